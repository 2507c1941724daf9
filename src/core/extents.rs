//! Extents: which parts of a range are data, holes or zeroes.

use crate::{Errno, Error, Result};

/// One extent: `length` bytes from `offset` of the same kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Start, in bytes from the start of the disk.
    pub offset: u64,
    /// Length in bytes, never 0.
    pub length: u64,
    /// Nothing is allocated here.
    pub hole: bool,
    /// Reads as zeroes.
    pub zero: bool,
}

impl Extent {
    /// The first byte after the extent.
    pub fn end(&self) -> u64 {
        self.offset + self.length
    }

    /// The kind as NBD and the C interface number it: hole 1, zero 2.
    pub fn kind(&self) -> u32 {
        u32::from(self.hole) | u32::from(self.zero) << 1
    }
}

/// The status of a range in a metadata context of a layer's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// Length in bytes, never 0.
    pub length: u64,
    /// What it means is the context's.
    pub flags: u32,
}

/// The answer to an extents request over `start..end`.
///
/// Layers add extents in ascending, contiguous order. What lies before the range is dropped and what passes its
/// end is kept whole (a plugin may know more than it was asked), neighbours of one kind are joined, and the
/// number is bounded, so a hostile plugin cannot fill memory.
#[derive(Clone, Debug)]
pub struct Extents {
    start: u64,
    end: u64,
    /// Where the next one must start; None before the first.
    expected: Option<u64>,
    list: Vec<Extent>,
    full: bool,
}

impl Extents {
    /// After this many, further ones are ignored: an answer may be shorter than the question.
    pub const MAX: usize = 1 << 20;

    /// An empty answer for `start..end`, in bytes.
    pub fn new(start: u64, end: u64) -> Self {
        Extents { start, end, expected: None, list: Vec::new(), full: false }
    }

    /// Start of the range asked for.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// End of the range asked for (exclusive).
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Adds the next extent. One of length 0 is ignored, as is all that comes once the range is covered.
    ///
    /// # Errors
    /// `ERANGE` when it does not start where the last one ended, when the first one starts after the range
    /// does, or when it passes 2^64.
    pub fn add(&mut self, offset: u64, length: u64, hole: bool, zero: bool) -> Result<()> {
        if length == 0 {
            return Ok(());
        }
        let end = offset.checked_add(length).ok_or_else(|| {
            Error::new(Errno::ERANGE, format!("extent {offset}+{length} passes the end of 64 bits"))
        })?;
        match self.expected {
            Some(expected) if expected != offset => {
                return Err(Error::new(
                    Errno::ERANGE,
                    format!("extents are not contiguous: {offset} follows one that ends at {expected}"),
                ));
            }
            None if offset > self.start => {
                return Err(Error::new(
                    Errno::ERANGE,
                    format!("the first extent starts at {offset}, after the requested {}", self.start),
                ));
            }
            _ => self.expected = Some(end),
        }
        if self.full || end <= self.start || offset >= self.end {
            return Ok(());
        }
        let offset = offset.max(self.start);
        let same = self.list.last_mut().filter(|last| last.hole == hole && last.zero == zero);
        if let Some(last) = same {
            last.length = end - last.offset;
        } else if self.list.len() == Self::MAX {
            self.full = true;
        } else {
            self.list.push(Extent { offset, length: end - offset, hole, zero });
        }
        Ok(())
    }

    /// Adds what `found` has, moved so that its start becomes `start`: of its own range only, where what lies behind that
    /// is `elsewhere`.
    ///
    /// # Errors
    /// As [`add`](Self::add).
    pub fn add_shifted(&mut self, found: &Extents, start: u64, elsewhere: bool) -> Result<()> {
        let end = if elsewhere { found.end } else { u64::MAX };
        for extent in found.as_slice() {
            let length = extent.end().min(end) - extent.offset;
            self.add(extent.offset - found.start + start, length, extent.hole, extent.zero)?;
        }
        Ok(())
    }

    /// Adds data up to `end`.
    ///
    /// # Errors
    /// As [`add`](Self::add).
    pub fn add_data(&mut self, offset: u64, length: u64) -> Result<()> {
        self.add(offset, length, false, false)
    }

    /// Forgets what is told past the end of a disk of `size` bytes.
    pub(crate) fn clip(&mut self, size: u64) {
        while self.list.pop_if(|e| e.offset >= size).is_some() {}
        if let Some(last) = self.list.last_mut().filter(|last| last.end() > size) {
            last.length = size - last.offset;
            self.expected = Some(size);
        }
    }

    /// The extents, ascending from the start of the range; the last one may pass its end.
    pub fn as_slice(&self) -> &[Extent] {
        &self.list
    }

    pub(crate) fn into_list(self) -> Vec<Extent> {
        self.list
    }

    /// Whether the whole range is covered, or no more can be taken: a layer may stop here.
    pub fn is_complete(&self) -> bool {
        self.full || self.list.last().is_some_and(|e| e.end() >= self.end)
    }

    /// How far the answer reaches: the end of the last extent, or the start of the range when empty.
    pub fn covered_to(&self) -> u64 {
        self.list.last().map_or(self.start, Extent::end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(e: &Extents) -> Vec<(u64, u64, u32)> {
        e.as_slice().iter().map(|x| (x.offset, x.length, x.kind())).collect()
    }

    #[test]
    fn clips_the_start_and_joins_neighbours() {
        let mut e = Extents::new(100, 300);
        e.add(0, 50, true, true).unwrap();
        e.add(50, 100, false, false).unwrap();
        e.add(150, 50, false, false).unwrap();
        e.add(200, 1000, true, true).unwrap();
        assert!(e.is_complete());
        e.add(1200, 10, false, false).unwrap();
        assert_eq!(all(&e), [(100, 100, 0), (200, 1000, 3)]);
    }

    #[test]
    fn refuses_gaps_and_overflow() {
        let mut e = Extents::new(10, 20);
        assert!(e.add(11, 5, false, false).is_err());
        e.add(0, 12, false, false).unwrap();
        assert!(e.add(13, 1, false, false).is_err());
        assert!(e.add(12, u64::MAX, false, false).is_err());
    }

    #[test]
    fn end_where_the_disk_does() {
        let mut e = Extents::new(0, 1000);
        e.add(0, 100, false, false).unwrap();
        e.add(100, 400, true, true).unwrap();
        e.clip(300);
        assert_eq!(all(&e), [(0, 100, 0), (100, 200, 3)]);
        e.add(300, 700, false, false).unwrap();
        assert_eq!(e.covered_to(), 1000);
        e.clip(100);
        assert_eq!(all(&e), [(0, 100, 0)]);
    }

    #[test]
    fn is_bounded() {
        let mut e = Extents::new(0, u64::MAX);
        for i in 0..Extents::MAX as u64 + 10 {
            e.add(i, 1, i % 2 == 0, false).unwrap();
        }
        assert_eq!(e.as_slice().len(), Extents::MAX);
        assert!(e.is_complete());
    }
}
