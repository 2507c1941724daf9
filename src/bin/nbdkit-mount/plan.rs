//! The command line as meant: what to mount, where, and how to live.

use std::{ffi::OsString, path::PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use nbdkit_core::params;

use crate::{args::Args, chain};

/// What a mount does.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) plugin: OsString,
    pub(crate) parameters: Vec<OsString>,
    pub(crate) filters: Vec<OsString>,
    /// None with `run`: a private directory.
    pub(crate) mountpoint: Option<PathBuf>,
    pub(crate) run: Option<OsString>,
    pub(crate) readonly: bool,
    pub(crate) threads: usize,
    pub(crate) export_name: OsString,
    pub(crate) filename: OsString,
    pub(crate) options: Vec<String>,
    pub(crate) passthrough: bool,
    pub(crate) socket: Option<PathBuf>,
    pub(crate) foreground: bool,
    pub(crate) pidfile: Option<PathBuf>,
    pub(crate) verbose: bool,
    /// Show throughput on the terminal.
    pub(crate) progress: bool,
}

/// Why a relative path has no absolute form.
const NO_DIRECTORY: &str = "cannot find the current directory: change to one that exists";
/// Requests at once unless `-t` says otherwise, as nbdkit(1) has it.
const THREADS: usize = 16;

impl Plan {
    /// Splits the words and checks that the options fit together.
    ///
    /// # Errors
    /// A missing plugin or mountpoint, and values that make no sense.
    pub(crate) fn new(args: &Args) -> Result<Self> {
        let mut words = args.words.clone().into_iter();
        let Some(plugin) = words.next() else {
            bail!(
                "no plugin was given: nbdkit-mount [OPTIONS] PLUGIN [[KEY=]VALUE ...] MOUNTPOINT (see --help)"
            );
        };
        ensure!(
            !args.progress || args.foreground || args.run.is_some(),
            "--progress needs the foreground: add -f"
        );
        let mut parameters: Vec<_> = words.collect();
        let mountpoint = match args.run {
            Some(_) => None,
            None => Some(mountpoint(&mut parameters)?),
        };
        let filename = &args.filename;
        ensure!(
            !filename.is_empty()
                && filename != "."
                && filename != ".."
                && !filename.as_encoded_bytes().contains(&b'/'),
            "--filename '{}' is not the name of a file",
            filename.display()
        );
        let threads = match args.threads.as_deref() {
            Some(threads) => match params::integer::<u16>("--threads", threads)? {
                0 => THREADS,
                n => n.into(),
            },
            None => THREADS,
        };
        let options: Vec<String> = args
            .options
            .iter()
            .flat_map(|o| o.split(','))
            .filter(|o| !o.is_empty())
            .map(String::from)
            .collect();
        Ok(Plan {
            plugin,
            parameters,
            filters: args.filter.clone(),
            mountpoint,
            run: args.run.clone(),
            readonly: args.readonly || options.iter().any(|o| o == "ro"),
            threads,
            export_name: args.export.clone().unwrap_or_default(),
            filename: filename.clone(),
            options,
            passthrough: !args.no_passthrough,
            socket: args.unix.as_deref().map(std::path::absolute).transpose().context(NO_DIRECTORY)?,
            foreground: args.foreground || args.run.is_some(),
            pidfile: args.pidfile.as_deref().map(std::path::absolute).transpose().context(NO_DIRECTORY)?,
            verbose: args.verbose,
            progress: args.progress,
        })
    }
}

/// Takes the last word as the mountpoint.
fn mountpoint(words: &mut Vec<OsString>) -> Result<PathBuf> {
    match words.pop() {
        Some(word) if chain::split(&word).is_none() || std::path::Path::new(&word).exists() => {
            std::path::absolute(word).context(NO_DIRECTORY)
        }
        Some(word) => bail!(
            "the mountpoint is missing: the last word '{}' is a parameter (add a directory or a regular file)",
            word.display()
        ),
        None => bail!("the mountpoint is missing: add a directory or a regular file as the last word"),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn plan(words: &str) -> Result<Plan> {
        Plan::new(&Args::try_parse_from(words.split(' ')).unwrap())
    }

    #[test]
    fn the_last_word_is_the_mountpoint() {
        let p = plan("nbdkit-mount memory 1M /mnt -o ro,allow_other").unwrap();
        assert_eq!(p.mountpoint.unwrap(), PathBuf::from("/mnt"));
        assert_eq!(p.parameters, ["1M"]);
        assert!(p.readonly);
        assert_eq!(p.options, ["ro", "allow_other"]);
        assert!(plan("nbdkit-mount memory size=1M").is_err());
        assert!(plan("nbdkit-mount memory").is_err());
        assert!(plan("nbdkit-mount").is_err());
    }

    #[test]
    fn run_needs_no_mountpoint() {
        let p = plan("nbdkit-mount --run true memory size=1M").unwrap();
        assert!(p.mountpoint.is_none() && p.foreground);
    }

    #[test]
    fn the_file_name_is_one() {
        assert!(plan("nbdkit-mount --filename a/b memory 1M /mnt").is_err());
        assert!(plan("nbdkit-mount --filename .. memory 1M /mnt").is_err());
        assert!(plan("nbdkit-mount -t x memory 1M /mnt").is_err());
    }
}
