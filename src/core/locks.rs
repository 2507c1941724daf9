//! The locks of the four thread models. The only place that knows what a model means.

use std::{sync::Arc, time::Duration};

use parking_lot::{ArcMutexGuard, MutexGuard, RawMutex};

use crate::{Errno, Error, Result, ShutdownFlag, ThreadModel, sync::Mutex};

/// How often a client that waits for the connection lock looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(50);

/// The server's locks.
#[derive(Debug)]
pub(crate) struct Locks {
    model: ThreadModel,
    connection: Arc<parking_lot::Mutex<()>>,
    all_requests: Mutex<()>,
}

/// The lock that a session holds for its life under `SERIALIZE_CONNECTIONS`.
pub(crate) type ConnectionPermit = Option<ArcMutexGuard<RawMutex, ()>>;

/// The lock that a request holds while it is in the chain.
pub(crate) type Permit<'a> = Option<MutexGuard<'a, ()>>;

impl Locks {
    pub(crate) fn new(model: ThreadModel) -> Self {
        Locks { model, connection: Arc::default(), all_requests: Mutex::new(()) }
    }

    /// Waits for the turn of a connection, or until the client is gone.
    pub(crate) fn connection(&self, gone: &ShutdownFlag) -> Result<ConnectionPermit> {
        if self.model != ThreadModel::SerializeConnections {
            return Ok(None);
        }
        loop {
            if let Some(guard) = self.connection.try_lock_arc_for(LOOK) {
                return Ok(Some(guard));
            }
            if gone.is_raised() {
                return Err(Error::new(Errno::ESHUTDOWN, "the client or the server stops"));
            }
        }
    }

    fn mutex<'a>(&'a self, session: &'a Mutex<()>) -> Option<&'a Mutex<()>> {
        match self.model {
            ThreadModel::Parallel => None,
            ThreadModel::SerializeRequests => Some(session),
            ThreadModel::SerializeAllRequests | ThreadModel::SerializeConnections => Some(&self.all_requests),
        }
    }

    /// Waits for the turn of a request; `session` is its session's own lock.
    pub(crate) fn request<'a>(&'a self, session: &'a Mutex<()>) -> Permit<'a> {
        self.mutex(session).map(Mutex::lock)
    }

    /// As [`request`](Self::request), but only if that needs no wait.
    pub(crate) fn request_nowait<'a>(&'a self, session: &'a Mutex<()>) -> Option<Permit<'a>> {
        match self.mutex(session) {
            None => Some(None),
            Some(mutex) => mutex.try_lock().map(Some),
        }
    }

    /// Whether requests need no permit.
    pub(crate) fn is_free(&self) -> bool {
        self.model == ThreadModel::Parallel
    }
}
