//! Fits requests of any size and alignment to a disk that takes only some.
//!
//! Large requests are cut up. The unaligned ends of reads are read with their whole blocks, those of writes and
//! zeroes are read, changed and written back, those of trims are left alone.

use std::{ffi::OsStr, sync::Arc};

use anyhow::{Context as _, ensure};
use nbdkit_core::{
    Below, BlockSize, Call, Caps, Data, Errno, Error, Extents, Filter, Flags, Handle, Info, Next, NextConfig,
    NextConfigComplete, Op, Open, Outcome, Request, Result, Support, params,
};
use parking_lot::{RwLock, RwLockReadGuard};

const HELP: &str = "\
minblock=<SIZE>   Smallest request and alignment, a power of 2 up to 64k (default: what the disk says, else 1).
maxdata=<SIZE>    Largest read or write (default: what the disk says, up to 64M).
maxlen=<SIZE>     Largest trim, zero, cache or extents request (default: 4G-minblock).";

const MAX_MINBLOCK: u64 = 64 << 10;
const MAX_DATA: u64 = 64 << 20;
const MAX_LEN: u64 = u32::MAX as u64;

pub(crate) fn new() -> Box<dyn Filter> {
    Box::new(Blocksize::default())
}

#[derive(Default)]
struct Blocksize {
    minblock: Option<u64>,
    maxdata: Option<u64>,
    maxlen: Option<u64>,
    /// All connections share them.
    locks: Arc<Locks>,
}

/// One for each block, shared by those with the same number modulo [`LOCKS`]. Held for writing while a part of the block
/// is changed, for reading by every other change of it: else the bytes around the part would be put back to what they
/// were. Who needs several takes them in ascending order.
struct Locks([RwLock<()>; LOCKS]);

const LOCKS: usize = 64;

type Shared<'a> = [Option<RwLockReadGuard<'a, ()>>; LOCKS];

impl Default for Locks {
    fn default() -> Self {
        Locks([const { RwLock::new(()) }; LOCKS])
    }
}

impl Blocksize {
    fn limits(&self, below: BlockSize) -> anyhow::Result<Limits> {
        let told = Limits::of(below);
        let min = self.minblock.unwrap_or(told.min);
        let limit = |key: &str, given: Option<u64>, default: u64| match given {
            Some(given) if given % min != 0 => Err(anyhow::anyhow!("{key} must be a multiple of {min}")),
            Some(given) => Ok(given),
            None => Ok((default - default % min).max(min)),
        };
        Ok(Limits {
            min,
            data: limit("maxdata", self.maxdata, told.data.min(MAX_DATA))?,
            len: limit("maxlen", self.maxlen, told.len)?,
        })
    }
}

fn size(key: &str, value: &OsStr, maximum: u64) -> anyhow::Result<Option<u64>> {
    let size = params::size(value).with_context(|| key.to_owned())?;
    ensure!(size > 0, "parameter '{key}' must be non-zero if specified");
    ensure!(size <= maximum, "{key} must not exceed {maximum}");
    Ok(Some(size))
}

impl Filter for Blocksize {
    fn info(&self) -> Info {
        Info::bundled("blocksize", "nbdkit blocksize filter", HELP)
    }

    fn config(&mut self, key: &str, value: &OsStr, next: &mut NextConfig<'_>) -> anyhow::Result<()> {
        match key {
            "minblock" => {
                self.minblock = size(key, value, MAX_MINBLOCK)?;
                ensure!(self.minblock.is_none_or(u64::is_power_of_two), "minblock must be a power of 2");
            }
            "maxdata" => self.maxdata = size(key, value, MAX_LEN)?,
            "maxlen" => self.maxlen = size(key, value, MAX_LEN)?,
            _ => return next(key, value),
        }
        Ok(())
    }

    fn config_complete(&mut self, next: &mut NextConfigComplete<'_>) -> anyhow::Result<()> {
        // What the disk says is known later; what was given together can be checked now.
        self.limits(BlockSize::default())?;
        next()
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        let next = next.open(open)?;
        let limits =
            self.limits(next.caps().block_size).map_err(|e| Error::new(Errno::EINVAL, e.to_string()))?;
        Ok(Box::new(Fitted { limits, locks: self.locks.clone(), next }))
    }
}

/// What the disk below takes, in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Alignment: a power of 2.
    min: u64,
    /// Largest request with data, a multiple of `min`.
    data: u64,
    /// Largest request without.
    len: u64,
}

impl Limits {
    /// Those that a disk tells.
    pub(crate) fn of(block_size: BlockSize) -> Self {
        let data = if block_size.maximum == 0 { MAX_DATA } else { u64::from(block_size.maximum) };
        Limits { min: u64::from(block_size.minimum).max(1), data, len: MAX_LEN }
    }

    /// Whether the disk takes a request as it is.
    pub(crate) fn take(&self, call: &Call) -> bool {
        let max = if matches!(call.op, Op::Read | Op::Write) { self.data } else { self.len };
        (call.offset | call.length).is_multiple_of(self.min) && call.length <= max
    }

    /// Aligns a range outwards: start and length. It stays on a disk whose size is aligned.
    pub(crate) fn widen(&self, offset: u64, length: u64) -> (u64, u64) {
        let start = offset - offset % self.min;
        (start, (offset + length).next_multiple_of(self.min) - start)
    }
}

/// Something the disk below takes in one request, or a part of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    offset: u64,
    length: u64,
    /// Whole blocks; else within one block.
    whole: bool,
}

/// Cuts a range into pieces of whole blocks, at most `max` long, and parts of blocks.
fn pieces(length: u64, offset: u64, min: u64, max: u64) -> impl Iterator<Item = Piece> {
    let end = offset + length;
    let mut at = offset;
    std::iter::from_fn(move || {
        let (into, left) = (at % min, end - at);
        let whole = into == 0 && left >= min;
        let length = if whole { (left - left % min).min(max) } else { left.min(min - into) };
        let piece = Piece { offset: at, length, whole };
        at += length;
        (length > 0).then_some(piece)
    })
}

/// Reads any range of a disk that takes only aligned reads. False: `read` did not want to wait.
///
/// # Errors
/// Those of `read`.
pub(crate) fn read_fitted(
    buf: &mut [u8],
    offset: u64,
    limits: Limits,
    mut read: impl FnMut(&mut [u8], u64) -> Result<bool>,
) -> Result<bool> {
    let mut rest = buf;
    let mut block = Vec::new();
    for piece in pieces(rest.len() as u64, offset, limits.min, limits.data) {
        let (target, after) = rest.split_at_mut(piece.length as usize);
        rest = after;
        if piece.whole {
            if !read(target, piece.offset)? {
                return Ok(false);
            }
        } else {
            let into = (piece.offset % limits.min) as usize;
            block.resize(limits.min as usize, 0);
            if !read(&mut block, piece.offset - into as u64)? {
                return Ok(false);
            }
            target.copy_from_slice(&block[into..into + target.len()]);
        }
    }
    Ok(true)
}

/// Reads any range of a disk within the limits that it tells.
///
/// # Errors
/// Those of the disk.
pub(crate) fn read_within_limits(next: &Next, buf: &mut [u8], offset: u64) -> Result<()> {
    let limits = Limits::of(next.caps().block_size);
    read_fitted(buf, offset, limits, |buf, at| next.pread(buf, at).map(|()| true)).map(drop)
}

/// As `pread` of the layer below, but only if that needs no wait; else false.
///
/// # Errors
/// Those of the disk.
pub(crate) fn read_inline(next: &Next, buf: &mut [u8], offset: u64) -> Result<bool> {
    let call = Call::new(Op::Read, offset, buf.len() as u64);
    match next.piece(call, Data::Read(buf), false) {
        Outcome::Done(result) => result.map(|()| true),
        _ => Ok(false),
    }
}

/// The extents of the layer below in `start..end`; None: they may not be waited for, and that would take a thread.
///
/// # Errors
/// Those of the disk.
pub(crate) fn extents_below(
    next: &Next,
    (start, end): (u64, u64),
    flags: Flags,
    may_wait: bool,
) -> Result<Option<Extents>> {
    let mut found = Extents::new(start, end);
    let call = Call::new(Op::Extents, start, end - start).with_flags(flags);
    match next.piece(call, Data::Extents(&mut found), may_wait) {
        Outcome::Done(result) => result.map(|()| Some(found)),
        _ => Ok(None),
    }
}

/// The answer to a request that was tried inline; false: it needs a thread.
pub(crate) fn tried(result: Result<bool>) -> Outcome<'static> {
    match result {
        Ok(false) => Outcome::NeedsThread,
        result => Outcome::Done(result.map(drop)),
    }
}

struct Fitted {
    limits: Limits,
    locks: Arc<Locks>,
    next: Next,
}

impl Fitted {
    /// FUA for several pieces by flushing once after them, where a flush is what it is below: the flags for the
    /// pieces, and "flush after".
    fn split_fua(&self, flags: Flags) -> (Flags, bool) {
        let flush = flags.contains(Flags::FUA) && self.next.caps().fua == Support::Emulate;
        (if flush { flags - Flags::FUA } else { flags }, flush)
    }

    fn flush_if(&self, wanted: bool) -> Result<()> {
        if wanted { self.next.flush() } else { Ok(()) }
    }

    /// The locks of whole blocks: while they are held, no part of one of them is changed. None: one of them is not to be
    /// had without a wait.
    fn lock_whole(&self, offset: u64, length: u64, may_wait: bool) -> Option<Shared<'_>> {
        let mut shared = [const { None }; LOCKS];
        if self.limits.min > 1 {
            let first = offset / self.limits.min;
            let others = (length - 1) / self.limits.min;
            let is_of = |i: usize| (i as u64).wrapping_sub(first) % LOCKS as u64 <= others;
            for (i, held) in shared.iter_mut().enumerate().filter(|(i, _)| is_of(*i)) {
                let lock = &self.locks.0[i];
                *held = Some(if may_wait { lock.read() } else { lock.try_read()? });
            }
        }
        Some(shared)
    }

    /// Does something to whole blocks while no part of one of them is being changed.
    fn change_whole(&self, piece: &Piece, change: impl FnOnce() -> Result<()>) -> Result<()> {
        let _shared = self.lock_whole(piece.offset, piece.length, true);
        change()
    }

    /// Changes a part of a block: reads the block, lets `change` work on the part and writes it back.
    fn change_part(&self, piece: Piece, flags: Flags, change: impl FnOnce(&mut [u8])) -> Result<()> {
        let into = (piece.offset % self.limits.min) as usize;
        let start = piece.offset - into as u64;
        let mut block = vec![0; self.limits.min as usize];
        let _alone = self.locks.0[(start / self.limits.min) as usize % LOCKS].write();
        self.next.pread(&mut block, start)?;
        change(&mut block[into..into + piece.length as usize]);
        self.next.pwrite(&block, start, flags & Flags::FUA)
    }
}

impl Handle for Fitted {
    fn next(&self) -> Option<&Next> {
        Some(&self.next)
    }

    fn capabilities(&self) -> Result<Caps> {
        let below = self.next.caps();
        let preferred = below.block_size.preferred.max(4096).max(self.limits.min as u32);
        let caps = self.next.capabilities().with_size(below.size - below.size % self.limits.min);
        Ok(caps.with_block_size(BlockSize { minimum: 1, preferred, maximum: u32::MAX }))
    }

    /// What the disk takes as it is passes, to be started or lent for too. Not so changes of whole blocks: they hold locks
    /// until they have ended, and of a started or lent one a slow client could put off the end.
    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        let (call, may_wait) = (*request.call(), request.may_wait());
        let changes = matches!(call.op, Op::Write | Op::Trim | Op::Zero);
        let locked = changes && self.limits.min > 1;
        let fits = self.limits.take(&call) && call.op != Op::Extents;
        if call.op == Op::Flush || (request.may_lend() && !locked) || (fits && !locked) {
            return self.next.pass(request);
        }
        match request.data() {
            Data::Extents(_) => {
                // Of widened requests, whole blocks; a shorter answer is legal, and one covers `offset`.
                let (start, length) = self.limits.widen(call.offset, call.length);
                self.next.whole_blocks(request, start, length.min(self.limits.len), self.limits.min)
            }
            _ if may_wait => request.run(self),
            Data::Read(buf) => {
                tried(read_fitted(buf, call.offset, self.limits, |buf, at| read_inline(&self.next, buf, at)))
            }
            _ if locked && self.limits.take(&call) => {
                match self.lock_whole(call.offset, call.length, false) {
                    Some(_shared) => self.next.at_once(request),
                    None => Outcome::NeedsThread,
                }
            }
            _ => Outcome::NeedsThread,
        }
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        read_fitted(buf, offset, self.limits, |buf, at| self.next.pread(buf, at).map(|()| true)).map(drop)
    }

    fn pwrite(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
        let (flags, flush) = self.split_fua(flags);
        let mut rest = buf;
        for piece in pieces(buf.len() as u64, offset, self.limits.min, self.limits.data) {
            let (data, after) = rest.split_at(piece.length as usize);
            rest = after;
            if piece.whole {
                self.change_whole(&piece, || self.next.pwrite(data, piece.offset, flags))?;
            } else {
                self.change_part(piece, flags, |part| part.copy_from_slice(data))?;
            }
        }
        self.flush_if(flush)
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        let (flags, flush) = self.split_fua(flags);
        for piece in pieces(length, offset, self.limits.min, self.limits.len).filter(|piece| piece.whole) {
            self.change_whole(&piece, || self.next.trim(piece.length, piece.offset, flags))?;
        }
        self.flush_if(flush)
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        let mut pieces = pieces(length, offset, self.limits.min, self.limits.len).peekable();
        // A later piece could fail after the earlier ones have taken their time.
        let one = pieces.peek().is_some_and(|piece| piece.whole && piece.length == length);
        if flags.contains(Flags::FAST_ZERO) && !one {
            return Err(Error::new(Errno::EOPNOTSUPP, "fast zero must be aligned and in one piece"));
        }
        let (flags, flush) = self.split_fua(flags);
        for piece in pieces {
            if piece.whole {
                self.change_whole(&piece, || self.next.zero(piece.length, piece.offset, flags))?;
            } else {
                self.change_part(piece, flags, |part| part.fill(0))?;
            }
        }
        self.flush_if(flush)
    }

    fn cache(&self, length: u64, offset: u64) -> Result<()> {
        let (offset, length) = self.limits.widen(offset, length);
        for piece in pieces(length, offset, self.limits.min, self.limits.len) {
            self.next.cache(piece.length, piece.offset)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
