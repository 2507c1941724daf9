//! Shuttle's, in the shape of the machine's.

use std::{
    cell::Cell,
    io,
    ops::{Deref, DerefMut},
    sync::{
        Arc,
        PoisonError,
        // What the model itself keeps, which is no event in it.
        atomic::{AtomicBool as Ended, AtomicU64 as Count, Ordering::Relaxed},
    },
    time::Duration,
};

use shuttle::rand::Rng as _;

use super::Bug;

pub(crate) use shuttle::{
    sync::atomic::{AtomicBool, AtomicU64},
    thread::{Scope, scope},
};

// Shuttle runs all threads of a model on one thread of the machine: that is the model's.
std::thread_local! {
    static PLANTED: Cell<Option<Bug>> = const { Cell::new(None) };
    static TIME: Cell<bool> = const { Cell::new(true) };
}

/// Plants a bug in what runs on this thread.
pub(crate) fn plant(bug: Option<Bug>) {
    PLANTED.set(bug);
}

/// Whether time passes. Where it does not, no wait ends because it was long: a notice that is missing is then a deadlock,
/// where in real life it would be a delay.
pub(crate) fn time_passes(passes: bool) {
    TIME.set(passes);
}

pub(crate) fn is_planted(bug: Bug) -> bool {
    PLANTED.get() == Some(bug)
}

#[derive(Debug, Default)]
pub(crate) struct Mutex<T>(shuttle::sync::Mutex<T>);

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Mutex(shuttle::sync::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        MutexGuard { mutex: self, guard: Some(self.guard()) }
    }

    fn guard(&self) -> shuttle::sync::MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Empty only within a wait.
#[derive(Debug)]
pub(crate) struct MutexGuard<'a, T> {
    mutex: &'a Mutex<T>,
    guard: Option<shuttle::sync::MutexGuard<'a, T>>,
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.guard.as_ref().expect("locked")
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.guard.as_mut().expect("locked")
    }
}

#[derive(Debug)]
pub(crate) struct Condvar {
    condvar: shuttle::sync::Condvar,
    /// How often somebody was told.
    notices: Count,
}

/// How a wait has ended.
pub(crate) struct TimedOut(bool);

impl TimedOut {
    pub(crate) fn timed_out(&self) -> bool {
        self.0
    }
}

impl Default for Condvar {
    fn default() -> Self {
        Self::new()
    }
}

impl Condvar {
    pub(crate) fn new() -> Self {
        Condvar { condvar: shuttle::sync::Condvar::new(), notices: Count::new(0) }
    }

    /// Waits for a notice or, while [time passes](time_passes), for a while in which anything may happen.
    pub(crate) fn wait_for<T>(&self, locked: &mut MutexGuard<'_, T>, _: Duration) -> TimedOut {
        let guard = locked.guard.take().expect("locked");
        if !TIME.get() {
            locked.guard = Some(self.condvar.wait(guard).unwrap_or_else(PoisonError::into_inner));
            return TimedOut(false);
        }
        let before = self.notices.load(Relaxed);
        drop(guard);
        let some_time = || {
            for _ in 0..shuttle::rand::thread_rng().gen_range(0..5) {
                shuttle::thread::yield_now();
            }
        };
        some_time();
        let timed_out = self.notices.load(Relaxed) == before;
        // A notice that comes before the lock is ours again is none for us.
        some_time();
        locked.guard = Some(locked.mutex.guard());
        TimedOut(timed_out)
    }

    pub(crate) fn notify_one(&self) {
        self.notices.fetch_add(1, Relaxed);
        self.condvar.notify_one();
    }

    pub(crate) fn notify_all(&self) {
        self.notices.fetch_add(1, Relaxed);
        self.condvar.notify_all();
    }
}

/// A thread's handle that knows whether it has ended.
pub(crate) struct JoinHandle<T> {
    thread: shuttle::thread::JoinHandle<T>,
    ended: Arc<Ended>,
}

impl<T> JoinHandle<T> {
    pub(crate) fn join(self) -> std::thread::Result<T> {
        self.thread.join()
    }

    pub(crate) fn is_finished(&self) -> bool {
        self.ended.load(Relaxed)
    }
}

pub(crate) fn spawn(_: &str, body: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    let ended = Arc::new(Ended::new(false));
    let end = ended.clone();
    let thread = shuttle::thread::spawn(move || {
        body();
        end.store(true, Relaxed);
    });
    Ok(JoinHandle { thread, ended })
}

pub(crate) fn spawn_scoped<'s>(
    scope: &'s Scope<'s, '_>,
    _: &str,
    body: impl FnOnce() + Send + 's,
) -> io::Result<()> {
    drop(scope.spawn(body));
    Ok(())
}

/// An event descriptor without a descriptor.
#[derive(Debug, Default)]
pub(crate) struct Event {
    signalled: Mutex<bool>,
    changed: shuttle::sync::Condvar,
}

impl Event {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Event::default())
    }

    pub(crate) fn signal(&self) {
        *self.signalled.lock() = true;
        self.changed.notify_all();
    }

    pub(crate) fn take(&self) {
        *self.signalled.lock() = false;
    }

    /// Waits until it is readable, as `poll` does.
    pub(crate) fn poll(&self) {
        let mut signalled = self.signalled.guard();
        while !*signalled {
            signalled = self.changed.wait(signalled).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
