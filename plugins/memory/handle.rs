//! A connection to a disk in memory, for each plugin that has one.

use std::sync::Arc;

use nbdkit_core::{Caps, Errno, Extents, Flags, Handle, Op, Outcome, Request, Result};

use super::{
    allocator::{Data, Storage},
    plain::Known,
};

/// An open disk.
pub(crate) struct Shared {
    pub(super) disk: Arc<Storage>,
    known: Known,
}

impl Shared {
    pub(crate) fn new(disk: Arc<Storage>) -> Self {
        Shared { disk, known: Known::default() }
    }
}

impl Handle for Shared {
    fn capabilities(&self) -> Result<Caps> {
        Ok(Caps::native(self.disk.size()).with_block_size(self.disk.block_size()).with_skip_holes(true))
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        match &self.disk.data {
            Data::Plain(plain) => plain.read(buf, offset),
            Data::Compressed(compressed) => compressed.read(buf, offset),
        }
    }

    fn pwrite(&self, buf: &[u8], offset: u64, _: Flags) -> Result<()> {
        self.disk.write(buf, offset)
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        match self.zero(length, offset, flags) {
            Err(e) if e.is_unsupported() => Ok(()),
            done => done,
        }
    }

    fn zero(&self, length: u64, offset: u64, _: Flags) -> Result<()> {
        match &self.disk.data {
            Data::Plain(plain) if plain.is_locked() => Err(Errno::EOPNOTSUPP.into()),
            _ => self.disk.clear(length, offset),
        }
    }

    fn extents(&self, length: u64, offset: u64, flags: Flags, extents: &mut Extents) -> Result<()> {
        match &self.disk.data {
            Data::Plain(plain) => plain.extents(&self.known, offset, flags, extents),
            Data::Compressed(compressed) => compressed.extents(length, offset, flags, extents),
        }
    }

    fn cache(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        let slow = match &self.disk.data {
            Data::Plain(_) if request.may_lend() && self.disk.is_told() => return Outcome::NeedsThread,
            Data::Plain(plain) if request.may_lend() => return Outcome::Lent(plain.loan(request.offset())),
            // Zeroes that have to be written take longer than a copy.
            Data::Plain(plain) => request.op() == Op::Zero && plain.is_locked(),
            // So does compressing.
            Data::Compressed(_) => !matches!(request.op(), Op::Flush | Op::Cache),
        };
        if slow && !request.may_wait() { Outcome::NeedsThread } else { request.run(self) }
    }
}
