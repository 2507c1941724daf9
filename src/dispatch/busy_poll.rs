//! A short spin before a thread sleeps for its next request: adaptive busy polling.
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

use rustix::thread::sched_getaffinity;

/// How long to look.
const SPIN: Duration = Duration::from_micros(40);
/// A wait that was this short, wake-up included, makes the next one worth a spin.
const SHORT: Duration = Duration::from_micros(100);
/// A wait that was this short was none.
const NONE: Duration = Duration::from_micros(4);
/// Most waits that are not spun for after spins in vain. A client on our own CPU makes all of them so.
const PENALTY_MAX: u32 = 256;

/// Threads that are not asleep, of all connections.
#[derive(Clone, Debug, Default)]
pub struct Awake(Arc<AtomicUsize>);

/// One connection's part: awake from its creation on.
#[derive(Debug)]
pub struct BusyPoll {
    awake: Awake,
    /// CPUs that this thread may run on.
    cpus: usize,
    /// The last wait was short.
    worth: bool,
    /// Waits to come without a spin.
    skip: u32,
    /// How many that will be after the next spin in vain.
    penalty: u32,
    /// The last find or sleep was none: it was there already.
    at_once: bool,
    /// Since when the thread sleeps.
    asleep: Option<Instant>,
}

impl BusyPoll {
    /// To be called on the thread that spins.
    pub fn new(awake: Awake) -> Self {
        awake.0.fetch_add(1, Ordering::Relaxed);
        let cpus = sched_getaffinity(None).map_or(1, |cpus| cpus.count() as usize);
        BusyPoll { awake, cpus, worth: false, skip: 0, penalty: 1, at_once: false, asleep: None }
    }

    /// CPUs that this thread may run on.
    pub fn cpus(&self) -> usize {
        self.cpus
    }

    /// Calls `look` until it finds something or spinning is not worth it.
    pub fn find<T>(&mut self, mut look: impl FnMut() -> Option<T>) -> Option<T> {
        // One CPU is left to those who make the requests.
        if !self.worth || self.awake.0.load(Ordering::Relaxed) >= self.cpus {
            return None;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return None;
        }
        let start = Instant::now();
        self.at_once = true;
        loop {
            if let Some(found) = look() {
                self.penalty = 1;
                return Some(found);
            }
            self.at_once = false;
            if start.elapsed() > SPIN {
                self.worth = false;
                self.skip = self.penalty;
                self.penalty = (self.penalty * 2).min(PENALTY_MAX);
                return None;
            }
            for _ in 0..8 {
                std::hint::spin_loop();
            }
        }
    }

    /// Whether there was nothing to wait for the last time.
    pub fn was_at_once(&self) -> bool {
        self.at_once
    }

    /// Runs a call that sleeps, and learns from how long it took.
    pub fn sleep<T>(&mut self, call: impl FnOnce() -> T) -> T {
        self.fall_asleep();
        let result = call();
        self.wake_up();
        result
    }

    /// The thread is about to sleep, in code of somebody else's.
    pub fn fall_asleep(&mut self) {
        self.awake.0.fetch_sub(1, Ordering::Relaxed);
        self.asleep = Some(Instant::now());
    }

    /// The thread is awake again: learns from how long that took, and returns it.
    pub fn wake_up(&mut self) -> Duration {
        let Some(asleep) = self.asleep.take() else { return Duration::ZERO };
        let took = asleep.elapsed();
        (self.worth, self.at_once) = (took < SHORT, took < NONE);
        self.awake.0.fetch_add(1, Ordering::Relaxed);
        took
    }
}

impl Drop for BusyPoll {
    fn drop(&mut self) {
        if self.asleep.is_none() {
            self.awake.0.fetch_sub(1, Ordering::Relaxed);
        }
    }
}
