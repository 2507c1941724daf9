//! Requests that wait in the ring: what has to be there before one starts, and what follows when it has ended.
//!
//! A request that cannot start at once needs a thread. One that did not end as it should is run again the slow way, on
//! the ring's thread: that meets whatever is wrong again, or does not.

use std::{
    fs::File,
    io,
    ops::Range,
    sync::{Arc, OnceLock},
};

use nbdkit_core::{Buffers, Data, Flags, Memory, Outcome, Payload, Pending, Request, Wake};

use super::{
    direct::{Direct, read_all},
    ranges::Entered,
    ring::{LARGEST, Place, Ring, Rings, Transfer, Way},
};

/// A connection's way to a ring, which is chosen when it is first needed.
pub(super) struct Submitter {
    ring: OnceLock<Option<Arc<Ring>>>,
    buffers: Buffers,
    /// None: there must be no ring.
    rings: Option<Rings>,
}

/// What follows when a transfer has ended.
pub(super) enum Then {
    /// Part of the memory was asked for; the same by way of the page cache, if need be.
    Cached { file: Arc<File>, offset: u64, length: usize },
    /// The same past the page cache.
    Direct { direct: Arc<Direct>, offset: u64, range: Range<usize> },
    /// Whole blocks were to be written, and nobody else could change a part of one meanwhile.
    Written { direct: Arc<Direct>, offset: u64, length: usize, flags: Flags, _entered: Entered },
}

impl Submitter {
    pub(super) fn new(buffers: Buffers, rings: Option<Rings>) -> Self {
        Submitter { ring: OnceLock::new(), buffers, rings }
    }

    /// The ring, if there can be one.
    fn ring(&self) -> Option<&Arc<Ring>> {
        let choose = || self.rings.as_ref().and_then(Rings::choose);
        self.ring.get_or_init(choose).as_ref()
    }

    /// What a transfer of `length` bytes needs.
    fn prepare(&self, request: &Request<'_>, length: usize) -> Option<(Place<'_>, Memory)> {
        if length > LARGEST || !request.may_start() {
            return None;
        }
        let place = self.ring()?.reserve()?;
        Some((place, self.buffers.take(length).ok()?))
    }

    /// Reads by way of the page cache.
    pub(super) fn start_read(&self, file: &Arc<File>, request: &mut Request<'_>) -> Outcome<'static> {
        let (offset, length) = (request.offset(), request.length() as usize);
        let Some((place, memory)) = self.prepare(request, length) else { return Outcome::NeedsThread };
        let Some((pending, started)) = request.start() else { return Outcome::NeedsThread };
        let then = Then::Cached { file: file.clone(), offset, length };
        place.start(Transfer { way: Way::Read, file: file.clone(), offset, memory, length, pending, then });
        Outcome::Started(started)
    }

    /// Reads past the page cache the blocks around the range, or writes whole blocks.
    pub(super) fn start_direct(&self, direct: &Arc<Direct>, request: &mut Request<'_>) -> Outcome<'static> {
        let (offset, flags, length) = (request.offset(), request.flags(), request.length() as usize);
        let blocks = direct.blocks(offset, length as u64);
        let whole = (blocks.end - blocks.start) as usize;
        let Some((place, mut memory)) = self.prepare(request, whole) else { return Outcome::NeedsThread };
        let (way, then) = match request.data() {
            Data::Write(data) => {
                if !direct.is_whole(offset, length as u64) {
                    return Outcome::NeedsThread;
                }
                let Some(entered) = direct.try_enter(&blocks) else { return Outcome::NeedsThread };
                memory[..length].copy_from_slice(data);
                let direct = direct.clone();
                let then = Then::Written { direct, offset, length, flags, _entered: entered };
                (Way::Write { durable: flags.contains(Flags::FUA) }, then)
            }
            _ => {
                let start = (offset - blocks.start) as usize;
                let range = start..start + length;
                (Way::Read, Then::Direct { direct: direct.clone(), offset, range })
            }
        };
        let Some((pending, started)) = request.start() else { return Outcome::NeedsThread };
        let file = direct.file().clone();
        place.start(Transfer { way, file, offset: blocks.start, memory, length: whole, pending, then });
        Outcome::Started(started)
    }
}

impl Then {
    /// Says how a request ended whose transfer did so.
    pub(super) fn end(self, pending: Pending, result: io::Result<usize>, mut memory: Memory) -> Wake {
        let ended = match self {
            Then::Cached { file, offset, length } => match result {
                Ok(n) if n == length => Ok(()),
                _ => read_all(&file, &mut memory[..length], offset),
            }
            .map(|()| Payload::Memory(memory, 0..length)),
            Then::Direct { direct, offset, range } => match result {
                // The last block of a file may not be there as a whole.
                Ok(n) if n >= range.end => Ok(()),
                _ => direct.read(&mut memory[range.clone()], offset),
            }
            .map(|()| Payload::Memory(memory, range)),
            Then::Written { direct, offset, length, flags, _entered } => match result {
                Ok(n) if n == length => Ok(()),
                _ => direct.write_blocks(&memory[..length], offset, flags),
            }
            .map(|()| Payload::None),
        };
        pending.complete(ended)
    }
}
