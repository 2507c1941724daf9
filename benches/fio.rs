//! The same loads through fio: an NBD client by libnbd, and the only client of the mounted files.

use std::{
    io::Read,
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;

use crate::{
    interrupt::{self, poll},
    jobs::Sample,
    load::{Load, Op, Order},
};

/// How long fio may take beyond the window.
const GRACE: Duration = Duration::from_secs(30);

/// How fio reaches the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Engine {
    /// libnbd on a socket.
    Nbd,
    /// A file past the page cache.
    Direct,
    /// As `Direct`, through io_uring.
    Uring,
    /// The first bytes of a file, from the page cache where the mount has one.
    Cached(u64),
}

/// Runs `load`, all reads or all writes, on `place` for `window`. The sample has no CPU time yet.
pub(crate) fn run(fio: &Path, engine: Engine, load: &Load, place: &Path, window: Duration) -> Result<Sample> {
    let mut command = Command::new(fio);
    let op = if load.mix.only_reads() { Op::Read } else { Op::Write };
    let order = if load.order == Order::Random { "rand" } else { "" };
    command.args(["--name=bench", "--output-format=json", "--eta=never", "--thread", "--time_based"]);
    command.args(["--norandommap", "--invalidate=0", "--allow_file_create=0"]);
    command.arg(format!("--rw={order}{}", op.name()));
    command.arg(format!("--bs={}", load.block));
    command.arg(format!("--iodepth={}", load.depth));
    command.arg(format!("--runtime={}ms", window.as_millis()));
    let place = place.to_str().context("a path that fio cannot take")?;
    match engine {
        Engine::Nbd => {
            command.arg("--ioengine=nbd").arg(format!("--uri=nbd+unix:///?socket={place}"));
        }
        Engine::Direct if load.depth == 1 => {
            command.args(["--ioengine=psync", "--direct=1"]).arg(format!("--filename={place}"));
        }
        Engine::Direct => {
            command.args(["--ioengine=libaio", "--direct=1"]).arg(format!("--filename={place}"));
        }
        Engine::Uring => {
            command.args(["--ioengine=io_uring", "--direct=1"]).arg(format!("--filename={place}"));
        }
        Engine::Cached(size) => {
            command.arg("--ioengine=psync").arg(format!("--filename={place}")).arg(format!("--size={size}"));
        }
    }
    let report = output(&mut command, window + GRACE)?;
    // The nbd engine says "connected" first.
    let json = report.find('{').and_then(|start| report.get(start..)).unwrap_or_default();
    let report: Value = serde_json::from_str(json).context("cannot read fio's report")?;
    sample(&report, op).ok_or_else(|| anyhow!("fio's report lacks the numbers"))
}

/// Runs a command to its end and returns what it printed; ends it on Ctrl-C or when it hangs.
fn output(command: &mut Command, limit: Duration) -> Result<String> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn().context("cannot start fio")?;
    let (Some(mut stdout), Some(mut stderr)) = (child.stdout.take(), child.stderr.take()) else {
        bail!("no pipe from fio");
    };
    let stdout = std::thread::spawn(move || {
        let mut text = String::new();
        stdout.read_to_string(&mut text).map(|_| text)
    });
    let stderr = std::thread::spawn(move || {
        let mut text = String::new();
        stderr.read_to_string(&mut text).map(|_| text)
    });
    let ended = poll(limit, || {
        interrupt::check()?;
        Ok(child.try_wait()?)
    });
    if !matches!(ended, Ok(Some(_))) {
        let _ = child.kill();
        let _ = child.wait();
    }
    let status = ended?.context("fio hangs")?;
    let collect = |handle: std::thread::JoinHandle<std::io::Result<String>>| {
        handle.join().map_err(|_| anyhow!("cannot read fio's output"))?.context("cannot read fio's output")
    };
    let (text, errors) = (collect(stdout)?, collect(stderr)?);
    ensure!(status.success(), "fio: {} ({status})", errors.lines().next().unwrap_or("no message"));
    Ok(text)
}

fn sample(report: &Value, op: Op) -> Option<Sample> {
    let job = &report["jobs"][0];
    let side = &job[op.name()];
    let percentile = |name: &str| side["clat_ns"]["percentile"][name].as_f64().unwrap_or(0.0) / 1000.0;
    Some(Sample {
        requests: side["total_ios"].as_u64().filter(|n| *n > 0)?,
        seconds: side["runtime"].as_f64().filter(|ms| *ms > 0.0)? / 1000.0,
        p50_us: percentile("50.000000"),
        p99_us: percentile("99.000000"),
        ..Sample::default()
    })
}
