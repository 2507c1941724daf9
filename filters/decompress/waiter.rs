//! A read that waits for pieces, with or without a thread.

use std::{ops::Range, sync::Arc};

use nbdkit_core::{Error, Memory, Payload, Pending, Result};
use parking_lot::{Condvar, Mutex};

use super::{
    cache::Piece,
    source::{Source, User},
};

/// See the module.
pub(super) struct Waiter {
    /// What is to be read.
    pub(super) range: Range<u64>,
    state: Mutex<State>,
    ended: Condvar,
}

struct State {
    memory: Memory,
    /// Pieces that have not come.
    missing: usize,
    error: Option<Error>,
    /// The request, if it was started; else a thread waits.
    pending: Option<Pending>,
    /// By which pieces can be had; None: it has ended.
    user: Option<User>,
}

impl Waiter {
    /// A read of `length` bytes into `memory`. Until [`release`](Self::release) it does not end.
    pub(super) fn new(
        source: &Arc<Source>,
        range: Range<u64>,
        memory: Memory,
        pending: Option<Pending>,
    ) -> Arc<Self> {
        let user = Some(User::new(source));
        let state = State { memory, missing: 1, error: None, pending, user };
        Arc::new(Waiter { range, state: Mutex::new(state), ended: Condvar::new() })
    }

    /// One more piece will come.
    pub(super) fn expect(&self) {
        self.state.lock().missing += 1;
    }

    /// All pieces are known that have to come.
    pub(super) fn release(&self) {
        self.supply(Ok(None));
    }

    /// One of the pieces has come, or will not.
    pub(super) fn supply(&self, piece: std::result::Result<Option<&Piece>, &Error>) {
        let mut state = self.state.lock();
        let length = (self.range.end - self.range.start) as usize;
        match piece {
            Ok(Some(piece)) => piece.copy_to(&mut state.memory[..length], self.range.start),
            Ok(None) => {}
            Err(e) => {
                state.error.get_or_insert_with(|| Error::new(e.errno(), e.to_string()));
            }
        }
        state.missing -= 1;
        if state.missing > 0 {
            return;
        }
        // While the request is under way its connection is open, so the source stays.
        state.user = None;
        let Some(pending) = state.pending.take() else {
            self.ended.notify_all();
            return;
        };
        let result = match state.error.take() {
            Some(e) => Err(e),
            None => Ok(Payload::Memory(std::mem::take(&mut state.memory), 0..length)),
        };
        drop(state);
        drop(pending.complete(result));
    }

    /// Waits, and copies what was read to `buf`.
    ///
    /// # Errors
    /// Those of the pieces.
    pub(super) fn wait(&self, buf: &mut [u8]) -> Result<()> {
        let mut state = self.state.lock();
        while state.user.is_some() {
            self.ended.wait(&mut state);
        }
        if let Some(e) = state.error.take() {
            return Err(e);
        }
        buf.copy_from_slice(&state.memory[..buf.len()]);
        Ok(())
    }

    /// By which its pieces can be had; None: its client is gone.
    pub(super) fn source(&self) -> Option<Arc<Source>> {
        let state = self.state.lock();
        state.user.as_ref().map(User::source).filter(|source| !source.is_closed()).cloned()
    }
}
