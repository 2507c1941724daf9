//! What a file promises, made of what a disk can do: reads that end at the end, synchronous writes, holes.
//!
//! Each method may be called on any thread and waits as long as the chain does.

use std::sync::Arc;

use fuser::Errno;
use nbdkit_core::{Error, Flags, Op, Session, Support};
use rustix::fs::{FallocateFlags, OFlags};

use crate::{attr::Attributes, tree::Tree};

/// A hole up to this length is made by writing zeroes if need be; a caller that punches a longer one is told that
/// it cannot be done.
const WORTH_WRITING: u64 = 4 << 20;

/// An open export as a file.
pub(crate) struct Door {
    pub(crate) session: Session,
    pub(crate) tree: Tree,
    pub(crate) attributes: Arc<Attributes>,
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
    /// How much of `length` bytes at `offset` lies within the file.
    pub(crate) fn room(&self, offset: u64, length: usize) -> usize {
        let left = self.session.size().saturating_sub(offset);
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
        let mut at = offset;
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
        self.session.pread_nowait(buffer, offset).map_err(|e| errno(&e))
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
        let mut at = offset;
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
        self.session.flush().map_err(|e| errno(&e))
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
        if end > caps.size && !mode.contains(keep) {
            return Err(Errno::ENOSPC);
        }
        let length = end.min(caps.size).saturating_sub(offset);
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
        let mut result = self.session.zero(length, offset, flags);
        if flags.contains(Flags::FAST_ZERO) && length <= WORTH_WRITING {
            result = match result {
                Err(e) if e.is_unsupported() => self.session.zero(length, offset, flags - Flags::FAST_ZERO),
                result => result,
            };
        }
        self.attributes.touch();
        result.map_err(|e| errno(&e))
    }

    /// The next data or the next hole from `offset` on. There is a hole at the end of every file.
    pub(crate) fn seek(&self, offset: i64, whence: i32) -> Result<i64, Errno> {
        let size = self.session.size();
        let mut at = u64::try_from(offset).map_err(|_| Errno::ENXIO)?;
        if at >= size {
            return Err(Errno::ENXIO);
        }
        let want_hole = match whence {
            SEEK_DATA => false,
            SEEK_HOLE => true,
            _ => return Err(Errno::EINVAL),
        };
        while at < size {
            let extents = self.session.extents(size - at, at, Flags::REQ_ONE).map_err(|e| errno(&e))?;
            let extent = extents.first().ok_or(Errno::EIO)?;
            // Only what reads as zeroes may be skipped by a copy; whether it is allocated does not matter to it.
            if extent.zero == want_hole {
                return i64::try_from(at).map_err(|_| Errno::EOVERFLOW);
            }
            at = extent.end();
        }
        if want_hole { i64::try_from(size).map_err(|_| Errno::EOVERFLOW) } else { Err(Errno::ENXIO) }
    }
}
