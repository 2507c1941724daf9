//! The list of jobs, and how one is run against one server or in interleaved rounds against several.

use std::{fs::File, io::Read, path::Path, time::Duration};

use anyhow::{Context, Result};

use crate::{
    client::{Client, Load, Op, Order},
    copy,
    fio::{self, Engine},
    interrupt,
    measure::{Pinned, SyscallTool, cpu_time},
    servers::{Kind, Server},
};

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;
/// The part of a mounted file that cached reads stay in, so that filling the cache takes no time.
const CACHED_REGION: u64 = 64 << 20;

/// The client of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tool {
    /// [`Client`].
    Own,
    /// fio.
    Fio(Engine),
    /// nbdcopy over TLS. The load is its whole disk, whatever the window.
    Copy,
}

/// One line of the report.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job {
    /// For the floors and bench.json.
    pub(crate) id: &'static str,
    pub(crate) title: &'static str,
    pub(crate) tool: Tool,
    pub(crate) load: Load,
    /// Server and client share one CPU; otherwise they run where they like.
    pub(crate) one_cpu: bool,
}

impl Job {
    /// Small requests are counted, large ones weighed.
    pub(crate) fn in_megabytes(&self) -> bool {
        self.load.block >= MIB
    }
}

const fn load(op: Op, order: Order, block: usize, depth: usize) -> Load {
    Load { op, order, block, depth }
}

const fn random_reads(depth: usize) -> Load {
    load(Op::Read, Order::Random, 4 * KIB, depth)
}

const fn stream(op: Op) -> Load {
    load(op, Order::Sequential, MIB, 4)
}

const fn own(id: &'static str, title: &'static str, load: Load, one_cpu: bool) -> Job {
    Job { id, title, tool: Tool::Own, load, one_cpu }
}

const fn by_fio(id: &'static str, title: &'static str, engine: Engine, load: Load) -> Job {
    Job { id, title, tool: Tool::Fio(engine), load, one_cpu: false }
}

/// A cached file over NBD. Writes come last: they leave dirty pages behind.
pub(crate) const NBD_FILE: &[Job] = &[
    own("nbd-read-d1", "4 KiB random reads, depth 1, one CPU", random_reads(1), true),
    own("nbd-read-d16", "4 KiB random reads, depth 16, one CPU", random_reads(16), true),
    own("nbd-read-d64", "4 KiB random reads, depth 64, one CPU", random_reads(64), true),
    own("nbd-read-d64-all", "4 KiB random reads, depth 64, all CPUs", random_reads(64), false),
    by_fio("nbd-fio-d1", "4 KiB random reads, depth 1, fio, all CPUs", Engine::Nbd, random_reads(1)),
    by_fio("nbd-fio-d16", "4 KiB random reads, depth 16, fio, all CPUs", Engine::Nbd, random_reads(16)),
    own("nbd-stream-read", "1 MiB reads, depth 4, all CPUs", stream(Op::Read), false),
    own("nbd-stream-write", "1 MiB writes, depth 4, all CPUs", stream(Op::Write), false),
];

/// The memory plugin over NBD.
pub(crate) const NBD_MEMORY: &[Job] = &[
    own(
        "memory-write-d16",
        "4 KiB random writes, depth 16, all CPUs",
        load(Op::Write, Order::Random, 4 * KIB, 16),
        false,
    ),
    own("memory-stream-write", "1 MiB writes, depth 4, all CPUs", stream(Op::Write), false),
];

/// A cached file over NBD with TLS.
pub(crate) const NBD_TLS: &[Job] = &[Job {
    id: "tls-copy",
    title: "nbdcopy of the disk, all CPUs, per MiB",
    tool: Tool::Copy,
    load: stream(Op::Read),
    one_cpu: false,
}];

/// A cached file through FUSE.
pub(crate) const FUSE_FILE: &[Job] = &[
    by_fio("fuse-read-d1", "4 KiB random reads, direct, depth 1", Engine::Direct, random_reads(1)),
    by_fio("fuse-read-d16", "4 KiB random reads, direct, depth 16", Engine::Direct, random_reads(16)),
    by_fio("fuse-cached", "4 KiB random reads, cached", Engine::Cached(CACHED_REGION), random_reads(1)),
    by_fio("fuse-stream-read", "1 MiB reads, direct, depth 4", Engine::Direct, stream(Op::Read)),
    by_fio("fuse-stream-write", "1 MiB writes, direct, depth 4", Engine::Direct, stream(Op::Write)),
];

/// What one window brought.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    pub(crate) requests: u64,
    pub(crate) seconds: f64,
    /// CPU time of the server.
    pub(crate) cpu: Duration,
    /// Latency of a request, in µs; 0: not measured.
    pub(crate) p50_us: f64,
    /// As `p50_us`.
    pub(crate) p99_us: f64,
}

impl Sample {
    /// Requests a second.
    pub(crate) fn rate(&self) -> f64 {
        self.requests as f64 / self.seconds
    }
}

/// The samples of one server for one job.
#[derive(Debug)]
pub(crate) struct Cell {
    pub(crate) kind: Kind,
    /// One a round.
    pub(crate) samples: Vec<Sample>,
    /// System calls a request.
    pub(crate) syscalls: Option<f64>,
    /// Why there are fewer samples than rounds.
    pub(crate) problem: Option<String>,
}

/// How jobs are run.
#[derive(Clone, Debug)]
pub(crate) struct Plan<'a> {
    pub(crate) rounds: usize,
    pub(crate) window: Duration,
    /// Ask for structured replies.
    pub(crate) structured: bool,
    pub(crate) fio: Option<&'a Path>,
    pub(crate) nbdcopy: Option<&'a Path>,
    pub(crate) syscalls: Option<SyscallTool>,
}

impl Plan<'_> {
    /// Runs `job` in rounds, each server once a round. A short round before them warms up and counts system calls.
    ///
    /// # Errors
    /// An interrupt. A server that fails is left out from then on.
    pub(crate) fn compare(&self, job: &Job, servers: &[Server]) -> Result<Vec<Cell>> {
        let servers: Vec<_> =
            servers.iter().filter(|s| job.load.op == Op::Read || !s.kind.is_readonly()).collect();
        let mut cells: Vec<_> = servers
            .iter()
            .map(|s| Cell { kind: s.kind, samples: Vec::new(), syscalls: None, problem: None })
            .collect();
        for round in 0..=self.rounds {
            for (server, cell) in servers.iter().zip(&mut cells).filter(|(_, cell)| cell.problem.is_none()) {
                let outcome = if round == 0 {
                    self.warm_up(job, server).map(|syscalls| cell.syscalls = syscalls)
                } else {
                    self.measure(job, server).map(|sample| cell.samples.push(sample))
                };
                interrupt::check()?;
                cell.problem = outcome.err().map(|error| format!("{error:#}"));
            }
        }
        Ok(cells)
    }

    fn warm_up(&self, job: &Job, server: &Server) -> Result<Option<f64>> {
        if let Tool::Fio(Engine::Cached(size)) = job.tool {
            std::io::copy(&mut File::open(server.place())?.take(size), &mut std::io::sink())?;
        }
        let _pinned = job.one_cpu.then(|| Pinned::to_one_cpu(&server.pids())).transpose()?;
        let window = (self.window / 4).max(Duration::from_millis(50));
        let Some(tool) = &self.syscalls else {
            return self.load(job, server, Duration::ZERO, window).map(|_| None);
        };
        let (sample, calls) =
            tool.count(&server.pids(), || self.load(job, server, Duration::ZERO, window))?;
        Ok(Some(calls as f64 / sample.requests as f64))
    }

    fn measure(&self, job: &Job, server: &Server) -> Result<Sample> {
        let _pinned = job.one_cpu.then(|| Pinned::to_one_cpu(&server.pids())).transpose()?;
        self.load(job, server, self.window / 10, self.window)
    }

    /// Runs the load of a job once; what happens in the first `settle` does not count.
    fn load(&self, job: &Job, server: &Server, settle: Duration, window: Duration) -> Result<Sample> {
        let pids = server.pids();
        if let Tool::Fio(engine) = job.tool {
            let fio = self.fio.context("fio is not installed")?;
            let before = cpu_time(&pids)?;
            let sample = fio::run(fio, engine, &job.load, server.place(), window)?;
            return Ok(Sample { cpu: cpu_time(&pids)? - before, ..sample });
        }
        if job.tool == Tool::Copy {
            let nbdcopy = self.nbdcopy.context("nbdcopy is not installed")?;
            let before = cpu_time(&pids)?;
            let sample = copy::run(nbdcopy, server.place(), &server.keys(), server.size(), job.load.block)?;
            return Ok(Sample { cpu: cpu_time(&pids)? - before, ..sample });
        }
        let mut client = Client::connect(server.place(), self.structured)?;
        client.run(&job.load, settle)?;
        let before = cpu_time(&pids)?;
        let outcome = client.run(&job.load, window)?;
        let cpu = cpu_time(&pids)? - before;
        let percentile = |q| outcome.latency.value_at_quantile(q) as f64 / 1000.0;
        Ok(Sample {
            requests: outcome.requests,
            seconds: outcome.elapsed.as_secs_f64(),
            cpu,
            p50_us: percentile(0.5),
            p99_us: percentile(0.99),
        })
    }
}

/// Writes the whole disk once, so that no job pays for first touches.
pub(crate) fn fill(server: &Server) -> Result<()> {
    Client::connect(server.place(), false)?.pass(&stream(Op::Write)).map(drop)
}
