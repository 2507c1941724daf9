//! A table of what a compressed file consists of: parts of the disk that are decoded by themselves.

use std::ops::Range;

use nbdkit_core::{Errno, Error, Result};

use super::{LARGEST_WHOLE, PART, part_of};

/// Parts of a disk, ascending and without gaps, each with what has to be known to decode it.
#[derive(Debug)]
pub(crate) struct Segments<T> {
    /// With the offset where each begins.
    list: Vec<(u64, T)>,
    size: u64,
    largest: u64,
}

impl<T: Clone> Segments<T> {
    /// A table of parts of these lengths, in bytes. Those of length 0 are left out.
    ///
    /// # Errors
    /// `EFBIG`: the disk is over 2^63-1 bytes.
    pub(crate) fn new(parts: impl Iterator<Item = (u64, T)>) -> Result<Self> {
        let mut table = Segments { list: Vec::new(), size: 0, largest: 0 };
        for (length, part) in parts.filter(|(length, _)| *length > 0) {
            table.list.push((table.size, part));
            table.largest = table.largest.max(length);
            table.size = table
                .size
                .checked_add(length)
                .filter(|size| i64::try_from(*size).is_ok())
                .ok_or_else(|| Error::new(Errno::EFBIG, "the disk in the file is over 2^63-1 bytes"))?;
        }
        table.list.shrink_to_fit();
        Ok(table)
    }

    /// Size of the disk in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Length of the largest part in bytes.
    pub(crate) fn largest(&self) -> u64 {
        self.largest
    }

    /// What is decoded together around an offset: the part that it is in, or a piece of one that is too large.
    pub(crate) fn piece(&self, offset: u64) -> Range<u64> {
        let whole = self.at(offset).0;
        if whole.end - whole.start <= LARGEST_WHOLE { whole } else { part_of(&whole, PART, offset) }
    }

    /// Where the part begins of which `piece` is not all: pieces of one are decoded one after the other.
    pub(crate) fn lane(&self, piece: &Range<u64>) -> Option<u64> {
        let whole = self.at(piece.start).0;
        (whole != *piece).then_some(whole.start)
    }

    /// The part that an offset is in, which is before the disk's end.
    pub(crate) fn at(&self, offset: u64) -> (Range<u64>, T) {
        let after = self.list.partition_point(|(start, _)| *start <= offset);
        let (start, part) = &self.list[after.saturating_sub(1)];
        let end = self.list.get(after).map_or(self.size, |(start, _)| *start);
        (*start..end, part.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_part() {
        let table = Segments::new([(10, 'a'), (0, 'b'), (5, 'c')].into_iter()).unwrap();
        assert_eq!((table.size(), table.largest()), (15, 10));
        assert_eq!(
            [table.at(0), table.at(9), table.at(10), table.at(14)],
            [(0..10, 'a'), (0..10, 'a'), (10..15, 'c'), (10..15, 'c')]
        );
        assert!(Segments::new([(u64::MAX / 2, ()), (1, ())].into_iter()).is_err());
    }
}
