//! What a job is, and how one is run against one server or in interleaved rounds against several.

use std::{
    fs::File,
    io::Read,
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use crate::{
    contestants::{Contestant, Kind},
    fio::{self, Engine},
    interrupt, libnbd,
    load::{Load, Mix, Order},
    measure::{Cpus, Pinned, SyscallTool, children_cpu_time, cpu_time},
    servers::Server,
};

const KIB: usize = 1024;
pub(crate) const MIB: usize = 1024 * KIB;

/// The client of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tool {
    /// [`Clients`](crate::load::Clients); for a contestant without a server, fio.
    Own,
    /// fio.
    Fio(Engine),
    /// nbdcopy of the whole disk, whatever the window.
    Copy,
    /// nbdinfo --map of the whole disk. A request is the whole map.
    Map,
    /// None: another server with the same disk is started, which ends when it is ready. A request is that.
    Start,
}

/// One row of a section.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job {
    /// For the targets and bench.json.
    pub(crate) id: &'static str,
    pub(crate) title: &'static str,
    pub(crate) tool: Tool,
    pub(crate) load: Load,
    pub(crate) cpus: Cpus,
}

impl Job {
    /// Small requests are counted, large ones weighed.
    pub(crate) fn in_megabytes(&self) -> bool {
        self.load.block >= MIB
    }

    /// Whether this contestant takes part.
    fn admits(&self, contestant: Contestant) -> bool {
        let cached = !matches!(self.tool, Tool::Fio(Engine::Direct));
        (cached || !contestant.only_cached()) && (self.load.mix.only_reads() || !contestant.is_readonly())
    }
}

/// Random requests of 4 KiB on one connection.
pub(crate) const fn small(mix: Mix, depth: usize) -> Load {
    Load { mix, order: Order::Random, block: 4 * KIB, depth, connections: 1 }
}

/// Requests of 1 MiB one after the other.
pub(crate) const fn stream(mix: Mix) -> Load {
    Load { mix, order: Order::Sequential, block: MIB, depth: 4, connections: 1 }
}

/// What one window brought.
#[derive(Clone, Debug, Default)]
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

    /// CPU time of the server for a request, in µs.
    pub(crate) fn cpu_us(&self) -> f64 {
        self.cpu.as_secs_f64() * 1e6 / self.requests as f64
    }
}

/// The samples of one server for one job.
#[derive(Debug)]
pub(crate) struct Cell {
    /// The contestant's name.
    pub(crate) name: &'static str,
    pub(crate) ours: bool,
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
    pub(crate) nbdinfo: Option<&'a Path>,
    pub(crate) syscalls: Option<SyscallTool>,
}

impl Plan<'_> {
    /// Whether the job's client is installed, and CPUs are there for it.
    pub(crate) fn can(&self, job: &Job) -> bool {
        let installed = match job.tool {
            Tool::Own | Tool::Start => true,
            Tool::Fio(_) => self.fio.is_some(),
            Tool::Copy => self.nbdcopy.is_some(),
            Tool::Map => self.nbdinfo.is_some(),
        };
        installed && job.cpus.are_here()
    }

    /// Runs `job` in rounds, each server once a round. A short round before them warms up and counts system calls.
    ///
    /// # Errors
    /// An interrupt. A server that fails is left out from then on.
    pub(crate) fn compare(&self, job: &Job, servers: &[Server]) -> Result<Vec<Cell>> {
        let servers: Vec<_> = servers.iter().filter(|server| job.admits(server.contestant)).collect();
        let cell = |server: &&Server| {
            let (name, ours) = (server.contestant.name, server.contestant.is_ours());
            Cell { name, ours, samples: Vec::new(), syscalls: None, problem: None }
        };
        let mut cells: Vec<_> = servers.iter().map(cell).collect();
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
        server.cool()?;
        let pids = server.pids();
        let _pinned = Pinned::to(job.cpus, &pids)?;
        let window = (self.window / 4).max(Duration::from_millis(50));
        let run = || self.load(job, server, Duration::ZERO, window);
        match &self.syscalls {
            Some(tool) if !pids.is_empty() && job.tool != Tool::Start => {
                let (sample, calls) = tool.count(&pids, run)?;
                Ok(Some(calls as f64 / sample.requests as f64))
            }
            _ => run().map(|_| None),
        }
    }

    fn measure(&self, job: &Job, server: &Server) -> Result<Sample> {
        server.cool()?;
        let _pinned = Pinned::to(job.cpus, &server.pids())?;
        self.load(job, server, self.window / 10, self.window)
    }

    /// Runs the load of a job once; what happens in the first `settle` does not count.
    fn load(&self, job: &Job, server: &Server, settle: Duration, window: Duration) -> Result<Sample> {
        let load = &job.load;
        let raw = server.contestant.kind == Kind::Raw;
        match job.tool {
            Tool::Own if !raw => return self.own_load(load, server, settle, window),
            Tool::Start => return starts(server, window),
            _ => {}
        }
        let pids = server.pids();
        let before = cpu_time(&pids)?;
        let by_fio = |engine| {
            let fio = self.fio.context("fio is not installed")?;
            fio::run(fio, engine, load, server.place(), window)
        };
        let sample = match job.tool {
            Tool::Fio(engine) => by_fio(engine)?,
            Tool::Own | Tool::Start => by_fio(Engine::Uring)?,
            Tool::Copy => {
                let nbdcopy = self.nbdcopy.context("nbdcopy is not installed")?;
                libnbd::copy(nbdcopy, &server.uri(), load.connections, server.size(), load.block)?
            }
            Tool::Map => {
                let nbdinfo = self.nbdinfo.context("nbdinfo is not installed")?;
                libnbd::map(nbdinfo, &server.uri(), window)?
            }
        };
        Ok(Sample { cpu: cpu_time(&pids)? - before, ..sample })
    }

    fn own_load(&self, load: &Load, server: &Server, settle: Duration, window: Duration) -> Result<Sample> {
        let pids = server.pids();
        let mut clients = server.connect(load.connections, self.structured)?;
        clients.run(load, settle)?;
        let before = cpu_time(&pids)?;
        let outcome = clients.run(load, window)?;
        let cpu = cpu_time(&pids)? - before;
        let latency = outcome.all()?;
        let percentile = |q| latency.value_at_quantile(q) as f64 / 1000.0;
        Ok(Sample {
            requests: latency.len(),
            seconds: outcome.elapsed.as_secs_f64(),
            cpu,
            p50_us: percentile(0.5),
            p99_us: percentile(0.99),
        })
    }
}

/// Starts the server again and again, each with a command that ends at once and the server with it.
fn starts(server: &Server, window: Duration) -> Result<Sample> {
    let mut times = Vec::new();
    let before = children_cpu_time()?;
    let begin = Instant::now();
    while begin.elapsed() < window {
        interrupt::check()?;
        let mut command = server.command();
        command.args(["--run", "true"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let start = Instant::now();
        let status = command.status().context("cannot start the server")?;
        ensure!(status.success(), "the server ended with {status}");
        times.push(start.elapsed().as_secs_f64() * 1e6);
    }
    let (seconds, cpu) = (begin.elapsed().as_secs_f64(), children_cpu_time()? - before);
    times.sort_by(f64::total_cmp);
    let percentile = |percent: usize| times.get(times.len() * percent / 100).copied().unwrap_or(0.0);
    let (p50_us, p99_us) = (percentile(50), percentile(99));
    Ok(Sample { requests: times.len() as u64, seconds, cpu, p50_us, p99_us })
}

/// Writes the whole disk once, so that no job pays for first touches.
pub(crate) fn fill(server: &Server) -> Result<()> {
    server.connect(1, false)?.pass(&stream(Mix::WRITES)).map(drop)
}
