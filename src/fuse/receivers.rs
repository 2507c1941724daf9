//! The threads that receive the kernel's requests: how many of them listen, and how they wait for the next request.
//!
//! fuser reads the device, one thread for each of its descriptors, and calls us. What is to be said about a thread's sleep
//! is therefore said between the answer to one request and the return to fuser:
//!
//! - A thread that finds that it is one too many is parked: the kernel would wake it for requests that another one is
//!   about to take. When those that listen do not keep up, one is let go.
//! - One of those that are parked is on standby: if all that listen are held up by their requests, it takes their place. So a
//!   request that may wait can run where it was received, without another thread, and holds up nobody for long.
//! - [Busy polling](BusyPoll), where requests come faster with it, as they do when the client has a CPU of its own: poll(2)
//!   tells whether there is another one, which fuser then finds at once. (A device that does not block would make fuser
//!   spin for ever.) Any descriptor tells, for the kernel has one queue for all.

use std::{
    cell::RefCell,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use nbdkit_core::sync::Mutex;
use nbdkit_dispatch::{Awake, BusyPoll};
use parking_lot::Condvar;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

mod pace;

use pace::Pace;

/// How often the standby thread checks on the others.
const TICK: Duration = Duration::from_millis(2);
/// After so many ticks without a request it does not look until there is one.
const QUIET: u32 = 16;
/// Of so many requests, one is looked at: whether another one waits when it is done.
const SAMPLE: u32 = 16;
/// If that is so so many times in a row, another thread is let go, …
const BUSY: u32 = 4;
/// … unless there are enough, one for two CPUs, and a request takes no longer than this: it would take longer to wake the
/// thread, on a CPU that those need who make the requests.
const LONG: Duration = Duration::from_micros(20);
/// If that is not so so many times in a row, this thread is parked.
const IDLE: u32 = 4;

thread_local! {
    /// What this thread knows, if it receives.
    static RECEIVER: RefCell<Option<Receiver>> = const { RefCell::new(None) };
}

/// See the module.
pub(crate) struct Receivers(Arc<Shared>);

struct Shared {
    count: usize,
    device: OwnedFd,
    awake: Awake,
    /// Those that are not parked.
    active: AtomicUsize,
    /// Those of them that have a request.
    inside: AtomicUsize,
    /// Requests that were dealt with.
    done: AtomicU64,
    /// A thread is on standby.
    standby: AtomicBool,
    /// It wants to be woken at the next request.
    asleep: AtomicBool,
    state: Mutex<State>,
    /// For the standby thread.
    looked_for: Condvar,
    /// For others that are parked.
    wanted: Condvar,
}

#[derive(Default)]
struct State {
    /// How many of those that are parked may go.
    released: usize,
    /// Those that are not parked and have called. Others do not tell when they end.
    known: usize,
    /// A thread has ended, for the mount has.
    over: bool,
}

/// What a thread knows of its own requests.
struct Receiver {
    shared: Arc<Shared>,
    poll: BusyPoll,
    pace: Pace,
    /// Busy polling has found the next request.
    has_found: bool,
    /// Requests until one is looked at, and since when it runs.
    sample: u32,
    since: Option<Instant>,
    /// How many in a row of those were followed by another one at once,
    busy: u32,
    /// or were not.
    idle: u32,
}

impl Receivers {
    /// `count` threads, which will call. `device` is open for the mount.
    pub(crate) fn new(count: usize, device: OwnedFd) -> Self {
        Receivers(Arc::new(Shared {
            count,
            device,
            awake: Awake::default(),
            active: AtomicUsize::new(count),
            inside: AtomicUsize::new(0),
            done: AtomicU64::new(0),
            standby: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            state: Mutex::default(),
            looked_for: Condvar::new(),
            wanted: Condvar::new(),
        }))
    }

    /// The thread that calls has received a request, until this is dropped.
    pub(crate) fn receive(&self) -> Received<'_> {
        self.0.inside.fetch_add(1, SeqCst);
        if self.0.asleep.load(SeqCst) {
            drop(self.0.state.lock());
            self.0.looked_for.notify_one();
        }
        RECEIVER.with_borrow_mut(|receiver| match receiver {
            Some(receiver) => receiver.wake_up(),
            None => {
                self.0.state.lock().known += 1;
                *receiver = Some(Receiver::new(self.0.clone()));
            }
        });
        Received { shared: &self.0, answered: true }
    }

    /// Whether a thread with a request may wait: another one is there to listen in its place.
    pub(crate) fn may_wait(&self) -> bool {
        self.0.standby.load(SeqCst)
    }
}

impl Receiver {
    fn new(shared: Arc<Shared>) -> Self {
        let poll = BusyPoll::new(shared.awake.clone());
        Receiver {
            shared,
            poll,
            pace: Pace::new(Instant::now()),
            has_found: false,
            sample: SAMPLE,
            since: None,
            busy: 0,
            idle: 0,
        }
    }

    fn wake_up(&mut self) {
        let slept = self.poll.wake_up();
        self.pace.request(slept, std::mem::take(&mut self.has_found), Instant::now);
        self.sample -= 1;
        self.since = (self.sample == 0).then(Instant::now);
    }

    /// A request was dealt with; `answered`, by this thread, so that the next may come soon.
    fn fall_asleep(&mut self, answered: bool) {
        if let Some(since) = self.since.take() {
            self.sample = SAMPLE;
            self.look(self.shared.has_request(), since.elapsed());
        }
        if answered && self.pace.is_polled() {
            self.has_found = self.poll.find(|| self.shared.has_request().then_some(())).is_some();
        }
        self.poll.fall_asleep();
        let unneeded = self.idle >= IDLE || !self.shared.standby.load(SeqCst);
        if unneeded && !self.has_found && self.shared.park() {
            self.idle = 0;
            self.poll.wake_up();
            self.poll.fall_asleep();
        }
    }

    /// A request that took so long is done, and there is `another` or not.
    fn look(&mut self, another: bool, took: Duration) {
        if !another {
            (self.busy, self.idle) = (0, self.idle + 1);
            return;
        }
        (self.busy, self.idle) = (self.busy + 1, 0);
        if self.busy >= BUSY {
            self.busy = 0;
            let enough = (self.poll.cpus() / 2).max(1);
            if took > LONG || self.shared.active.load(SeqCst) < enough {
                self.shared.release_one();
            }
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.shared.state.lock().over = true;
        self.shared.wanted.notify_all();
        self.shared.looked_for.notify_all();
    }
}

impl Shared {
    fn has_request(&self) -> bool {
        let mut device = [PollFd::new(&self.device, PollFlags::IN)];
        poll(&mut device, Some(&Timespec::default())).is_ok_and(|found| found > 0)
    }

    /// Lets another thread listen, other than the standby thread.
    fn release_one(&self) {
        if self.active.load(SeqCst) + 1 >= self.count {
            return;
        }
        let mut state = self.state.lock();
        if state.released == 0 {
            state.released = 1;
            self.wanted.notify_one();
        }
    }

    /// Keeps the thread that calls until it is wanted. False: it is the only one that surely listens.
    fn park(&self) -> bool {
        let mut state = self.state.lock();
        if state.known <= 1 || state.over {
            return false;
        }
        state.known -= 1;
        self.active.fetch_sub(1, SeqCst);
        loop {
            if state.over {
                break;
            }
            if !self.standby.load(SeqCst) {
                self.standby.store(true, SeqCst);
                self.stand_by(&mut state);
                self.standby.store(false, SeqCst);
                // Another of the parked threads is on standby now.
                self.wanted.notify_one();
                break;
            }
            if state.released > 0 {
                state.released -= 1;
                break;
            }
            self.wanted.wait(&mut state);
        }
        self.active.fetch_add(1, SeqCst);
        state.known += 1;
        true
    }

    /// Returns when nobody listens, for all are in requests, and none of those ends.
    fn stand_by(&self, state: &mut parking_lot::MutexGuard<'_, State>) {
        let mut quiet = 0;
        while !state.over {
            let done = self.done.load(SeqCst);
            if quiet >= QUIET {
                self.asleep.store(true, SeqCst);
                if self.inside.load(SeqCst) == 0 && self.done.load(SeqCst) == done {
                    self.looked_for.wait(state);
                }
                self.asleep.store(false, SeqCst);
                quiet = 0;
                continue;
            }
            self.looked_for.wait_for(state, TICK);
            let inside = self.inside.load(SeqCst);
            if self.done.load(SeqCst) != done {
                quiet = 0;
            } else if inside == 0 {
                quiet += 1;
            } else if inside >= self.active.load(SeqCst) {
                log::debug!("requests are slow: others are not held up");
                return;
            }
        }
    }
}

/// A receiver with a request.
pub(crate) struct Received<'a> {
    shared: &'a Shared,
    answered: bool,
}

impl Received<'_> {
    /// The request goes on elsewhere, so the next one may take long.
    pub(crate) fn handed_over(&mut self) {
        self.answered = false;
    }
}

impl Drop for Received<'_> {
    fn drop(&mut self) {
        self.shared.done.fetch_add(1, SeqCst);
        self.shared.inside.fetch_sub(1, SeqCst);
        RECEIVER.with_borrow_mut(|receiver| {
            if let Some(receiver) = receiver {
                receiver.fall_asleep(self.answered);
            }
        });
    }
}

#[cfg(test)]
mod tests;
