//! An open volume: requests for its sectors.
//!
//! Whole sectors are decrypted where they were read into, and encrypted in a copy; such requests may be answered at once,
//! started, or run on a thread, as the layer below likes. Parts of sectors are written by read-modify-write, on a thread.

use std::sync::Arc;

use nbdkit_core::{
    BlockSize, Call, Caps, Data, Errno, Error, Flags, Handle, Next, Op, Outcome, Request, Result, Support,
    emulate,
};
use parking_lot::{Mutex, MutexGuard};
use zeroize::Zeroizing;

use super::{
    cipher::{IV_UNIT, SectorCipher},
    keyslot::Segment,
};

/// Locks for read-modify-write, which sectors share.
const LOCKS: usize = 64;

/// What connections share.
pub(super) struct Volume {
    segment: Segment,
    cipher: Box<dyn SectorCipher>,
    locks: [Mutex<()>; LOCKS],
}

impl Volume {
    pub(super) fn new(segment: Segment, cipher: Box<dyn SectorCipher>) -> Self {
        Volume { segment, cipher, locks: [const { Mutex::new(()) }; LOCKS] }
    }

    /// Size of a sector in bytes.
    fn sector(&self) -> u64 {
        self.segment.sector_size.into()
    }

    fn is_whole(&self, offset: u64, length: u64) -> bool {
        (offset | length).is_multiple_of(self.sector())
    }

    /// The vector of the sector at an offset of the volume.
    fn iv(&self, offset: u64) -> u64 {
        self.segment.iv.wrapping_add(offset / IV_UNIT)
    }

    fn decrypt(&self, data: &mut [u8], offset: u64) {
        self.cipher.decrypt(data, self.segment.sector_size as usize, self.iv(offset));
    }

    fn encrypt(&self, data: &mut [u8], offset: u64) {
        self.cipher.encrypt(data, self.segment.sector_size as usize, self.iv(offset));
    }

    fn lock(&self, offset: u64) -> MutexGuard<'_, ()> {
        self.locks[(offset / self.sector()) as usize % LOCKS].lock()
    }
}

/// A connection to a volume.
pub(super) struct Opened {
    next: Next,
    volume: Arc<Volume>,
    size: u64,
}

impl Opened {
    /// # Errors
    /// `EINVAL`: the disk is too short.
    pub(super) fn new(next: Next, volume: Arc<Volume>) -> Result<Self> {
        let Segment { offset, size, .. } = volume.segment;
        let left = next.caps().size.checked_sub(offset);
        let size = left.and_then(|left| size.map_or(Some(left), |size| (size <= left).then_some(size)));
        let size = size.ok_or_else(|| {
            Error::new(Errno::EINVAL, "luks: the disk is too short: a part of the volume is missing")
        })?;
        Ok(Opened { size: size - size % volume.sector(), next, volume })
    }

    /// Where an offset of the volume is in the layer below. It is within its disk, so this does not overflow.
    fn below(&self, offset: u64) -> u64 {
        self.volume.segment.offset + offset
    }

    /// Reads and decrypts the sectors that a range touches. What is returned begins with `offset`'s sector.
    fn read_sectors(&self, offset: u64, length: u64) -> Result<(Zeroizing<Vec<u8>>, u64)> {
        let sector = self.volume.sector();
        let start = offset - offset % sector;
        let end = (offset + length).next_multiple_of(sector);
        let mut data = Zeroizing::new(vec![0; (end - start) as usize]);
        self.next.pread(&mut data, self.below(start))?;
        self.volume.decrypt(&mut data, start);
        Ok((data, start))
    }

    /// Writes whole sectors.
    fn write_sectors(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
        let mut data = buf.to_vec();
        self.volume.encrypt(&mut data, offset);
        self.next.pwrite(&data, self.below(offset), flags)
    }

    /// Writes a part of one sector.
    fn modify(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
        let _lock = self.volume.lock(offset);
        let (mut data, start) = self.read_sectors(offset, buf.len() as u64)?;
        let at = (offset - start) as usize;
        data[at..at + buf.len()].copy_from_slice(buf);
        self.write_sectors(&data, start, flags)
    }
}

impl Handle for Opened {
    fn next(&self) -> Option<&Next> {
        Some(&self.next)
    }

    fn capabilities(&self) -> Result<Caps> {
        let below = self.next.capabilities();
        let sector = self.volume.segment.sector_size;
        let block_size = if below.block_size.is_unset() {
            BlockSize { minimum: sector, preferred: sector, maximum: u32::MAX }
        } else {
            let BlockSize { minimum, preferred, maximum } = below.block_size;
            let minimum = minimum.max(sector);
            let maximum = if maximum == u32::MAX { maximum } else { maximum - maximum % minimum };
            BlockSize { minimum, preferred: preferred.max(minimum), maximum }
        };
        Ok(below
            .with_size(self.size)
            .with_block_size(block_size)
            .with_trim(false)
            .with_zero(Support::Emulate)
            .with_fast_zero(false)
            .with_cache(Support::Native)
            .with_extents(false))
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        let call = *request.call();
        let whole = self.volume.is_whole(call.offset, call.length);
        let (offset, may_wait) = (self.below(call.offset), request.may_wait());
        match (call.op, request.data()) {
            (Op::Read, Data::Read(_)) if whole => self.next.transform_at(self, request, offset, 0),
            (Op::Write, Data::Write(buf)) if whole => {
                let mut data = buf.to_vec();
                self.volume.encrypt(&mut data, call.offset);
                self.next.replaced(request, Call { offset, ..call }, Data::Write(&data))
            }
            (Op::Read | Op::Write, Data::None) => Outcome::NeedsThread,
            (Op::Flush, _) => self.next.submit(request),
            _ if may_wait => request.run(self),
            _ => Outcome::NeedsThread,
        }
    }

    fn transform(&self, call: &Call, _: u64, data: &mut [u8]) -> Result<()> {
        self.volume.decrypt(data, call.offset);
        Ok(())
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        if self.volume.is_whole(offset, buf.len() as u64) {
            self.next.pread(buf, self.below(offset))?;
            self.volume.decrypt(buf, offset);
            return Ok(());
        }
        let (data, start) = self.read_sectors(offset, buf.len() as u64)?;
        buf.copy_from_slice(&data[(offset - start) as usize..][..buf.len()]);
        Ok(())
    }

    fn pwrite(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
        let sector = self.volume.sector();
        let head = ((offset.next_multiple_of(sector) - offset) as usize).min(buf.len());
        let (head, rest) = buf.split_at(head);
        let (body, tail) = rest.split_at(rest.len() - rest.len() % sector as usize);
        let mut at = offset;
        if !head.is_empty() {
            self.modify(head, at, flags)?;
            at += head.len() as u64;
        }
        if !body.is_empty() {
            self.write_sectors(body, at, flags)?;
            at += body.len() as u64;
        }
        if tail.is_empty() { Ok(()) } else { self.modify(tail, at, flags) }
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        let block = self.next.caps().block_size;
        emulate::zero(length, offset, block, |zeroes, at| self.pwrite(zeroes, at, flags & Flags::FUA))
    }

    fn cache(&self, length: u64, offset: u64) -> Result<()> {
        match self.next.caps().cache {
            Support::None => Ok(()),
            _ => self.next.cache(length, self.below(offset)),
        }
    }
}
