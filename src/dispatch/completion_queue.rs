//! Where plugins post the ends of started requests, for the front end to pick up.
//!
//! To post takes a short lock and never waits for a client. The front end is woken only while it sleeps, once, by an
//! event descriptor that it polls beside its own; one that never sleeps with requests under way has no such descriptor.

use std::{
    io,
    sync::{OnceLock, atomic::Ordering::SeqCst},
    time::Duration,
};

use nbdkit_core::{Completed, Completions};

use crate::sync::{AtomicBool, Bug, Condvar, Event, Mutex, is_planted};

/// See the module.
#[derive(Debug, Default)]
pub struct CompletionQueue {
    ready: Mutex<Vec<Completed>>,
    /// There is something in `ready`.
    filled: AtomicBool,
    /// The front end sleeps, or is about to.
    asleep: AtomicBool,
    /// Readable when it is to wake up.
    event: OnceLock<Event>,
    posted: Condvar,
}

impl CompletionQueue {
    /// Takes all that was posted into `into`, which is empty.
    pub fn take(&self, into: &mut Vec<Completed>) {
        if self.filled.load(SeqCst) {
            let mut ready = self.ready.lock();
            self.filled.store(false, SeqCst);
            std::mem::swap(&mut *ready, into);
        }
    }

    /// Whether nothing was posted since the last [`take`](Self::take).
    pub fn is_empty(&self) -> bool {
        !self.filled.load(SeqCst)
    }

    /// The front end is about to sleep until the descriptor is readable. None: something was posted already.
    ///
    /// # Errors
    /// There can be no descriptor.
    #[cfg(not(all(test, feature = "shuttle")))]
    pub fn fall_asleep(&self) -> io::Result<Option<std::os::fd::BorrowedFd<'_>>> {
        Ok(self.may_sleep()?.map(std::os::fd::AsFd::as_fd))
    }

    /// [`fall_asleep`](Self::fall_asleep), whatever an event is.
    pub(crate) fn may_sleep(&self) -> io::Result<Option<&Event>> {
        let event = match self.event.get() {
            Some(event) => event,
            None => {
                let event = Event::new()?;
                self.event.get_or_init(|| event)
            }
        };
        if !is_planted(Bug::AsleepAfterTheLook) {
            self.asleep.store(true, SeqCst);
        }
        if !self.is_empty() {
            self.wake_up(false);
            return Ok(None);
        }
        if is_planted(Bug::AsleepAfterTheLook) {
            self.asleep.store(true, SeqCst);
        }
        Ok(Some(event))
    }

    /// The front end is awake again; `woken`, because the descriptor was readable.
    pub fn wake_up(&self, woken: bool) {
        let already = !self.asleep.swap(false, SeqCst);
        if (woken || already)
            && let Some(event) = self.event.get()
        {
            // The thread that found it asleep writes, or has written: a late write causes one spurious wake-up.
            event.take();
        }
    }

    /// Waits until something is posted, at most for `timeout`: for a front end that has nothing else to wait for.
    pub fn wait(&self, timeout: Duration) {
        let mut ready = self.ready.lock();
        if ready.is_empty() {
            self.posted.wait_for(&mut ready, timeout);
        }
    }

    /// Gives memory back that holds nothing.
    pub fn give_back(&self) {
        let mut ready = self.ready.lock();
        if ready.is_empty() {
            *ready = Vec::new();
        }
    }
}

impl Completions for CompletionQueue {
    fn post(&self, completed: Completed) -> bool {
        let mut ready = self.ready.lock();
        ready.push(completed);
        self.filled.store(true, SeqCst);
        drop(ready);
        if !is_planted(Bug::NoNotice) {
            self.posted.notify_one();
        }
        self.asleep.swap(false, SeqCst)
    }

    fn wake(&self) {
        if let Some(event) = self.event.get() {
            event.signal();
        }
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests;
