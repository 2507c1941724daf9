//! A flag that, once raised, stays up and wakes all threads that wait for it.
//!
//! There is one for the server (shutdown) and one for each client (gone); sleeps in filters end early through
//! them, which is why a server in a 60 s delay still stops at once.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

type Hook = Box<dyn FnOnce() + Send>;

/// See the module.
#[derive(Default)]
pub struct ShutdownFlag {
    /// As in the state, for those who ask for each request.
    is_raised: AtomicBool,
    state: Mutex<State>,
    raised: Condvar,
}

#[derive(Default)]
struct State {
    raised: bool,
    hooks: Vec<Hook>,
}

impl std::fmt::Debug for ShutdownFlag {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ShutdownFlag({})", self.is_raised())
    }
}

impl ShutdownFlag {
    /// A flag that is down.
    pub fn new() -> Self {
        Self::default()
    }

    /// Raises the flag, wakes all waiters and runs the hooks. Doing it again does nothing.
    pub fn raise(&self) {
        let hooks = {
            let mut state = self.state.lock();
            state.raised = true;
            self.is_raised.store(true, Ordering::Release);
            std::mem::take(&mut state.hooks)
        };
        self.raised.notify_all();
        for hook in hooks {
            hook();
        }
    }

    /// Whether the flag is up.
    pub fn is_raised(&self) -> bool {
        self.is_raised.load(Ordering::Acquire)
    }

    /// Runs `hook` when the flag goes up, on the thread that raises it; at once if it is up already.
    pub fn on_raise(&self, hook: impl FnOnce() + Send + 'static) {
        let mut state = self.state.lock();
        if state.raised {
            drop(state);
            hook();
        } else {
            state.hooks.push(Box::new(hook));
        }
    }

    /// Waits until the flag goes up.
    pub fn wait(&self) {
        let mut state = self.state.lock();
        while !state.raised {
            self.raised.wait(&mut state);
        }
    }

    /// Waits until the flag goes up, at most for `timeout`. Tells whether it is up.
    pub fn wait_for(&self, timeout: Duration) -> bool {
        let mut state = self.state.lock();
        let Some(deadline) = Instant::now().checked_add(timeout) else {
            drop(state);
            self.wait();
            return true;
        };
        while !state.raised {
            if self.raised.wait_until(&mut state, deadline).timed_out() {
                return state.raised;
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    };

    use super::*;

    #[test]
    fn wakes_waiters_and_runs_hooks_once() {
        let stop = Arc::new(ShutdownFlag::new());
        let count = Arc::new(AtomicU32::new(0));
        let c = count.clone();
        stop.on_raise(move || {
            c.fetch_add(1, Ordering::SeqCst);
        });
        assert!(!stop.wait_for(Duration::ZERO));
        let waiter = std::thread::spawn({
            let stop = stop.clone();
            move || stop.wait_for(Duration::MAX)
        });
        stop.raise();
        stop.raise();
        assert!(waiter.join().unwrap());
        let c = count.clone();
        stop.on_raise(move || {
            c.fetch_add(10, Ordering::SeqCst);
        });
        assert_eq!(count.load(Ordering::SeqCst), 11);
    }
}
