//! A whole disk copied to nowhere by nbdcopy over TLS: the client that people use for it, with several connections.

use std::{
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use crate::jobs::Sample;

/// Copies the disk at the socket once. Counted in requests of `block` bytes, though nbdcopy chooses its own; the sample
/// has no CPU time yet, and no latencies.
pub(crate) fn run(nbdcopy: &Path, socket: &Path, keys: &Path, size: u64, block: usize) -> Result<Sample> {
    let uri = format!("nbds+unix://bench@/?socket={}&tls-psk-file={}", socket.display(), keys.display());
    let mut command = Command::new(nbdcopy);
    command.arg(uri).arg("null:").stdin(Stdio::null());
    let begin = Instant::now();
    let output = command.output().context("cannot start nbdcopy")?;
    let seconds = begin.elapsed().as_secs_f64();
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "nbdcopy: {}", said.lines().next().unwrap_or("no message"));
    let cpu = Duration::ZERO;
    Ok(Sample { requests: size / block as u64, seconds, cpu, p50_us: 0.0, p99_us: 0.0 })
}
