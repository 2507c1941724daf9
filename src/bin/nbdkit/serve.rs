//! The life of a server, from a configured chain to the end.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, Write},
    os::fd::AsFd,
    path::PathBuf,
    sync::Arc,
};

use anyhow::{Context as _, Result};
use nbdkit_cli::{
    captive, daemon, descriptors, ending, logger, metrics, parent, pidfile, readiness,
    signals::{self, Events},
    stdio::Stdio,
};
use nbdkit_core::Chain;
use nbdkit_nbd::Tls;
use nbdkit_nbd::listen::{self, Listener};

use crate::{
    plan::{Address, Plan, Uri, Where},
    privileges::Identity,
    selinux, stats,
};

/// Serves until a signal, the `--run` command's end, or the end of the one client of `-s`. Returns the exit code.
/// `taken`: standard input and output, which are the one client's.
///
/// # Errors
/// Anything that keeps the server from starting or ends it.
pub(crate) fn serve(mut chain: Chain, mut plan: Plan, taken: Option<Stdio>) -> Result<u8> {
    if plan.exit_with_parent {
        parent::exit_with_parent()?;
    }
    if plan.metrics.is_some() {
        chain.count_requests();
    }
    chain.set_readonly(plan.config.readonly);
    descriptors::raise_limit();
    chain.get_ready()?;
    let client_on_stdio = taken.is_some();
    let stdio = taken.map_or_else(Stdio::take, Ok)?;
    signals::block()?;
    if plan.swap {
        rustix::mm::mlockall(rustix::mm::MlockAllFlags::CURRENT | rustix::mm::MlockAllFlags::FUTURE)
            .context("--swap: cannot lock memory: raise the limit (ulimit -l) or run as root")?;
    }
    let places = std::mem::take(&mut plan.listen);
    let mut bound =
        selinux::with_label(plan.selinux_label.as_deref(), || Bound::new(places, &plan.identity))?;

    let mut metrics = plan.metrics.as_deref().map(metrics::Endpoint::bind).transpose()?;
    let stop = chain.server().clone();
    // The command keeps the caller's rights; unless there are rights to lose, it starts when all is ready.
    let drops = plan.identity.changes();
    let mut captive = if drops { start(&plan, &bound, &stdio)? } else { None };
    if drops {
        plan.identity.assume()?;
        if plan.exit_with_parent {
            // The kernel forgets it with the old rights.
            parent::exit_with_parent()?;
        }
    }
    let ready = if plan.foreground { daemon::Ready::nobody() } else { daemon::fork_to_background()? };
    // With a command this thread handles them while it waits for clients, which saves a thread where the start counts.
    let mut events = Some(Events::new(stop.clone())?);
    if let Some(events) = events.take_if(|_| plan.run.is_none()) {
        events.handle_on_thread()?;
    }
    if let Some(path) = &plan.pidfile {
        pidfile::write(path)?;
    }
    let chain = Arc::new(chain);
    chain.after_fork()?;
    if let Some(metrics) = &mut metrics {
        metrics.serve(chain.clone(), nbdkit_fuse::stats::document)?;
        let counted = Arc::downgrade(&chain);
        signals::on_report(move || counted.upgrade().map(|chain| stats::report(&chain)).unwrap_or_default());
    }
    if !drops {
        captive = start(&plan, &bound, &stdio)?;
    }
    ready.tell(logger::keeps_stderr())?;
    if !plan.foreground {
        logger::in_background();
    }
    if let Some(mut file) = plan.ready.take() {
        file.write_all(b"READY=1\n").context("--ready-fd: cannot write")?;
    }
    readiness::notify("READY=1\n")?;
    bound.unlink.clear();

    if client_on_stdio {
        nbdkit_nbd::serve_one(chain.clone(), plan.config, stdio.input, stdio.output, stop)?;
    } else {
        drop(stdio);
        let handle = || events.iter().for_each(Events::handle);
        let auxiliary = events
            .as_ref()
            .map(|events| nbdkit_nbd::AuxiliaryDescriptor { fd: events.as_fd(), ready: &handle });
        let listeners = std::mem::take(&mut bound.listeners);
        nbdkit_nbd::serve(chain.clone(), plan.config, listeners, stop, auxiliary)?;
    }
    ending::clean_up(chain);
    Ok(captive.map_or(0, |captive| captive.status(events.as_ref())))
}

/// Prints the URI and starts the `--run` command.
fn start(plan: &Plan, bound: &Bound, stdio: &Stdio) -> Result<Option<captive::Captive>> {
    let export_name = &plan.config.export_name;
    let credentials = plan.credentials.as_ref().map(|(name, path)| (*name, &**path));
    let (level, tls) = match &plan.config.tls {
        Tls::Off => ("0", None),
        #[cfg(feature = "tls")]
        Tls::On(_) => ("1", None),
        #[cfg(feature = "tls")]
        Tls::Require(_) => ("2", credentials),
    };
    // As given: a command runs in the directory that they are relative to. In the URI, which may go elsewhere, they are
    // absolute.
    let given = |option: &Option<PathBuf>| option.clone().unwrap_or_default().into_os_string();
    let [certificates, keys] = &plan.tls_options;
    let uris = bound.addresses.iter().map(|address| Uri { address, export_name, tls }.to_string());
    let uris: Vec<String> = uris.collect();
    if plan.print_uri {
        print_uris(&uris, File::from(stdio.output.try_clone()?))?;
    }
    let Some(command) = &plan.run else { return Ok(None) };
    let uri: OsString = uris.into_iter().next().unwrap_or_default().into();
    let socket = bound.addresses.iter().find_map(|address| match address {
        Address::Unix(path) => Some(path.clone().into_os_string()),
        _ => None,
    });
    let port = bound.addresses.iter().find_map(|address| match address {
        Address::Tcp(_, port) => Some(port.to_string()),
        Address::Vsock(port) => Some(port.to_string()),
        Address::Unix(_) => None,
    });
    let variables = [
        ("uri", uri.clone()),
        ("nbd", uri),
        ("unixsocket", socket.unwrap_or_default()),
        ("port", port.unwrap_or_default().into()),
        ("exportname", export_name.clone()),
        ("tls", level.into()),
        ("tls_certificates", given(certificates)),
        ("tls_psk", given(keys)),
    ];
    captive::run(command, &variables, stdio).map(Some)
}

/// Prints the URIs as they are, for programs; then, for people, the first as a shell takes it and a command that
/// connects.
fn print_uris(uris: &[String], mut out: File) -> Result<()> {
    for uri in uris {
        writeln!(out, "{uri}")?;
    }
    if let Some(uri) = uris.first() {
        let uri = captive::quote(uri.as_ref());
        let uri = uri.display();
        writeln!(out, "In a shell: {uri}\nTo connect: nbdinfo {uri}")?;
    }
    Ok(out.flush()?)
}

/// The sockets, of which the private ones go when the server does.
#[derive(Default)]
struct Bound {
    listeners: Vec<Listener>,
    /// In the order of the command line, without those of a service manager.
    addresses: Vec<Address>,
    /// Named sockets to remove if the start fails; those that have served stay, as scripts expect.
    unlink: Vec<PathBuf>,
    private: Vec<tempfile::TempPath>,
}

impl Drop for Bound {
    fn drop(&mut self) {
        for path in &self.unlink {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Bound {
    fn new(places: Vec<Where>, identity: &Identity) -> Result<Self> {
        let mut bound = Bound::default();
        for place in places {
            bound.listen(place, identity)?;
        }
        for listener in &bound.addresses {
            log::debug!("listening on {listener:?}");
        }
        Ok(bound)
    }

    fn listen(&mut self, place: Where, identity: &Identity) -> Result<()> {
        match place {
            Where::Stdio => {}
            Where::Inherited(fds) => self.listeners.extend(fds.into_iter().map(listen::from_fd)),
            Where::Unix(path) => {
                self.listeners.push(listen::unix(&path)?);
                self.unlink.push(path.clone());
                self.addresses.push(Address::Unix(path));
            }
            Where::Private => {
                // In no directory of its own: others could look into that as well, and it takes longer than the rest.
                let (listener, path) = private()?.into_parts();
                self.listeners.push(listener);
                if identity.changes() {
                    identity.own(&path)?;
                }
                self.addresses.push(Address::Unix(path.to_path_buf()));
                self.private.push(path);
            }
            Where::Tcp { host, port, family } => {
                let listeners = listen::tcp(host.as_deref(), &port, family)?;
                let port = listeners.iter().find_map(Listener::local_port);
                self.addresses.extend(port.map(|port| Address::tcp(host.as_deref(), port)));
                self.listeners.extend(listeners);
            }
            Where::Vsock(port) => {
                self.listeners.push(listen::vsock(port)?);
                self.addresses.push(Address::Vsock(port));
            }
        }
        Ok(())
    }
}

/// Makes a socket with a random name in the directory for temporary files, or in a usual one if the path would be too
/// long for a socket.
fn private() -> Result<tempfile::NamedTempFile<Listener>> {
    let directory = std::env::temp_dir();
    let is_long = directory.as_os_str().len() + "/nbdkitXXXXXX".len() > listen::UNIX_PATH_MAX;
    let short: &[&str] = if is_long { &["/tmp", "/var/tmp", "/run"] } else { &[] };
    let mut first = None;
    for directory in short.iter().map(PathBuf::from).chain([directory]) {
        let mut refused = None;
        let made = tempfile::Builder::new().prefix("nbdkit").make_in(&directory, |path| {
            listen::private(path).map_err(|e| {
                let taken = path.exists();
                refused = Some(e);
                if taken { io::ErrorKind::AddrInUse.into() } else { io::ErrorKind::Other.into() }
            })
        });
        match made {
            Ok(made) => return Ok(made),
            Err(e) => first = first.or(Some(refused.unwrap_or_else(|| e.into()))),
        }
    }
    Err(first.context("there is no directory for it")?)
        .context("a private socket is made in the directory TMPDIR")
}
