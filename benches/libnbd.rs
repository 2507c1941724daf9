//! Whole disks passed over by the programs of libnbd: the clients that people use, which open several connections.

use std::{
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use crate::jobs::Sample;

/// The socket of a server, and the directory of its key when it insists on TLS.
pub(crate) fn uri(socket: &Path, keys: Option<&Path>) -> String {
    match keys {
        Some(keys) => {
            format!("nbds+unix://bench@/?socket={}&tls-psk-file={}", socket.display(), keys.display())
        }
        None => format!("nbd+unix:///?socket={}", socket.display()),
    }
}

/// Copies the disk to nowhere; counted in requests of `block` bytes, though nbdcopy chooses its own.
pub(crate) fn copy(nbdcopy: &Path, uri: &str, connections: usize, size: u64, block: usize) -> Result<Sample> {
    let mut command = Command::new(nbdcopy);
    command.arg(format!("--connections={connections}")).arg(uri).arg("null:");
    let seconds = run(&mut command)?;
    Ok(Sample { requests: size / block as u64, seconds, ..Sample::default() })
}

/// Asks for the extents of the whole disk, again and again until the window is over. A request is the whole.
pub(crate) fn map(nbdinfo: &Path, uri: &str, window: Duration) -> Result<Sample> {
    let mut sample = Sample::default();
    while sample.seconds < window.as_secs_f64() {
        sample.seconds += run(Command::new(nbdinfo).args(["--map", uri]))?;
        sample.requests += 1;
    }
    Ok(sample)
}

/// The time in seconds that the command took.
fn run(command: &mut Command) -> Result<f64> {
    let program = command.get_program().to_owned();
    let program = program.display();
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let begin = Instant::now();
    let output = command.output().with_context(|| format!("cannot start {program}"))?;
    let seconds = begin.elapsed().as_secs_f64();
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program}: {}", said.lines().next().unwrap_or("no message"));
    Ok(seconds)
}
