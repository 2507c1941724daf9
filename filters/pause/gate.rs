//! A gate that requests pass, and that can be closed.

use std::collections::HashSet;

use nbdkit_core::{Client, Errno, Error, Result};
use parking_lot::{Condvar, Mutex};

#[derive(Default)]
pub(super) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    closed: bool,
    /// The tickets of the requests that are inside.
    inside: HashSet<u64>,
    /// The next one.
    ticket: u64,
}

impl Gate {
    /// Lets a request in, at once or when the gate opens.
    pub(super) fn enter(&self, client: &Client) -> Result<Inside<'_>> {
        let mut state = self.state.lock();
        while state.closed {
            if client.gone.is_raised() {
                return Err(Error::new(Errno::ESHUTDOWN, "the pause was still on when the client went away"));
            }
            self.changed.wait(&mut state);
        }
        Ok(self.admit(&mut state))
    }

    /// Lets a request in if the gate is open.
    pub(super) fn enter_nowait(&self) -> Option<Inside<'_>> {
        let mut state = self.state.lock();
        if state.closed {
            return None;
        }
        Some(self.admit(&mut state))
    }

    fn admit(&self, state: &mut State) -> Inside<'_> {
        let ticket = state.ticket;
        state.ticket += 1;
        state.inside.insert(ticket);
        Inside { gate: self, ticket }
    }

    /// Lets a request out, if it is inside.
    pub(super) fn leave(&self, ticket: u64) {
        let mut state = self.state.lock();
        if state.inside.remove(&ticket) && state.inside.is_empty() && state.closed {
            drop(state);
            self.changed.notify_all();
        }
    }

    /// Closes the gate and waits until nobody is inside, or until somebody opens it again.
    pub(super) fn pause(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        while state.closed && !state.inside.is_empty() {
            self.changed.wait(&mut state);
        }
    }

    /// Opens the gate.
    pub(super) fn resume(&self) {
        self.state.lock().closed = false;
        self.changed.notify_all();
    }

    /// Makes those who wait look again whether their client is there.
    pub(super) fn wake(&self) {
        // Who has looked and does not wait yet holds the lock.
        drop(self.state.lock());
        self.changed.notify_all();
    }
}

/// A request that is inside, until this is dropped or its ticket is given back.
pub(super) struct Inside<'a> {
    gate: &'a Gate,
    ticket: u64,
}

impl Inside<'_> {
    pub(super) fn ticket(&self) -> u64 {
        self.ticket
    }

    /// It leaves by its ticket only.
    pub(super) fn stay(self) {
        std::mem::forget(self);
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.gate.leave(self.ticket);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_waits_for_those_inside() {
        let gate = Gate::default();
        std::thread::scope(|scope| {
            let inside = gate.enter_nowait().unwrap();
            let pausing = scope.spawn(|| gate.pause());
            while gate.enter_nowait().is_some() {
                std::thread::yield_now();
            }
            // It has closed the gate. If it did not wait, it would end now.
            for _ in 0..1000 {
                std::thread::yield_now();
            }
            assert!(!pausing.is_finished());
            drop(inside);
            pausing.join().unwrap();
        });
    }

    #[test]
    fn a_pause_that_is_called_off_does_not_wait() {
        let gate = Gate::default();
        std::thread::scope(|scope| {
            let _inside = gate.enter_nowait().unwrap();
            let pausing = scope.spawn(|| gate.pause());
            while gate.enter_nowait().is_some() {
                std::thread::yield_now();
            }
            gate.resume();
            pausing.join().unwrap();
        });
    }
}
