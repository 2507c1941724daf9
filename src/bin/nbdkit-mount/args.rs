//! The command line as typed. What it means is plan.rs's matter.

use std::{ffi::OsString, path::PathBuf};

use clap::{ArgAction, Parser};

/// The options that `-h` shows.
pub(crate) const COMMON: [&str; 6] = ["filter", "readonly", "partitions", "run", "verbose", "list"];

/// Options of nbdkit-mount(1).
#[derive(Debug, Parser)]
#[command(
    name = "nbdkit-mount",
    about = "Shows a virtual disk as a file",
    override_usage = "nbdkit-mount [OPTIONS] PLUGIN [[KEY=]VALUE ...] MOUNTPOINT\n       \
                      nbdkit-mount [OPTIONS] --run COMMAND PLUGIN [[KEY=]VALUE ...]\n       \
                      nbdkit-mount [OPTIONS] 'PLUGIN [[KEY=]VALUE ...]' MOUNTPOINT\n       \
                      nbdkit-mount [OPTIONS] URI|[ COMMAND ... ] [KEY=VALUE ...] MOUNTPOINT\n       \
                      nbdkit-mount -u [--lazy|--wait=TIME] MOUNTPOINT\n       \
                      nbdkit-mount --list-mounts [--json]\n       \
                      nbdkit-mount --list [--json] PLUGIN [[KEY=]VALUE ...]\n       \
                      nbdkit-mount --stats MOUNTPOINT\n       \
                      nbdkit-mount --commit OVERLAY PLUGIN [[KEY=]VALUE ...]",
    disable_help_flag = true,
    disable_version_flag = true,
    args_override_self = true,
    after_help = "Examples:\n  nbdkit-mount file disk.img /mnt/x      the disk is the file /mnt/x/nbd\n  \
                  nbdkit-mount --partitions file disk.img /mnt/x\n                                         \
                  and its partitions are /mnt/x/nbd1 ...\n  \
                  nbdkit-mount --loop file disk.img /mnt/x\n                                         \
                  and a loop device, the name of which is printed\n  \
                  nbdkit-mount --mount /mnt/y --partition 1 file disk.img /mnt/x\n                                         \
                  and its first file system is at /mnt/y\n  \
                  nbdkit-mount -u /mnt/x                 the end of all that\n  \
                  nbdkit-mount --list file disk.img      partitions and what is in them\n  \
                  nbdkit-mount file dir=/images /mnt/x   each image is a file\n  \
                  nbdkit-mount nbd://host/name /mnt/x    what an NBD server has\n  \
                  nbdkit-mount --run 'mkfs.ext4 -q \"$file\"' file disk.img\n  \
                  mount -t fuse.nbdkit-mount 'file file=/disk.img' /mnt/x"
)]
pub(crate) struct Args {
    /// Plugin, its parameters and those of the filters, and the mountpoint: a directory or an empty file
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
    /// Show this export alone (default: all there are)
    #[arg(
        short,
        long = "export",
        aliases = ["exportname", "export-name"],
        value_name = "NAME",
        help_heading = "Chain"
    )]
    pub(crate) export: Option<OsString>,

    /// Name of the default export's file in the mountpoint
    #[arg(long, value_name = "NAME", default_value = "nbd", help_heading = "Mount")]
    pub(crate) filename: OsString,
    /// Show partitions as files too: nbd1, nbd2 ...
    #[arg(long, help_heading = "Mount")]
    pub(crate) partitions: bool,
    /// Bytes in a sector of partition tables: 512, 1024, 2048 or 4096 (default: found out)
    #[arg(long, value_name = "N", help_heading = "Mount")]
    pub(crate) sector_size: Option<OsString>,
    /// What the kernel keeps: auto (reads), none, or writeback (writes too, until fsync)
    #[arg(long, value_name = "MODE", default_value = "auto", help_heading = "Mount")]
    pub(crate) cache: String,
    /// Fail requests that take longer, in seconds, or as 500ms
    #[arg(long, value_name = "TIME", help_heading = "Mount")]
    pub(crate) timeout: Option<OsString>,
    /// Mount on a regular file even if it is not empty; it is hidden until the end of the mount
    #[arg(long, help_heading = "Mount")]
    pub(crate) cover_file: bool,
    /// Clear a mount whose server was killed before mounting there
    #[arg(long, help_heading = "Mount")]
    pub(crate) clear_stale: bool,
    /// The same, and take an overlay (cow-file=) to a disk that it does not belong to
    #[arg(long, help_heading = "Mount")]
    pub(crate) force: bool,
    /// Mount options, separated by commas
    #[arg(short = 'o', value_name = "OPTIONS", action = ArgAction::Append, help_heading = "Mount")]
    pub(crate) options: Vec<String>,
    /// Never let the kernel read the file on its own
    #[arg(long, help_heading = "Mount")]
    pub(crate) no_passthrough: bool,
    /// Serve the disk over NBD on this Unix socket too
    #[arg(short = 'U', long = "unix", value_name = "SOCKET", help_heading = "Mount")]
    pub(crate) unix: Option<PathBuf>,

    /// Attach a loop device to the disk and print its name
    #[arg(long = "loop", help_heading = "Loop device")]
    pub(crate) loop_device: bool,
    /// Mount the file system in the disk on this directory too
    #[arg(long, value_name = "DIR", help_heading = "Loop device")]
    pub(crate) mount: Option<PathBuf>,
    /// Type of that file system (default: found out)
    #[arg(long, value_name = "TYPE", help_heading = "Loop device")]
    pub(crate) fstype: Option<String>,
    /// Options for that mount, separated by commas
    #[arg(long, value_name = "OPTIONS", action = ArgAction::Append, help_heading = "Loop device")]
    pub(crate) mount_options: Vec<String>,
    /// Put a temporary overlay over the disk, in which that file system is recovered
    #[arg(long, help_heading = "Loop device")]
    pub(crate) recovered: bool,
    /// The partition for --loop and --mount: a number, a name, LABEL=, UUID=, PARTLABEL=, PARTUUID=, or root
    #[arg(long, value_name = "PARTITION", help_heading = "Loop device")]
    pub(crate) partition: Option<OsString>,

    /// Stay in the foreground
    #[arg(short, long, alias = "no-fork", help_heading = "Life")]
    pub(crate) foreground: bool,
    /// Mount on a private directory, run a shell command with $file and $mnt set, and exit with it
    #[arg(long, value_name = "COMMAND", help_heading = "Life")]
    pub(crate) run: Option<OsString>,
    /// Write the process ID here once ready
    #[arg(short = 'P', long, alias = "pid-file", value_name = "FILE", help_heading = "Life")]
    pub(crate) pidfile: Option<PathBuf>,
    /// Write a newline to this file descriptor once ready
    #[arg(long, value_name = "FD", help_heading = "Life")]
    pub(crate) ready_fd: Option<OsString>,
    /// End when the parent process does; implies -f
    #[arg(long, help_heading = "Life")]
    pub(crate) exit_with_parent: bool,
    /// Unmount even if the server is killed
    #[arg(long, help_heading = "Life")]
    pub(crate) auto_unmount: bool,
    /// Unmount MOUNTPOINT, with everything that was set up on it
    #[arg(short = 'u', long, value_name = "MOUNTPOINT", num_args = 0..=1, help_heading = "Life")]
    pub(crate) unmount: Option<Option<PathBuf>>,
    /// With -u: take it out of sight at once, even if it is in use
    #[arg(long, help_heading = "Life")]
    pub(crate) lazy: bool,
    /// With -u: how long to try while it is in use (default 10 s)
    #[arg(long, value_name = "TIME", help_heading = "Life")]
    pub(crate) wait: Option<OsString>,
    /// Start messages with 'nbdkit-mount[NAME]'
    #[arg(long, value_name = "NAME", help_heading = "Life")]
    pub(crate) name: Option<String>,
    /// Set a debug flag of a plugin or filter, or of the program (NAME nbdkit)
    #[arg(short = 'D', value_name = "NAME.FLAG=N", action = ArgAction::Append, help_heading = "Life")]
    pub(crate) debug_flags: Vec<String>,
    /// Print the kernel's requests, and debug messages; implies -f
    #[arg(short, long, help_heading = "Life")]
    pub(crate) debug: bool,
    /// Print debug messages
    #[arg(short, long, help_heading = "Life")]
    pub(crate) verbose: bool,
    /// Where errors go: stderr, syslog, null, default or the absolute path of a file
    #[arg(long, value_name = "SINK", help_heading = "Life")]
    pub(crate) log: Option<OsString>,
    /// Lines of messages: text, time (text after a time stamp) or json
    #[arg(long, value_name = "FORMAT", help_heading = "Life")]
    pub(crate) log_format: Option<String>,
    /// Serve metrics for Prometheus and --stats at HOST:PORT, PORT, or a Unix socket
    #[arg(long, value_name = "ADDRESS", help_heading = "Life")]
    pub(crate) metrics: Option<OsString>,

    /// Show throughput on the terminal, in the foreground
    #[arg(long, help_heading = "Life")]
    pub(crate) progress: bool,

    /// List the mounts of this program
    #[arg(long, help_heading = "Instead of mounting")]
    pub(crate) list_mounts: bool,
    /// Show what goes through a mount, or a server with --metrics: live on a terminal, else once
    #[arg(long, value_name = "MOUNTPOINT|ADDRESS", help_heading = "Instead of mounting")]
    pub(crate) stats: Option<PathBuf>,
    /// Write the changes in an overlay (cow-file=) to the disk PLUGIN [[KEY=]VALUE ...] and empty it
    #[arg(long, value_name = "OVERLAY", help_heading = "Instead of mounting")]
    pub(crate) commit: Option<PathBuf>,
    /// Remove an overlay with its changes
    #[arg(long, value_name = "OVERLAY", help_heading = "Instead of mounting")]
    pub(crate) discard: Option<PathBuf>,
    /// JSON on standard output instead of a table or a bar, with --list too
    #[arg(long, help_heading = "Instead of mounting")]
    pub(crate) json: bool,

    /// Print help, with a PLUGIN about that and its filters
    #[arg(long, help_heading = "Information")]
    pub(crate) help: bool,
    /// Print help that fits on a screen
    #[arg(short = 'h', help_heading = "Information")]
    pub(crate) short_help: bool,
    /// List the partitions, volumes and file systems of the disk PLUGIN [[KEY=]VALUE ...]; alone, the plugins and filters
    /// there are, with --json also their parameters
    #[arg(long, help_heading = "Information")]
    pub(crate) list: bool,
    /// Print the version, with a PLUGIN of that and its filters
    #[arg(short = 'V', long, help_heading = "Information")]
    pub(crate) version: bool,
    /// Print how the program was built
    #[arg(long, help_heading = "Information")]
    pub(crate) dump_config: bool,
    /// Print what a PLUGIN can do
    #[arg(long, help_heading = "Information")]
    pub(crate) dump_plugin: bool,
    /// Print the completion script for a shell: bash, zsh or fish
    #[arg(long, value_name = "SHELL", help_heading = "Information")]
    pub(crate) completions: Option<String>,

    /// The plugin and its parameters as one word, where mount(8) gave them so.
    #[arg(skip)]
    pub(crate) source: Option<String>,
}
