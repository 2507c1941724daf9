//! Fits requests of any size and alignment to a disk that takes only some.
//!
//! Large requests are cut up. The unaligned ends of reads are read with their whole blocks, those of writes and
//! zeroes are read, changed and written back, those of trims are left alone.

use std::{ffi::OsStr, sync::Arc};

use anyhow::{Context as _, ensure};
use nbdkit_core::{
    Below, BlockSize, Errno, Error, Extents, Filter, Flags, Handle, Info, Loan, Next, NextConfig,
    NextConfigComplete, Open, Result, Support, params,
};
use parking_lot::RwLock;

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

    /// Does something to whole blocks while no part of one of them is being changed.
    fn change_whole(&self, piece: &Piece, change: impl FnOnce() -> Result<()>) -> Result<()> {
        if self.limits.min == 1 {
            return change();
        }
        let first = piece.offset / self.limits.min;
        let others = (piece.length - 1) / self.limits.min;
        let is_of = |lock: usize| (lock as u64).wrapping_sub(first) % LOCKS as u64 <= others;
        let _shared: [_; LOCKS] = std::array::from_fn(|i| is_of(i).then(|| self.locks.0[i].read()));
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

    fn get_size(&self) -> Result<u64> {
        let size = self.next.caps().size;
        Ok(size - size % self.limits.min)
    }

    fn block_size(&self) -> Result<BlockSize> {
        let preferred = self.next.caps().block_size.preferred.max(4096).max(self.limits.min as u32);
        Ok(BlockSize { minimum: 1, preferred, maximum: u32::MAX })
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        read_fitted(buf, offset, self.limits, |buf, at| self.next.pread(buf, at).map(|()| true)).map(drop)
    }

    fn pread_nowait(&self, buf: &mut [u8], offset: u64) -> Result<bool> {
        read_fitted(buf, offset, self.limits, |buf, at| self.next.pread_nowait(buf, at))
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

    fn extents(&self, length: u64, offset: u64, flags: Flags, extents: &mut Extents) -> Result<()> {
        // Of widened requests, whole blocks; a shorter answer is legal, and one covers `offset`.
        let (start, length) = self.limits.widen(offset, length);
        self.next.extents_aligned(length.min(self.limits.len), start, flags, self.limits.min, extents)
    }

    fn cache(&self, length: u64, offset: u64) -> Result<()> {
        let (offset, length) = self.limits.widen(offset, length);
        for piece in pieces(length, offset, self.limits.min, self.limits.len) {
            self.next.cache(piece.length, piece.offset)?;
        }
        Ok(())
    }

    /// Writing through a loan would go round the lock.
    fn loan(&self, offset: u64, length: u64) -> Option<Loan<'_>> {
        let loan = self.next.loan(offset, length)?;
        Some(Loan { writable: loan.writable && self.limits.min == 1, ..loan })
    }
}

#[cfg(test)]
mod tests {
    use nbdkit_core::Op;

    use super::*;
    use crate::testing::{Call, Spec, View, check_model, check_model_over, config_error, session};

    /// The spec of a disk that insists on its limits.
    fn strict(size: u64, minimum: u32, maximum: u32) -> Spec {
        Spec {
            block_size: BlockSize { minimum, preferred: minimum.max(512), maximum },
            ..Spec::emulated(size)
        }
    }

    fn calls(calls: &[Call]) -> Vec<(Op, u64, u64, bool)> {
        calls.iter().map(|c| (c.op, c.offset, c.length, c.flags.contains(Flags::FUA))).collect()
    }

    #[test]
    fn model() {
        check_model(&["blocksize"], &[], 20_000, &View::same(20_000));
        let params = [("minblock", "1k"), ("maxdata", "2k"), ("maxlen", "3k")];
        check_model(&["blocksize"], &params, 20_000, &View::same(19_456));
        let view = View::same(16 << 10);
        check_model_over(&strict(20_000, 4096, 8192), &["blocksize"], &[], &view);
        check_model_over(
            &Spec { fua: Support::Native, ..strict(20_000, 4096, 4096) },
            &["blocksize"],
            &[],
            &view,
        );
    }

    #[test]
    fn ranges_are_cut_where_the_disk_wants_it() {
        let cut = |length, offset, min, max| {
            pieces(length, offset, min, max).map(|p| (p.offset, p.length, p.whole)).collect::<Vec<_>>()
        };
        assert_eq!(cut(10, 3, 1, 4), [(3, 4, true), (7, 4, true), (11, 2, true)]);
        assert_eq!(cut(2, 3, 8, 16), [(3, 2, false)]);
        assert_eq!(cut(30, 3, 8, 16), [(3, 5, false), (8, 16, true), (24, 8, true), (32, 1, false)]);
        assert_eq!(cut(i64::MAX as u64, 0, 512, i64::MAX as u64).len(), 2);
    }

    #[test]
    fn several_pieces_with_fua_are_flushed_once() {
        let disk = Spec::emulated(8192).disk();
        let session = session(&disk, "blocksize", &[("minblock", "512"), ("maxdata", "512")]);
        session.pwrite(&[7; 1000], 100, Flags::FUA).unwrap();
        assert_eq!(
            calls(&disk.take_calls()),
            [
                (Op::Read, 0, 512, false),
                (Op::Write, 0, 512, false),
                (Op::Write, 512, 512, false),
                (Op::Read, 1024, 512, false),
                (Op::Write, 1024, 512, false),
                (Op::Flush, 0, 0, false)
            ]
        );
        session.trim(100, 10, Flags::FUA).unwrap();
        assert_eq!(calls(&disk.calls()), [(Op::Flush, 0, 0, false)]);
    }

    #[test]
    fn native_fua_goes_with_each_piece() {
        let disk = Spec::sized(8192).disk();
        let session = session(&disk, "blocksize", &[("maxdata", "512"), ("maxlen", "1k")]);
        session.pwrite(&[7; 1000], 0, Flags::FUA).unwrap();
        session.zero(1500, 0, Flags::FUA).unwrap();
        assert_eq!(
            calls(&disk.calls()),
            [
                (Op::Write, 0, 512, true),
                (Op::Write, 512, 488, true),
                (Op::Zero, 0, 1024, true),
                (Op::Zero, 1024, 476, true)
            ]
        );
    }

    #[test]
    fn parallel_writes_into_one_block_lose_nothing() {
        let disk = Spec { data: vec![0; 4096], ..Spec::default() }.disk();
        let session = session(&disk, "blocksize", &[("minblock", "4k")]);
        std::thread::scope(|scope| {
            for thread in 0..8u64 {
                let session = &session;
                scope.spawn(move || {
                    for i in 0..512 {
                        session.pwrite(&[thread as u8 + 1], i * 8 + thread, Flags::empty()).unwrap();
                    }
                });
            }
        });
        assert!(disk.contents().iter().enumerate().all(|(i, byte)| usize::from(*byte) == i % 8 + 1));
    }

    #[test]
    fn whole_blocks_are_not_put_back_by_a_part() {
        use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

        const BLOCK: u64 = 512;
        // More blocks than there are locks, and not from the first one on.
        let (first, blocks) = (3, LOCKS as u64 + 7);
        let disk = Spec::sized((first + blocks) * BLOCK).disk();
        let session = session(&disk, "blocksize", &[("minblock", "512")]);
        let done = AtomicBool::new(false);
        let target = AtomicU64::new(first);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Relaxed) {
                    let block = target.load(Relaxed);
                    session.pwrite(&[0xff], block * BLOCK + 7, Flags::empty()).unwrap();
                }
            });
            for round in 0..20_000_u64 {
                let count = 1 + round % blocks;
                let start = (first + round % (blocks - count + 1)) * BLOCK;
                let data = vec![(round % 200) as u8; (count * BLOCK) as usize];
                target.store(start / BLOCK + count - 1, Relaxed);
                session.pwrite(&data, start, Flags::empty()).unwrap();
                let mut there = vec![0; data.len()];
                session.pread(&mut there, start).unwrap();
                let kept = there.iter().zip(&data).enumerate().all(|(i, (a, b))| a == b || i % 512 == 7);
                if !kept {
                    done.store(true, Relaxed);
                }
                assert!(kept, "round {round}");
            }
            done.store(true, Relaxed);
        });
    }

    #[test]
    fn a_fast_zero_in_pieces_is_refused_before_anything_is_done() {
        let disk = Spec::sized(8192).disk();
        let session = session(&disk, "blocksize", &[("minblock", "512"), ("maxlen", "1k")]);
        for (length, offset) in [(100, 0), (512, 1), (2048, 0), (1000, 0)] {
            let error = session.zero(length, offset, Flags::FAST_ZERO).unwrap_err();
            assert_eq!(error.errno(), Errno::EOPNOTSUPP);
        }
        assert!(disk.calls().is_empty());
        session.zero(1024, 512, Flags::FAST_ZERO).unwrap();
    }

    #[test]
    fn what_clients_are_told() {
        let told = |spec: Spec, params: &[(&str, &str)]| {
            let caps = session(&spec.disk(), "blocksize", params).caps().clone();
            let BlockSize { minimum, preferred, maximum } = caps.block_size;
            (caps.size, minimum, preferred, maximum)
        };
        assert_eq!(told(Spec::sized(10_000), &[]), (10_000, 1, 4096, u32::MAX));
        assert_eq!(told(Spec::sized(100_000), &[("minblock", "64k")]), (65_536, 1, 65_536, u32::MAX));
        assert_eq!(told(strict(10_000, 512, 8192), &[]), (9728, 1, 4096, u32::MAX));
    }

    #[test]
    fn bad_limits_are_refused() {
        assert!(config_error("blocksize", &[("minblock", "3")]).contains("power of 2"));
        assert!(config_error("blocksize", &[("minblock", "128k")]).contains("must not exceed 65536"));
        assert!(config_error("blocksize", &[("minblock", "0")]).contains("non-zero"));
        let message = config_error("blocksize", &[("maxdata", "100"), ("minblock", "4k")]);
        assert_eq!(message, "maxdata must be a multiple of 4096");
        assert_eq!(
            config_error("blocksize", &[("maxlen", "100"), ("minblock", "512")]),
            "maxlen must be a multiple of 512"
        );
    }
}
