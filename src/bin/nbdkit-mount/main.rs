//! The `nbdkit-mount` bridge. This file is the one place that maps outcomes to exit codes.

#![deny(unsafe_code)]

mod args;
mod failure;
mod list;
mod list_mounts;
mod loop_mount;
mod loop_writeback;
mod loopdev;
mod mount;
mod mount_users;
mod overlay;
mod plan;
mod ready;
mod selector;
mod source;
mod state;
#[path = "../common/stats.rs"]
mod stats;
mod unmount;
mod unprivileged;
mod watcher;

use std::{io::Write, process::ExitCode};

use anyhow::{Result, bail, ensure};
use clap::{CommandFactory, Parser};
use nbdkit_cli::{chain, completion, dump, layers, logger, std_fds, usage, version};
use nbdkit_loader::DebugFlags;

use crate::{
    args::Args,
    failure::{At as _, Failure, Stage},
    plan::Plan,
    unmount::How,
};

/// What messages start with.
const PROGRAM: &str = "nbdkit-mount";

fn main() -> ExitCode {
    let mut name = String::from(PROGRAM);
    match run(&mut name) {
        Ok(code) => ExitCode::from(code),
        Err(Failure { stage, error }) => {
            logger::fatal(&name, &error);
            ExitCode::from(stage as u8)
        }
    }
}

/// Everything; `program` becomes the name that messages start with.
fn run(program: &mut String) -> Result<u8, Failure> {
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
    if let Some(name) = &args.name {
        *program = format!("{PROGRAM}[{name}]");
    }
    if let Some(format) = &args.log_format {
        logger::set_format(logger::Format::parse(format)?);
    }
    if let Some(sink) = args.log.as_deref().map(logger::Sink::parse).transpose()?.flatten() {
        logger::send_errors_to(sink);
    }
    logger::start(program, args.verbose || args.debug);
    let mut debug = DebugFlags::parse(args.debug_flags.iter().map(String::as_str))?;
    logger::mute(|flag| debug.take(flag) == Some(0));
    if args.debug {
        logger::add("fuser::request");
    }
    if let Some(text) = information(&args, &debug)? {
        std::io::stdout().write_all(text.as_bytes()).at(Stage::Arguments)?;
        return Ok(0);
    }
    if let Some(mountpoint) = &args.unmount {
        let mountpoint =
            mountpoint.clone().or_else(|| args.words.first().map(Into::into)).unwrap_or_default();
        unmount::unmount(&mountpoint, How::new(&args)?).at(Stage::Life)?;
        return Ok(0);
    }
    if remount(&args).at(Stage::Mount)? {
        return Ok(0);
    }
    if let Some(code) = instead_of_mounting(&args)? {
        return Ok(code);
    }
    let plan = Plan::new(&args)?;
    let ready_fd = plan.ready_fd.map(ready::ReadyFd::take).transpose()?;
    chain::check_order(&args.words)?;
    let mut chain = chain::load(&plan.plugin, &plan.filters, debug)?;
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
    let mut given = None;
    loop {
        let args = Args::try_parse_from(&line).map_err(|e| usage::one_line(&e));
        if let Ok(Args { unmount: Some(mountpoint), words, .. }) = &args {
            let given = usize::from(mountpoint.is_some()) + words.len();
            ensure!(given > 0, "-u needs a mountpoint: nbdkit-mount -u MOUNTPOINT");
            ensure!(given == 1, "-u takes one mountpoint and nothing else: leave the other words out");
            return args;
        }
        // A source that starts with an option looks like one, known or not. The mountpoint comes after it.
        let hidden = line.get(1).filter(|word| {
            let word = word.as_encoded_bytes();
            let alone = args.as_ref().map_or(true, |args| args.words.len() == 1 && args.run.is_none());
            alone && word.starts_with(b"-") && word.iter().any(u8::is_ascii_whitespace)
        });
        let words: Vec<_> = match (hidden, &args) {
            (Some(_), Err(_)) => line.iter().skip(1).take(2).cloned().collect(),
            (hidden, Ok(args)) => hidden.into_iter().chain(&args.words).cloned().collect(),
            (None, Err(_)) => return args,
        };
        let Some(first) = words.first() else { return args };
        let long = match source::long_form(std::slice::from_ref(first))? {
            Some(long) => Some(long),
            None => source::split_source(&words)?,
        };
        let Some(long) = long else { return Ok(Args { source: given, ..args? }) };
        line = source::expand(&line, first, long);
        given = given.or_else(|| first.to_str().map(String::from));
    }
}

/// Does what `-o remount` asks for, if it is there.
fn remount(args: &Args) -> Result<bool> {
    let options =
        args.options.iter().flat_map(|options| options.split(',')).filter(|option| !option.is_empty());
    let (remount, options): (Vec<_>, Vec<_>) =
        options.map(String::from).partition(|option| option == "remount");
    if remount.is_empty() {
        return Ok(false);
    }
    let Some(mountpoint) = args.words.last() else {
        bail!("-o remount needs the mountpoint: nbdkit-mount -o remount,ro MOUNTPOINT");
    };
    // What the mount table has is given back, with words that only the kernel knows.
    let kernels = ["user_id=", "group_id=", "rootmode=", "fd=", "blksize="];
    let options: Vec<_> =
        options.into_iter().filter(|option| !kernels.iter().any(|key| option.starts_with(key))).collect();
    let (mount, _) = unmount::find(&nbdkit_fuse::resolve(mountpoint.as_ref())?)?;
    nbdkit_fuse::remount(&mount.target, &options)?;
    Ok(true)
}

/// Does what was asked for in place of a mount, if anything.
fn instead_of_mounting(args: &Args) -> Result<Option<u8>> {
    if args.list_mounts {
        list_mounts::list(args)?;
        return Ok(Some(0));
    }
    Ok(match (&args.stats, &args.commit, &args.discard, args.list) {
        (None, None, None, false) => {
            ensure!(!args.json, "--json goes with --list, --list-mounts, --stats, --commit or --discard");
            None
        }
        (Some(mountpoint), None, None, false) => Some(stats::show(mountpoint.as_os_str(), args.json)?),
        (None, Some(overlay), None, false) => Some(overlay::commit(overlay, args)?),
        (None, None, Some(overlay), false) => Some(overlay::discard(overlay, args)?),
        (None, None, None, true) => Some(list::list(args)?),
        _ => bail!("--list, --stats, --commit and --discard cannot be combined: give one of them"),
    })
}

/// What the options that only print have to say.
fn information(args: &Args, debug: &DebugFlags) -> Result<Option<String>> {
    let loaded =
        || args.words.first().map(|plugin| chain::load(plugin, &args.filter, debug.clone())).transpose();
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
    } else if args.list && args.words.is_empty() {
        if args.json { format!("{:#}\n", layers::json()) } else { layers::table() }
    } else if args.version {
        let versions = loaded()?.map(|chain| chain::versions(&chain)).unwrap_or_default();
        version::text(PROGRAM) + &versions
    } else if args.dump_config {
        dump::config(PROGRAM, cfg!(feature = "tls"))
    } else if args.dump_plugin {
        let Some(mut chain) = loaded()? else { bail!("--dump-plugin needs the name of a plugin") };
        chain::configure(&mut chain, &args.words[1..])?;
        dump::plugin(&chain)?
    } else if let Some(shell) = &args.completions {
        completion::script(shell)?.to_owned()
    } else {
        return Ok(None);
    }))
}
