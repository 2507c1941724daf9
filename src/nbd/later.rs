//! Replies to requests that the chain runs without a worker: collected as they end, and sent together.
//!
//! They count among the requests of the pool until their replies are sent. Nothing here holds the session, for the one
//! who flushes is a thread of the chain's, which the end of the session waits for.

use std::sync::Arc;

use nbdkit_core::Flush;
use parking_lot::Mutex;

use crate::{buffer::Buffer, output::Outbox, pool::Pool};

/// See the module.
pub(crate) struct Later {
    outbox: Arc<Outbox>,
    pool: Arc<Pool>,
    ready: Mutex<Ready>,
}

/// What is ready to be sent.
#[derive(Default)]
struct Ready {
    out: Buffer,
    running: Vec<Running>,
}

/// A request that runs without a worker.
pub(crate) struct Running {
    pool: Arc<Pool>,
    bytes: usize,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.pool.leave(self.bytes);
    }
}

impl Later {
    pub(crate) fn new(outbox: Arc<Outbox>, pool: Arc<Pool>) -> Self {
        Later { outbox, pool, ready: Mutex::default() }
    }

    /// Begins a request that has or will need a buffer of so many bytes. None: there are too many.
    pub(crate) fn begin(&self, bytes: usize) -> Option<Running> {
        self.pool.enter(bytes).then(|| Running { pool: self.pool.clone(), bytes })
    }

    /// Gives memory back that holds nothing.
    pub(crate) fn give_back(&self) {
        self.ready.lock().out.give_back();
    }

    /// Ends a request with the reply that `put` appends.
    pub(crate) fn end(&self, running: Running, put: impl FnOnce(&mut Buffer)) {
        let mut ready = self.ready.lock();
        put(&mut ready.out);
        ready.running.push(running);
    }
}

impl Flush for Later {
    fn flush(&self) {
        let mut ready = std::mem::take(&mut *self.ready.lock());
        self.outbox.send(&mut ready.out);
        ready.running.clear();
        // Its memory is for the next ones.
        let mut next = self.ready.lock();
        if next.running.is_empty() && next.out.is_empty() {
            *next = ready;
        }
    }
}
