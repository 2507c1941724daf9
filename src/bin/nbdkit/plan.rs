//! The command line as meant: what to serve, where to listen and how to live.

use std::{ffi::OsString, fmt, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use nbdkit_core::params;
use nbdkit_nbd::{Config, listen::Family};

use crate::args::Args;

/// Why a relative path has no absolute form.
const NO_DIRECTORY: &str = "cannot find the current directory: change to one that exists";

/// Where clients come from.
#[derive(Debug)]
pub(crate) enum Where {
    /// A Unix socket with a name.
    Unix(PathBuf),
    /// A Unix socket in a private directory.
    Private,
    /// TCP.
    Tcp { host: Option<String>, port: String, family: Family },
    /// Standard input and output.
    Stdio,
}

/// What a serving run does.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) listen: Where,
    pub(crate) config: Config,
    pub(crate) foreground: bool,
    pub(crate) run: Option<OsString>,
    pub(crate) pidfile: Option<PathBuf>,
    pub(crate) exit_with_parent: bool,
    pub(crate) print_uri: bool,
    pub(crate) swap: bool,
    pub(crate) verbose: bool,
}

impl Plan {
    /// Checks that the options fit together.
    ///
    /// # Errors
    /// Options that exclude each other, and values that make no sense.
    pub(crate) fn new(args: &Args) -> Result<Self> {
        conflicts(args)?;
        let foreground = args.foreground || args.single || args.run.is_some() || args.exit_with_parent;
        Ok(Plan {
            listen: listen(args)?,
            config: config(args)?,
            foreground,
            run: args.run.clone(),
            pidfile: args.pidfile.as_deref().map(std::path::absolute).transpose().context(NO_DIRECTORY)?,
            exit_with_parent: args.exit_with_parent,
            print_uri: args.print_uri,
            swap: args.swap,
            verbose: args.verbose,
        })
    }
}

/// The pairs of options that exclude each other.
fn conflicts(args: &Args) -> Result<()> {
    let port = ("-p", args.port.is_some());
    let unix = ("-U", args.unix.is_some());
    let single = ("-s", args.single);
    let run = ("--run", args.run.is_some());
    for (a, b) in [(port, unix), (port, single), (unix, single), (single, run)] {
        if a.1 && b.1 {
            bail!("{} and {} cannot be used together: leave one out", a.0, b.0);
        }
    }
    Ok(())
}

fn listen(args: &Args) -> Result<Where> {
    if args.single {
        return Ok(Where::Stdio);
    }
    Ok(match &args.unix {
        Some(path) if path.as_os_str() == "-" => Where::Private,
        Some(path) => {
            ensure!(!path.as_os_str().is_empty(), "-U needs the path of a socket, or '-' for a private one");
            Where::Unix(std::path::absolute(path).context(NO_DIRECTORY)?)
        }
        None if args.run.is_some() && args.port.is_none() => Where::Private,
        None => Where::Tcp {
            host: args.ipaddr.clone(),
            port: args.port.clone().unwrap_or_else(|| "10809".into()),
            family: match (args.ipv4_only, args.ipv6_only) {
                (true, _) => Family::V4,
                (_, true) => Family::V6,
                _ => Family::Any,
            },
        },
    })
}

fn config(args: &Args) -> Result<Config> {
    let mut config = Config {
        readonly: args.readonly,
        oldstyle: args.oldstyle,
        structured_replies: !args.no_sr,
        meta_contexts: !args.no_mc,
        keepalive: args.keepalive,
        export_name: args.exportname.clone().unwrap_or_default(),
        ..Config::default()
    };
    if let Some(threads) = args.threads.as_deref() {
        match params::integer::<u16>("--threads", threads)? {
            0 => {}
            n => config.threads = n.into(),
        }
    }
    if let Some(mask) = args.mask_handshake.as_deref() {
        config.mask_handshake = params::integer("--mask-handshake", mask)?;
    }
    if let Some(timeout) = args.timeout.as_deref() {
        let timeout = params::delay(timeout).context("--timeout")?;
        ensure!(timeout > Duration::ZERO, "--timeout must be longer than 0");
        config.handshake_timeout = Some(timeout);
    }
    Ok(config)
}

/// The address of a server, as a client is given it.
#[derive(Debug, Clone)]
pub(crate) enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// A TCP port on this machine.
    Tcp(u16),
}

/// An NBD URI (the NBD project's doc/uri.md).
#[derive(Debug)]
pub(crate) struct Uri<'a> {
    /// The server.
    pub(crate) address: &'a Address,
    /// The export; empty: the default one.
    pub(crate) export_name: &'a std::ffi::OsStr,
}

impl fmt::Display for Uri<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut export = escape(self.export_name);
        if !export.is_empty() {
            export.insert(0, '/');
        }
        match self.address {
            Address::Unix(path) => {
                write!(f, "nbd+unix://{export}?socket={}", escape(path.as_os_str()))
            }
            Address::Tcp(port) => write!(f, "nbd://localhost:{port}{export}"),
        }
    }
}

/// Percent-escapes what may not stand in a path or a query.
fn escape(text: &std::ffi::OsStr) -> String {
    let mut out = String::new();
    for &b in text.as_encoded_bytes() {
        if b.is_ascii_alphanumeric() || b"-._~/".contains(&b) {
            out.push(char::from(b));
        } else {
            out += &format!("%{b:02X}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn plan(words: &str) -> Result<Plan> {
        Plan::new(&Args::try_parse_from(words.split(' ')).unwrap())
    }

    #[test]
    fn conflicts_are_errors() {
        for bad in ["-p 1 -U x", "-p 1 -s", "-U x -s", "-s --run true"] {
            let error = plan(&format!("nbdkit {bad} memory 1M")).unwrap_err().to_string();
            assert!(error.contains("cannot be used together"), "{bad}: {error}");
        }
    }

    #[test]
    fn options_may_follow_parameters() {
        let args = Args::try_parse_from("nbdkit memory 1M --filter=cow -r x=y".split(' ')).unwrap();
        assert_eq!(args.parameters, ["1M", "x=y"]);
        assert_eq!(args.filter, ["cow"]);
        assert!(args.readonly);
    }

    #[test]
    fn run_implies_a_private_socket() {
        assert!(matches!(plan("nbdkit memory 1M --run true").unwrap().listen, Where::Private));
        assert!(matches!(plan("nbdkit -p 5 memory 1M --run true").unwrap().listen, Where::Tcp { .. }));
    }

    #[test]
    fn last_family_wins() {
        let family = |words: &str| match plan(words).unwrap().listen {
            Where::Tcp { family, .. } => family,
            other => panic!("{other:?}"),
        };
        assert!(matches!(family("nbdkit -4 -6 null"), Family::V6));
        assert!(matches!(family("nbdkit -6 -4 null"), Family::V4));
    }

    #[test]
    fn uris() {
        let unix = Address::Unix("/tmp/a b".into());
        let uri = |address, name: &str| Uri { address, export_name: name.as_ref() }.to_string();
        assert_eq!(uri(&unix, ""), "nbd+unix://?socket=/tmp/a%20b");
        assert_eq!(uri(&unix, "x y"), "nbd+unix:///x%20y?socket=/tmp/a%20b");
        assert_eq!(uri(&Address::Tcp(7), ""), "nbd://localhost:7");
        assert_eq!(uri(&Address::Tcp(7), "e"), "nbd://localhost:7/e");
    }
}
