//! The `nbdkit-mount` bridge. This file is the one place that maps outcomes to exit codes.

#![deny(unsafe_code)]

mod args;
mod mount;
mod overlay;
mod plan;
mod stats;

#[path = "../common/captive.rs"]
mod captive;
#[path = "../common/chain.rs"]
mod chain;
#[path = "../common/daemon.rs"]
mod daemon;
#[path = "../common/logger.rs"]
mod logger;
#[path = "../common/pidfile.rs"]
mod pidfile;
#[path = "../common/progress.rs"]
mod progress;
#[path = "../common/signals.rs"]
mod signals;
#[path = "../common/std_fds.rs"]
mod std_fds;
#[path = "../common/usage.rs"]
mod usage;

use std::{io::Write, process::ExitCode};

use anyhow::{Result, bail, ensure};
use clap::{CommandFactory, Parser};
use nbdkit_loader::DebugFlags;

use crate::{args::Args, plan::Plan};

/// What messages start with.
const PROGRAM: &str = "nbdkit-mount";

fn main() -> ExitCode {
    match run() {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            logger::fatal(PROGRAM, &error);
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<u8> {
    std_fds::check()?;
    // What is made, sockets and pidfiles first of all, has the same mode wherever the program is started.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let args = Args::try_parse().map_err(|e| usage::one_line(&e))?;
    logger::start(PROGRAM, args.verbose);
    if let Some(text) = information(&args)? {
        std::io::stdout().write_all(text.as_bytes())?;
        return Ok(0);
    }
    if let Some(code) = instead_of_mounting(&args)? {
        return Ok(code);
    }
    let plan = Plan::new(&args)?;
    let mut chain = chain::load(&plan.plugin, &plan.filters, DebugFlags::default())?;
    // Before the parameters, so that a forgotten mountpoint is not taken for one and missed among them.
    if let Some(mountpoint) = &plan.mountpoint {
        nbdkit_fuse::check_mountpoint(mountpoint)?;
    }
    chain::configure(&mut chain, &plan.parameters)?;
    chain.config_complete()?;
    mount::mount(chain, plan)
}

/// Does what was asked for in place of a mount, if anything.
fn instead_of_mounting(args: &Args) -> Result<Option<u8>> {
    Ok(match (&args.stats, &args.commit, &args.discard) {
        (None, None, None) => {
            ensure!(!args.json, "--json goes with --stats, --commit or --discard");
            None
        }
        (Some(mountpoint), None, None) => Some(stats::show(mountpoint, args.json)?),
        (None, Some(overlay), None) => Some(overlay::commit(overlay, args)?),
        (None, None, Some(overlay)) => Some(overlay::discard(overlay, args)?),
        _ => bail!("--stats, --commit and --discard cannot be combined: give one of them"),
    })
}

/// What the options that only print have to say.
fn information(args: &Args) -> Result<Option<String>> {
    let layers = || {
        args.words.first().map(|plugin| chain::load(plugin, &args.filter, DebugFlags::default())).transpose()
    };
    Ok(Some(if args.help {
        let usage = usage::help(Args::command(), &chain::names_help());
        match layers()? {
            Some(chain) => usage + &chain::help(&chain),
            None => usage,
        }
    } else if args.version {
        let versions = layers()?.map(|chain| chain::versions(&chain)).unwrap_or_default();
        format!("{PROGRAM} {}\n{versions}", env!("CARGO_PKG_VERSION"))
    } else if let Some(shell) = args.completions {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut Args::command(), PROGRAM, &mut script);
        String::from_utf8(script)?
    } else {
        return Ok(None);
    }))
}
