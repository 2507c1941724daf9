//! The life of a server, from a configured chain to the end.

use std::{
    ffi::OsString,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use anyhow::{Context as _, Result};
use nbdkit_core::{Chain, Stop};
use nbdkit_nbd::listen::{self, Listener};

use crate::{
    captive, daemon, parent, pidfile,
    plan::{Address, Plan, Uri, Where},
    signals,
};

/// Serves until a signal, the `--run` command's end, or the end of the one client of `-s`. Returns the exit code.
///
/// # Errors
/// Anything that keeps the server from starting or ends it.
pub(crate) fn serve(mut chain: Chain, plan: Plan) -> Result<u8> {
    if plan.exit_with_parent {
        parent::exit_with_parent()?;
    }
    // First: a layer that prints must not print to the client.
    let stdio = matches!(plan.listen, Where::Stdio).then(take_stdio).transpose()?;
    chain.get_ready()?;
    signals::block()?;
    if plan.swap {
        rustix::mm::mlockall(rustix::mm::MlockAllFlags::CURRENT | rustix::mm::MlockAllFlags::FUTURE)
            .context("--swap: cannot lock memory: raise the limit (ulimit -l) or run as root")?;
    }
    let mut bound = Bound::new(&plan.listen)?;

    let ready = if plan.foreground { daemon::Ready::nobody() } else { daemon::fork_to_background()? };
    let stop = Arc::new(Stop::new());
    signals::watch(stop.clone())?;
    if let Some(path) = &plan.pidfile {
        pidfile::write(path)?;
    }
    let chain = Arc::new(chain);
    chain.after_fork()?;
    let captive = start(&plan, &bound, &stop)?;
    ready.tell(plan.verbose)?;
    bound.unlink = None;

    match stdio {
        Some((input, output)) => nbdkit_nbd::serve_one(chain.clone(), plan.config, input, output, stop)?,
        None => nbdkit_nbd::serve(chain.clone(), plan.config, std::mem::take(&mut bound.listeners), stop)?,
    }
    chain.cleanup();
    Ok(captive.map_or(0, |captive| captive.status()))
}

/// Prints the URI and starts the `--run` command.
fn start(plan: &Plan, bound: &Bound, stop: &Arc<Stop>) -> Result<Option<captive::Captive>> {
    let export_name = &plan.config.export_name;
    let uri = bound.address.as_ref().map(|address| Uri { address, export_name }.to_string());
    if let (true, Some(uri)) = (plan.print_uri, &uri) {
        use std::io::Write;
        let uri = captive::quote(uri.as_ref());
        writeln!(std::io::stdout(), "{}", uri.display())?;
    }
    let Some(command) = &plan.run else { return Ok(None) };
    let uri: OsString = uri.unwrap_or_default().into();
    let (socket, port) = match &bound.address {
        Some(Address::Unix(path)) => (path.clone().into_os_string(), OsString::new()),
        Some(Address::Tcp(port)) => (OsString::new(), port.to_string().into()),
        None => Default::default(),
    };
    let variables = [
        ("uri", uri.clone()),
        ("nbd", uri),
        ("unixsocket", socket),
        ("port", port),
        ("exportname", export_name.clone()),
        ("tls", "0".into()),
        ("tls_certificates", OsString::new()),
        ("tls_psk", OsString::new()),
    ];
    captive::run(command, &variables, stop.clone()).map(Some)
}

/// The sockets, and the private directory that goes when the server does.
struct Bound {
    listeners: Vec<Listener>,
    address: Option<Address>,
    /// A named socket to remove if the start fails; one that has served stays, as scripts expect.
    unlink: Option<std::path::PathBuf>,
    _private: Option<tempfile::TempDir>,
}

impl Drop for Bound {
    fn drop(&mut self) {
        if let Some(path) = &self.unlink {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Bound {
    fn new(place: &Where) -> Result<Self> {
        let mut private = None;
        let mut unlink = None;
        let (listeners, address) = match place {
            Where::Stdio => (Vec::new(), None),
            Where::Unix(path) => {
                let listener = listen::unix(path)?;
                unlink = Some(path.clone());
                (vec![listener], Some(Address::Unix(path.clone())))
            }
            Where::Private => {
                let directory = tempfile::Builder::new()
                    .prefix("nbdkit")
                    .tempdir()
                    .context("cannot make a directory for the socket")?;
                let path = directory.path().join("socket");
                private = Some(directory);
                (vec![listen::unix(&path)?], Some(Address::Unix(path)))
            }
            Where::Tcp { host, port, family } => {
                let listeners = listen::tcp(host.as_deref(), port, *family)?;
                let port = listeners.iter().find_map(Listener::local_port);
                (listeners, port.map(Address::Tcp))
            }
        };
        Ok(Bound { listeners, address, unlink, _private: private })
    }
}

/// Takes the client's connection from standard input and output, which then point to /dev/null, so that nothing
/// that prints can break the protocol.
fn take_stdio() -> Result<(OwnedFd, OwnedFd)> {
    let input = std::io::stdin().as_fd().try_clone_to_owned()?;
    let output = std::io::stdout().as_fd().try_clone_to_owned()?;
    let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    Ok((input, output))
}
