//! The command line as typed. What it means is plan.rs's matter.

use std::{ffi::OsString, path::PathBuf};

use clap::{ArgAction, Parser};

/// Options of nbdkit-mount(1).
#[derive(Debug, Parser)]
#[command(
    name = "nbdkit-mount",
    about = "Shows a virtual disk as a file",
    override_usage = "nbdkit-mount [OPTIONS] PLUGIN [[KEY=]VALUE ...] MOUNTPOINT\n       \
                      nbdkit-mount [OPTIONS] --run COMMAND PLUGIN [[KEY=]VALUE ...]",
    disable_help_flag = true,
    disable_version_flag = true,
    args_override_self = true,
    after_help = "Examples:\n  nbdkit-mount file disk.img /mnt/x      the disk is the file /mnt/x/nbd\n  \
                  mount -o loop /mnt/x/nbd /mnt/y        look inside it\n  \
                  fusermount3 -u /mnt/x                  the end\n  \
                  nbdkit-mount --run 'mkfs.ext4 -q \"$file\"' file disk.img"
)]
pub(crate) struct Args {
    /// Plugin, its parameters and those of the filters, and the mountpoint: a directory or a regular file
    #[arg(value_name = "PLUGIN [KEY=]VALUE MOUNTPOINT", hide = true)]
    pub(crate) words: Vec<OsString>,

    /// Filter over the plugin; repeat for more, the first is the outermost
    #[arg(long, value_name = "FILTER", action = ArgAction::Append, help_heading = "Chain")]
    pub(crate) filter: Vec<OsString>,
    /// Show the disk read-only
    #[arg(short, long, alias = "read-only", help_heading = "Chain")]
    pub(crate) readonly: bool,
    /// Requests that may run at once (default 16)
    #[arg(short, long, value_name = "N", help_heading = "Chain")]
    pub(crate) threads: Option<OsString>,
    /// Export to show (default: the default one)
    #[arg(
        short,
        long = "export",
        aliases = ["exportname", "export-name"],
        value_name = "NAME",
        help_heading = "Chain"
    )]
    pub(crate) export: Option<OsString>,

    /// Name of the file in the mountpoint
    #[arg(long, value_name = "NAME", default_value = "nbd", help_heading = "Mount")]
    pub(crate) filename: OsString,
    /// Mount options, separated by commas
    #[arg(short = 'o', value_name = "OPTIONS", action = ArgAction::Append, help_heading = "Mount")]
    pub(crate) options: Vec<String>,
    /// Never let the kernel read the file on its own
    #[arg(long, help_heading = "Mount")]
    pub(crate) no_passthrough: bool,
    /// Serve the disk over NBD on this Unix socket too
    #[arg(short = 'U', long = "unix", value_name = "SOCKET", help_heading = "Mount")]
    pub(crate) unix: Option<PathBuf>,

    /// Stay in the foreground
    #[arg(short, long, alias = "no-fork", help_heading = "Life")]
    pub(crate) foreground: bool,
    /// Mount on a private directory, run a shell command with $file and $mnt set, and exit with it
    #[arg(long, value_name = "COMMAND", help_heading = "Life")]
    pub(crate) run: Option<OsString>,
    /// Write the process ID here once ready
    #[arg(short = 'P', long, alias = "pid-file", value_name = "FILE", help_heading = "Life")]
    pub(crate) pidfile: Option<PathBuf>,
    /// Print debug messages
    #[arg(short, long, help_heading = "Life")]
    pub(crate) verbose: bool,

    /// Show throughput on the terminal, in the foreground
    #[arg(long, help_heading = "Life")]
    pub(crate) progress: bool,

    /// Show what goes through a mount: live on a terminal, else once
    #[arg(long, value_name = "MOUNTPOINT", help_heading = "Instead of mounting")]
    pub(crate) stats: Option<PathBuf>,
    /// Write the changes in an overlay (cow-file=) to the disk PLUGIN [[KEY=]VALUE ...] and empty it
    #[arg(long, value_name = "OVERLAY", help_heading = "Instead of mounting")]
    pub(crate) commit: Option<PathBuf>,
    /// Remove an overlay with its changes
    #[arg(long, value_name = "OVERLAY", help_heading = "Instead of mounting")]
    pub(crate) discard: Option<PathBuf>,
    /// JSON on standard output instead of a table or a bar
    #[arg(long, help_heading = "Instead of mounting")]
    pub(crate) json: bool,

    /// Print help, with a PLUGIN about that and its filters
    #[arg(long, help_heading = "Information")]
    pub(crate) help: bool,
    /// Print the version, with a PLUGIN of that and its filters
    #[arg(short = 'V', long, help_heading = "Information")]
    pub(crate) version: bool,
    /// Print a completion script for a shell
    #[arg(long, value_name = "SHELL", help_heading = "Information")]
    pub(crate) completions: Option<clap_complete::Shell>,
}
