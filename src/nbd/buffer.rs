//! Bytes on their way out, and memory that may not be there.
//!
//! How much is needed is the client's choice, so a failed allocation is an error of its request and never ends the
//! server.

use nbdkit_core::Result;
use nbdkit_dispatch::{buffer::grow, reclaim::give_back};

/// A buffer that stays initialised: the chain reads straight into it, and nothing is zeroed twice.
#[derive(Debug, Default)]
pub(crate) struct Buffer {
    data: Vec<u8>,
    /// What lies before was sent.
    start: usize,
    end: usize,
    spoilt: bool,
}

impl Buffer {
    /// A buffer that was larger once is not kept.
    const KEEP: usize = 4 << 20;
    const FIRST: usize = 64 << 10;

    pub(crate) fn len(&self) -> usize {
        self.end - self.start
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        &self.data[self.start..self.end]
    }

    /// Drops the first `n` bytes.
    pub(crate) fn consume(&mut self, n: usize) {
        self.start += n.min(self.len());
        if self.is_empty() {
            self.clear();
        }
    }

    /// Drops everything, and the memory too if it is unusually much.
    pub(crate) fn clear(&mut self) {
        (self.start, self.end) = (0, 0);
        if self.data.len() > Self::KEEP {
            self.data = Vec::new();
        }
    }

    /// Gives the memory back, to the system: the allocator would keep it.
    pub(crate) fn give_back(&mut self) {
        if self.is_empty() {
            give_back(&mut self.data);
            self.data = Vec::new();
        }
    }

    /// Not even an error reply found memory: what comes out here is no longer what the client has to get.
    pub(crate) fn spoil(&mut self) {
        self.spoilt = true;
    }

    /// The connection has to end.
    pub(crate) fn is_spoilt(&self) -> bool {
        self.spoilt
    }

    /// Where the next byte goes; see [`rewind`](Self::rewind).
    pub(crate) fn mark(&self) -> usize {
        self.len()
    }

    /// Takes back what was appended after `mark`; nothing may have been consumed since.
    pub(crate) fn rewind(&mut self, mark: usize) {
        self.end = self.start + mark;
    }

    fn ensure(&mut self, n: usize) -> Result<()> {
        if self.end + n <= self.data.len() {
            return Ok(());
        }
        if self.start > 0 {
            self.data.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.len());
        }
        let needed = self.end + n;
        if needed <= self.data.len() {
            return Ok(());
        }
        let size = needed.max(self.data.len() * 2).max(Self::FIRST);
        if self.end == 0 {
            // Nothing to keep, so nothing to copy.
            self.give_back();
        }
        grow(&mut self.data, size).or_else(|_| grow(&mut self.data, needed))
    }

    /// Appends `bytes`.
    ///
    /// # Errors
    /// `ENOMEM`: nothing was appended.
    pub(crate) fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.space(bytes.len())?.copy_from_slice(bytes);
        Ok(())
    }

    /// Appends `n` bytes, whose content is left over from before, for the caller to fill.
    ///
    /// # Errors
    /// `ENOMEM`: nothing was appended.
    pub(crate) fn space(&mut self, n: usize) -> Result<&mut [u8]> {
        self.ensure(n)?;
        let at = self.end;
        self.end += n;
        Ok(&mut self.data[at..self.end])
    }
}

#[cfg(test)]
mod tests {
    use nbdkit_core::Errno;

    use super::*;

    #[test]
    fn appends_consumes_and_rewinds() {
        let mut b = Buffer::default();
        b.put(b"head").unwrap();
        let mark = b.mark();
        b.space(100_000).unwrap().fill(7);
        b.rewind(mark);
        b.put(b"tail").unwrap();
        assert_eq!(b.as_slice(), b"headtail");
        b.consume(4);
        assert_eq!(b.as_slice(), b"tail");
        b.consume(99);
        assert!(b.is_empty());
        assert_eq!(b.mark(), 0);
    }

    #[test]
    fn what_was_sent_makes_room() {
        let mut b = Buffer::default();
        b.space(Buffer::FIRST).unwrap().fill(1);
        for i in 0..1000 {
            b.consume(1000);
            let mark = b.mark();
            b.space(1000).unwrap().fill(9);
            b.rewind(mark);
            b.space(1000).unwrap().fill(i as u8);
        }
        assert_eq!(b.data.len(), Buffer::FIRST);
        assert_eq!(b.as_slice().last(), Some(&(999_u32 as u8)));
    }

    #[test]
    fn unusual_memory_is_given_back() {
        let mut b = Buffer::default();
        b.space(Buffer::KEEP + 1).unwrap();
        b.clear();
        assert_eq!(b.data.capacity(), 0);
    }

    #[test]
    fn too_much_is_an_error_and_changes_nothing() {
        let mut b = Buffer::default();
        b.put(b"head").unwrap();
        assert_eq!(b.space(isize::MAX as usize).unwrap_err().errno(), Errno::ENOMEM);
        b.put(b"tail").unwrap();
        assert_eq!(b.as_slice(), b"headtail");
    }
}
