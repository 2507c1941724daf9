//! Who writes where in a file, so that writes of parts of a block lose nothing.
//!
//! Direct I/O writes whole blocks. To write a part of one is to read it, change it and write it back; what anybody else
//! writes to that block meanwhile would be undone. So every write enters the range of whole units that it touches:
//! those of whole blocks side by side, the others alone. All connections to a file share one list. It is short, as many
//! entries as there are writes under way, so it is searched from end to end.

use std::{
    collections::HashMap,
    ops::Range,
    sync::{Arc, Weak},
};

use nbdkit_core::{Buffers, sync::Mutex};
use parking_lot::{Condvar, MutexGuard};

use super::{ring::Rings, submit::Submitter};

/// The writes to a file.
#[derive(Debug)]
pub(super) struct Ranges {
    /// Entries cover whole multiples of this, in bytes; a power of 2.
    unit: u64,
    state: Mutex<State>,
    left: Condvar,
}

#[derive(Debug, Default)]
struct State {
    entered: Vec<Entry>,
    waiting: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    range: Range<u64>,
    alone: bool,
}

impl State {
    fn has_room(&self, entry: &Entry) -> bool {
        self.entered.iter().all(|other| {
            let apart = other.range.end <= entry.range.start || entry.range.end <= other.range.start;
            apart || !(other.alone || entry.alone)
        })
    }
}

impl Ranges {
    pub(super) fn new(unit: u64) -> Self {
        Ranges { unit, state: Mutex::default(), left: Condvar::new() }
    }

    fn entry(&self, range: &Range<u64>, alone: bool) -> Entry {
        let mask = self.unit - 1;
        // The end may be anywhere below 2^64, for a disk ends at 2^63 at most.
        Entry { range: range.start & !mask..(range.end + mask) & !mask, alone }
    }

    fn admit(self: &Arc<Self>, mut state: MutexGuard<'_, State>, entry: Entry) -> Entered {
        state.entered.push(entry.clone());
        Entered { ranges: self.clone(), entry }
    }

    /// Enters a range, side by side with others or `alone`, when nothing stands against it.
    pub(super) fn enter(self: &Arc<Self>, range: &Range<u64>, alone: bool) -> Entered {
        let entry = self.entry(range, alone);
        let mut state = self.state.lock();
        while !state.has_room(&entry) {
            state.waiting += 1;
            self.left.wait(&mut state);
            state.waiting -= 1;
        }
        self.admit(state, entry)
    }

    /// As [`enter`](Self::enter) side by side, unless that has to wait.
    pub(super) fn try_enter(self: &Arc<Self>, range: &Range<u64>) -> Option<Entered> {
        let entry = self.entry(range, false);
        let state = self.state.lock();
        state.has_room(&entry).then(|| self.admit(state, entry))
    }
}

/// A range that was entered; dropping it leaves.
#[derive(Debug)]
pub(super) struct Entered {
    ranges: Arc<Ranges>,
    entry: Entry,
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut state = self.ranges.state.lock();
        // Equal entries are as good as each other.
        if let Some(index) = state.entered.iter().position(|entry| *entry == self.entry) {
            state.entered.swap_remove(index);
        }
        if state.waiting > 0 {
            self.ranges.left.notify_all();
        }
    }
}

/// The files that are open, each with its writes.
#[derive(Debug, Default)]
pub(super) struct Files {
    ranges: Mutex<HashMap<FileId, Weak<Ranges>>>,
    buffers: Buffers,
    rings: Rings,
}

/// What a file is known by: whether it is a device, and the numbers that tell it from others of its kind.
pub(super) type FileId = (bool, u64, u64);

impl Files {
    /// The writes to a file, in units of `unit` bytes.
    pub(super) fn ranges(&self, file: FileId, unit: u64) -> Arc<Ranges> {
        let mut files = self.ranges.lock();
        if let Some(ranges) = files.get(&file).and_then(Weak::upgrade) {
            return ranges;
        }
        files.retain(|_, ranges| ranges.strong_count() > 0);
        let ranges = Arc::new(Ranges::new(unit));
        files.insert(file, Arc::downgrade(&ranges));
        ranges
    }

    /// Memory for direct I/O, shared by all connections.
    pub(super) fn buffers(&self) -> &Buffers {
        &self.buffers
    }

    /// What starts requests of one more connection.
    pub(super) fn submitter(&self, allowed: bool) -> Submitter {
        Submitter::new(self.buffers.clone(), allowed.then(|| self.rings.clone()))
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn alone_is_alone_in_its_units() {
        let ranges = Arc::new(Ranges::new(4096));
        let shared = ranges.enter(&(0..8192), false);
        let beside = ranges.enter(&(4096..4608), false);
        let alone = ranges.enter(&(8192..8193), true);
        assert!(ranges.try_enter(&(12_287..12_288)).is_none());
        assert!(ranges.try_enter(&(12_288..12_289)).is_some());
        drop(alone);
        assert!(ranges.try_enter(&(8192..12_288)).is_some());
        drop((shared, beside));
        assert!(ranges.state.lock().entered.is_empty());
    }

    #[test]
    fn nothing_is_lost_between_those_who_read_change_and_write() {
        let ranges = Arc::new(Ranges::new(512));
        let sum = Mutex::new(0);
        thread::scope(|scope| {
            for id in 0..4 {
                let (ranges, sum) = (&ranges, &sum);
                scope.spawn(move || {
                    for i in 0..500 {
                        let start = (i + id) % 2 * 100;
                        let entered = ranges.enter(&(start..start + 600), true);
                        let old = *sum.lock();
                        thread::yield_now();
                        *sum.lock() = old + 1;
                        drop(entered);
                    }
                });
            }
        });
        assert_eq!(*sum.lock(), 2000);
    }

    #[test]
    fn a_file_has_one_list_while_it_is_open() {
        let files = Files::default();
        let (one, two) = (files.ranges((false, 1, 1), 512), files.ranges((false, 1, 2), 512));
        assert!(Arc::ptr_eq(&one, &files.ranges((false, 1, 1), 512)));
        assert!(!Arc::ptr_eq(&one, &two));
        drop((one, two));
        let _three = files.ranges((true, 1, 1), 512);
        assert_eq!(files.ranges.lock().len(), 1);
    }
}
