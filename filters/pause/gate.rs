//! A gate that requests pass, and that can be closed.

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
    inside: usize,
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
        state.inside += 1;
        Ok(Inside(self))
    }

    /// Lets a request in if the gate is open.
    pub(super) fn enter_nowait(&self) -> Option<Inside<'_>> {
        let mut state = self.state.lock();
        if state.closed {
            return None;
        }
        state.inside += 1;
        Some(Inside(self))
    }

    /// Closes the gate and waits until nobody is inside, or until somebody opens it again.
    pub(super) fn pause(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        while state.closed && state.inside > 0 {
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

/// A request that is inside.
pub(super) struct Inside<'a>(&'a Gate);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.inside -= 1;
        if state.inside == 0 && state.closed {
            drop(state);
            self.0.changed.notify_all();
        }
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
