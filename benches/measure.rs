//! What a server costs, seen from outside: CPU time, memory, system calls; and the pinning to CPUs.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    process::{Pid, Signal, kill_process},
    thread::{CpuSet, sched_getaffinity, sched_setaffinity},
};
use tempfile::NamedTempFile;

use crate::interrupt::poll;

/// CPU time that the processes have used so far, threads that have ended included. In ticks of 10 ms: meaningful
/// over a second or so.
pub(crate) fn cpu_time(pids: &[Pid]) -> Result<Duration> {
    pids.iter().map(|pid| ticks(&pid.to_string(), 11)).sum()
}

/// CPU time of this program's children that have ended.
pub(crate) fn children_cpu_time() -> Result<Duration> {
    ticks("self", 13)
}

/// The sum of two neighbouring fields of `/proc/PID/stat`, counted from the one after the name.
fn ticks(pid: &str, field: usize) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).context("the server is gone")?;
    // The name in parentheses may hold anything.
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let both = fields.split_whitespace().skip(field).take(2);
    let ticks: u64 = both.filter_map(|f| f.parse::<u64>().ok()).sum();
    Ok(Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64))
}

/// Resident memory, in KiB.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Memory {
    /// Now.
    pub(crate) rss: u64,
    /// The most there ever was.
    pub(crate) peak: u64,
}

/// Resident memory of the processes together.
pub(crate) fn memory(pids: &[Pid]) -> Result<Memory> {
    let mut memory = Memory::default();
    for pid in pids {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).context("the server is gone")?;
        let field = |name: &str| {
            let value = status.lines().find_map(|line| line.strip_prefix(name));
            value.and_then(|v| v.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0)
        };
        memory.rss += field("VmRSS:");
        memory.peak += field("VmHWM:");
    }
    Ok(memory)
}

/// Where server and client of a job run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cpus {
    /// Both on one and the same.
    One,
    /// Each on one of its own.
    Two,
    /// Where they like.
    All,
}

impl Cpus {
    /// For programs.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Cpus::One => "one",
            Cpus::Two => "two",
            Cpus::All => "all",
        }
    }

    /// Whether this program may use so many.
    pub(crate) fn are_here(self) -> bool {
        self != Cpus::Two || sched_getaffinity(None).is_ok_and(|cpus| cpus.count() >= 2)
    }
}

/// While it lives, the processes and the calling thread (with what it starts) are bound to their CPUs.
#[derive(Debug)]
pub(crate) struct Pinned {
    before: CpuSet,
    pids: Vec<Pid>,
}

impl Pinned {
    /// Binds them as a job wants it; None: it leaves them free.
    pub(crate) fn to(cpus: Cpus, pids: &[Pid]) -> Result<Option<Self>> {
        let before = sched_getaffinity(None)?;
        let mut allowed = (0..CpuSet::MAX_CPU).filter(|cpu| before.is_set(*cpu)).map(|cpu| {
            let mut one = CpuSet::new();
            one.set(cpu);
            one
        });
        let mut next = || allowed.next().context("not enough CPUs to run on");
        let (client, server) = match cpus {
            Cpus::All => return Ok(None),
            Cpus::One => [next()?; 2].into(),
            Cpus::Two => (next()?, next()?),
        };
        let pinned = Pinned { before, pids: pids.to_vec() };
        pinned.apply(&client, &server)?;
        Ok(Some(pinned))
    }

    fn apply(&self, client: &CpuSet, server: &CpuSet) -> Result<()> {
        sched_setaffinity(None, client)?;
        for pid in &self.pids {
            for task in fs::read_dir(format!("/proc/{pid}/task")).context("the server is gone")? {
                let tid =
                    task?.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
                // A thread may have ended since it was listed.
                let _ = tid.map(|tid| sched_setaffinity(Some(tid), server));
            }
        }
        Ok(())
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = self.apply(&self.before, &self.before);
    }
}

/// A tool that counts the system calls of running processes.
#[derive(Clone, Debug)]
pub(crate) enum SyscallTool {
    /// Cheap, does not disturb the server. Needs root or a low `perf_event_paranoid`.
    Perf(PathBuf),
    /// Slows the server down several times, which makes it find more requests waiting at a time.
    Strace(PathBuf),
}

/// How long the counting tool may take to answer or to end.
const COUNTER_LIMIT: Duration = Duration::from_secs(5);
const SYSCALL_EVENT: &str = "raw_syscalls:sys_enter";

impl SyscallTool {
    /// The better one that works here.
    pub(crate) fn find() -> Option<Self> {
        if let Some(perf) = crate::programs::in_path("perf") {
            let probe = Command::new(&perf)
                .args(["stat", "-x,", "-e", SYSCALL_EVENT, "true"])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .output();
            let works = |text: &str| text.split(',').next().is_some_and(|n| n.parse::<u64>().is_ok());
            if probe.is_ok_and(|out| out.status.success() && works(&String::from_utf8_lossy(&out.stderr))) {
                return Some(SyscallTool::Perf(perf));
            }
        }
        crate::programs::in_path("strace").map(SyscallTool::Strace)
    }

    /// For the report.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            SyscallTool::Perf(_) => "perf",
            SyscallTool::Strace(_) => "strace",
        }
    }

    /// Runs `load` and returns its result with the system calls of the processes meanwhile.
    pub(crate) fn count<T>(&self, pids: &[Pid], load: impl FnOnce() -> Result<T>) -> Result<(T, u64)> {
        let output = NamedTempFile::new()?;
        let mut counter = match self {
            SyscallTool::Perf(perf) => {
                let list = pids.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
                let mut command = Command::new(perf);
                command.args(["stat", "-x,", "-e", SYSCALL_EVENT, "--control", "fd:0,1", "--delay", "-1"]);
                command.arg("-p").arg(list).arg("-o").arg(output.path());
                command.process_group(0);
                Counter(command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?)
            }
            SyscallTool::Strace(strace) => {
                let mut command = Command::new(strace);
                command.args(["-c", "-f", "-o"]).arg(output.path());
                for pid in pids {
                    command.arg("-p").arg(pid.to_string());
                }
                command.process_group(0);
                Counter(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?)
            }
        };
        match self {
            SyscallTool::Perf(_) => counter.enable_perf()?,
            SyscallTool::Strace(_) => counter.await_strace(pids.len())?,
        }
        let result = load()?;
        counter.stop()?;
        let text = fs::read_to_string(output.path())?;
        let total = match self {
            SyscallTool::Perf(_) => text.lines().find_map(|line| {
                let (count, rest) = line.split_once(',')?;
                rest.contains(SYSCALL_EVENT).then(|| count.parse().ok())?
            }),
            SyscallTool::Strace(_) => text.lines().find(|line| line.ends_with(" total")).and_then(|line| {
                // "100.00  0.01  0  1234  5 total": calls are the last column that is always there.
                line.split_whitespace().nth(3)?.parse().ok()
            }),
        };
        Ok((result, total.context("no count of system calls")?))
    }
}

/// The counting tool while it runs.
struct Counter(Child);

impl Counter {
    fn enable_perf(&mut self) -> Result<()> {
        let (Some(control), Some(ack)) = (&mut self.0.stdin, &mut self.0.stdout) else {
            bail!("no pipe to perf")
        };
        control.write_all(b"enable\n")?;
        let mut ready = [PollFd::new(ack, PollFlags::IN)];
        let limit = Timespec { tv_sec: COUNTER_LIMIT.as_secs().cast_signed(), tv_nsec: 0 };
        ensure!(rustix::event::poll(&mut ready, Some(&limit))? > 0, "perf does not answer");
        let mut answer = [0; 4];
        ack.read_exact(&mut answer).context("perf did not start")?;
        ensure!(&answer == b"ack\n", "perf did not start counting");
        Ok(())
    }

    fn await_strace(&mut self, processes: usize) -> Result<()> {
        let stderr = self.0.stderr.take().context("no pipe from strace")?;
        let mut lines = BufReader::new(stderr).lines();
        for _ in 0..processes {
            let line = lines.next().context("strace ended")??;
            ensure!(line.contains("attached"), "{line}");
        }
        // Keep the pipe open and empty: threads that come later are announced in it too.
        std::thread::spawn(move || lines.for_each(drop));
        Ok(())
    }

    fn stop(&mut self) -> Result<()> {
        kill_process(Pid::from_child(&self.0), Signal::INT)?;
        if poll(COUNTER_LIMIT, || Ok(self.0.try_wait()?))?.is_none() {
            self.0.kill()?;
            self.0.wait()?;
            bail!("the counter of system calls hangs");
        }
        Ok(())
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            let _ = self.stop();
        }
    }
}
