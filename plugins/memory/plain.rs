//! A disk that is one memfd: the kernel allocates pages as they are written, frees those that are trimmed, finds holes,
//! and lends the file to the front ends. A read of a hole allocates nothing.

use std::{
    fs::File,
    io,
    ops::Range,
    os::{fd::AsFd, unix::fs::FileExt},
    sync::atomic::{AtomicU64, Ordering},
};

use anyhow::Context as _;
use nbdkit_core::{Errno, Error, Extents, Flags, Loan, Result};
use parking_lot::Mutex;
use rustix::fs::MemfdFlags;

use super::lock;
use crate::holes;

/// The granularity of holes in a memfd.
pub(super) const PAGE: u64 = 4096;
/// `lseek` does not find data or holes from here on: the end of the last page does not fit its offsets.
pub(super) const BLIND: u64 = i64::MAX as u64 / PAGE * PAGE;

pub(super) struct Plain {
    file: File,
    size: u64,
    /// Every page is in memory and stays there.
    mlock: bool,
    /// How often a hole was made.
    punches: AtomicU64,
}

/// An extent of data that a connection has seen, and the number of punches when it was found: looking for the end of data
/// takes time for each page of it, so a client that maps a full disk piece by piece must not start anew each time.
pub(super) type Known = Mutex<(u64, Range<u64>)>;

impl Plain {
    pub(super) fn new(size: u64, mlock: bool) -> anyhow::Result<Self> {
        let memfd = rustix::fs::memfd_create("nbdkit-memory", MemfdFlags::CLOEXEC).map_err(io::Error::from);
        let file = File::from(memfd.map_err(Error::from).context("cannot create a file in memory")?);
        // Whole pages, so that all of the last one can become a hole.
        file.set_len(size.next_multiple_of(PAGE).min(i64::MAX as u64))
            .map_err(Error::from)
            .with_context(|| format!("cannot make a file of {size} bytes in memory"))?;
        Ok(Plain { file, size, mlock, punches: AtomicU64::new(0) })
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Whether zeroes have to be written: a hole would be pages that are not locked when they are written again.
    pub(super) fn is_locked(&self) -> bool {
        self.mlock
    }

    /// Locks all of it in memory, if that was asked for.
    pub(super) fn pin(&self) -> anyhow::Result<()> {
        if !self.mlock {
            return Ok(());
        }
        lock::pin(&self.file, self.size).map_err(Error::from).with_context(|| {
            format!("cannot lock {} bytes of memory: raise 'ulimit -l' or leave mlock=true out", self.size)
        })
    }

    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        Ok(self.file.read_exact_at(buf, offset)?)
    }

    pub(super) fn write(&self, data: &[u8], offset: u64) -> Result<()> {
        Ok(self.file.write_all_at(data, offset)?)
    }

    pub(super) fn punch(&self, length: u64, offset: u64) -> Result<()> {
        let end = offset + length;
        let end = if end == self.size { end.next_multiple_of(PAGE).min(i64::MAX as u64) } else { end };
        let done = holes::punch(&self.file, offset, end - offset);
        // After the hole is there: extents remembered until now are not believed any more.
        self.punches.fetch_add(1, Ordering::Release);
        done.map_err(|e| io::Error::from(e).into())
    }

    pub(super) fn extents(
        &self,
        known: &Known,
        offset: u64,
        flags: Flags,
        extents: &mut Extents,
    ) -> Result<()> {
        let punches = self.punches.load(Ordering::Acquire);
        let (then, data) = known.lock().clone();
        if then == punches && data.contains(&offset) {
            extents.add_data(offset, data.end - offset)?;
        }
        holes::find(&self.file, self.size.min(BLIND), flags, extents)?;
        if let Some(last) = extents.as_slice().last()
            && !last.hole
        {
            *known.lock() = (punches, last.offset..last.end());
        }
        let done = flags.contains(Flags::REQ_ONE) && !extents.as_slice().is_empty();
        if extents.covered_to() >= BLIND && !extents.is_complete() && !done {
            self.blind_extent(extents)?;
        }
        Ok(())
    }

    /// Adds the part of the last page of a disk of nearly 8 EiB: see [`BLIND`].
    fn blind_extent(&self, extents: &mut Extents) -> Result<()> {
        let at = extents.covered_to();
        let mut page = [0; PAGE as usize];
        let part = page.get_mut(..(self.size - at) as usize).ok_or(Errno::EIO)?;
        self.file.read_exact_at(part, at)?;
        let zero = part.iter().all(|b| *b == 0);
        extents.add(at, self.size - at, zero, zero)
    }

    pub(super) fn loan(&self, offset: u64) -> Loan<'_> {
        Loan { fd: self.file.as_fd(), offset, writable: true }
    }

    /// Allocated memory, in bytes.
    #[cfg(test)]
    pub(super) fn allocated(&self) -> u64 {
        use std::os::unix::fs::MetadataExt as _;
        self.file.metadata().unwrap().blocks() * 512
    }
}
