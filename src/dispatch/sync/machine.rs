//! The machine's.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    thread::Builder,
};

use rustix::event::{EventfdFlags, eventfd};

use super::Bug;

pub(crate) use std::{
    sync::atomic::{AtomicBool, AtomicU64},
    thread::{JoinHandle, Scope, scope},
};

pub(crate) use nbdkit_core::sync::Mutex;
pub(crate) use parking_lot::{Condvar, MutexGuard};

/// Starts a thread.
pub(crate) fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    Builder::new().name(name.to_owned()).spawn(body)
}

/// Starts a thread that ends before the scope does.
pub(crate) fn spawn_scoped<'s>(
    scope: &'s Scope<'s, '_>,
    name: &str,
    body: impl FnOnce() + Send + 's,
) -> io::Result<()> {
    Builder::new().name(name.to_owned()).spawn_scoped(scope, body).map(drop)
}

/// A descriptor that is readable while there was a signal that nobody has taken.
#[derive(Debug)]
pub(crate) struct Event(OwnedFd);

impl Event {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Event(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    pub(crate) fn signal(&self) {
        // It fails only when the counter is at its end, and then it is readable anyway.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }

    pub(crate) fn take(&self) {
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Nothing is planted outside of model tests.
#[inline(always)]
pub(crate) const fn is_planted(_: Bug) -> bool {
    false
}
