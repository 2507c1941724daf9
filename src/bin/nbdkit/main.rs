//! The `nbdkit` server. This file is the one place that maps outcomes to exit codes.

#![deny(unsafe_code)]

mod activation;
mod args;
mod plan;
mod privileges;
mod selinux;
mod serve;
mod shebang;
#[path = "../common/stats.rs"]
mod stats;
mod tls;

use std::{io::Write, process::ExitCode};

use anyhow::{Result, bail};
use clap::{CommandFactory, Parser};
use nbdkit_cli::{
    chain, completion, dump, layers,
    logger::{self, Sink},
    std_fds,
    stdio::Stdio,
    usage, version,
};
use nbdkit_loader::DebugFlags;

use crate::{activation::Inherited, args::Args, plan::Plan};

fn main() -> ExitCode {
    let mut name = String::from("nbdkit");
    match run(&mut name) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            logger::fatal(&name, &error);
            ExitCode::FAILURE
        }
    }
}

/// Everything; `program` becomes the name that messages start with.
fn run(program: &mut String) -> Result<u8> {
    std_fds::check()?;
    if let Some(words) = completion::asked(std::env::args_os()) {
        let found = completion::print(&Args::command(), &words, &completion::Program::default());
        std::io::stdout().write_all(&found)?;
        return Ok(0);
    }
    // What is made, sockets and pidfiles first of all, has the same mode wherever the program is started.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let args =
        Args::try_parse_from(shebang::command_line(std::env::args_os())).map_err(|e| usage::one_line(&e))?;
    if let Some(name) = &args.name {
        *program = format!("nbdkit[{name}]");
    }
    let inherited = Inherited::take(args.ready_fd.as_deref())?;
    if let Some(sink) = args.log.as_deref().map(Sink::parse).transpose()?.flatten() {
        logger::send_errors_to(sink);
    }
    if let Some(format) = &args.log_format {
        logger::set_format(logger::Format::parse(format)?);
    }
    logger::start(program, args.verbose);
    let mut debug = DebugFlags::parse(args.debug.iter().map(String::as_str))?;
    logger::mute(|flag| debug.take(flag) == Some(0));
    let tls = ["tls.log", "tls.session"].map(|flag| debug.take(flag).unwrap_or_default());
    #[cfg(feature = "tls")]
    nbdkit_nbd::tls::set_debug(tls[0].try_into().unwrap_or_default(), tls[1] > 0);
    #[cfg(not(feature = "tls"))]
    let _ = tls;
    if debug.take("environ").is_some_and(|value| value > 0) {
        for (name, value) in std::env::vars_os() {
            log::debug!("{}={}", name.display(), value.display());
        }
    }
    if args.single {
        nbdkit_loader::stdio_is_taken();
    }
    if let Some(place) = &args.stats {
        return stats::show(place, args.json);
    }
    if let Some(text) = information(&args, &debug)? {
        std::io::stdout().write_all(text.as_bytes())?;
        return Ok(0);
    }
    let plan = Plan::new(&args, inherited)?;
    let Some(plugin) = &args.plugin else {
        bail!("no plugin was given: nbdkit [OPTIONS] PLUGIN [[KEY=]VALUE ...] (see --help)");
    };
    chain::check_order(&[std::slice::from_ref(plugin), &args.parameters].concat())?;
    // First: a layer that prints must not print to the client.
    let taken = args.single.then(Stdio::take).transpose()?;
    let mut chain = chain::load(plugin, &args.filter, debug)?;
    if args.single {
        chain.stdio_is_taken();
    }
    chain::configure(&mut chain, &args.parameters)?;
    chain.config_complete()?;
    serve::serve(chain, plan, taken)
}

/// What the options that only print have to say.
fn information(args: &Args, debug: &DebugFlags) -> Result<Option<String>> {
    let load = |plugin| chain::load(plugin, &args.filter, debug.clone());
    let loaded = || args.plugin.as_deref().map(load).transpose();
    // A plugin that runs a script has the script's help.
    let configured = || {
        let mut chain = loaded()?;
        if let Some(chain) = &mut chain {
            chain::configure_script(chain, &args.parameters)?;
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
        version::text("nbdkit") + &versions
    } else if args.short_options {
        dump::short_options(&Args::command())
    } else if args.long_options {
        dump::long_options(&Args::command())
    } else if args.dump_config {
        dump::config("nbdkit", cfg!(feature = "tls"))
    } else if args.dump_plugin {
        plan::conflicts(args, false)?;
        let Some(mut chain) = loaded()? else { bail!("--dump-plugin needs the name of a plugin") };
        chain::configure(&mut chain, &args.parameters)?;
        dump::plugin(&chain)?
    } else if let Some(shell) = &args.completions {
        completion::script(shell)?.to_owned()
    } else {
        return Ok(None);
    }))
}
