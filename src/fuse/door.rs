//! What a file promises, made of what a disk can do: reads that end at the end, synchronous writes, holes.
//!
//! A file is an open export, or a part of one: a partition. Each method may be called on any thread and waits as long
//! as the chain does.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use fuser::{Errno, FileAttr, INodeNo};
use nbdkit_core::{Completion, Error, Flags, Io, Op, Session, Support};
use rustix::fs::{FallocateFlags, OFlags};

use crate::{
    attr::{Attributes, Owner},
    passthrough::Passthrough,
};

/// A hole up to this length is made by writing zeroes if need be; a caller that punches a longer one is told that
/// it cannot be done.
const WORTH_WRITING: u64 = 4 << 20;

/// A file.
pub(crate) struct Door {
    pub(crate) ino: INodeNo,
    /// Index of the export.
    pub(crate) disk: usize,
    pub(crate) session: Arc<Session>,
    pub(crate) attributes: Attributes,
    pub(crate) passthrough: Passthrough,
    /// The first byte of the export that is in the file.
    start: u64,
    length: u64,
    /// The kernel may have pages of it.
    opened: AtomicBool,
    /// Somebody has tried to write since the last flush.
    unflushed: AtomicBool,
}

/// `whence` of lseek(2): the next data.
pub(crate) const SEEK_DATA: i32 = 3;
/// `whence` of lseek(2): the next hole.
pub(crate) const SEEK_HOLE: i32 = 4;

/// The errno of a failed request.
pub(crate) fn errno(e: &Error) -> Errno {
    Errno::from_i32(e.errno() as i32)
}

/// Whether writes to a file opened with `flags` are durable when they return.
pub(crate) fn is_synchronous(flags: i32) -> bool {
    // O_SYNC has the bit of O_DSYNC in it.
    flags as u32 & OFlags::DSYNC.bits() != 0
}

impl Door {
    /// A file of the `length` bytes from `start` on.
    pub(crate) fn new(
        (ino, disk): (INodeNo, usize),
        session: Arc<Session>,
        range: Range<u64>,
        owner: Owner,
        passthrough: Passthrough,
    ) -> Self {
        let (start, length) = (range.start, range.end - range.start);
        let attributes = Attributes::new(owner, session.caps().write, start, length);
        let [opened, unflushed] = [const { AtomicBool::new(false) }; 2];
        Door { ino, disk, session, attributes, passthrough, start, length, opened, unflushed }
    }

    /// Size in bytes.
    #[inline]
    pub(crate) fn size(&self) -> u64 {
        self.length
    }

    /// Whether it can be written to.
    pub(crate) fn is_writable(&self) -> bool {
        self.session.caps().write
    }

    /// What stat(2) shows.
    pub(crate) fn attr(&self) -> FileAttr {
        self.attributes.get(self.ino, &self.session)
    }

    /// Notes that the kernel may have pages of it from now on.
    pub(crate) fn note_opened(&self) {
        self.opened.store(true, Ordering::Release);
    }

    /// A range of the file as one of the export.
    pub(crate) fn on_disk(&self, offset: u64, length: u64) -> Range<u64> {
        let start = self.start.saturating_add(offset);
        start..start.saturating_add(length)
    }

    /// The part of a range of the export that the file shows, and whether the kernel may know it.
    pub(crate) fn shows(&self, range: &Range<u64>) -> Option<(Range<u64>, bool)> {
        let start = range.start.max(self.start) - self.start;
        let end = range.end.min(self.start + self.length).saturating_sub(self.start);
        (start < end).then(|| (start..end, self.opened.load(Ordering::Acquire)))
    }

    /// How much of `length` bytes at `offset` lies within the file.
    pub(crate) fn room(&self, offset: u64, length: usize) -> usize {
        let left = self.length.saturating_sub(offset);
        usize::try_from(left).map_or(length, |left| left.min(length))
    }

    /// The largest request that the chain takes, in bytes.
    fn piece(&self) -> usize {
        match self.session.caps().block_size.maximum {
            0 => usize::MAX,
            maximum => maximum as usize,
        }
    }

    /// Fills `buffer`, all of it within the file.
    pub(crate) fn read(&self, buffer: &mut [u8], offset: u64) -> Result<(), Errno> {
        let mut at = self.start + offset;
        for piece in buffer.chunks_mut(self.piece()) {
            self.session.pread(piece, at).map_err(|e| errno(&e))?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// As [`read`](Self::read), if that needs no wait; else `Ok(false)`.
    pub(crate) fn read_nowait(&self, buffer: &mut [u8], offset: u64) -> Result<bool, Errno> {
        if buffer.len() > self.piece() {
            return Ok(false);
        }
        self.session.pread_nowait(buffer, self.start + offset).map_err(|e| errno(&e))
    }

    /// Starts a read, all of it within the file, if the chain can without a thread; else `done` comes back.
    pub(crate) fn submit_read(&self, length: usize, offset: u64, done: Completion) -> Option<Completion> {
        if length > self.piece() {
            return Some(done);
        }
        self.session.submit(Io::Read(length), self.start + offset, done)
    }

    /// As [`submit_read`](Self::submit_read), for a write. Whoever gets told of its end tells the attributes.
    pub(crate) fn submit_write(
        &self,
        data: &[u8],
        offset: u64,
        synchronous: bool,
        done: Completion,
    ) -> Option<Completion> {
        let flags = if synchronous { Flags::FUA } else { Flags::empty() };
        if data.len() > self.piece() || (synchronous && self.session.caps().fua == Support::None) {
            return Some(done);
        }
        self.note_write();
        self.session.submit(Io::Write(data, flags), self.start + offset, done)
    }

    /// Whether a write would have to wait.
    pub(crate) fn write_may_block(&self, synchronous: bool) -> bool {
        self.session.may_block(Op::Write) || synchronous && self.session.may_block(Op::Flush)
    }

    /// Writes `data`, all of it within the file.
    pub(crate) fn write(&self, data: &[u8], offset: u64, synchronous: bool) -> Result<(), Errno> {
        let caps = self.session.caps();
        let fua = synchronous && caps.fua != Support::None;
        let flags = if fua { Flags::FUA } else { Flags::empty() };
        self.note_write();
        let mut at = self.start + offset;
        for piece in data.chunks(self.piece()) {
            self.session.pwrite(piece, at, flags).map_err(|e| errno(&e))?;
            at += piece.len() as u64;
        }
        self.attributes.touch();
        if synchronous && !fua { self.flush() } else { Ok(()) }
    }

    /// Makes everything that was written durable, as far as the chain knows how.
    pub(crate) fn flush(&self) -> Result<(), Errno> {
        if !self.session.caps().flush {
            return Ok(());
        }
        // Before the flush, which need not cover what is written meanwhile.
        let unflushed = self.unflushed.swap(false, Ordering::AcqRel);
        self.session.flush().map_err(|e| {
            self.unflushed.fetch_or(unflushed, Ordering::AcqRel);
            errno(&e)
        })
    }

    /// Notes that a write is tried: one that fails may have changed something, and its writer may not have heard of it.
    fn note_write(&self) {
        // A store for each write would make the threads of several writers fight for the line.
        if !self.unflushed.load(Ordering::Relaxed) {
            self.unflushed.store(true, Ordering::Release);
        }
    }

    /// Whether there is something that a flush would make durable.
    pub(crate) fn is_unflushed(&self) -> bool {
        self.unflushed.load(Ordering::Acquire)
    }

    /// Checks fallocate(2)'s arguments and turns them into a zero request: length and flags. None: nothing to do.
    pub(crate) fn plan_fallocate(
        &self,
        offset: u64,
        length: u64,
        mode: i32,
    ) -> Result<Option<(u64, Flags)>, Errno> {
        let caps = self.session.caps();
        if !caps.write {
            return Err(Errno::EROFS);
        }
        let mode = FallocateFlags::from_bits_retain(mode as u32);
        let keep = FallocateFlags::KEEP_SIZE;
        let punch = mode == FallocateFlags::PUNCH_HOLE | keep;
        let zero = mode - keep == FallocateFlags::ZERO_RANGE;
        if !(punch || zero) || caps.zero == Support::None {
            return Err(Errno::EOPNOTSUPP);
        }
        let end = offset.checked_add(length).ok_or(Errno::EFBIG)?;
        if end > self.length && !mode.contains(keep) {
            return Err(Errno::ENOSPC);
        }
        let length = end.min(self.length).saturating_sub(offset);
        let flags = match (punch, caps.fast_zero) {
            (false, _) => Flags::empty(),
            // A caller that punches holes wants to save work: it must not be made to write gigabytes of zeroes.
            (true, true) => Flags::MAY_TRIM | Flags::FAST_ZERO,
            (true, false) => Flags::MAY_TRIM,
        };
        Ok((length > 0).then_some((length, flags)))
    }

    /// Makes a range within the file read as zeroes. What is not fast, although asked to be, is done all the same
    /// if it is little.
    pub(crate) fn zero(&self, length: u64, offset: u64, flags: Flags) -> Result<(), Errno> {
        self.note_write();
        let at = self.start + offset;
        let mut result = self.session.zero(length, at, flags);
        if flags.contains(Flags::FAST_ZERO) && length <= WORTH_WRITING {
            result = match result {
                Err(e) if e.is_unsupported() => self.session.zero(length, at, flags - Flags::FAST_ZERO),
                result => result,
            };
        }
        self.attributes.touch();
        result.map_err(|e| errno(&e))
    }

    /// The next data or the next hole from `offset` on. There is a hole at the end of every file.
    pub(crate) fn seek(&self, offset: i64, whence: i32) -> Result<i64, Errno> {
        let offset = u64::try_from(offset).map_err(|_| Errno::ENXIO)?;
        if offset >= self.length {
            return Err(Errno::ENXIO);
        }
        let want_hole = match whence {
            SEEK_DATA => false,
            SEEK_HOLE => true,
            _ => return Err(Errno::EINVAL),
        };
        let (mut at, end) = (self.start + offset, self.start + self.length);
        while at < end {
            let extents = self.session.extents(end - at, at, Flags::REQ_ONE).map_err(|e| errno(&e))?;
            let extent = extents.first().ok_or(Errno::EIO)?;
            // Only what reads as zeroes may be skipped by a copy; whether it is allocated does not matter to it.
            if extent.zero == want_hole {
                return i64::try_from(at - self.start).map_err(|_| Errno::EOVERFLOW);
            }
            at = extent.end();
        }
        if want_hole { i64::try_from(self.length).map_err(|_| Errno::EOVERFLOW) } else { Err(Errno::ENXIO) }
    }
}
