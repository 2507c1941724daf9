//! What a file promises, made of what a disk can do: reads that end at the end, synchronous writes, holes.
//!
//! A file is an open export, or a part of one: a partition. Each method may be called on any thread. One that is told
//! whether it `may_wait` returns None when it would have to and may not, and can then be called again.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use fuser::{Errno, FileAttr, INodeNo};
use nbdkit_core::{Call, Data, Error, Extent, Flags, Op, Outcome, Request, Session, Support};
use rustix::fs::{FallocateFlags, OFlags};

use crate::{
    attr::{Attributes, Owner},
    passthrough::Passthrough,
};

/// A hole up to this length is made by writing zeroes if need be; a caller that punches a longer one is told that
/// it cannot be done.
const WORTH_WRITING: u64 = 4 << 20;

/// A file.
pub(crate) struct ExportFile {
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
    /// Handles that it can be written through.
    writers: AtomicUsize,
    /// Somebody has tried to write since the last flush.
    unflushed: AtomicBool,
}

/// An answer to lseek(2).
pub(crate) struct Found {
    /// The answer.
    pub(crate) at: Result<i64, Errno>,
    /// A range of the file that the answer takes for a hole.
    pub(crate) hole: Range<u64>,
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

impl ExportFile {
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
        let writers = AtomicUsize::new(0);
        ExportFile { ino, disk, session, attributes, passthrough, start, length, opened, writers, unflushed }
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
    pub(crate) fn attr(&self, may_wait: bool) -> Option<FileAttr> {
        self.attributes.get(self.ino, &self.session, self.may_be_kept(), may_wait)
    }

    /// Notes that the kernel may have pages of it from now on.
    pub(crate) fn note_opened(&self) {
        self.opened.store(true, Ordering::Release);
    }

    /// Whether the kernel may have pages of it.
    pub(crate) fn was_opened(&self) -> bool {
        self.opened.load(Ordering::Acquire)
    }

    /// Notes that somebody has opened it for writing, and may store to its pages without our hearing of it …
    pub(crate) fn add_writer(&self) {
        self.writers.fetch_add(1, Ordering::AcqRel);
    }

    /// … and has closed it: then the kernel has written them.
    pub(crate) fn remove_writer(&self) {
        self.writers.fetch_sub(1, Ordering::AcqRel);
    }

    /// Whether the kernel may keep data that the chain does not have yet.
    pub(crate) fn may_be_kept(&self) -> bool {
        self.writers.load(Ordering::Acquire) > 0
    }

    /// A range of the file as one of the export.
    pub(crate) fn on_disk(&self, offset: u64, length: u64) -> Range<u64> {
        let start = self.start.saturating_add(offset);
        start..start.saturating_add(length)
    }

    /// The part of a range of the export that the file shows.
    pub(crate) fn shows(&self, range: &Range<u64>) -> Option<Range<u64>> {
        let start = range.start.max(self.start) - self.start;
        let end = range.end.min(self.start + self.length).saturating_sub(self.start);
        (start < end).then_some(start..end)
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

    /// Asks the chain.
    fn ask(&self, call: Call, may_wait: bool) -> Option<nbdkit_core::Result<()>> {
        let request = Request::new(call, Data::None);
        let mut request = if may_wait { request.on_thread() } else { request };
        match self.session.submit(&mut request) {
            Outcome::Done(result) => Some(result),
            _ => None,
        }
    }

    /// The request that fills `buffer`, all of it within the file. None: it takes more than one.
    pub(crate) fn read_request<'a>(&self, buffer: &'a mut [u8], offset: u64) -> Option<Request<'a>> {
        (buffer.len() <= self.piece()).then(|| Request::read(buffer, self.start + offset))
    }

    /// The request that writes `data`, all of it within the file. None: it takes more than one.
    pub(crate) fn write_request<'a>(
        &self,
        data: &'a [u8],
        offset: u64,
        synchronous: bool,
    ) -> Option<Request<'a>> {
        self.note_write();
        let (flags, flush) = self.durable(synchronous);
        (data.len() <= self.piece() && !flush).then(|| Request::write(data, self.start + offset, flags))
    }

    /// How a write becomes durable, if it has to: by these flags, or by a flush that follows.
    fn durable(&self, synchronous: bool) -> (Flags, bool) {
        let caps = self.session.caps();
        match synchronous {
            false => (Flags::empty(), false),
            true if caps.fua != Support::None => (Flags::FUA, false),
            true => (Flags::empty(), caps.flush),
        }
    }

    /// Fills `buffer`, all of it within the file. May wait.
    pub(crate) fn read(&self, buffer: &mut [u8], offset: u64) -> Result<(), Errno> {
        let mut at = self.start + offset;
        for piece in buffer.chunks_mut(self.piece()) {
            self.session.pread(piece, at).map_err(|e| errno(&e))?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// Writes `data`, all of it within the file. May wait.
    pub(crate) fn write(&self, data: &[u8], offset: u64, synchronous: bool) -> Result<(), Errno> {
        let (flags, flush) = self.durable(synchronous);
        self.note_write();
        let mut at = self.start + offset;
        for piece in data.chunks(self.piece()) {
            self.session.pwrite(piece, at, flags).map_err(|e| errno(&e))?;
            at += piece.len() as u64;
        }
        if flush { self.session.flush().map_err(|e| errno(&e)) } else { Ok(()) }
    }

    /// Makes everything that was written durable, as far as the chain knows how.
    pub(crate) fn flush(&self, may_wait: bool) -> Option<Result<(), Errno>> {
        if !self.session.caps().flush {
            return Some(Ok(()));
        }
        // Before the flush, which need not cover what is written meanwhile.
        let unflushed = self.unflushed.swap(false, Ordering::AcqRel);
        let flushed = self.ask(Call::new(Op::Flush, 0, 0), may_wait);
        if !matches!(flushed, Some(Ok(()))) {
            self.unflushed.fetch_or(unflushed, Ordering::AcqRel);
        }
        Some(flushed?.map_err(|e| errno(&e)))
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
    /// if it is little: `flags` then no longer ask for that.
    pub(crate) fn zero(
        &self,
        length: u64,
        offset: u64,
        flags: &mut Flags,
        may_wait: bool,
    ) -> Option<Result<(), Errno>> {
        self.note_write();
        let call = Call::new(Op::Zero, self.start + offset, length);
        loop {
            match self.ask(call.with_flags(*flags), may_wait)? {
                Err(e)
                    if e.is_unsupported() && flags.contains(Flags::FAST_ZERO) && length <= WORTH_WRITING =>
                {
                    flags.remove(Flags::FAST_ZERO);
                }
                result => {
                    self.attributes.touch();
                    return Some(result.map_err(|e| errno(&e)));
                }
            }
        }
    }

    /// The next data or the next hole from `offset` on. There is a hole at the end of every file.
    pub(crate) fn seek(&self, offset: i64, whence: i32, may_wait: bool) -> Option<Found> {
        let fail = |errno| Some(Found { at: Err(errno), hole: 0..0 });
        let Some(offset) = u64::try_from(offset).ok().filter(|offset| *offset < self.length) else {
            return fail(Errno::ENXIO);
        };
        let want_hole = match whence {
            SEEK_DATA => false,
            SEEK_HOLE => true,
            _ => return fail(Errno::EINVAL),
        };
        let (mut at, end) = (self.start + offset, self.start + self.length);
        let mut found_end = end;
        let found = loop {
            if at >= end {
                break if want_hole { Ok(self.length) } else { Err(Errno::ENXIO) };
            }
            match first_extent(&self.session, at..end, may_wait)? {
                // Only what reads as zeroes may be skipped by a copy; whether it is allocated does not matter to it.
                Ok(extent) if extent.zero == want_hole => {
                    found_end = extent.end();
                    break Ok(at - self.start);
                }
                Ok(extent) => at = extent.end(),
                Err(e) => return fail(errno(&e)),
            }
        };
        let at = at.min(end) - self.start;
        let hole = if want_hole { at..found_end.min(end) - self.start } else { offset..at };
        Some(Found { at: found.and_then(|at| i64::try_from(at).map_err(|_| Errno::EOVERFLOW)), hole })
    }
}

/// The extent at the start of a range.
pub(crate) fn first_extent(
    session: &Session,
    range: Range<u64>,
    may_wait: bool,
) -> Option<nbdkit_core::Result<Extent>> {
    let (length, offset) = (range.end - range.start, range.start);
    let extents = match may_wait {
        true => session.extents(length, offset, Flags::REQ_ONE),
        false => session.extents_nowait(length, offset, Flags::REQ_ONE)?,
    };
    Some(extents.and_then(|extents| extents.first().copied().ok_or(nbdkit_core::Errno::EIO.into())))
}
