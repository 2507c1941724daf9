//! A disk that is one memfd: the kernel allocates pages as they are written, frees those that are trimmed, finds holes,
//! and lends the file to the front ends. A read of a hole allocates nothing.
//!
//! Pages that are known to exist are read and written through a mapping, which takes half the time of a system call. A fresh
//! page is written by one: through the mapping it would cost a page fault, and be cleared before it is filled. What is
//! written to the file on loan is not known, and costs what it did. Making holes waits for those who copy, and they for it:
//! to touch a page of the mapping that has just become a hole would allocate it again.

use std::{
    fs::File,
    io,
    ops::Range,
    os::{fd::AsFd, unix::fs::FileExt},
    sync::atomic::{AtomicU64, Ordering},
};

use anyhow::Context as _;
use nbdkit_core::{
    Errno, Error, Extents, Flags, Loan, Result,
    sync::{Mutex, RwLock},
};
use rustix::fs::MemfdFlags;

use nbdkit_common::Bitmap;

use super::mapping::Mapping;
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
    /// None for a disk that does not fit into the address space.
    mapped: Option<Mapped>,
}

struct Mapped {
    mapping: Mapping,
    /// The pages that are known to exist.
    pages: Bitmap,
    /// Held for reading by those who copy, and for writing while pages cease to exist.
    holes: RwLock<()>,
}

/// An extent of data that a connection has seen, and the number of punches when it was found: looking for the end of data
/// takes time for each page of it, so a client that maps a full disk piece by piece must not start anew each time.
pub(super) type Known = Mutex<(u64, Range<u64>)>;

impl Plain {
    pub(super) fn new(size: u64, mlock: bool) -> anyhow::Result<Self> {
        let memfd =
            rustix::fs::memfd_create("nbdkit-memory", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
                .map_err(io::Error::from);
        let file = File::from(memfd.map_err(Error::from).context("cannot create a file in memory")?);
        // Whole pages, so that all of the last one can become a hole.
        file.set_len(size.next_multiple_of(PAGE).min(i64::MAX as u64))
            .map_err(Error::from)
            .with_context(|| format!("cannot make a file of {size} bytes in memory"))?;
        let mapped = match (Mapping::new(&file, size), Bitmap::new(size.div_ceil(PAGE))) {
            (Ok(mapping), Some(pages)) => Some(Mapped { mapping, pages, holes: RwLock::default() }),
            _ => None,
        };
        Ok(Plain { file, size, mlock, punches: AtomicU64::new(0), mapped })
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
        let cannot = || {
            format!("cannot lock {} bytes of memory: raise 'ulimit -l' or leave mlock=true out", self.size)
        };
        let mapped = self.mapped.as_ref().with_context(cannot)?;
        mapped.mapping.lock().map_err(Error::from).with_context(cannot)?;
        // No page can be missing now.
        mapped.pages.set_range(0, mapped.pages.len(), true);
        Ok(())
    }

    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let Some(mapped) = &self.mapped else { return Ok(self.file.read_exact_at(buf, offset)?) };
        let _no_holes = mapped.holes.read();
        let (mut buf, mut offset) = (buf, offset);
        while !buf.is_empty() {
            let (exists, length) = mapped.run(offset, buf.len());
            let (part, rest) = std::mem::take(&mut buf).split_at_mut(length);
            match exists {
                true => mapped.mapping.read(part, offset),
                false => self.file.read_exact_at(part, offset)?,
            }
            offset += length as u64;
            buf = rest;
        }
        Ok(())
    }

    pub(super) fn write(&self, data: &[u8], offset: u64) -> Result<()> {
        let Some(mapped) = &self.mapped else { return Ok(self.file.write_all_at(data, offset)?) };
        let _no_holes = mapped.holes.read();
        let (mut data, mut offset) = (data, offset);
        while !data.is_empty() {
            let (exists, length) = mapped.run(offset, data.len());
            let (part, rest) = data.split_at(length);
            let end = offset + length as u64;
            if exists {
                mapped.mapping.write(part, offset);
            } else {
                self.file.write_all_at(part, offset)?;
                mapped.pages.set_range(offset / PAGE, end.div_ceil(PAGE) - offset / PAGE, true);
            }
            offset = end;
            data = rest;
        }
        Ok(())
    }

    pub(super) fn punch(&self, length: u64, offset: u64) -> Result<()> {
        let end = offset + length;
        let end = if end == self.size { end.next_multiple_of(PAGE).min(i64::MAX as u64) } else { end };
        let alone = self.mapped.as_ref().map(|mapped| {
            let alone = mapped.holes.write();
            // Pages that are zeroed in part still exist.
            let (first, last) = (offset.div_ceil(PAGE), end / PAGE);
            mapped.pages.set_range(first, last.saturating_sub(first), false);
            alone
        });
        let done = holes::punch(&self.file, offset, end - offset);
        drop(alone);
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

    /// The pages that are known to exist.
    #[cfg(test)]
    pub(super) fn known(&self) -> u64 {
        self.mapped.as_ref().map_or(0, |mapped| mapped.pages.count())
    }

    pub(super) fn loan(&self, offset: u64) -> Loan<'_> {
        Loan { fd: self.file.as_fd(), offset }
    }

    /// Allocated memory, in bytes.
    #[cfg(test)]
    pub(super) fn allocated(&self) -> u64 {
        use std::os::unix::fs::MetadataExt as _;
        self.file.metadata().unwrap().blocks() * 512
    }
}

impl Mapped {
    /// Whether the pages from `offset` on exist, and for how many of `length` bytes that is so.
    fn run(&self, offset: u64, length: usize) -> (bool, usize) {
        let (first, last) = (offset / PAGE, (offset + length as u64 - 1) / PAGE);
        let (exists, pages) = self.pages.run(first, last - first + 1);
        let end = (first + pages) * PAGE;
        (exists, (end - offset).min(length as u64) as usize)
    }
}
