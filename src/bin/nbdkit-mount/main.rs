//! The `nbdkit-mount` bridge. This file is the one place that maps outcomes to exit codes.

#![deny(unsafe_code)]

mod args;
mod failure;
mod loop_mount;
mod loop_writeback;
mod loopdev;
mod mount;
mod mount_users;
mod overlay;
mod plan;
mod ready;
mod source;
mod state;
#[path = "../common/stats.rs"]
mod stats;
mod unmount;
mod watcher;

use std::{io::Write, process::ExitCode};

use anyhow::{Result, bail, ensure};
use clap::{CommandFactory, Parser};
use nbdkit_cli::{chain, completion, layers, logger, std_fds, usage, version};
use nbdkit_loader::DebugFlags;

use crate::{
    args::Args,
    failure::{At as _, Failure, Stage},
    plan::Plan,
};

/// What messages start with.
const PROGRAM: &str = "nbdkit-mount";

fn main() -> ExitCode {
    match run() {
        Ok(code) => ExitCode::from(code),
        Err(Failure { stage, error }) => {
            logger::fatal(PROGRAM, &error);
            ExitCode::from(stage as u8)
        }
    }
}

fn run() -> Result<u8, Failure> {
    std_fds::check()?;
    if let Some(words) = completion::asked(std::env::args_os()) {
        let mounts = nbdkit_fuse::mounts().unwrap_or_default().into_iter();
        let live = mounts.filter(nbdkit_fuse::MountEntry::is_ours).map(|mount| mount.target).collect();
        let program = completion::Program { mounts: true, live };
        std::io::stdout()
            .write_all(&completion::print(&Args::command(), &words, &program))
            .at(Stage::Arguments)?;
        return Ok(0);
    }
    // What is made, sockets and pidfiles first of all, has the same mode wherever the program is started.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let args = arguments()?;
    if let Some(format) = &args.log_format {
        logger::set_format(logger::Format::parse(format)?);
    }
    if let Some(sink) = args.log.as_deref().map(logger::Sink::parse).transpose()?.flatten() {
        logger::send_errors_to(sink);
    }
    logger::start(PROGRAM, args.verbose || args.debug);
    if args.debug {
        logger::add("fuser::request");
    }
    if let Some(text) = information(&args)? {
        std::io::stdout().write_all(text.as_bytes()).at(Stage::Arguments)?;
        return Ok(0);
    }
    if let Some(mountpoint) = &args.unmount {
        unmount::unmount(mountpoint).at(Stage::Life)?;
        return Ok(0);
    }
    if let Some(code) = instead_of_mounting(&args)? {
        return Ok(code);
    }
    let plan = Plan::new(&args)?;
    let ready_fd = plan.ready_fd.map(ready::ReadyFd::take).transpose()?;
    chain::check_order(&args.words)?;
    let mut chain = chain::load(&plan.plugin, &plan.filters, DebugFlags::default())?;
    // Before the parameters, so that a forgotten mountpoint is not taken for one and missed among them.
    if let Some(mountpoint) = &plan.mountpoint {
        if plan.clear_stale {
            unmount::clear_stale(mountpoint).at(Stage::Mount)?;
        }
        nbdkit_fuse::check_mountpoint(mountpoint).at(Stage::Mount)?;
        // After that: what is mounted on a file looks like a file with content.
        plan.check_last_word().at(Stage::NoMountpoint)?;
    }
    if plan.force && chain.filters().any(|filter| overlay::is_cow(&filter.info())) {
        chain.config("cow-force", "true".as_ref())?;
    }
    chain::configure(&mut chain, &plan.parameters)?;
    chain.config_complete()?;
    mount::mount(chain, plan, ready_fd)
}

/// The command line, in its long form.
fn arguments() -> Result<Args> {
    let mut line = source::without_brackets(std::env::args_os().collect())?;
    loop {
        let args = Args::try_parse_from(&line).map_err(|e| usage::one_line(&e))?;
        if args.unmount.is_some() {
            ensure!(
                args.words.is_empty(),
                "-u takes one mountpoint and nothing else: leave the other words out"
            );
            return Ok(args);
        }
        // A source that starts with an option looks like one.
        let hidden = line.get(1).filter(|word| {
            let is_option = word.as_encoded_bytes().starts_with(b"-");
            is_option && args.words.len() == 1 && args.run.is_none()
        });
        let words: Vec<_> = hidden.into_iter().chain(&args.words).cloned().collect();
        let Some(first) = words.first() else { return Ok(args) };
        let long = match source::long_form(std::slice::from_ref(first))? {
            Some(long) => Some(long),
            None => source::split_source(&words)?,
        };
        let Some(long) = long else { return Ok(args) };
        line = source::expand(&line, first, long);
    }
}

/// Does what was asked for in place of a mount, if anything.
fn instead_of_mounting(args: &Args) -> Result<Option<u8>> {
    Ok(match (&args.stats, &args.commit, &args.discard) {
        (None, None, None) => {
            ensure!(!args.json, "--json goes with --stats, --list, --commit or --discard");
            None
        }
        (Some(place), None, None) => Some(stats::show(place.as_os_str(), args.json)?),
        (None, Some(overlay), None) => Some(overlay::commit(overlay, args)?),
        (None, None, Some(overlay)) => Some(overlay::discard(overlay, args)?),
        _ => bail!("--stats, --commit and --discard cannot be combined: give one of them"),
    })
}

/// What the options that only print have to say.
fn information(args: &Args) -> Result<Option<String>> {
    let loaded = || {
        args.words.first().map(|plugin| chain::load(plugin, &args.filter, DebugFlags::default())).transpose()
    };
    // A plugin that runs a script has the script's help.
    let configured = || {
        let mut chain = loaded()?;
        if let Some(chain) = &mut chain {
            chain::configure_script(chain, &args.words[1..])?;
        }
        Ok::<_, anyhow::Error>(chain)
    };
    Ok(Some(if args.help {
        usage::help(Args::command(), configured()?.as_ref())
    } else if args.short_help {
        usage::short_help(Args::command(), &args::COMMON, configured()?.as_ref())
    } else if args.list {
        if args.json { format!("{:#}\n", layers::json()) } else { layers::table() }
    } else if args.version {
        let versions = loaded()?.map(|chain| chain::versions(&chain)).unwrap_or_default();
        version::text(PROGRAM) + &versions
    } else if let Some(shell) = &args.completions {
        completion::script(shell)?.to_owned()
    } else {
        return Ok(None);
    }))
}
