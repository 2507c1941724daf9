//! `nbdkit-bench`: this project beside its peers on one machine, in one run.
//!
//! Servers of one section run at the same time, and each job goes round them (A B C A B C …), so that whatever
//! disturbs the machine disturbs all. What counts is the ratio within a round; the report has the median over the
//! rounds and the extremes. BENCHMARKING.md tells how to read it.

#![forbid(unsafe_code)]

mod client;
mod copy;
mod fio;
mod interrupt;
mod jobs;
mod measure;
mod replies;
mod report;
mod servers;

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use clap::Parser;
use serde_json::json;

use crate::{
    jobs::{Job, Plan, Tool},
    measure::{SyscallTool, memory},
    report::{Floor, Row, Section},
    servers::{Disk, Kind, Programs, Server, version},
};

/// Compares this project with nbdkit, qemu-nbd, nbdfuse and qemu-storage-daemon, as far as they are installed.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Shorter windows, fewer rounds, a smaller disk: under two minutes
    #[arg(long)]
    quick: bool,
    /// Rounds of each job [default: 5, quick 3]
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// Length of a measurement in milliseconds [default: 1000, quick 400]
    #[arg(long, value_name = "MS")]
    window: Option<u64>,
    /// Size of the disk in MiB [default: 1024, quick 256]
    #[arg(long, value_name = "MIB")]
    size: Option<u64>,
    /// Run only the jobs whose id or title contains TEXT
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Ask the servers for structured replies
    #[arg(long)]
    structured: bool,
    /// Exit with status 1 when a floor does not hold
    #[arg(long)]
    strict: bool,
    /// Our server [default: nbdkit beside this program]
    #[arg(long, value_name = "PATH")]
    nbdkit: Option<PathBuf>,
    /// Our mount [default: nbdkit-mount beside our server]
    #[arg(long, value_name = "PATH")]
    nbdkit_mount: Option<PathBuf>,
    /// The nbdkit to compare with [default: the first in $PATH that is not ours]
    #[arg(long, value_name = "PATH")]
    peer: Option<PathBuf>,
    /// Directory for the disk; a real file system shows more than a tmpfs [default: target/bench]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Where the numbers go [default: benches/results/bench.json]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

const NBD_KINDS: &[Kind] = &[Kind::Ours, Kind::Nbdkit, Kind::QemuNbd];
const MEMORY_KINDS: &[Kind] = &[Kind::Ours, Kind::Nbdkit];
const TLS_KINDS: &[Kind] = &[Kind::OursTls, Kind::NbdkitTls];
const FUSE_KINDS: &[Kind] = &[Kind::OursMount, Kind::Nbdfuse, Kind::Qsd, Kind::OursPassthrough];
const FUSE_KINDS_QUICK: &[Kind] = &[Kind::OursMount, Kind::Nbdfuse, Kind::Qsd];
const MEMORY_SIZE: u64 = 256 << 20;

fn main() -> ExitCode {
    match interrupt::install().and_then(|()| run(&Args::parse())) {
        Ok(status) => status,
        Err(error) => {
            eprintln!("nbdkit-bench: {error:#}");
            ExitCode::from(if interrupt::requested() { 130 } else { 1 })
        }
    }
}

fn run(args: &Args) -> Result<ExitCode> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    // Cargo puts all programs into one directory.
    let beside = std::env::current_exe()
        .map_or_else(|_| here.join("../target/release/nbdkit"), |me| me.with_file_name("nbdkit"));
    let ours = args.nbdkit.clone().unwrap_or(beside);
    let mount = args.nbdkit_mount.clone().unwrap_or_else(|| ours.with_file_name("nbdkit-mount"));
    let programs = Programs::find(&ours, &mount, args.peer.clone());
    let dir = args.dir.clone().unwrap_or_else(|| here.join("../target/bench"));
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let disk = tempfile::Builder::new().prefix("disk-").suffix(".img").tempfile_in(&dir)?;
    let size = args.size.unwrap_or(if args.quick { 256 } else { 1024 });
    make_disk(disk.as_file(), size)?;

    let plan = Plan {
        rounds: args.rounds.unwrap_or(if args.quick { 3 } else { 5 }).max(1),
        window: Duration::from_millis(args.window.unwrap_or(if args.quick { 400 } else { 1000 }).max(10)),
        structured: args.structured,
        fio: programs.fio.as_deref(),
        nbdcopy: programs.nbdcopy.as_deref(),
        syscalls: SyscallTool::find(),
    };
    let begin = Instant::now();
    let bench = Bench { programs: &programs, plan: &plan, only: args.only.as_deref() };
    let file = Disk::File(disk.path());
    let fuse_kinds = if args.quick { FUSE_KINDS_QUICK } else { FUSE_KINDS };
    let sections = [
        bench.section("NBD, cached file", NBD_KINDS, file, jobs::NBD_FILE)?,
        bench.section("NBD, memory plugin", MEMORY_KINDS, Disk::Memory(MEMORY_SIZE), jobs::NBD_MEMORY)?,
        bench.section("NBD with TLS (pre-shared key), cached file", TLS_KINDS, file, jobs::NBD_TLS)?,
        bench.section("FUSE, cached file, all CPUs", fuse_kinds, file, jobs::FUSE_FILE)?,
    ];
    let sections: Vec<_> = sections.into_iter().flatten().collect();
    let floors = floors(&sections);
    let machine = machine(&programs, &plan);

    println!("{}\n", machine.text);
    for section in &sections {
        println!("{}", section.text());
    }
    for floor in &floors {
        println!("{}", floor.text());
    }
    let output = args.output.clone().unwrap_or_else(|| here.join("results/bench.json"));
    let report = json!({
        "machine": machine.json,
        "rounds": plan.rounds,
        "window_ms": plan.window.as_millis() as u64,
        "sections": sections.iter().map(Section::json).collect::<Vec<_>>(),
        "floors": floors.iter().map(Floor::json).collect::<Vec<_>>(),
    });
    save(&output, &report).with_context(|| format!("cannot write {}", output.display()))?;
    eprintln!("\n{} s, numbers in {}", begin.elapsed().as_secs(), output.display());

    let ours_failed = sections.iter().flat_map(Section::problems).any(|(ours, _)| ours);
    let below_floor = args.strict && floors.iter().any(|floor| floor.holds() == Some(false));
    Ok(if ours_failed || below_floor { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn save(output: &Path, report: &serde_json::Value) -> Result<()> {
    if let Some(parent) = output.parent() {
        fs::create_dir_all(parent)?;
    }
    Ok(fs::write(output, format!("{report:#}\n"))?)
}

/// What all sections share.
struct Bench<'a> {
    programs: &'a Programs,
    plan: &'a Plan<'a>,
    only: Option<&'a str>,
}

impl Bench<'_> {
    /// Starts a server of each kind over `disk` and takes them through the jobs. None: no job was asked
    /// for, or all need a client that is not installed.
    fn section(
        &self,
        title: &'static str,
        kinds: &'static [Kind],
        disk: Disk<'_>,
        jobs: &'static [Job],
    ) -> Result<Option<Section>> {
        let wanted =
            |job: &&Job| self.only.is_none_or(|text| job.id.contains(text) || job.title.contains(text));
        let possible = |job: &&Job| match job.tool {
            Tool::Own => true,
            Tool::Fio(_) => self.plan.fio.is_some(),
            Tool::Copy => self.plan.nbdcopy.is_some(),
        };
        let jobs: Vec<_> = jobs.iter().filter(wanted).filter(possible).collect();
        if jobs.is_empty() {
            return Ok(None);
        }
        let mut section = Section { title, kinds, rows: Vec::new(), memory: Vec::new(), absent: Vec::new() };
        let mut servers = Vec::new();
        for &kind in kinds {
            interrupt::check()?;
            let started = Server::start(kind, self.programs, disk).and_then(|server| {
                if let (Some(server), Disk::Memory(_)) = (&server, disk) {
                    jobs::fill(server)?;
                }
                Ok(server)
            });
            interrupt::check()?;
            match started {
                Ok(Some(server)) => servers.push(server),
                Ok(None) => section.absent.push((kind, "not installed".into())),
                Err(error) => section.absent.push((kind, format!("{error:#}"))),
            }
        }
        for job in jobs {
            eprintln!("{title}: {}", job.title);
            section.rows.push(Row { job, cells: self.plan.compare(job, &servers)? });
        }
        section.memory = servers.iter().filter_map(|s| Some((s.kind, memory(&s.pids()).ok()?))).collect();
        Ok(Some(section))
    }
}

/// What this project promises about its numbers.
fn floors(sections: &[Section]) -> Vec<Floor> {
    let ratio = |id: &str, ours, peer| {
        let row = sections.iter().find_map(|section| section.row(id))?;
        Some(row.ratio(ours, peer)?.median)
    };
    let rss = |kind| {
        let memory = sections.iter().find(|s| s.row("nbd-read-d16").is_some())?.memory_of(kind)?;
        Some(memory.rss as f64)
    };
    vec![
        Floor {
            what: "NBD, 4 KiB random reads, depth 16, one CPU: ours ÷ nbdkit",
            value: ratio("nbd-read-d16", Kind::Ours, Kind::Nbdkit),
            bound: 2.0,
            at_most: false,
        },
        Floor {
            what: "NBD with TLS, nbdcopy: ours ÷ nbdkit",
            value: ratio("tls-copy", Kind::OursTls, Kind::NbdkitTls),
            bound: 3.0,
            at_most: false,
        },
        Floor {
            what: "FUSE, 4 KiB random reads, direct, depth 16: ours ÷ nbdfuse",
            value: ratio("fuse-read-d16", Kind::OursMount, Kind::Nbdfuse),
            bound: 4.0,
            at_most: false,
        },
        Floor {
            what: "memory of the NBD server after the run: ours ÷ nbdkit",
            value: rss(Kind::Ours).zip(rss(Kind::Nbdkit)).map(|(ours, peer)| ours / peer),
            bound: 2.0,
            at_most: true,
        },
    ]
}

/// Where and with what the numbers were taken.
struct Machine {
    text: String,
    json: serde_json::Value,
}

fn machine(programs: &Programs, plan: &Plan<'_>) -> Machine {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or("unknown CPU", |(_, name)| name);
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let peers = [
        ("ours", &programs.ours),
        ("ours, mount", &programs.ours_mount),
        ("nbdkit", &programs.nbdkit),
        ("qemu-nbd", &programs.qemu_nbd),
        ("nbdfuse", &programs.nbdfuse),
        ("qemu-storage-daemon", &programs.qsd),
        ("fio", &programs.fio),
        ("nbdcopy", &programs.nbdcopy),
    ];
    let versions: Vec<_> = peers
        .into_iter()
        .map(|(name, program)| {
            let known = program.as_deref().map(|p| version(p).unwrap_or_else(|| "no version".into()));
            (name, known.unwrap_or_else(|| "not installed".into()))
        })
        .collect();
    let counted = plan.syscalls.as_ref().map_or("not counted: no perf or strace", SyscallTool::name);
    let mut text = format!("{cpus} CPUs ({model}), Linux {}; ", kernel.trim());
    text += &format!("{} rounds of {} ms; system calls: {counted}", plan.rounds, plan.window.as_millis());
    for (name, version) in &versions {
        text += &format!("\n{name}: {version}");
    }
    let json = json!({
        "cpus": cpus,
        "cpu": model,
        "kernel": kernel.trim(),
        "syscalls_counted_by": counted,
        "versions": versions.into_iter().collect::<std::collections::BTreeMap<_, _>>(),
    });
    Machine { text, json }
}

/// Fills the disk with stamped blocks, which leaves it in the page cache.
fn make_disk(mut file: &File, mib: u64) -> Result<()> {
    let mut data = vec![0x5a; 1 << 20];
    for index in 0..mib {
        interrupt::check()?;
        client::stamp_blocks(&mut data, index << 20);
        file.write_all(&data).context("cannot fill the disk")?;
    }
    // Otherwise the kernel would write the pages back during the first jobs.
    file.sync_all()?;
    Ok(())
}
