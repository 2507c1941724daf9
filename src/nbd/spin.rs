//! A short spin before the connection's thread sleeps for its next request.
//!
//! At depth 1 a request costs two wake-ups across CPUs, more than all the rest together. Looking again for some
//! microseconds saves ours, if a CPU is free for it and requests come that fast.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

/// How long to look.
const SPIN: Duration = Duration::from_micros(40);
/// A wait that was this short, wake-up included, makes the next one worth a spin.
const SHORT: Duration = Duration::from_micros(100);

/// Connections that are not asleep, of the whole server.
#[derive(Clone, Debug)]
pub(crate) struct Busy {
    awake: Arc<AtomicUsize>,
    cpus: usize,
}

impl Busy {
    pub(crate) fn new() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Busy { awake: Arc::default(), cpus }
    }
}

/// One connection's part: awake from its creation on.
#[derive(Debug)]
pub(crate) struct Spin {
    busy: Busy,
    worth: bool,
}

impl Spin {
    pub(crate) fn new(busy: Busy) -> Self {
        busy.awake.fetch_add(1, Ordering::Relaxed);
        Spin { busy, worth: false }
    }

    /// Calls `look` until it finds something or spinning is not worth it.
    pub(crate) fn find<T>(&mut self, mut look: impl FnMut() -> Option<T>) -> Option<T> {
        if !self.worth || self.busy.awake.load(Ordering::Relaxed) >= self.busy.cpus {
            return None;
        }
        let start = Instant::now();
        loop {
            if let Some(found) = look() {
                return Some(found);
            }
            if start.elapsed() > SPIN {
                self.worth = false;
                return None;
            }
            for _ in 0..8 {
                std::hint::spin_loop();
            }
        }
    }

    /// Runs a call that sleeps, and learns from how long it took.
    pub(crate) fn sleep<T>(&mut self, call: impl FnOnce() -> T) -> T {
        self.busy.awake.fetch_sub(1, Ordering::Relaxed);
        let start = Instant::now();
        let result = call();
        self.worth = start.elapsed() < SHORT;
        self.busy.awake.fetch_add(1, Ordering::Relaxed);
        result
    }
}

impl Drop for Spin {
    fn drop(&mut self) {
        self.busy.awake.fetch_sub(1, Ordering::Relaxed);
    }
}
