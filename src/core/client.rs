//! Who is asking: the client at the other end of a session, and what it asked to open.

use std::{
    ffi::OsString,
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::Duration,
};

use crate::{Errno, Error, Result, ShutdownFlag, sync::Mutex};

/// Where a client comes from.
#[derive(Clone, Debug, Default)]
pub enum Peer {
    /// A front end that has no peer: the FUSE mount, or the server itself.
    #[default]
    Local,
    /// A TCP client.
    Tcp(SocketAddr),
    /// A Unix socket client, with its credentials where the kernel gives them.
    Unix {
        /// Process ID.
        pid: i32,
        /// User ID.
        uid: u32,
        /// Group ID.
        gid: u32,
    },
    /// A virtual machine socket client.
    Vsock {
        /// Context ID.
        cid: u32,
        /// Port.
        port: u32,
    },
    /// Something else, standard input for one.
    Other,
}

/// The certificate by which a client proved over TLS who it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// The distinguished name of its owner, as text (RFC 4514): `CN=client,O=company`.
    pub subject: String,
    /// The distinguished name of the authority that issued it.
    pub issuer: String,
}

/// One client, from connect to disconnect.
#[derive(Debug)]
pub struct Client {
    /// Number of the connection, from 1, as it stands in messages (`file[1]`).
    pub number: u64,
    /// Where it comes from.
    pub peer: Peer,
    /// The security context (SELinux label) of the process at the other end, where the kernel tells it.
    pub security_context: OnceLock<String>,
    /// Its verified certificate; not there before TLS is.
    pub certificate: OnceLock<Certificate>,
    /// Raised when the client is gone or must go: its sleeping requests end.
    pub gone: ShutdownFlag,
    /// Raised when a layer asks for the connection to be closed. A front end refuses further requests with `ESHUTDOWN`
    /// then, until the client leaves; if [`gone`](Self::gone) is up too, it closes the connection at once.
    pub leave: ShutdownFlag,
    server: Arc<ShutdownFlag>,
    /// What layers have said of their default exports.
    default_exports: Mutex<Vec<(Asked, Option<OsString>)>>,
}

/// A layer's level, read-only or not, with TLS or without.
type Asked = (usize, bool, bool);

impl Client {
    /// The level of a plugin, for [`default_export`](Self::default_export).
    pub const PLUGIN: usize = 1;

    /// The answer of the layer at `level`, which is asked if it was not before.
    ///
    /// # Errors
    /// Those of `ask`.
    pub fn default_export(
        &self,
        level: usize,
        readonly: bool,
        tls: bool,
        ask: impl FnOnce() -> Result<Option<OsString>>,
    ) -> Result<Option<OsString>> {
        let key = (level, readonly, tls);
        let known = self.default_exports.lock().iter().find(|(k, _)| *k == key).map(|(_, name)| name.clone());
        if let Some(name) = known {
            return Ok(name);
        }
        let name = ask()?;
        self.default_exports.lock().push((key, name.clone()));
        Ok(name)
    }

    /// A client of the server whose shutdown flag is `server`.
    pub fn new(number: u64, peer: Peer, server: Arc<ShutdownFlag>) -> Self {
        Client {
            number,
            peer,
            security_context: OnceLock::new(),
            certificate: OnceLock::new(),
            gone: ShutdownFlag::new(),
            leave: ShutdownFlag::new(),
            server,
            default_exports: Mutex::default(),
        }
    }

    /// Asks for the end of the connection: with `force` at once, else when the client has heard of it.
    pub fn disconnect(&self, force: bool) {
        if force {
            self.gone.raise();
        }
        self.leave.raise();
    }

    /// Asks the whole server to shut down, as a signal would.
    pub fn shut_down_server(&self) {
        self.server.raise();
    }

    /// The server's shutdown flag, for what must raise it after the client is gone.
    pub fn server(&self) -> &Arc<ShutdownFlag> {
        &self.server
    }

    /// Sleeps, unless the client goes away or the server shuts down meanwhile. The front end raises
    /// [`gone`](Self::gone) in either case.
    ///
    /// # Errors
    /// `ESHUTDOWN` when the sleep was cut short.
    pub fn sleep(&self, duration: Duration) -> Result<()> {
        if duration.is_zero() {
            return Ok(());
        }
        if self.gone.wait_for(duration) {
            return Err(Error::new(
                Errno::ESHUTDOWN,
                "the sleep ended early: the client or the server stops",
            ));
        }
        Ok(())
    }

    /// Sleeps on behalf of a client that may have gone already, unless the server shuts down meanwhile.
    pub fn linger(&self, duration: Duration) {
        if !duration.is_zero() {
            self.server.wait_for(duration);
        }
    }
}

impl Drop for Client {
    /// However a client ends, those that wait for it to be gone are woken.
    fn drop(&mut self) {
        self.gone.raise();
    }
}

/// What a client asked to open. A filter may pass a changed copy to the layer below.
#[derive(Clone, Debug)]
pub struct Open {
    /// No request will change data.
    pub readonly: bool,
    /// The export's name; empty: the default one.
    pub export_name: OsString,
    /// The client speaks TLS.
    pub tls: bool,
    /// Who asks.
    pub client: Arc<Client>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_client_is_gone() {
        let server = Arc::new(ShutdownFlag::new());
        let client = Client::new(1, Peer::Local, server.clone());
        let (gone, hears) = (Arc::new(ShutdownFlag::new()), Arc::clone(client.server()));
        let told = gone.clone();
        client.gone.on_raise(move || told.raise());
        drop(client);
        assert!(gone.is_raised());
        assert!(!server.is_raised() && Arc::ptr_eq(&server, &hears));
    }
}
