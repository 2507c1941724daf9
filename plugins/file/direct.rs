//! Reads and writes that go past the page cache (`O_DIRECT`), at any offset and of any length.
//!
//! Direct I/O takes whole blocks, from memory that is aligned. What is not so is read into a buffer of ours; a write of
//! a part of a block reads the block, changes it and writes it back, while `ranges` keeps others out of it. Nothing of
//! that touches the page cache, since the two do not mix: a page that is dirtied while a direct write to its
//! neighbourhood is under way may bring old data back. The one exception is the end of a file that does not end with
//! a block, where direct I/O cannot write: that goes through the page cache alone, and does not stay there.

use std::{
    fs::File,
    io::{self, IoSlice},
    ops::Range,
    os::{fd::AsRawFd, unix::fs::FileExt},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use nbdkit_core::{Buffers, Errno, Error, Flags, Memory, Result};
use rustix::{
    fs::{
        Advice, AtFlags, CWD, Mode, OFlags, StatxFlags, fadvise, fdatasync, fstat, ioctl_blksszget, openat,
        statx,
    },
    io::{Errno as Sys, ReadWriteFlags, pwritev2},
};

use super::ranges::{Entered, Files, Ranges};

/// Bytes moved with one call, for memory is needed for them.
const PIECE: u64 = 1 << 20;

/// A file that is open for direct I/O.
pub(super) struct Direct {
    file: Arc<File>,
    /// The same file by way of the page cache.
    cached: Arc<File>,
    /// Offsets and lengths are multiples of this.
    block: u64,
    /// Where the last whole block ends.
    end: u64,
    ranges: Arc<Ranges>,
    buffers: Buffers,
    /// The file system would not do it after all.
    refused: AtomicBool,
    no_dsync: AtomicBool,
}

impl Direct {
    /// Opens a file once more. None: its file system cannot do direct I/O.
    pub(super) fn open(
        cached: &Arc<File>,
        (writable, is_device): (bool, bool),
        size: u64,
        files: &Files,
    ) -> Option<Direct> {
        // A new description, for the flags of the one that there is may be somebody else's too.
        let path = PathBuf::from(format!("/proc/self/fd/{}", cached.as_raw_fd()));
        let access = if writable { OFlags::RDWR } else { OFlags::RDONLY };
        let fd = openat(CWD, path, access | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty())
            .inspect_err(|e| log::debug!("file: no direct I/O: {e}"))
            .ok()?;
        let file = File::from(fd);
        let stat = fstat(&file).ok()?;
        let block = if is_device { ioctl_blksszget(&file).ok().map(u64::from) } else { block(&file) };
        let block = block
            .filter(|b| b.is_power_of_two() && *b <= Memory::ALIGN as u64)
            .unwrap_or(Memory::ALIGN as u64);
        let id = if is_device { (true, stat.st_rdev, 0) } else { (false, stat.st_dev, stat.st_ino) };
        // A page is the least that the page cache knows to be changed.
        let unit = block.max(rustix::param::page_size() as u64);
        Some(Direct {
            file: Arc::new(file),
            cached: cached.clone(),
            block,
            end: size / block * block,
            ranges: files.ranges(id, unit),
            buffers: files.buffers().clone(),
            refused: AtomicBool::new(false),
            no_dsync: AtomicBool::new(false),
        })
    }

    /// The file itself.
    pub(super) fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// It turned out that the file system refuses.
    pub(super) fn is_refused(&self) -> bool {
        self.refused.load(Relaxed)
    }

    /// The whole blocks around a range; the last one may pass the end of the file.
    pub(super) fn blocks(&self, offset: u64, length: u64) -> Range<u64> {
        let mask = self.block - 1;
        offset & !mask..(offset + length + mask) & !mask
    }

    /// Whether a range is whole blocks, none of them cut off by the end of the file.
    pub(super) fn is_whole(&self, offset: u64, length: u64) -> bool {
        self.blocks(offset, length) == (offset..offset + length) && offset + length <= self.end
    }

    /// Enters a range of whole blocks that is about to be written, unless that has to wait.
    pub(super) fn try_enter(&self, range: &Range<u64>) -> Option<Entered> {
        self.ranges.try_enter(range)
    }

    /// Enters a range that is about to be changed by other means than writing to it.
    pub(super) fn enter(&self, range: &Range<u64>) -> Entered {
        self.ranges.enter(range, false)
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// Those of the file; `EIO` when it ends early.
    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        if self.is_refused() {
            return read_all(&self.cached, buf, offset);
        }
        if Memory::is_aligned(buf) && self.is_whole(offset, buf.len() as u64) {
            return match self.file.read_exact_at(buf, offset) {
                Err(e) if self.refuses(&e) => read_all(&self.cached, buf, offset),
                Err(e) => Err(shorter(e)),
                Ok(()) => Ok(()),
            };
        }
        let (mut buf, mut offset) = (buf, offset);
        while !buf.is_empty() {
            let skip = offset % self.block;
            let length = (buf.len() as u64).min(PIECE - skip);
            let blocks = self.blocks(offset, length);
            let (piece, rest) = buf.split_at_mut(length as usize);
            let mut bounce = self.buffers.take((blocks.end - blocks.start) as usize)?;
            let needed = (skip + length) as usize;
            let whole = (blocks.end - blocks.start) as usize;
            match read_most(&self.file, &mut bounce[..whole], needed, blocks.start) {
                Ok(()) => piece.copy_from_slice(&bounce[skip as usize..needed]),
                Err(e) if self.refuses(&e) => read_all(&self.cached, piece, offset)?,
                Err(e) => return Err(shorter(e)),
            }
            (buf, offset) = (rest, offset + length);
        }
        Ok(())
    }

    /// Writes all of `buf` at `offset`. Flags: FUA.
    ///
    /// # Errors
    /// Those of the file.
    pub(super) fn write(&self, mut buf: &[u8], mut offset: u64, flags: Flags) -> Result<()> {
        while !buf.is_empty() {
            let skip = offset % self.block;
            let most = (PIECE - skip).min(self.end.saturating_sub(offset));
            if most == 0 {
                return self.write_end(buf, offset);
            }
            let (piece, rest) = buf.split_at((buf.len() as u64).min(most) as usize);
            let blocks = self.blocks(offset, piece.len() as u64);
            let whole = blocks == (offset..offset + piece.len() as u64);
            let _entered = self.ranges.enter(&blocks, !whole || self.is_refused());
            if whole && Memory::is_aligned(piece) {
                self.write_blocks(piece, offset, flags)?;
            } else {
                let mut bounce = self.buffers.take((blocks.end - blocks.start) as usize)?;
                let bounce_blocks = &mut bounce[..(blocks.end - blocks.start) as usize];
                if !whole {
                    self.read_edges(bounce_blocks, &blocks, offset..offset + piece.len() as u64)?;
                }
                bounce_blocks[skip as usize..][..piece.len()].copy_from_slice(piece);
                self.write_blocks(bounce_blocks, blocks.start, flags)?;
            }
            (buf, offset) = (rest, offset + piece.len() as u64);
        }
        Ok(())
    }

    /// Fills the first and the last of `blocks` that are not wholly within `range`.
    fn read_edges(&self, buf: &mut [u8], blocks: &Range<u64>, range: Range<u64>) -> Result<()> {
        let block = self.block as usize;
        let last = buf.len() - block;
        let head = range.start != blocks.start;
        if head {
            self.read(&mut buf[..block], blocks.start)?;
        }
        if range.end != blocks.end && !(head && last == 0) {
            self.read(&mut buf[last..], blocks.end - self.block)?;
        }
        Ok(())
    }

    /// Writes whole blocks that were entered, from aligned memory. Flags: FUA.
    ///
    /// # Errors
    /// Those of the file.
    pub(super) fn write_blocks(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
        if !self.is_refused() {
            match write_all(&self.file, buf, offset, flags, &self.no_dsync) {
                Err(e) if self.refuses(&e) => {}
                done => return Ok(done?),
            }
        }
        // Another connection may have direct writes under way nearby: nothing of this may stay in the page cache.
        write_all(&self.cached, buf, offset, flags, &self.no_dsync)?;
        self.write_back(offset, buf.len() as u64)
    }

    /// Writes what lies behind the last whole block.
    fn write_end(&self, buf: &[u8], offset: u64) -> Result<()> {
        let _entered = self.ranges.enter(&(offset..offset + buf.len() as u64), true);
        self.cached.write_all_at(buf, offset)?;
        self.write_back(offset, buf.len() as u64)
    }

    /// Brings a range from the page cache to the disk.
    fn write_back(&self, offset: u64, length: u64) -> Result<()> {
        fdatasync(&self.cached).map_err(io::Error::from)?;
        // Only a hint.
        let _ = fadvise(&self.cached, offset, std::num::NonZeroU64::new(length), Advice::DontNeed);
        Ok(())
    }

    /// Whether the file system will not have it, although all is aligned.
    fn refuses(&self, e: &io::Error) -> bool {
        let refuses = matches!(Sys::from_io_error(e), Some(Sys::INVAL | Sys::OPNOTSUPP));
        if refuses && !self.refused.swap(true, Relaxed) {
            log::debug!("file: direct I/O is refused: {e}");
        }
        refuses
    }
}

/// What offsets and lengths of direct I/O have to be multiples of, if the file system tells (since Linux 6.1).
fn block(file: &File) -> Option<u64> {
    let stat = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
    let told =
        stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0 && stat.stx_dio_mem_align <= Memory::ALIGN as u32;
    told.then(|| stat.stx_dio_offset_align.into())
}

fn shorter(e: io::Error) -> Error {
    match e.kind() {
        io::ErrorKind::UnexpectedEof => {
            Error::new(Errno::EIO, "the file ends early: it was made shorter while it was open")
        }
        _ => e.into(),
    }
}

/// Fills `buf` from a file.
///
/// # Errors
/// Those of the file; `EIO` when it ends early.
pub(super) fn read_all(file: &File, buf: &mut [u8], offset: u64) -> Result<()> {
    file.read_exact_at(buf, offset).map_err(shorter)
}

/// Fills the first `needed` bytes of `buf`, and more if the file goes on.
fn read_most(file: &File, buf: &mut [u8], needed: usize, offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < needed {
        match file.read_at(&mut buf[done..], offset + done as u64) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Writes all of `buf` at `offset`; with FUA it is durable then. `no_dsync` is kept by the caller: the file system
/// cannot do both with one call.
///
/// # Errors
/// Those of the file.
pub(super) fn write_all(
    file: &File,
    mut buf: &[u8],
    mut offset: u64,
    flags: Flags,
    no_dsync: &AtomicBool,
) -> io::Result<()> {
    if !flags.contains(Flags::FUA) {
        return file.write_all_at(buf, offset);
    }
    while !buf.is_empty() && !no_dsync.load(Relaxed) {
        match pwritev2(file, &[IoSlice::new(buf)], offset, ReadWriteFlags::DSYNC) {
            Ok(0) => return Err(io::Error::new(io::ErrorKind::WriteZero, "the file took no data")),
            Ok(n) => {
                buf = &buf[n..];
                offset += n as u64;
            }
            Err(Sys::INTR) => {}
            Err(Sys::OPNOTSUPP | Sys::NOSYS) => no_dsync.store(true, Relaxed),
            Err(e) => return Err(e.into()),
        }
    }
    if buf.is_empty() {
        return Ok(());
    }
    file.write_all_at(buf, offset)?;
    Ok(fdatasync(file)?)
}
