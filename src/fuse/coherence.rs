//! Keeps the kernel's copies of a disk and of its partitions the same, and true when somebody writes by another front
//! end.
//!
//! The kernel caches each file by itself, so a write to `nbd` has to drop its cached pages of `nbd1`, and the other way
//! round, before the writer is told that it is done; a write over NBD those of both. Pages may hold more than the chain
//! does: what was stored through a shared mapping and not written yet. To drop such a page is to write it, all of it. So
//! pages are dropped before the chain is written, and until that is over no page of the range is read again, for it
//! could be stored to and then be written over what the other one wrote. Afterwards they are dropped once more.
//!
//! Dropping a page waits for the holder of its lock: a read, which other threads answer, or a write. Two writes to the
//! same place through two files would wait for each other, so one that finds the other under way drops pages only
//! after it was answered; what such writers find was never ordered. A thread of its own does all that, since no thread
//! that serves requests may wait here.

use std::{
    collections::VecDeque,
    ops::Range,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use fuser::{INodeNo, Notifier};
use nbdkit_core::sync::Mutex;
use parking_lot::Condvar;

/// The kernel locks up to this many bytes at once, however little is written.
const FOLIO: u64 = 2 << 20;

/// How often pages are dropped before a write, when somebody reads them again each time.
const ATTEMPTS: usize = 16;

/// Pages to drop: a file, and a range in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stale {
    pub(crate) file: INodeNo,
    pub(crate) range: Range<u64>,
}

/// A write under way: the disk it goes to, the file it came by, and the range of the disk. No file: another front end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Write {
    pub(crate) disk: usize,
    pub(crate) file: Option<INodeNo>,
    pub(crate) range: Range<u64>,
}

impl Write {
    /// Whether the kernel may hold pages of one that dropping those of the other waits for.
    fn meets(&self, other: &Write) -> bool {
        self.disk == other.disk
            && self.file != other.file
            && self.file.is_some()
            && other.file.is_some()
            && self.range.start.saturating_sub(FOLIO) < other.range.end.saturating_add(FOLIO)
            && other.range.start.saturating_sub(FOLIO) < self.range.end.saturating_add(FOLIO)
    }

    /// Whether a read through `file` may bring back pages that the write has dropped. Their edges are not known here, but
    /// that the kernel reads whole ones.
    fn hinders(&self, disk: usize, file: INodeNo, range: &Range<u64>) -> bool {
        self.disk == disk
            && self.file != Some(file)
            && self.range.start < range.end
            && range.start < self.range.end
    }
}

/// How far a registered write is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Pages are dropped. `again`: some were brought back meanwhile.
    Clearing { again: bool },
    /// The kernel has no pages of the range, and reads wait until it is made.
    Exclusive,
    /// It is made, or pages cannot be kept away: nobody waits for it.
    Shared,
}

/// A registered write, until this is dropped.
pub(crate) struct Ticket {
    coherence: Arc<Coherence>,
    number: u64,
    /// Another write that it may have to wait for was under way.
    met: bool,
    /// Pages are in its way, so that it has to go through [`Coherence::before`].
    pub(crate) blocked: bool,
}

type Answer = Box<dyn FnOnce() + Send>;

impl Ticket {
    /// For [`Coherence::before`].
    pub(crate) fn number(&self) -> u64 {
        self.number
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.coherence.remove(|entry| entry.number == self.number);
    }
}

/// Pages to drop, and what has to happen then.
#[derive(Default)]
struct Job {
    stale: Vec<Stale>,
    /// For the write with this number, which follows.
    before: Option<u64>,
    /// For a write that was made, which is registered until then.
    after: Option<Ticket>,
    then: Option<Answer>,
}

struct Entry {
    number: u64,
    write: Write,
    phase: Phase,
}

#[derive(Default)]
struct State {
    next: u64,
    writes: Vec<Entry>,
    jobs: VecDeque<Job>,
    running: bool,
    closing: bool,
}

/// See the module.
#[derive(Default)]
pub(crate) struct Coherence {
    state: Mutex<State>,
    /// Wakes the thread.
    wake: Condvar,
    /// Registered writes that reads have to look at.
    hindering: AtomicUsize,
    /// Wakes reads that wait for a write.
    released: Condvar,
    /// Set once the mount answers; before that nothing is cached.
    notifier: OnceLock<Notifier>,
}

impl Coherence {
    /// Starts telling the kernel.
    pub(crate) fn connect(&self, notifier: Notifier) {
        // Set once, by the mount that made it.
        let _ = self.notifier.set(notifier);
    }

    /// Drops pages at once, and writes those that the kernel has changed. Waits for requests of the kernel that hold
    /// them: not to be called on a thread that serves requests of the mount.
    pub(crate) fn drop_pages(&self, stale: &Stale) {
        let length = stale.range.end - stale.range.start;
        let (Ok(offset), Ok(length)) = (i64::try_from(stale.range.start), i64::try_from(length)) else {
            return;
        };
        self.tell(stale.file, offset, length);
    }

    /// Has the kernel ask again for the attributes of a file. Waits for nobody.
    pub(crate) fn drop_attributes(&self, file: INodeNo) {
        self.tell(file, -1, 0);
    }

    fn tell(&self, file: INodeNo, offset: i64, length: i64) {
        let Some(notifier) = self.notifier.get() else { return };
        if let Err(e) = notifier.inval_inode(file, offset, length) {
            // A mount that is ending caches nothing, and the kernel may have forgotten the file.
            log::debug!("the kernel's cache was not told of a change: {e}");
        }
    }

    /// Registers a write before it is made. `stale` are the pages in its way. `from_cache`: the kernel writes a page that
    /// it kept, which others may be waiting for.
    pub(crate) fn begin(self: &Arc<Self>, write: Write, stale: &[Stale], from_cache: bool) -> Ticket {
        let mut state = self.state.lock();
        let mut met = from_cache;
        for other in state.writes.iter_mut().filter(|other| other.write.meets(&write)) {
            met = true;
            if let (Phase::Clearing { again }, false) = (&mut other.phase, from_cache) {
                // It leaves a page behind.
                *again = true;
            }
        }
        let phase = match (met, stale.is_empty()) {
            (true, _) => Phase::Shared,
            (false, true) => Phase::Exclusive,
            (false, false) => Phase::Clearing { again: false },
        };
        let number = self.register(&mut state, write, phase);
        Ticket { coherence: self.clone(), number, met, blocked: !met && !stale.is_empty() }
    }

    fn register(&self, state: &mut State, write: Write, phase: Phase) -> u64 {
        let number = state.next;
        state.next += 1;
        state.writes.push(Entry { number, write, phase });
        self.count(state);
        number
    }

    /// To be called when a write has come or gone, or has reached another phase.
    fn count(&self, state: &State) {
        let hindering = state.writes.iter().filter(|entry| entry.phase != Phase::Shared).count();
        self.hindering.store(hindering, Ordering::Release);
        self.released.notify_all();
    }

    fn remove(&self, which: impl Fn(&Entry) -> bool) {
        let mut state = self.state.lock();
        if let Some(at) = state.writes.iter().position(which) {
            state.writes.swap_remove(at);
            self.count(&state);
        }
    }

    /// Registers a write by another front end and drops the pages in its way. Waits as [`drop_pages`](Self::drop_pages).
    pub(crate) fn begin_elsewhere(&self, write: Write, stale: &[Stale]) {
        let mut state = self.state.lock();
        let number = self.register(&mut state, write, Phase::Clearing { again: false });
        drop(state);
        self.clear(number, stale);
    }

    /// A write by another front end is over, if it was registered.
    pub(crate) fn end_elsewhere(&self, write: &Write) {
        self.remove(|entry| entry.write == *write);
    }

    /// Drops the pages in the way of a write, until nobody has read any meanwhile.
    fn clear(&self, number: u64, stale: &[Stale]) {
        for attempt in 1..=ATTEMPTS {
            for stale in stale {
                self.drop_pages(stale);
            }
            let mut state = self.state.lock();
            let Some(entry) = state.writes.iter_mut().find(|entry| entry.number == number) else { return };
            entry.phase = match entry.phase {
                Phase::Clearing { again: true } if attempt < ATTEMPTS => Phase::Clearing { again: false },
                Phase::Clearing { again: true } => Phase::Shared,
                _ => Phase::Exclusive,
            };
            if entry.phase != (Phase::Clearing { again: false }) {
                return self.count(&state);
            }
        }
    }

    /// Whether a read has to [wait](Self::wait_to_read) for a write.
    #[inline]
    pub(crate) fn must_wait_to_read(&self, disk: usize, file: INodeNo, range: &Range<u64>) -> bool {
        self.hindering.load(Ordering::Acquire) > 0
            && Self::is_hindered(&mut self.state.lock(), disk, file, range)
    }

    /// Waits until a read may bring pages into the kernel's cache.
    pub(crate) fn wait_to_read(&self, disk: usize, file: INodeNo, range: &Range<u64>) {
        let mut state = self.state.lock();
        while Self::is_hindered(&mut state, disk, file, range) {
            self.released.wait(&mut state);
        }
    }

    fn is_hindered(state: &mut State, disk: usize, file: INodeNo, range: &Range<u64>) -> bool {
        let mut hindered = false;
        for entry in state.writes.iter_mut().filter(|entry| entry.write.hinders(disk, file, range)) {
            match &mut entry.phase {
                Phase::Clearing { again } => *again = true,
                Phase::Exclusive => hindered = true,
                Phase::Shared => {}
            }
        }
        hindered
    }

    /// Drops the pages in the way of a registered write, then calls `then`, on a thread that must not wait for long.
    pub(crate) fn before(
        self: &Arc<Self>,
        (number, stale): (u64, Vec<Stale>),
        then: impl FnOnce() + Send + 'static,
    ) {
        self.enqueue(Job { stale, before: Some(number), then: Some(Box::new(then)), ..Job::default() });
    }

    /// Has the kernel write what it keeps of a file, then calls `then`, on a thread that must not wait for long.
    pub(crate) fn launder(self: &Arc<Self>, kept: Stale, then: impl FnOnce() + Send + 'static) {
        self.enqueue(Job { stale: vec![kept], then: Some(Box::new(then)), ..Job::default() });
    }

    /// The write was made: drops the pages and calls `answer`. With `at_once` the answer does not wait for that.
    pub(crate) fn end(
        self: &Arc<Self>,
        ticket: Ticket,
        stale: Vec<Stale>,
        at_once: bool,
        answer: impl FnOnce() + Send + 'static,
    ) {
        if stale.is_empty() {
            drop(ticket);
            return answer();
        }
        let mut state = self.state.lock();
        let mut met = ticket.met || at_once;
        if let Some(at) = state.writes.iter().position(|entry| entry.number == ticket.number) {
            state.writes[at].phase = Phase::Shared;
            let write = state.writes[at].write.clone();
            // One that came later may be answered already, and its pages be waited for.
            met |= state.writes.iter().any(|other| other.write.meets(&write));
            self.count(&state);
        }
        drop(state);
        let then = if met {
            answer();
            None
        } else {
            Some(Box::new(answer) as Answer)
        };
        self.enqueue(Job { stale, after: Some(ticket), then, ..Job::default() });
    }

    fn enqueue(self: &Arc<Self>, job: Job) {
        let mut state = self.state.lock();
        state.jobs.push_back(job);
        if !state.running {
            let this = self.clone();
            match thread::Builder::new().name("coherence".into()).spawn(move || this.work()) {
                Ok(_) => state.running = true,
                Err(e) => {
                    log::error!("the kernel's cache is not told of a write, since no thread can be had: {e}");
                    let jobs = std::mem::take(&mut state.jobs);
                    drop(state);
                    for Job { after, then, .. } in jobs {
                        drop(after);
                        then.into_iter().for_each(|then| then());
                    }
                    return;
                }
            }
        }
        drop(state);
        self.wake.notify_one();
    }

    /// Lets the thread end once nothing is left to do.
    pub(crate) fn close(&self) {
        self.state.lock().closing = true;
        self.wake.notify_all();
    }

    fn work(&self) {
        loop {
            let mut state = self.state.lock();
            let job = loop {
                match state.jobs.pop_front() {
                    Some(job) => break job,
                    None if state.closing => {
                        state.running = false;
                        return;
                    }
                    None => self.wake.wait(&mut state),
                }
            };
            drop(state);
            match job.before {
                Some(number) => self.clear(number, &job.stale),
                None => job.stale.iter().for_each(|stale| self.drop_pages(stale)),
            }
            drop(job.after);
            if let Some(then) = job.then {
                then();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn write(file: u64, range: Range<u64>) -> Write {
        Write { disk: 0, file: Some(INodeNo(file)), range }
    }

    #[test]
    fn writes_meet_by_two_files_only() {
        let one = write(2, 0..4096);
        assert!(!one.meets(&write(2, 0..4096)), "the kernel keeps those apart itself");
        assert!(one.meets(&write(3, 1000..1001)));
        assert!(one.meets(&write(3, FOLIO..FOLIO + 1)));
        assert!(!one.meets(&write(3, 10 * FOLIO..11 * FOLIO)));
        assert!(!one.meets(&Write { disk: 1, ..write(3, 0..4096) }));
    }

    #[test]
    fn every_write_is_answered_once() {
        let coherence = Arc::new(Coherence::default());
        let (tell, told) = mpsc::channel();
        let stale = vec![Stale { file: INodeNo(9), range: 0..1 }];
        let first = coherence.begin(write(2, 0..1), &[], false);
        let second = coherence.begin(write(3, 0..1), &[], false);
        assert!(!first.met && second.met);
        for (number, ticket, stale) in [(2, second, stale.clone()), (1, first, stale)] {
            let tell = tell.clone();
            coherence.end(ticket, stale, false, move || tell.send(number).unwrap());
        }
        assert_eq!((told.recv(), told.recv()), (Ok(2), Ok(1)));
        // Pages are dropped in order.
        let over = tell.clone();
        coherence.launder(Stale { file: INodeNo(9), range: 0..1 }, move || over.send(0).unwrap());
        assert_eq!(told.recv(), Ok(0));
        let third = coherence.begin(write(2, 0..1), &[], false);
        assert!(!third.met, "the others are over");
        coherence.end(third, Vec::new(), false, move || tell.send(3).unwrap());
        assert_eq!(told.recv(), Ok(3));
        coherence.close();
    }

    #[test]
    fn reads_wait_for_a_write_whose_pages_were_dropped() {
        let coherence = Arc::new(Coherence::default());
        let waits = |file, range| coherence.must_wait_to_read(0, INodeNo(file), &range);
        let ticket = coherence.begin(write(2, 4096..8192), &[], false);
        assert!(!ticket.blocked && waits(3, 8191..10000));
        assert!(!waits(2, 4096..8192), "the kernel keeps those apart itself");
        assert!(!waits(3, 0..4096) && !waits(3, 8192..10000));
        drop(ticket);
        assert!(!waits(3, 8191..10000));

        let elsewhere = Write { disk: 0, file: None, range: 0..1 };
        coherence.begin_elsewhere(elsewhere.clone(), &[]);
        assert!(waits(2, 0..4096) && waits(3, 0..4096));
        coherence.end_elsewhere(&elsewhere);
        assert!(!waits(2, 0..4096));
    }

    #[test]
    fn what_a_read_brings_back_is_dropped_again() {
        let coherence = Arc::new(Coherence::default());
        let stale = [Stale { file: INodeNo(3), range: 0..4096 }];
        let ticket = coherence.begin(write(2, 0..4096), &stale, false);
        assert!(ticket.blocked);
        assert!(!coherence.must_wait_to_read(0, INodeNo(3), &(0..4096)), "its page may be waited for");
        assert!(coherence.state.lock().writes[0].phase == Phase::Clearing { again: true });
        coherence.clear(ticket.number, &stale);
        assert!(coherence.must_wait_to_read(0, INodeNo(3), &(0..4096)));
        // A page that the kernel writes itself must not wait for anything.
        let kept = coherence.begin(write(3, 0..4096), &stale, true);
        assert!(!kept.blocked);
    }
}
