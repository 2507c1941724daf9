//! The command line as meant: what to mount, where, and how to live.

use std::{ffi::OsString, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use nbdkit_cli::chain;
use nbdkit_common::SECTOR_SIZES;
use nbdkit_core::params;
use nbdkit_fuse::Cache;

use crate::{
    args::Args,
    failure::{At as _, Failure, Stage},
    loop_mount::LoopMountOptions,
    selector::Selector,
};

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
    /// None: all.
    pub(crate) export: Option<OsString>,
    pub(crate) filename: OsString,
    pub(crate) options: Vec<String>,
    /// The words of the command line as one, where mount(8) gave them so.
    pub(crate) source: Option<String>,
    pub(crate) passthrough: bool,
    pub(crate) partitions: bool,
    /// What partition tables count in. None: found out.
    pub(crate) sector_size: Option<u64>,
    pub(crate) cache: Cache,
    pub(crate) timeout: Option<Duration>,
    /// Mount on a file that is not empty.
    pub(crate) cover_file: bool,
    /// Clear a mount whose server is gone.
    pub(crate) clear_stale: bool,
    /// Take an overlay to a disk that it does not belong to.
    pub(crate) force: bool,
    pub(crate) loop_mount: LoopMountOptions,
    pub(crate) socket: Option<PathBuf>,
    pub(crate) foreground: bool,
    pub(crate) pidfile: Option<PathBuf>,
    pub(crate) ready_fd: Option<i32>,
    pub(crate) exit_with_parent: bool,
    pub(crate) auto_unmount: bool,
    pub(crate) verbose: bool,
    /// Show throughput on the terminal.
    pub(crate) progress: bool,
    pub(crate) metrics: Option<OsString>,
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
    pub(crate) fn new(args: &Args) -> Result<Self, Failure> {
        let mut words = args.words.clone().into_iter();
        let Some(plugin) = words.next() else {
            return Err(anyhow!(
                "no plugin was given: nbdkit-mount [OPTIONS] PLUGIN [[KEY=]VALUE ...] MOUNTPOINT (see --help)"
            )
            .into());
        };
        if args.progress && !args.foreground && args.run.is_none() {
            return Err(anyhow!("--progress needs the foreground: add -f").into());
        }
        let mut parameters: Vec<_> = words.collect();
        let mountpoint = match args.run {
            Some(_) => None,
            None => {
                let mountpoint = mountpoint(&mut parameters).at(Stage::NoMountpoint)?;
                Some(std::path::absolute(mountpoint).context(NO_DIRECTORY)?)
            }
        };
        let threads = match args.threads.as_deref() {
            Some(threads) => match params::integer::<u16>("--threads", threads)? {
                0 => THREADS,
                n => n.into(),
            },
            None => THREADS,
        };
        let mut options: Vec<String> = args
            .options
            .iter()
            .flat_map(|o| o.split(','))
            .filter(|o| !o.is_empty())
            .map(String::from)
            .collect();
        let before = options.len();
        options.retain(|o| o != "auto_unmount");
        let auto_unmount = args.auto_unmount || options.len() < before;
        nbdkit_fuse::check_options(&options)?;
        let readonly = args.readonly || options.iter().any(|o| o == "ro");
        if args.recovered {
            // What is read-only is the image.
            options.retain(|o| o != "ro");
        }
        let cache = cache(&args.cache)?;
        conflicts(args, cache)?;
        let timeout = args.timeout.as_deref().map(|t| params::delay(t).context("--timeout")).transpose()?;
        if timeout.is_some_and(|timeout| timeout.is_zero()) {
            return Err(anyhow!("--timeout 0 leaves no time for any request: give a longer one").into());
        }
        Ok(Plan {
            plugin,
            parameters,
            filters: filters(args),
            mountpoint,
            run: args.run.clone(),
            readonly: readonly && !args.recovered,
            threads,
            export: args.export.clone(),
            filename: args.filename.clone(),
            options,
            source: args.source.clone(),
            passthrough: !args.no_passthrough,
            partitions: args.partitions,
            sector_size: sector_size(args)?,
            cache,
            timeout,
            cover_file: args.cover_file,
            clear_stale: args.clear_stale || args.force,
            force: args.force,
            loop_mount: loop_mount(args, readonly)?,
            socket: socket(args)?,
            foreground: args.foreground || args.run.is_some() || args.exit_with_parent || args.debug,
            pidfile: absolute(args.pidfile.as_deref())?,
            ready_fd: args.ready_fd.as_deref().map(|fd| params::integer("--ready-fd", fd)).transpose()?,
            exit_with_parent: args.exit_with_parent,
            auto_unmount,
            verbose: args.verbose || args.debug,
            metrics: args.metrics.clone(),
            progress: args.progress,
        })
    }
}

fn absolute(path: Option<&std::path::Path>) -> Result<Option<PathBuf>> {
    path.map(std::path::absolute).transpose().context(NO_DIRECTORY)
}

fn socket(args: &Args) -> Result<Option<PathBuf>> {
    let private = args.unix.as_deref().is_some_and(|path| path.as_os_str() == "-");
    ensure!(!private, "-U - would make a socket that nobody knows of: name one, as in -U /run/disk.sock");
    absolute(args.unix.as_deref())
}

/// The value of `--sector-size`.
pub(crate) fn sector_size(args: &Args) -> Result<Option<u64>> {
    let Some(text) = &args.sector_size else { return Ok(None) };
    let size = params::size(text).ok().filter(|size| SECTOR_SIZES.contains(size));
    let size =
        size.with_context(|| format!("--sector-size {}: use 512, 1024, 2048 or 4096", text.display()))?;
    Ok(Some(size))
}

fn cache(mode: &str) -> Result<Cache> {
    Ok(match mode {
        "auto" => Cache::Auto,
        "none" => Cache::None,
        "writeback" => Cache::Writeback,
        other => bail!("unknown --cache={other}: use auto, none or writeback"),
    })
}

/// The filters, the outermost first: for `--recovered`, an overlay over all of them.
fn filters(args: &Args) -> Vec<OsString> {
    let overlay = args.recovered && !args.filter.iter().any(|filter| filter == "cow");
    overlay.then(|| "cow".into()).into_iter().chain(args.filter.iter().cloned()).collect()
}

/// The options that exclude each other, or need each other.
fn conflicts(args: &Args, cache: Cache) -> Result<()> {
    let loop_mount = args.loop_device || args.mount.is_some();
    if cache == Cache::Writeback {
        // What one keeps to itself the other cannot see.
        ensure!(args.unix.is_none(), "--cache=writeback and -U cannot be used together: leave one out");
        ensure!(
            !args.partitions,
            "--cache=writeback and --partitions cannot be used together: leave one out"
        );
    }
    for (option, given) in
        [("--fstype", args.fstype.is_some()), ("--mount-options", !args.mount_options.is_empty())]
    {
        ensure!(args.mount.is_some() || !given, "{option} is for --mount: add that");
    }
    for (option, given) in [("--lazy", args.lazy), ("--wait", args.wait.is_some())] {
        ensure!(!given, "{option} is for -u: add that");
    }
    ensure!(
        loop_mount || args.partition.is_none(),
        "--partition is for --mount and --loop: add one, or use --partitions"
    );
    ensure!(
        !loop_mount || args.run.is_none(),
        "--loop and --mount cannot be used with --run: use $file in the command"
    );
    Ok(())
}

/// What is to be set up on the disk.
fn loop_mount(args: &Args, readonly: bool) -> Result<LoopMountOptions> {
    let mount = match &args.mount {
        Some(dir) => {
            let full = dir.canonicalize().with_context(|| format!("--mount {}", dir.display()))?;
            ensure!(full.is_dir(), "--mount {} is not a directory", dir.display());
            Some(full)
        }
        None => None,
    };
    let partition = args.partition.as_deref().map(Selector::parse).transpose()?;
    Ok(LoopMountOptions {
        loop_device: args.loop_device,
        mount,
        fstype: args.fstype.clone(),
        options: args.mount_options.clone(),
        readonly,
        recovered: args.recovered,
        partition,
    })
}

/// Takes the last word as the mountpoint.
fn mountpoint(words: &mut Vec<OsString>) -> Result<PathBuf> {
    match words.pop() {
        Some(word) if chain::split(&word).is_none() || std::path::Path::new(&word).exists() => {
            Ok(word.into())
        }
        Some(word) => bail!(
            "the mountpoint is missing: the last word '{}' is a parameter (add a directory or an empty file)",
            word.display()
        ),
        None => bail!("the mountpoint is missing: add a directory or an empty file as the last word"),
    }
}

impl Plan {
    /// A file with content as the last word is one of the plugin's files rather than the mountpoint, which would hide it.
    ///
    /// # Errors
    /// It is such a file.
    pub(crate) fn check_last_word(&self) -> Result<()> {
        let Some(path) = self.mountpoint.as_deref().filter(|_| !self.cover_file) else { return Ok(()) };
        let hides = std::fs::metadata(path).is_ok_and(|file| file.is_file() && file.len() > 0);
        ensure!(
            !hides,
            "the mountpoint is missing: the last word '{}' is a file with content, which a mount would hide (add a \
             directory or an empty file, or --cover-file if you mean it)",
            path.display()
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn plan(words: &str) -> Result<Plan, Failure> {
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
    fn options_that_do_not_fit() {
        for words in [
            "-t x",
            "--cache=big",
            "--cache=writeback -U /s",
            "--cache=writeback --partitions",
            "--fstype ext4",
            "--partition 1",
            "--mount-options ro",
            "--lazy",
            "--wait 3",
            "--timeout 0",
            "--timeout x",
            "--sector-size 8k",
            "--ready-fd x",
            "--mount /no/such/directory",
        ] {
            assert!(plan(&format!("nbdkit-mount {words} memory 1M /mnt")).is_err(), "{words}");
        }
        assert!(plan("nbdkit-mount --loop --run true memory 1M").is_err());
    }

    #[test]
    fn exit_codes() {
        assert_eq!(plan("nbdkit-mount memory").unwrap_err().stage, Stage::NoMountpoint);
        assert_eq!(plan("nbdkit-mount").unwrap_err().stage, Stage::Arguments);
    }
}
