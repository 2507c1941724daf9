//! Places of a .gz file where decoding can begin: the boundaries of deflate's blocks, with what has to be known there.
//!
//! One that needs the last 32 KiB of data keeps them compressed. All of them together are bounded: when there are too many,
//! every other one goes, and they are twice as far apart from then on.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use nbdkit_core::Result;
use parking_lot::Mutex;

use crate::decompress::damaged;

/// How far back matches may reach, in bytes.
pub(super) const WINDOW: usize = 32 << 10;
/// What windows may take, in bytes.
const MOST_BYTES: usize = 192 << 20;
/// What a checkpoint takes beside its window, in bytes.
const OVERHEAD: usize = 128;

/// A place where decoding can begin.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Checkpoint {
    /// Its offset in the disk.
    pub(super) disk: u64,
    /// The offset in the file of the first byte that was not touched.
    pub(super) file: u64,
    /// Where its member begins in the disk, and the checksum of that from there to here.
    pub(super) member: u64,
    pub(super) checksum: u32,
    /// Bits of the byte before `file` that are still to be used, and these bits.
    pub(super) bits: u8,
    pub(super) bit_buffer: u8,
    /// The data before it, as far as it can matter.
    pub(super) window: Vec<u8>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Checkpoints {
    state: Mutex<State>,
    span: AtomicU64,
    /// Up to where, from 0 on, they are known.
    frontier: AtomicU64,
    complete: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    /// With compressed windows.
    list: BTreeMap<u64, Checkpoint>,
    bytes: usize,
}

impl Checkpoints {
    pub(super) fn new(span: u64) -> Self {
        Checkpoints {
            state: Mutex::default(),
            span: AtomicU64::new(span),
            frontier: AtomicU64::new(0),
            complete: AtomicBool::new(false),
        }
    }

    /// How far apart they are, in bytes of the disk.
    pub(super) fn span(&self) -> u64 {
        self.span.load(Ordering::Relaxed)
    }

    /// Whether decoding can begin near `offset`.
    pub(super) fn reach(&self, offset: u64) -> bool {
        self.is_complete() || offset <= self.frontier.load(Ordering::Acquire)
    }

    /// A decoder has come as far as `offset`, without leaving anything out.
    pub(super) fn reached(&self, offset: u64) {
        self.frontier.fetch_max(offset, Ordering::AcqRel);
    }

    /// All of the file was decoded.
    pub(super) fn completed(&self) {
        self.complete.store(true, Ordering::Release);
    }

    pub(super) fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Acquire)
    }

    /// The last one at or before `offset`, with its window; None: the start of the file.
    ///
    /// # Errors
    /// `EIO`: the window cannot be decompressed.
    pub(super) fn before(&self, offset: u64) -> Result<Option<Checkpoint>> {
        let found = self.state.lock().list.range(..=offset).next_back().map(|(_, found)| found.clone());
        found
            .map(|found| {
                let window = zstd::bulk::decompress(&found.window, WINDOW).map_err(damaged)?;
                Ok(Checkpoint { window, ..found })
            })
            .transpose()
    }

    /// The checksum that was right at that place the last time.
    pub(super) fn checksum(&self, disk: u64) -> Option<u32> {
        self.state.lock().list.get(&disk).map(|found| found.checksum)
    }

    /// Adds one, whose window is not compressed yet, unless there is one in the same span.
    pub(super) fn add(&self, checkpoint: Checkpoint) {
        let span = self.span();
        let first = checkpoint.disk - checkpoint.disk % span;
        let mut state = self.state.lock();
        if state.list.range(first..first.saturating_add(span)).next().is_some() {
            return;
        }
        // Level 1: half of the size for little time.
        let Ok(window) = zstd::bulk::compress(&checkpoint.window, 1) else { return };
        self.insert(&mut state, Checkpoint { window, ..checkpoint });
    }

    fn insert(&self, state: &mut State, checkpoint: Checkpoint) {
        state.bytes += checkpoint.window.len() + OVERHEAD;
        state.list.insert(checkpoint.disk, checkpoint);
        while state.bytes > MOST_BYTES {
            self.span.store(self.span().saturating_mul(2), Ordering::Relaxed);
            let mut keep = false;
            let State { list, bytes } = &mut *state;
            list.retain(|_, checkpoint| {
                keep = !keep;
                if !keep {
                    *bytes -= checkpoint.window.len() + OVERHEAD;
                }
                keep
            });
        }
    }

    /// All of them, with compressed windows, and how far they go.
    pub(super) fn all(&self) -> (Vec<Checkpoint>, u64) {
        let list = self.state.lock().list.values().cloned().collect();
        (list, self.frontier.load(Ordering::Acquire))
    }

    /// Those of another time.
    pub(super) fn from(list: Vec<Checkpoint>, span: u64, frontier: u64, complete: bool) -> Self {
        let new = Self::new(span);
        {
            let mut state = new.state.lock();
            for checkpoint in list {
                new.insert(&mut state, checkpoint);
            }
        }
        new.frontier.store(frontier, Ordering::Release);
        new.complete.store(complete, Ordering::Release);
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkpoint(disk: u64, window: Vec<u8>) -> Checkpoint {
        Checkpoint { disk, file: disk / 2, window, ..Checkpoint::default() }
    }

    #[test]
    fn one_for_each_span() {
        let all = Checkpoints::new(1000);
        for disk in [0, 10, 999, 1000, 2500, 2600] {
            all.add(checkpoint(disk, vec![disk as u8; 100]));
        }
        let at = |offset| all.before(offset).unwrap().unwrap().disk;
        assert_eq!([at(0), at(999), at(1000), at(2499), at(1 << 40)], [0, 0, 1000, 1000, 2500]);
        assert_eq!(all.before(2600).unwrap().unwrap().window, vec![2500_u64 as u8; 100]);
    }

    #[test]
    fn their_memory_is_bounded() {
        let all = Checkpoints::new(1000);
        let mut state = State::default();
        for i in 0..8000 {
            all.insert(&mut state, checkpoint(i * 1000, vec![0; WINDOW]));
        }
        assert!(state.bytes <= MOST_BYTES && state.list.len() > 2000, "{}", state.list.len());
        assert!(all.span() >= 2000 && state.list.contains_key(&0));
    }
}
