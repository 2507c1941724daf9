//! Keeps the kernel's copies of a disk and of its partitions the same.
//!
//! The kernel caches each file by itself, so a write to `nbd` has to drop its cached pages of `nbd1`, and the other way
//! round, before the writer is told that it is done. Dropping a page waits for the holder of its lock: a read, which
//! other threads answer, or a write. Two writes to the same place through two files would wait for each other, so
//! one that finds the other under way is answered first and drops the pages afterwards; what such writers find was
//! never ordered. A thread of its own does all that, since no thread that serves requests may wait here.

use std::{
    collections::VecDeque,
    ops::Range,
    sync::{Arc, OnceLock},
    thread,
};

use fuser::{INodeNo, Notifier};
use nbdkit_core::sync::Mutex;
use parking_lot::Condvar;

/// The kernel locks up to this many bytes at once, however little is written.
const FOLIO: u64 = 2 << 20;

/// Pages to drop: a file, and a range in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stale {
    pub(crate) file: INodeNo,
    pub(crate) range: Range<u64>,
}

/// A write under way: the disk it goes to, the file it came by, and the range of the disk.
#[derive(Clone, Debug)]
pub(crate) struct Write {
    pub(crate) disk: usize,
    pub(crate) file: INodeNo,
    pub(crate) range: Range<u64>,
}

impl Write {
    /// Whether the kernel may hold pages of one that dropping those of the other waits for.
    fn meets(&self, other: &Write) -> bool {
        self.disk == other.disk
            && self.file != other.file
            && self.range.start.saturating_sub(FOLIO) < other.range.end.saturating_add(FOLIO)
            && other.range.start.saturating_sub(FOLIO) < self.range.end.saturating_add(FOLIO)
    }
}

/// A registered write, until this is dropped.
pub(crate) struct Ticket {
    coherence: Arc<Coherence>,
    number: u64,
    /// Another write that it may have to wait for was under way.
    met: bool,
}

type Answer = Box<dyn FnOnce() + Send>;

impl Drop for Ticket {
    fn drop(&mut self) {
        self.coherence.state.lock().writes.retain(|(number, _)| *number != self.number);
    }
}

struct Job {
    ticket: Ticket,
    stale: Vec<Stale>,
    answer: Option<Answer>,
}

#[derive(Default)]
struct State {
    next: u64,
    writes: Vec<(u64, Write)>,
    jobs: VecDeque<Job>,
    running: bool,
    closing: bool,
}

/// See the module.
#[derive(Default)]
pub(crate) struct Coherence {
    state: Mutex<State>,
    wake: Condvar,
    /// Set once the mount answers; before that nothing is cached.
    notifier: OnceLock<Notifier>,
}

impl Coherence {
    /// Starts telling the kernel.
    pub(crate) fn connect(&self, notifier: Notifier) {
        // Set once, by the mount that made it.
        let _ = self.notifier.set(notifier);
    }

    /// Drops pages at once. Waits for requests of the kernel that hold them: not to be called on a thread that
    /// serves requests of the mount.
    pub(crate) fn drop_pages(&self, stale: &Stale) {
        let Some(notifier) = self.notifier.get() else { return };
        let length = stale.range.end - stale.range.start;
        let (Ok(offset), Ok(length)) = (i64::try_from(stale.range.start), i64::try_from(length)) else {
            return;
        };
        if let Err(e) = notifier.inval_inode(stale.file, offset, length) {
            // A mount that is ending caches nothing.
            log::debug!("the kernel's cache was not told of a write: {e}");
        }
    }

    /// Registers a write before it is made.
    pub(crate) fn begin(self: &Arc<Self>, write: Write) -> Ticket {
        let mut state = self.state.lock();
        let met = state.writes.iter().any(|(_, other)| other.meets(&write));
        let number = state.next;
        state.next += 1;
        state.writes.push((number, write));
        Ticket { coherence: self.clone(), number, met }
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
        let answer = if ticket.met || at_once {
            answer();
            None
        } else {
            Some(Box::new(answer) as Answer)
        };
        let mut state = self.state.lock();
        state.jobs.push_back(Job { ticket, stale, answer });
        if !state.running {
            let this = self.clone();
            match thread::Builder::new().name("coherence".into()).spawn(move || this.work()) {
                Ok(_) => state.running = true,
                Err(e) => {
                    log::error!("the kernel's cache is not told of a write, since no thread can be had: {e}");
                    let jobs = std::mem::take(&mut state.jobs);
                    drop(state);
                    for Job { ticket, answer, .. } in jobs {
                        drop(ticket);
                        answer.into_iter().for_each(|answer| answer());
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
            for stale in &job.stale {
                self.drop_pages(stale);
            }
            drop(job.ticket);
            if let Some(answer) = job.answer {
                answer();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn write(file: u64, range: Range<u64>) -> Write {
        Write { disk: 0, file: INodeNo(file), range }
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
        let first = coherence.begin(write(2, 0..1));
        let second = coherence.begin(write(3, 0..1));
        assert!(!first.met && second.met);
        for (number, ticket, stale) in [(2, second, stale.clone()), (1, first, stale)] {
            let tell = tell.clone();
            coherence.end(ticket, stale, false, move || tell.send(number).unwrap());
        }
        assert_eq!((told.recv(), told.recv()), (Ok(2), Ok(1)));
        let third = coherence.begin(write(2, 0..1));
        assert!(!third.met, "the others are over");
        coherence.end(third, Vec::new(), false, move || tell.send(3).unwrap());
        assert_eq!(told.recv(), Ok(3));
        coherence.close();
    }
}
