//! Sparse reads: the holes of a READ are neither read nor sent.
//!
//! Only a large read is worth the question where its holes are: at 64 KiB two `lseek` calls are a percent or two of
//! what copying the data twice costs, at 4 KiB they would double the system calls. And only a chain that says so
//! ([`Caps::skip_holes`](nbdkit_core::Caps::skip_holes)) is asked: the question is cheap there, and no
//! layer has to see the reads that are left out. So the connection's thread asks; only what then has to wait for the
//! data goes to a worker. What was data the last time is remembered and not asked for again,
//! so a disk without holes is asked once.
//!
//! Is it true what the client gets? The question is asked after the request was received. A write that had been
//! answered by then is data in the answer. One that had not may come in between: then the client sees the range as
//! it was a moment after it asked, before that write, as if it had been read then. What is remembered is data only,
//! and data is read: if it has become a hole meanwhile, by whomever, zeroes are read and sent. A hole is never
//! remembered, for others may write to the disk. No read is atomic over several blocks, whole or in parts.

use std::ops::Range;

use nbdkit_core::{Session, sync::Mutex};

/// A smaller read is not worth the question.
pub(crate) const WORTH_ASKING: u64 = 64 << 10;
/// A smaller hole is read with the data around it: that is cheaper than one more call and chunk.
const WORTH_SKIPPING: u64 = 32 << 10;
/// Chunks begin and end at multiples of this where they can (proto.md, `NBD_CMD_READ`).
const UNIT: u64 = 512;

/// What a session knows of its disk.
#[derive(Debug, Default)]
pub(crate) struct Map {
    /// Was data when it was last asked for.
    data: Mutex<Range<u64>>,
}

/// A part of a READ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) offset: u64,
    pub(crate) length: u64,
    /// Reads as zeroes.
    pub(crate) hole: bool,
}

impl Map {
    /// Whether all of a range is taken for data.
    pub(crate) fn is_data(&self, offset: u64, length: u64) -> bool {
        let data = self.data.lock();
        data.start <= offset && offset.saturating_add(length) <= data.end
    }

    /// A range was trimmed or zeroed: it may have become a hole.
    pub(crate) fn freed(&self, offset: u64, length: u64) {
        let mut data = self.data.lock();
        if offset < data.end && data.start < offset.saturating_add(length) {
            *data = 0..0;
        }
    }

    /// The parts of a range, in order. None: the chain does not tell.
    pub(crate) fn parts(&self, session: &Session, offset: u64, length: u64, wait: bool) -> Option<Vec<Part>> {
        let range = offset..offset + length;
        let extents = session.holes(length, offset, wait)?;
        if let Some(data) = extents.iter().rev().find(|e| !e.zero) {
            *self.data.lock() = data.offset..data.end();
        }
        let unit = UNIT.max(session.caps().block_size.minimum.into());
        let holes = extents.iter().filter(|e| e.zero).map(|e| e.offset..e.end());
        Some(cut(&range, holes, unit))
    }
}

/// Cuts a range along its holes, which come in order; neighbours are taken as one.
fn cut(range: &Range<u64>, holes: impl Iterator<Item = Range<u64>>, unit: u64) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut at = range.start;
    let mut holes = holes.peekable();
    while let Some(mut hole) = holes.next() {
        while let Some(next) = holes.next_if(|next| next.start <= hole.end) {
            hole.end = next.end;
        }
        let start = if hole.start <= range.start { range.start } else { hole.start.next_multiple_of(unit) };
        let end = if hole.end >= range.end { range.end } else { hole.end / unit * unit };
        let worth = start.checked_add(WORTH_SKIPPING).is_some_and(|worth| worth <= end);
        if start < at || !worth {
            continue;
        }
        if at < start {
            parts.push(Part { offset: at, length: start - at, hole: false });
        }
        parts.push(Part { offset: start, length: end - start, hole: true });
        at = end;
    }
    if at < range.end {
        parts.push(Part { offset: at, length: range.end - at, hole: false });
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    const K: u64 = 1 << 10;

    fn parts(range: Range<u64>, holes: &[(u64, u64)], unit: u64) -> Vec<(u64, u64, bool)> {
        let parts = cut(&range, holes.iter().map(|(start, end)| *start..*end), unit);
        // They follow each other and cover the range.
        let end = parts.iter().fold(range.start, |at, part| {
            assert_eq!(part.offset, at);
            assert!(part.length > 0);
            at + part.length
        });
        assert_eq!(end, range.end);
        parts.iter().map(|p| (p.offset / K, p.length / K, p.hole)).collect()
    }

    #[test]
    fn holes_are_cut_out() {
        let range = 64 * K..256 * K;
        assert_eq!(parts(range.clone(), &[], 512), [(64, 192, false)]);
        assert_eq!(parts(range.clone(), &[(0, u64::MAX)], 512), [(64, 192, true)]);
        let holes = [(0, 100 * K), (120 * K, 140 * K), (160 * K, 200 * K), (200 * K, 300 * K)];
        assert_eq!(parts(range.clone(), &holes, 512), [(64, 36, true), (100, 60, false), (160, 96, true)]);
        // Small ones are read.
        assert_eq!(parts(range, &[(64 * K, 95 * K), (250 * K, 256 * K)], 512), [(64, 192, false)]);
    }

    #[test]
    fn parts_are_aligned_within_the_range() {
        let hole = 1000..100 * K + 1;
        assert_eq!(
            cut(&(7..200 * K), [hole].into_iter(), 512),
            [
                Part { offset: 7, length: 1024 - 7, hole: false },
                Part { offset: 1024, length: 99 * K, hole: true },
                Part { offset: 100 * K, length: 100 * K, hole: false }
            ]
        );
        assert_eq!(
            parts(0..256 * K, &[(K, 250 * K)], 64 * K),
            [(0, 64, false), (64, 128, true), (192, 64, false)]
        );
    }

    #[test]
    fn data_is_remembered_until_it_is_freed() {
        let map = Map::default();
        assert!(!map.is_data(0, 1));
        *map.data.lock() = 10..20;
        assert!(map.is_data(10, 10) && map.is_data(12, 1));
        assert!(!map.is_data(9, 2) && !map.is_data(19, 2) && !map.is_data(u64::MAX, 2));
        map.freed(20, 5);
        map.freed(0, 10);
        assert!(map.is_data(10, 10));
        map.freed(19, u64::MAX);
        assert!(!map.is_data(10, 1));
    }
}
