//! `nbdkit-bench`: this project beside its peers on one machine, in one run.
//!
//! Servers of one section run at the same time, and each job goes round them (A B C A B C …), so that whatever
//! disturbs the machine disturbs all. What counts is the ratio within a round; the report has the median over the
//! rounds and the extremes. BENCHMARKING.md tells how to read it.

#![forbid(unsafe_code)]

mod chart;
mod contestants;
mod contests;
mod figures;
mod fio;
mod images;
mod interrupt;
mod jobs;
mod libnbd;
mod lineup;
mod load;
mod machine;
mod measure;
mod programs;
mod report;
mod servers;
mod spread;
mod table;
mod targets;

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

use crate::{
    contestants::Variant,
    contests::{CONTESTS, Contest},
    images::Images,
    jobs::{Job, Plan},
    lineup::lineup,
    measure::{SyscallTool, memory},
    programs::{Programs, Release},
    report::{Report, Row, Section},
    servers::Server,
};

/// Compares this project with nbdkit, qemu-nbd, nbdfuse and qemu-storage-daemon, as far as they are installed.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Args {
    #[command(subcommand)]
    command: Option<Task>,
    /// Shorter windows, fewer rounds, a smaller disk: about two minutes
    #[arg(long)]
    quick: bool,
    /// Rounds of each job [default: 5, quick 3]
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// Length of a measurement in milliseconds [default: 1000, quick 200]
    #[arg(long, value_name = "MS")]
    window: Option<u64>,
    /// Size of the disk in MiB [default: 1024, quick 256]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(8..))]
    size: Option<u64>,
    /// Run only the job with the id TEXT or, if there is none, those whose id or title, or that of their section,
    /// contains TEXT; repeat for more
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    /// Leave out the contestant of this name (as over its column); repeat for more
    #[arg(long, value_name = "NAME")]
    without: Vec<String>,
    /// Compare also with an earlier release: a directory with its nbdkit and nbdkit-mount
    #[arg(long, value_name = "DIR")]
    baseline: Option<PathBuf>,
    /// Ask the servers for structured replies
    #[arg(long)]
    structured: bool,
    /// Exit with status 1 when a target is missed
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
    /// Where the numbers go; the chart goes beside them [default: benches/results/bench.json, of part of the jobs,
    /// a quick run or one with --baseline target/bench/bench.json]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Task {
    Load(load::command::Args),
}

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
    if let Some(Task::Load(args)) = &args.command {
        print!("{}", load::command::run(args)?);
        return Ok(ExitCode::SUCCESS);
    }
    let begin = Instant::now();
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    // Cargo puts all programs into one directory.
    let beside = std::env::current_exe()
        .map_or_else(|_| here.join("../target/release/nbdkit"), |me| me.with_file_name("nbdkit"));
    let ours = args.nbdkit.clone().unwrap_or(beside);
    let mount = args.nbdkit_mount.clone().unwrap_or_else(|| ours.with_file_name("nbdkit-mount"));
    let mut programs = Programs::find(&ours, &mount, args.peer.clone());
    programs.earlier = args.baseline.as_deref().map(Release::earlier).transpose()?;
    let dir = args.dir.clone().unwrap_or_else(|| here.join("../target/bench"));
    let images = Images::new(dir, args.size.unwrap_or(if args.quick { 256 } else { 1024 }))?;
    let plan = Plan {
        rounds: args.rounds.unwrap_or(if args.quick { 3 } else { 5 }).max(1),
        window: Duration::from_millis(args.window.unwrap_or(if args.quick { 200 } else { 1000 }).max(10)),
        structured: args.structured,
        fio: programs.fio.as_deref(),
        nbdcopy: programs.nbdcopy.as_deref(),
        nbdinfo: programs.nbdinfo.as_deref(),
        syscalls: SyscallTool::find(),
    };
    let bench =
        Bench { programs: &programs, images: &images, plan: &plan, only: &args.only, without: &args.without };
    let report = bench.report()?;
    let machine = machine::describe(&programs, &plan);
    let mut verdicts = targets::verdicts(&report);
    let whole = args.only.is_empty() && args.without.is_empty();
    // A run limited to some contests is known to lack the rest.
    verdicts.retain(|verdict| {
        verdict.met().is_some() || whole && (args.baseline.is_some() || !verdict.needs_baseline())
    });

    println!("{}\n\n{}", machine.text, report.text(&verdicts));
    // What is shown to the world comes from full runs.
    let full = !args.quick && whole && args.baseline.is_none();
    let place = if full { "results/bench.json" } else { "../target/bench/bench.json" };
    let output = args.output.clone().unwrap_or_else(|| here.join(place));
    save(&output, &format!("{:#}\n", report.json(&machine, &verdicts)))?;
    let chart = output.with_extension("svg");
    save(&chart, &chart::svg(&report, &machine.summary))?;
    let (seconds, output, chart) = (begin.elapsed().as_secs(), output.display(), chart.display());
    eprintln!("\n{seconds} s, numbers in {output}, chart in {chart}");

    let missed = args.strict && verdicts.iter().any(|verdict| verdict.met() == Some(false));
    Ok(if report.ours_failed() || missed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn save(file: &Path, text: &str) -> Result<()> {
    let parent = file.parent().map_or(Ok(()), fs::create_dir_all);
    parent.and_then(|()| fs::write(file, text)).with_context(|| format!("cannot write {}", file.display()))
}

/// What all sections share.
struct Bench<'a> {
    programs: &'a Programs,
    images: &'a Images,
    plan: &'a Plan<'a>,
    only: &'a [String],
    without: &'a [String],
}

impl Bench<'_> {
    fn report(&self) -> Result<Report> {
        let mut report = Report::default();
        for contest in CONTESTS {
            report.sections.extend(self.section(contest)?);
        }
        if self.wants("figures idle sizes") {
            eprintln!("figures");
            report.figures = figures::sizes(self.programs);
            let (idle, problems) = figures::idle(self.programs, self.images)?;
            report.figures.push(idle);
            report.problems = problems;
        }
        Ok(report)
    }

    fn wants(&self, text: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| text.contains(only.as_str()))
    }

    fn wants_job(&self, contest: &Contest, job: &Job) -> bool {
        let texts = [job.id, job.title, contest.title];
        let is_id = |only: &str| CONTESTS.iter().flat_map(|contest| contest.jobs).any(|job| job.id == only);
        let matches = |only: &String| match is_id(only) {
            true => job.id == only,
            false => texts.iter().any(|text| text.contains(only.as_str())),
        };
        self.only.is_empty() || self.only.iter().any(matches)
    }

    /// Starts a server for each contestant and takes them through the jobs. None: no job was asked for, or all
    /// need a client that is not installed.
    fn section(&self, contest: &Contest) -> Result<Option<Section>> {
        let contest = lineup(contest, self.programs.earlier.is_some(), self.without);
        let wanted = |job: &&Job| self.wants_job(&contest, job) && self.plan.can(job);
        let jobs: Vec<_> = contest.jobs.iter().filter(wanted).collect();
        if jobs.is_empty() || contest.contestants.is_empty() {
            return Ok(None);
        }
        self.images.repair()?;
        let (mut section, mut servers) = (Section::new(contest), Vec::new());
        for &contestant in contest.contestants {
            let started = Server::start(contestant, self.programs, self.images);
            interrupt::check()?;
            let (name, ours) = (contestant.name, contestant.is_ours());
            match started {
                Ok(Some(server)) => servers.push(server),
                // Ours with the peer's plugin may lack that.
                Ok(None) => {
                    let ours = ours && contestant.variant != Variant::CPlugin;
                    section.absent.push((ours, format!("{name}: not installed")));
                }
                Err(error) => section.absent.push((ours, format!("{name}: {error:#}"))),
            }
        }
        for job in jobs {
            eprintln!("{}: {}", contest.title, job.title);
            section.rows.push(Row { job, cells: self.plan.compare(job, &servers)? });
        }
        let memory = |server: &Server| Some((server.contestant.name, memory(&server.pids()).ok()?));
        section.memory = servers.iter().filter(|s| !s.pids().is_empty()).filter_map(memory).collect();
        Ok(Some(section))
    }
}
