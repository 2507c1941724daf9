//! A range of the disk below as a disk of its own: the handle of the filters that choose one.

use nbdkit_core::{Completion, Extents, Flags, Handle, Io, Loan, Next, Op, Result};

/// The `length` bytes from `start` on of the disk below.
pub(crate) struct Part {
    start: u64,
    length: u64,
    next: Next,
}

impl Part {
    /// None when the range is not within the disk below.
    pub(crate) fn new(next: Next, start: u64, length: u64) -> Option<Self> {
        let end = start.checked_add(length)?;
        (end <= next.caps().size).then_some(Part { start, length, next })
    }
}

// No sum here can overflow: the glue keeps requests within the range, and the range is within the disk below.
impl Handle for Part {
    fn next(&self) -> Option<&Next> {
        Some(&self.next)
    }

    fn get_size(&self) -> Result<u64> {
        Ok(self.length)
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.next.pread(buf, self.start + offset)
    }

    fn pread_nowait(&self, buf: &mut [u8], offset: u64) -> Result<bool> {
        self.next.pread_nowait(buf, self.start + offset)
    }

    fn pwrite(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
        self.next.pwrite(buf, self.start + offset, flags)
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.next.trim(length, self.start + offset, flags)
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.next.zero(length, self.start + offset, flags)
    }

    fn extents(&self, length: u64, offset: u64, flags: Flags, extents: &mut Extents) -> Result<()> {
        let start = self.start + offset;
        let mut below = Extents::new(start, start + length);
        self.next.extents(length, start, flags, &mut below)?;
        for extent in below.as_slice() {
            // The last one may go on past the range, where this disk has nothing.
            let end = extent.end().min(self.start + self.length);
            extents.add(extent.offset - self.start, end - extent.offset, extent.hole, extent.zero)?;
        }
        Ok(())
    }

    fn cache(&self, length: u64, offset: u64) -> Result<()> {
        self.next.cache(length, self.start + offset)
    }

    fn may_block(&self, op: Op) -> bool {
        self.next.may_block(op)
    }

    fn may_skip_holes(&self) -> bool {
        self.next.may_skip_holes()
    }

    fn submit(&self, io: Io<'_>, offset: u64, done: Completion) -> Option<Completion> {
        self.next.submit(io, self.start + offset, done)
    }

    fn loan(&self, offset: u64, length: u64) -> Option<Loan<'_>> {
        self.next.loan(self.start + offset, length)
    }
}
