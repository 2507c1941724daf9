//! The command line as typed. What it means is plan.rs's matter.

use std::{ffi::OsString, path::PathBuf};

use clap::{ArgAction, Parser};

/// The options that `-h` shows.
pub(crate) const COMMON: [&str; 13] = [
    "filter",
    "readonly",
    "unix",
    "port",
    "ipaddr",
    "exportname",
    "tls",
    "foreground",
    "run",
    "pidfile",
    "print-uri",
    "verbose",
    "list",
];

/// Options of nbdkit(1).
#[derive(Debug, Parser)]
#[command(
    name = "nbdkit",
    about = "Serves virtual disks over the NBD protocol",
    override_usage = "nbdkit [OPTIONS] PLUGIN [[KEY=]VALUE | @FILE ...]",
    disable_help_flag = true,
    disable_version_flag = true,
    args_override_self = true,
    after_help = "Examples:\n  nbdkit file disk.img                        serve a file on port 10809\n  \
                  nbdkit -U - memory 1G --run 'nbdinfo \"$uri\"'  a RAM disk for one command\n  \
                  nbdkit --filter=cow file disk.img           writes go to a temporary overlay"
)]
pub(crate) struct Args {
    /// Plugin, by name
    #[arg(value_name = "PLUGIN")]
    pub(crate) plugin: Option<OsString>,
    /// Parameters of the plugin and the filters
    #[arg(value_name = "[KEY=]VALUE")]
    pub(crate) parameters: Vec<OsString>,

    /// Filter over the plugin; repeat for more, the first is the outermost
    #[arg(long, value_name = "FILTER", action = ArgAction::Append, help_heading = "Chain")]
    pub(crate) filter: Vec<OsString>,
    /// Offer the disk read-only
    #[arg(short, long, alias = "read-only", help_heading = "Chain")]
    pub(crate) readonly: bool,
    /// Requests of one connection that may run at once (default 16)
    #[arg(short, long, value_name = "N", help_heading = "Chain")]
    pub(crate) threads: Option<OsString>,

    /// Listen on this Unix socket; '-' makes a private one; repeat for more
    #[arg(short = 'U', long = "unix", value_name = "SOCKET", action = ArgAction::Append, help_heading = "Listening")]
    pub(crate) unix: Vec<PathBuf>,
    /// TCP port (default 10809; 0 lets the kernel choose); repeat for more
    #[arg(short, long, value_name = "PORT", action = ArgAction::Append, help_heading = "Listening")]
    pub(crate) port: Vec<String>,
    /// TCP address (default: all), also beside -U; repeat for more
    #[arg(
        short,
        long,
        alias = "ip-addr",
        value_name = "ADDR",
        action = ArgAction::Append,
        help_heading = "Listening"
    )]
    pub(crate) ipaddr: Vec<String>,
    /// Listen on AF_VSOCK, for virtual machines and their host
    #[arg(long, help_heading = "Listening")]
    pub(crate) vsock: bool,
    /// IPv4 only
    #[arg(short = '4', long, overrides_with = "ipv6_only", help_heading = "Listening")]
    pub(crate) ipv4_only: bool,
    /// IPv6 only
    #[arg(short = '6', long, overrides_with = "ipv4_only", help_heading = "Listening")]
    pub(crate) ipv6_only: bool,
    /// Serve one client on standard input and output
    #[arg(short, long, alias = "stdin", help_heading = "Listening")]
    pub(crate) single: bool,
    /// Let TCP notice dead clients
    #[arg(long, alias = "keep-alive", help_heading = "Listening")]
    pub(crate) keepalive: bool,
    /// Clients served at once; more have to wait
    #[arg(long, value_name = "N", help_heading = "Listening")]
    pub(crate) max_connections: Option<OsString>,
    /// SELinux label of the sockets
    #[arg(long, value_name = "LABEL", help_heading = "Listening")]
    pub(crate) selinux_label: Option<String>,

    /// Newstyle handshake (the default)
    #[arg(short, long, alias = "new-style", overrides_with = "oldstyle", help_heading = "Protocol")]
    pub(crate) newstyle: bool,
    /// Oldstyle handshake
    #[arg(short, long, alias = "old-style", overrides_with = "newstyle", help_heading = "Protocol")]
    pub(crate) oldstyle: bool,
    /// Export name in the URI, and for oldstyle clients
    #[arg(
        short,
        long = "exportname",
        aliases = ["export", "export-name"],
        value_name = "NAME",
        help_heading = "Protocol"
    )]
    pub(crate) exportname: Option<OsString>,
    /// Longest time from connect to the end of the handshake, such as 10s
    #[arg(long, alias = "time-out", value_name = "DELAY", help_heading = "Protocol")]
    pub(crate) timeout: Option<OsString>,
    /// Bounds on a handshake: options=N,bytes=SIZE,seconds=N, each may be left out
    #[arg(long, value_name = "LIMITS", help_heading = "Protocol")]
    pub(crate) handshake_limits: Option<String>,
    /// Keep only these handshake flags (for testing)
    #[arg(long, value_name = "MASK", help_heading = "Protocol")]
    pub(crate) mask_handshake: Option<OsString>,
    /// Refuse structured replies (for testing)
    #[arg(long = "no-sr", alias = "no-structured-replies", help_heading = "Protocol")]
    pub(crate) no_sr: bool,
    /// Refuse metadata contexts (for testing)
    #[arg(long = "no-mc", alias = "no-meta-contexts", help_heading = "Protocol")]
    pub(crate) no_mc: bool,

    /// Encryption: off, on or require (default: on if there are certificates)
    #[arg(long, value_name = "MODE", help_heading = "TLS")]
    pub(crate) tls: Option<String>,
    /// Directory of ca-cert.pem, server-cert.pem, server-key.pem and perhaps ca-crl.pem
    #[arg(long, value_name = "DIR", help_heading = "TLS")]
    pub(crate) tls_certificates: Option<PathBuf>,
    /// File of pre-shared keys (USER:HEXKEY lines), used instead of certificates
    #[arg(long, value_name = "FILE", help_heading = "TLS")]
    pub(crate) tls_psk: Option<PathBuf>,
    /// Clients need a certificate too
    #[arg(long, help_heading = "TLS")]
    pub(crate) tls_verify_peer: bool,
    /// Versions and ciphers, as GnuTLS or OpenSSL has them; NORMAL for the default, @SYSTEM for the machine's
    #[arg(long, value_name = "CIPHERS", help_heading = "TLS")]
    pub(crate) tls_priority: Option<String>,

    /// Stay in the foreground
    #[arg(short, long, alias = "no-fork", help_heading = "Life")]
    pub(crate) foreground: bool,
    /// Run a shell command with $uri set, and exit with it
    #[arg(long, value_name = "COMMAND", help_heading = "Life")]
    pub(crate) run: Option<OsString>,
    /// Write the process ID here once ready
    #[arg(short = 'P', long, alias = "pid-file", value_name = "FILE", help_heading = "Life")]
    pub(crate) pidfile: Option<PathBuf>,
    /// Write READY=1 to this file descriptor once ready
    #[arg(long, value_name = "FD", help_heading = "Life")]
    pub(crate) ready_fd: Option<OsString>,
    /// Become this user once the sockets are there
    #[arg(short, long, value_name = "USER", help_heading = "Life")]
    pub(crate) user: Option<OsString>,
    /// Become this group once the sockets are there
    #[arg(short, long, value_name = "GROUP", help_heading = "Life")]
    pub(crate) group: Option<OsString>,
    /// End when the parent process does
    #[arg(long, help_heading = "Life")]
    pub(crate) exit_with_parent: bool,
    /// Print the URI on standard output, and how to connect
    #[arg(
        long,
        aliases = ["print-url", "show-uri", "show-url"],
        help_heading = "Life"
    )]
    pub(crate) print_uri: bool,
    /// Start messages with 'nbdkit[NAME]'
    #[arg(long, value_name = "NAME", help_heading = "Life")]
    pub(crate) name: Option<String>,
    /// Keep the server out of swap
    #[arg(long, help_heading = "Life")]
    pub(crate) swap: bool,
    /// Where errors go: stderr, syslog, null, default or the absolute path of a file
    #[arg(long, value_name = "SINK", help_heading = "Life")]
    pub(crate) log: Option<OsString>,
    /// Lines of messages: text, time (text after a time stamp) or json
    #[arg(long, value_name = "FORMAT", help_heading = "Life")]
    pub(crate) log_format: Option<String>,
    /// Serve metrics for Prometheus and --stats at HOST:PORT, PORT, or a Unix socket
    #[arg(long, value_name = "ADDRESS", help_heading = "Life")]
    pub(crate) metrics: Option<OsString>,
    /// Print debug messages
    #[arg(short, long, help_heading = "Life")]
    pub(crate) verbose: bool,

    /// Set a debug flag of a plugin or filter, or of the server (NAME nbdkit)
    #[arg(short = 'D', long, value_name = "NAME.FLAG=N", action = ArgAction::Append, help_heading = "Life")]
    pub(crate) debug: Vec<String>,

    /// Print help, with a PLUGIN about that and its filters
    #[arg(long, help_heading = "Information")]
    pub(crate) help: bool,
    /// Print help that fits on a screen
    #[arg(short = 'h', help_heading = "Information")]
    pub(crate) short_help: bool,
    /// Print the plugins and filters there are, with --json also their parameters
    #[arg(long, help_heading = "Information")]
    pub(crate) list: bool,
    /// Print the version, with a PLUGIN of that and its filters
    #[arg(short = 'V', long, help_heading = "Information")]
    pub(crate) version: bool,
    /// Show what goes through a server with --metrics, or a mount: live on a terminal, else once
    #[arg(long, value_name = "ADDRESS|MOUNTPOINT", help_heading = "Information")]
    pub(crate) stats: Option<OsString>,
    /// With --list and --stats, JSON instead of a table
    #[arg(long, help_heading = "Information")]
    pub(crate) json: bool,
    /// Print how the server was built
    #[arg(long, help_heading = "Information")]
    pub(crate) dump_config: bool,
    /// Print what a PLUGIN can do
    #[arg(long, help_heading = "Information")]
    pub(crate) dump_plugin: bool,
    /// Print the options with one letter
    #[arg(long, hide = true)]
    pub(crate) short_options: bool,
    /// Print the options with a name
    #[arg(long, hide = true)]
    pub(crate) long_options: bool,
    /// Print the completion script for a shell: bash, zsh or fish
    #[arg(long, value_name = "SHELL", help_heading = "Information")]
    pub(crate) completions: Option<String>,
}
