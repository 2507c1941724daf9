//! The nbd plugin: a disk of another NBD server.
//!
//! This file owns the parameters; `uri` reads URIs, `target` and `command` get a socket, `handshake` comes to terms with the
//! server. `remote` is an export that is agreed on, with `lane` for each connection and `receiver` for what comes by it;
//! `reactor` has the threads. `disk` turns requests of ours into the server's.

use std::{
    ffi::{OsStr, OsString},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use nbdkit_core::{Errno, Exports, Handle, Info, Open, Plugin, Result, ShutdownFlag, params, sync::Mutex};
use rustix::net::{SocketType, sockopt};

use self::{
    command::Command,
    disk::Disk,
    handshake::Agreed,
    reactor::Reactors,
    remote::{Remote, Source},
    target::{Address, DEFAULT_PORT, Target, port_number},
    tls::{Encryption, Mode, TlsOptions},
    uri::Uri,
    wire::Wire,
};
use crate::inherit::inherited;

mod command;
mod disk;
#[cfg(feature = "tls")]
mod encrypted;
mod flight;
mod handshake;
mod lane;
mod reactor;
mod receiver;
mod remote;
mod target;
mod tls;
mod uri;
mod wire;

/// How long a server may do nothing while it has something to do, unless the user says otherwise.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Connections to a server for each client at most.
const CONNECTIONS: usize = 16;

pub(crate) use uri::is_uri;

pub(crate) fn new() -> Box<dyn Plugin> {
    Box::<NbdPlugin>::default()
}

#[derive(Default)]
struct NbdPlugin {
    given: Given,
    /// From `config_complete` on.
    source: Option<Arc<Source>>,
    reactors: Reactors,
    /// With `shared=true`.
    shared: Mutex<Option<Arc<Remote>>>,
    /// A connection that was made to ask something, for the next client.
    spare: Mutex<Option<(Wire, Agreed)>>,
    /// The metadata contexts beside `base:allocation`, once they are known.
    contexts: Mutex<Option<Vec<String>>>,
}

/// Which server is meant.
enum Place {
    Uri(Box<Uri>),
    Host(String),
    Socket(PathBuf),
    Vsock(u32),
    Fd(std::os::fd::OwnedFd),
    Command(OsString),
}

/// The parameters.
#[derive(Default)]
struct Given {
    /// With the name of its parameter.
    place: Option<(&'static str, Place)>,
    port: Option<u32>,
    arguments: Vec<OsString>,
    export: Option<OsString>,
    shared: Option<bool>,
    dynamic: bool,
    retry: u32,
    connections: Option<usize>,
    timeout: Option<Option<Duration>>,
    tls: TlsOptions,
}

impl Given {
    fn set_place(&mut self, key: &'static str, place: Place) -> anyhow::Result<()> {
        if let Some((earlier, _)) = &self.place {
            ensure!(*earlier != key, "{key}= was given twice: a server is enough");
            bail!("{earlier}= and {key}= cannot be used together: name one server");
        }
        self.place = Some((key, place));
        Ok(())
    }

    fn export(&self) -> OsString {
        self.export.clone().unwrap_or_default()
    }

    /// Whether all clients use the same connections.
    fn is_shared(&self) -> bool {
        let single = matches!(self.place, Some((_, Place::Fd(_) | Place::Command(_))));
        single || self.shared.unwrap_or(false)
    }

    fn check(&self) -> anyhow::Result<()> {
        let place = self.place.as_ref().map(|(key, place)| (*key, place));
        let Some((key, place)) = place else {
            bail!(
                "you must supply [uri=]URI, hostname=HOST, socket=PATH, vsock=CID, socket-fd=FD or \
                 command=COMMAND after the plugin name"
            )
        };
        let takes_port = matches!(place, Place::Host(_) | Place::Vsock(_));
        ensure!(self.port.is_none() || takes_port, "port= is for hostname= and vsock=, not for {key}=");
        let runs = matches!(place, Place::Command(_));
        ensure!(self.arguments.is_empty() || runs, "arg= is for command=: add that");
        if self.dynamic {
            ensure!(self.export.is_none(), "export= and dynamic-export=true cannot be used together");
            ensure!(
                !self.is_shared(),
                "dynamic-export=true needs a connection for each client, which {} does not give",
                if self.shared == Some(true) { "shared=true" } else { key }
            );
        }
        if matches!(place, Place::Fd(_)) {
            ensure!(
                self.connections.unwrap_or(1) == 1,
                "connections= needs a server that can be connected to, and socket-fd= is one connection"
            );
        }
        Ok(())
    }

    /// Where exports come from. To be called once.
    fn source(&mut self) -> anyhow::Result<Source> {
        let port = |most: u32| match self.port {
            Some(port) if port > most => bail!("port={port}: the largest port is {most}"),
            port => Ok(port.unwrap_or(DEFAULT_PORT.into())),
        };
        let (_, place) = self.place.take().context("there is no server")?;
        let target = match place {
            Place::Uri(uri) => Target::Address(uri.address),
            Place::Host(host) => Target::Address(Address::Tcp { host, port: port(u16::MAX.into())? as u16 }),
            Place::Socket(path) => Target::Address(Address::Unix(path)),
            Place::Vsock(cid) => Target::Address(Address::Vsock { cid, port: port(u32::MAX)? }),
            Place::Fd(fd) => Target::Socket(Mutex::new(Some(fd))),
            Place::Command(program) => {
                let arguments = std::mem::take(&mut self.arguments);
                Target::Command(Command::new(std::iter::once(program).chain(arguments).collect())?)
            }
        };
        Ok(Source {
            target,
            encryption: Encryption::new(&self.tls)?,
            timeout: self.timeout.unwrap_or(Some(TIMEOUT)),
            retry: self.retry,
            connections: self.connections.unwrap_or(1),
        })
    }
}

impl NbdPlugin {
    fn source(&self) -> Result<&Arc<Source>> {
        self.source.as_ref().ok_or_else(|| Errno::EINVAL.into())
    }

    /// Connects to an export of the server's.
    fn connect(&self, export: &OsStr, stop: &ShutdownFlag) -> Result<(Wire, Agreed)> {
        let connected = self.source()?.connect_patiently(export, stop)?;
        *self.contexts.lock() = Some(connected.1.others());
        Ok(connected)
    }

    fn remote(&self, export: &OsStr, connected: (Wire, Agreed)) -> Result<Arc<Remote>> {
        Remote::new(self.source()?, export, connected, &self.reactors)
    }

    /// The connections that all clients use, made again if they are lost.
    fn shared_remote(&self, stop: &ShutdownFlag) -> Result<Arc<Remote>> {
        let mut shared = self.shared.lock();
        if let Some(remote) = shared.as_ref().filter(|remote| !remote.is_down()) {
            return Ok(remote.clone());
        }
        let export = self.given.export();
        let remote = self.remote(&export, self.connect(&export, stop)?)?;
        *shared = Some(remote.clone());
        Ok(remote)
    }
}

impl Plugin for NbdPlugin {
    fn info(&self) -> Info {
        Info::bundled(
            "nbd",
            "serves the disk of another NBD server",
            "[uri=]URI               The server and its export: nbd://HOST/EXPORT or nbd+unix:///EXPORT?socket=PATH\n\
             hostname=HOST           A server on that host\n\
             port=PORT               The port of hostname= or vsock=, or the name of its service (default 10809)\n\
             socket=SOCKNAME         A server on that Unix socket\n\
             vsock=CID               A server in the virtual machine with that number, or on the host (2)\n\
             socket-fd=FD            A server at the other end of this open socket\n\
             command=COMMAND         Run a server that takes its socket as from systemd\n\
             arg=ARG                 An argument for the command, as often as needed\n\
             export=NAME             The export of the server (default: its default export)\n\
             dynamic-export=BOOL     If true, a client gets the export of the name that it asks for\n\
             shared=BOOL             If true, all clients use the same connection\n\
             connections=N           Connections for each client, if the server allows it (default 1)\n\
             retry=N                 Try N times more, once a second, when there is no connection (default 0)\n\
             timeout=SECS            How long the server may do nothing (default 60s; 0: for ever)\n\
             tls=MODE                off, on (if the server does) or require\n\
             tls-certificates=DIR    The directory with ca-cert.pem and perhaps client-cert.pem and client-key.pem\n\
             tls-verify=BOOL         If false, the server may be anybody\n\
             tls-psk=FILE            The file with pre-shared keys\n\
             tls-username=NAME       The user whose key it is",
        )
        .magic("uri")
    }

    fn callbacks(&self) -> Option<Vec<&'static str>> {
        let all = [
            crate::EVERYTHING,
            &[
                "block_size",
                "is_rotational",
                "config_complete",
                "dump_plugin",
                "get_ready",
                "after_fork",
                "cleanup",
                "list_exports",
                "default_export",
                "export_description",
            ],
        ];
        Some(all.concat())
    }

    fn config(&mut self, key: &str, value: &OsStr) -> anyhow::Result<bool> {
        let given = &mut self.given;
        let path = || -> anyhow::Result<PathBuf> {
            ensure!(!value.is_empty(), "{key}= needs a name");
            std::path::absolute(value).with_context(|| format!("{key}="))
        };
        match key {
            "uri" => {
                let uri = Uri::parse(params::text(value)?)?;
                given.set_place("uri", Place::Uri(Box::new(uri)))?;
            }
            "hostname" => given.set_place("hostname", Place::Host(params::text(value)?.into()))?,
            "port" => given.port = Some(port_number(params::text(value)?)?),
            "socket" => given.set_place("socket", Place::Socket(path()?))?,
            "vsock" | "cid" => given.set_place("vsock", Place::Vsock(params::integer(key, value)?))?,
            "socket-fd" => {
                let fd = inherited(key, value)?;
                let kind = sockopt::socket_type(&fd);
                ensure!(
                    kind == Ok(SocketType::STREAM),
                    "socket-fd={}: it is no connected socket",
                    value.display()
                );
                given.set_place("socket-fd", Place::Fd(fd))?;
            }
            "command" => given.set_place("command", Place::Command(value.to_owned()))?,
            "arg" => given.arguments.push(value.to_owned()),
            "export" => given.export = Some(value.to_owned()),
            "dynamic-export" => given.dynamic = params::boolean(value)?,
            "shared" => given.shared = Some(params::boolean(value)?),
            "retry" => given.retry = params::integer(key, value)?,
            "connections" => {
                let connections: usize = params::integer(key, value)?;
                ensure!(
                    (1..=CONNECTIONS).contains(&connections),
                    "connections={connections}: 1 to {CONNECTIONS}"
                );
                given.connections = Some(connections);
            }
            "timeout" => given.timeout = Some(Some(params::delay(value)?).filter(|time| !time.is_zero())),
            "tls" => {
                given.tls.mode = Some(match params::text(value)? {
                    "off" | "0" | "false" | "no" => Mode::Off,
                    "on" | "1" | "true" | "yes" => Mode::On,
                    "require" => Mode::Require,
                    other => bail!("unknown tls mode '{other}': use off, on or require"),
                });
            }
            "tls-certificates" => given.tls.certificates = Some(path()?),
            "tls-verify" => given.tls.verify = params::boolean(value)?,
            "tls-username" => given.tls.user = Some(params::text(value)?.into()),
            "tls-psk" => given.tls.keys = Some(path()?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn config_complete(&mut self) -> anyhow::Result<()> {
        if let Some((_, Place::Uri(uri))) = &self.given.place {
            ensure!(
                self.given.export.is_none(),
                "export= and uri= cannot be used together: the URI has the name of the export in it"
            );
            let given = &mut self.given.tls;
            if uri.encrypted {
                ensure!(given.mode != Some(Mode::Off), "tls=off does not go with a URI that wants TLS");
                given.mode = Some(Mode::Require);
            }
            let uri = &**uri;
            given.user = given.user.take().or(uri.user.clone());
            given.keys = given.keys.take().or(uri.keys.clone());
            given.certificates = given.certificates.take().or(uri.certificates.clone());
            given.server_name = uri.server_name.clone();
            given.verify = given.verify && uri.verify.unwrap_or(true);
            if !self.given.dynamic && !uri.export.is_empty() {
                self.given.export = Some(uri.export.clone());
            }
        }
        self.given.check()
    }

    fn get_ready(&mut self) -> anyhow::Result<()> {
        self.given.shared = Some(self.given.is_shared());
        self.source = Some(Arc::new(self.given.source()?));
        Ok(())
    }

    fn after_fork(&self, server: &Arc<ShutdownFlag>) -> anyhow::Result<()> {
        if self.given.shared == Some(true) {
            self.shared_remote(server)?;
        }
        Ok(())
    }

    fn cleanup(&self) {
        self.shared.lock().take();
        self.spare.lock().take();
        if let Ok(Source { target: Target::Command(command), .. }) = self.source().map(|source| &**source) {
            command.stop();
        }
    }

    fn dump(&self) -> Vec<(String, String)> {
        let tls = if cfg!(feature = "tls") { "1" } else { "0" };
        [("libnbd_dynamic_list", "1"), ("libnbd_tls", tls), ("libnbd_uri", "1"), ("libnbd_vsock", "1")]
            .map(|(key, value)| (key.into(), value.into()))
            .into()
    }

    fn list_exports(&self, _: bool, _: bool) -> Result<Exports> {
        if self.given.dynamic {
            return self.source()?.negotiate()?.list();
        }
        let mut exports = Exports::new();
        exports.use_default();
        Ok(exports)
    }

    fn meta_contexts(&self) -> Vec<String> {
        let known = self.contexts.lock().clone();
        if let Some(known) = known {
            return known;
        }
        // Of which export is not known before it is opened.
        if self.given.dynamic {
            return Vec::new();
        }
        match self.connect(&self.given.export(), &ShutdownFlag::new()) {
            Ok(connected) => {
                let others = connected.1.others();
                *self.spare.lock() = Some(connected);
                others
            }
            Err(e) => {
                log::debug!("nbd: the server's metadata contexts are not known: {e}");
                Vec::new()
            }
        }
    }

    fn open(&self, open: &Open) -> Result<Box<dyn Handle>> {
        let shared = self.given.shared == Some(true);
        let remote = if shared {
            self.shared_remote(&open.client.gone)?
        } else {
            let export = if self.given.dynamic { open.export_name.clone() } else { self.given.export() };
            let spare = self.spare.lock().take();
            let connected = match spare {
                Some(spare) => spare,
                None => self.connect(&export, &open.client.gone)?,
            };
            self.remote(&export, connected)?
        };
        Ok(Box::new(Disk::new(remote, &open.client, shared)))
    }
}
