//! The command line as meant: what to serve, where to listen and how to live.

use std::{
    ffi::OsString,
    fmt,
    fs::File,
    net::IpAddr,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use nbdkit_core::params;
use nbdkit_nbd::{Config, listen::Family};

use crate::{activation::Inherited, args::Args, privileges::Identity, tls};

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
    /// A port of AF_VSOCK.
    Vsock(u32),
    /// Sockets that the service manager made.
    Inherited(Vec<OwnedFd>),
    /// Standard input and output.
    Stdio,
}

/// What a serving run does.
#[derive(Debug)]
pub(crate) struct Plan {
    /// At least one.
    pub(crate) listen: Vec<Where>,
    pub(crate) selinux_label: Option<String>,
    pub(crate) identity: Identity,
    pub(crate) config: Config,
    /// The parameter of a URI that says where the TLS credentials are, and where that is.
    pub(crate) credentials: Option<(&'static str, PathBuf)>,
    /// What was said of them: `--tls-certificates` and `--tls-psk` as given.
    pub(crate) tls_options: [Option<PathBuf>; 2],
    pub(crate) foreground: bool,
    pub(crate) run: Option<OsString>,
    pub(crate) pidfile: Option<PathBuf>,
    pub(crate) ready: Option<File>,
    pub(crate) exit_with_parent: bool,
    pub(crate) print_uri: bool,
    pub(crate) swap: bool,
    pub(crate) metrics: Option<OsString>,
}

impl Plan {
    /// Checks that the options fit together, and with what was inherited.
    ///
    /// # Errors
    /// Options that exclude each other, and values that make no sense.
    pub(crate) fn new(args: &Args, inherited: Inherited) -> Result<Self> {
        conflicts(args, !inherited.sockets.is_empty())?;
        let foreground = args.foreground
            || args.single
            || args.run.is_some()
            || args.exit_with_parent
            || !inherited.sockets.is_empty();
        Ok(Plan {
            listen: listen(args, inherited.sockets)?,
            selinux_label: args.selinux_label.clone(),
            identity: Identity::new(args.user.as_deref(), args.group.as_deref())?,
            config: config(args)?,
            credentials: tls::source(args),
            tls_options: [args.tls_certificates.clone(), args.tls_psk.clone()],
            foreground,
            run: args.run.clone(),
            pidfile: args.pidfile.as_deref().map(std::path::absolute).transpose().context(NO_DIRECTORY)?,
            ready: inherited.ready,
            exit_with_parent: args.exit_with_parent,
            print_uri: args.print_uri,
            swap: args.swap,
            metrics: args.metrics.clone(),
        })
    }
}

/// The pairs of options that exclude each other.
///
/// # Errors
/// For the first such pair.
pub(crate) fn conflicts(args: &Args, activated: bool) -> Result<()> {
    let ipaddr = ("-i", !args.ipaddr.is_empty());
    let port = ("-p", !args.port.is_empty());
    // With an address the port is that of one more listener.
    let port_alone = ("-p", port.1 && !ipaddr.1);
    let unix = ("-U", !args.unix.is_empty());
    let vsock = ("--vsock", args.vsock);
    let single = ("-s", args.single);
    let run = ("--run", args.run.is_some());
    let dump = ("--dump-plugin", args.dump_plugin);
    let activated = ("socket activation", activated);
    let pairs = [
        (port_alone, unix),
        (port, single),
        (unix, single),
        (single, run),
        (single, dump),
        (vsock, unix),
        (vsock, single),
        (activated, ipaddr),
        (activated, port),
        (activated, run),
        (activated, single),
        (activated, unix),
        (activated, vsock),
    ];
    for (a, b) in pairs {
        if a.1 && b.1 {
            bail!("{} and {} cannot be used together: leave one out", a.0, b.0);
        }
    }
    Ok(())
}

fn listen(args: &Args, activated: Vec<OwnedFd>) -> Result<Vec<Where>> {
    if !activated.is_empty() {
        return Ok(vec![Where::Inherited(activated)]);
    }
    if args.single {
        return Ok(vec![Where::Stdio]);
    }
    let mut places = args.unix.iter().map(|path| unix(path)).collect::<Result<Vec<_>>>()?;
    let default = [String::from("10809")];
    let ports = if args.port.is_empty() { &default[..] } else { &args.port };
    if args.vsock {
        for port in ports {
            places.push(Where::Vsock(params::integer("--port", port.as_ref())?));
        }
    }
    if places.is_empty() && args.run.is_some() && args.port.is_empty() {
        return Ok(vec![Where::Private]);
    }
    let all = [None];
    let chosen: Vec<_> = args.ipaddr.iter().cloned().map(Some).collect();
    let hosts = if places.is_empty() && chosen.is_empty() { &all[..] } else { &chosen };
    for host in hosts {
        places.extend(ports.iter().map(|port| Where::Tcp {
            host: host.clone(),
            port: port.clone(),
            family: match (args.ipv4_only, args.ipv6_only) {
                (true, _) => Family::V4,
                (_, true) => Family::V6,
                _ => Family::Any,
            },
        }));
    }
    Ok(places)
}

fn unix(path: &Path) -> Result<Where> {
    if path.as_os_str() == "-" {
        return Ok(Where::Private);
    }
    ensure!(!path.as_os_str().is_empty(), "-U needs the path of a socket, or '-' for a private one");
    Ok(Where::Unix(std::path::absolute(path).context(NO_DIRECTORY)?))
}

fn config(args: &Args) -> Result<Config> {
    let mut config = Config {
        tls: tls::tls(args)?,
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
    if let Some(max) = args.max_connections.as_deref() {
        let max: u32 = params::integer("--max-connections", max)?;
        ensure!(max > 0, "--max-connections must be at least 1");
        config.max_connections = Some(max as usize);
    }
    if let Some(mask) = args.mask_handshake.as_deref() {
        config.mask_handshake = params::integer("--mask-handshake", mask)?;
    }
    if let Some(timeout) = args.timeout.as_deref() {
        let timeout = params::delay(timeout).context("--timeout")?;
        ensure!(timeout > Duration::ZERO, "--timeout must be longer than 0");
        config.handshake_timeout = Some(timeout);
    }
    if let Some(limits) = args.handshake_limits.as_deref() {
        ensure!(
            args.timeout.is_none() || !limits.split(',').any(|l| l.starts_with("seconds=")),
            "--timeout and --handshake-limits=seconds=… are the same limit: give one of them"
        );
        handshake_limits(&mut config, limits).context("--handshake-limits")?;
    }
    Ok(config)
}

/// Parses `KEY=VALUE,…`.
fn handshake_limits(config: &mut Config, limits: &str) -> Result<()> {
    for limit in limits.split(',') {
        let (key, value) = limit.split_once('=').unwrap_or((limit, ""));
        let text = std::ffi::OsStr::new(value);
        match key {
            "options" => {
                let options: u32 = params::integer(key, text)?;
                ensure!(options > 0, "options must be at least 1");
                config.handshake_options = options as usize;
            }
            "bytes" => {
                config.handshake_bytes = params::size(text)?;
                ensure!(config.handshake_bytes > 0, "bytes must be at least 1");
            }
            "seconds" => {
                let seconds = params::delay(text)?;
                ensure!(seconds > Duration::ZERO, "seconds must be more than 0");
                config.handshake_timeout = Some(seconds);
            }
            _ => bail!("'{limit}' is not options=N, bytes=SIZE or seconds=N"),
        }
    }
    Ok(())
}

/// The address of a server, as a client is given it.
#[derive(Debug, Clone)]
pub(crate) enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// A TCP port, and the address that was asked for; None: of all addresses of this machine.
    Tcp(Option<String>, u16),
    /// An AF_VSOCK port on this machine.
    Vsock(u32),
}

impl Address {
    /// A TCP port of `host`, as `-i` has it. What stands for all addresses is none that a client could connect to.
    pub(crate) fn tcp(host: Option<&str>, port: u16) -> Self {
        let bare = host.map(|host| host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host));
        let host = bare.and_then(|host| match host.parse::<IpAddr>() {
            Ok(address) if address.is_unspecified() => None,
            Ok(IpAddr::V6(_)) => Some(format!("[{host}]")),
            // A scope, as in fe80::1%eth0.
            Err(_) if host.contains(':') => Some(format!("[{}]", host.replace('%', "%25"))),
            _ => Some(host.to_owned()),
        });
        Address::Tcp(host, port)
    }
}

/// An NBD URI (the NBD project's doc/uri.md).
#[derive(Debug)]
pub(crate) struct Uri<'a> {
    /// The server.
    pub(crate) address: &'a Address,
    /// The export; empty: the default one.
    pub(crate) export_name: &'a std::ffi::OsStr,
    /// The name and the path of the parameter that says how to encrypt, if that is required.
    pub(crate) tls: Option<(&'static str, &'a std::path::Path)>,
}

impl fmt::Display for Uri<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut export = escape(self.export_name);
        if !export.is_empty() {
            export.insert(0, '/');
        }
        let nbd = if self.tls.is_some() { "nbds" } else { "nbd" };
        let mut join = '?';
        match self.address {
            Address::Unix(path) => {
                write!(f, "{nbd}+unix://{export}?socket={}", escape(path.as_os_str()))?;
                join = '&';
            }
            Address::Tcp(host, port) => {
                let host = host.as_deref().unwrap_or("localhost");
                write!(f, "{nbd}://{host}:{port}{export}")?;
            }
            Address::Vsock(port) => write!(f, "{nbd}+vsock://1:{port}{export}")?,
        }
        let Some((name, path)) = self.tls else { return Ok(()) };
        write!(f, "{join}{name}={}", escape(path.as_os_str()))
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
        Plan::new(&Args::try_parse_from(words.split(' ')).unwrap(), Inherited::default())
    }

    #[test]
    fn conflicts_are_errors() {
        for bad in [
            "-p 1 -U x",
            "-p 1 -s",
            "-U x -s",
            "-s --run true",
            "-s --dump-plugin",
            "--vsock -U x",
            "--vsock -s",
        ] {
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
        let listen = |words: &str| plan(words).unwrap().listen;
        assert!(matches!(listen("nbdkit memory 1M --run true")[..], [Where::Private]));
        assert!(matches!(listen("nbdkit -p 5 memory 1M --run true")[..], [Where::Tcp { .. }]));
        assert!(matches!(listen("nbdkit --vsock memory 1M --run true")[..], [Where::Vsock(10809)]));
    }

    #[test]
    fn last_family_wins() {
        let family = |words: &str| match plan(words).unwrap().listen[..] {
            [Where::Tcp { family, .. }] => family,
            ref other => panic!("{other:?}"),
        };
        assert!(matches!(family("nbdkit -4 -6 null"), Family::V6));
        assert!(matches!(family("nbdkit -6 -4 null"), Family::V4));
    }

    #[test]
    fn listeners_add_up() {
        let listen = |words: &str| plan(&format!("nbdkit {words} null")).unwrap().listen;
        assert!(matches!(listen("-U /a -U -")[..], [Where::Unix(_), Where::Private]));
        let tcp = |words: &str| {
            let places = listen(words).into_iter();
            let tcp = places.filter_map(|place| match place {
                Where::Tcp { host, port, .. } => Some(format!("{} {port}", host.unwrap_or_default())),
                _ => None,
            });
            tcp.collect::<Vec<_>>()
        };
        assert_eq!(tcp("-p 1 -p 2"), [" 1", " 2"]);
        assert_eq!(tcp("-i a -i b -p 1"), ["a 1", "b 1"]);
        assert_eq!(tcp("-U /x -i a -p 1"), ["a 1"]);
        assert_eq!(tcp("--vsock -i a"), ["a 10809"]);
        assert!(tcp("--vsock -p 1").is_empty() && tcp("-U /x").is_empty());
        assert_eq!(tcp("-r"), [" 10809"]);
    }

    #[test]
    fn uris() {
        let unix = Address::Unix("/tmp/a b".into());
        let uri = |address, name: &str| Uri { address, export_name: name.as_ref(), tls: None }.to_string();
        assert_eq!(uri(&unix, ""), "nbd+unix://?socket=/tmp/a%20b");
        assert_eq!(uri(&unix, "x y"), "nbd+unix:///x%20y?socket=/tmp/a%20b");
        let tcp = |host, name: &str| {
            let address = &Address::tcp(host, 7);
            Uri { address, export_name: name.as_ref(), tls: None }.to_string()
        };
        assert_eq!(tcp(None, ""), "nbd://localhost:7");
        assert_eq!(tcp(Some("0.0.0.0"), ""), "nbd://localhost:7");
        assert_eq!(tcp(Some("::"), "e"), "nbd://localhost:7/e");
        assert_eq!(tcp(Some("127.0.0.2"), ""), "nbd://127.0.0.2:7");
        assert_eq!(tcp(Some("example.com"), ""), "nbd://example.com:7");
        assert_eq!(tcp(Some("::1"), "e"), "nbd://[::1]:7/e");
        assert_eq!(tcp(Some("[::1]"), ""), "nbd://[::1]:7");
        assert_eq!(tcp(Some("fe80::1%eth0"), ""), "nbd://[fe80::1%25eth0]:7");
        let tls = |address| {
            let tls = Some(("tls-psk-file", "/k y".as_ref()));
            Uri { address, export_name: "e".as_ref(), tls }.to_string()
        };
        assert_eq!(tls(&Address::Tcp(None, 7)), "nbds://localhost:7/e?tls-psk-file=/k%20y");
        assert_eq!(tls(&unix), "nbds+unix:///e?socket=/tmp/a%20b&tls-psk-file=/k%20y");
    }
}
