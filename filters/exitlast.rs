//! Shuts the server down when the last client that opened an export is gone.
//!
//! Clients are counted, not handles: a client that looks at an export (`NBD_OPT_INFO`) before it opens one closes a
//! handle while it is still there, and a mount has several handles.

use std::{collections::HashSet, sync::Arc};

use nbdkit_core::{Below, Filter, Handle, Info, Open, Result};
use parking_lot::Mutex;

use crate::passthrough::Passthrough;

pub(crate) fn new() -> Box<dyn Filter> {
    Box::new(ExitLast { clients: Arc::default() })
}

struct ExitLast {
    /// The clients that have opened an export, by the address of their state: two front ends may give out the same
    /// number, and an address is not used again before its client was taken out.
    clients: Arc<Mutex<HashSet<usize>>>,
}

impl Filter for ExitLast {
    fn info(&self) -> Info {
        Info::bundled("exitlast", "nbdkit exitlast filter", "")
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        let next = next.open(open)?;
        let client = Arc::as_ptr(&open.client).addr();
        if self.clients.lock().insert(client) {
            let clients = self.clients.clone();
            let server = open.client.server().clone();
            open.client.gone.on_raise(move || {
                let mut clients = clients.lock();
                clients.remove(&client);
                if clients.is_empty() {
                    log::debug!("exitlast: the last client is gone, the server shuts down");
                    server.raise();
                }
            });
        }
        Ok(Box::new(Passthrough(next)))
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use nbdkit_core::{Chain, Client, Connection, Peer, ShutdownFlag};

    use super::*;
    use crate::testing::{Spec, View, chain, check_model};

    struct Server {
        chain: Arc<Chain>,
        stop: Arc<ShutdownFlag>,
    }

    impl Server {
        fn new(spec: Spec) -> Self {
            let chain = chain(&spec.disk(), &["exitlast"], &[]).unwrap();
            Server { chain, stop: Arc::new(ShutdownFlag::new()) }
        }

        fn connect(&self) -> Arc<Connection> {
            let client = Arc::new(Client::new(1, Peer::Local, self.stop.clone()));
            Arc::new(self.chain.connect(client, false).unwrap())
        }

        fn stops(&self) -> bool {
            self.stop.is_raised()
        }
    }

    fn open(connection: &Arc<Connection>) -> Result<nbdkit_core::Session> {
        connection.open(OsStr::new(""), false)
    }

    #[test]
    fn model() {
        check_model(&["exitlast"], &[], 20_000, &View::same(20_000));
    }

    #[test]
    fn the_last_client_takes_the_server_with_it() {
        let server = Server::new(Spec::default());
        let (first, second) = (server.connect(), server.connect());
        let sessions = (open(&first).unwrap(), open(&second).unwrap());
        drop((sessions.0, first));
        assert!(!server.stops(), "the second one is still there");
        drop((sessions.1, second));
        assert!(server.stops());
    }

    #[test]
    fn a_look_before_the_open_does_not_count() {
        let server = Server::new(Spec::default());
        let connection = server.connect();
        drop(open(&connection).unwrap());
        assert!(!server.stops(), "the client may open another one");
        let session = open(&connection).unwrap();
        drop(session);
        assert!(!server.stops());
        drop(connection);
        assert!(server.stops());
    }

    #[test]
    fn a_client_that_opened_nothing_does_not_count() {
        let server = Server::new(Spec::default());
        drop(server.connect());
        assert!(!server.stops());
    }

    #[test]
    fn a_failed_open_does_not_count() {
        let block_size = nbdkit_core::BlockSize { minimum: 3, preferred: 512, maximum: u32::MAX };
        let server = Server::new(Spec { block_size, ..Spec::default() });
        let connection = server.connect();
        open(&connection).unwrap_err();
        drop(connection);
        assert!(!server.stops());
    }

    #[test]
    fn a_client_that_must_go_is_gone() {
        let server = Server::new(Spec::default());
        let connection = server.connect();
        let _session = open(&connection).unwrap();
        connection.client().gone.raise();
        assert!(server.stops());
    }
}
