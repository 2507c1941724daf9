//! Disks that are read out of compressed files: what the filters xz, gzip, zstd, bzip2 and lzip share.
//!
//! A format knows how its file divides into *pieces* that can be decoded without what lies before them, and how to decode
//! one: [`Format`]. Everything else is here, once. Decoded pieces are kept in a bounded cache (`cache`), which all
//! connections to an export share; a piece is decoded once, however many requests wait for it (`disk`); threads decode, one
//! for each CPU (`pool`), while requests wait without one; and a client that reads in sequence (`sequence`) finds the next
//! pieces decoded. What was found to be zero is told as holes (`zeroes`).
//!
//! Damage is `EIO` for the piece that has it. Memory is bounded by the cache and by a piece for each thread, whatever the
//! file claims to contain.

mod cache;
mod codec;
mod cursors;
mod disk;
mod handle;
mod pool;
mod segments;
mod sequence;
mod source;
#[cfg(test)]
pub(crate) mod testing;
mod waiter;
mod zeroes;

use std::{
    collections::HashMap,
    ffi::{OsStr, OsString},
    ops::Range,
    sync::Arc,
};

use nbdkit_core::{
    Below, Errno, Error, Filter, Handle, Info, Next, NextConfig, NextConfigComplete, Open, Result,
    ThreadModel,
};
use parking_lot::Mutex;

pub(crate) use self::{
    codec::{Codec, Step, Stream},
    cursors::{Cursor, Cursors, StreamCursor},
    segments::Segments,
    source::{Reader, Source},
};
use self::{disk::Disk, handle::Opened, pool::Pool};

/// Pieces up to this length, in bytes, are decoded as a whole, so that their checksum is verified before anything of them is
/// given out.
pub(crate) const LARGEST_WHOLE: u64 = 64 << 20;
/// What is larger is decoded in parts of this length, in bytes.
pub(crate) const PART: u64 = 1 << 20;
/// The least that the cache may hold, in bytes.
pub(crate) const LEAST_CACHE: u64 = 64 << 20;
/// Exports whose cache is kept when nobody has them open. Clients choose the names.
const MOST_DISKS: usize = 16;

/// Where decoded data goes: its first byte's offset in the disk, and the bytes, of a whole piece.
pub(crate) type Sink<'a> = dyn FnMut(u64, Vec<u8>) + 'a;

/// A compressed file whose structure is known.
pub(crate) trait Format: Send + Sync {
    /// Size of the disk in bytes.
    fn size(&self) -> u64;

    /// The piece that `offset` is in, which is before the disk's end.
    fn piece(&self, offset: u64) -> Range<u64>;

    /// Pieces of one lane are decoded one after the other: one of them ends where the next can start. None: by itself.
    fn lane(&self, piece: &Range<u64>) -> Option<u64>;

    /// Decodes a piece and hands it to `sink`; others that were decoded on the way too.
    ///
    /// # Errors
    /// `EIO` for damage; those of the layer below; `ESHUTDOWN` when the source's client is gone.
    fn decode(&self, source: &Source, piece: Range<u64>, sink: &mut Sink<'_>) -> Result<()>;

    /// The cache that this file is best read with, in bytes.
    fn cache_size(&self) -> u64 {
        LEAST_CACHE
    }

    /// Keeps what was learnt about the file, at the end.
    fn save(&self) {}
}

/// A format as it was configured.
pub(crate) trait Kind: Send + Sync {
    /// Name, help and so on.
    fn info(&self) -> Info;

    /// Takes a parameter; false: it is not one of the format's.
    ///
    /// # Errors
    /// A bad value.
    fn config(&mut self, key: &str, value: &OsStr) -> anyhow::Result<bool> {
        let _ = (key, value);
        Ok(false)
    }

    /// All parameters were given.
    ///
    /// # Errors
    /// One is missing.
    fn config_complete(&mut self) -> anyhow::Result<()> {
        Ok(())
    }

    /// Finds out the structure of the file of an export.
    ///
    /// # Errors
    /// It is not of that format, damaged, or too large; those of the layer below.
    fn open(&self, source: &Source, export: &OsStr) -> Result<Box<dyn Format>>;
}

/// The filter for a kind of compressed files.
pub(crate) fn filter(kind: impl Kind + 'static) -> Box<dyn Filter> {
    Box::new(Decompress {
        kind: Box::new(kind),
        pool: Arc::default(),
        parallel: false,
        disks: Mutex::default(),
    })
}

struct Decompress {
    kind: Box<dyn Kind>,
    pool: Arc<Pool>,
    /// The layers below take requests beside those of clients.
    parallel: bool,
    disks: Mutex<HashMap<OsString, Arc<Slot>>>,
}

/// The disk of an export. It is locked while the structure of its file is read.
type Slot = Mutex<Option<Known>>;

struct Known {
    disk: Arc<Disk>,
    /// Size and fingerprint of the file.
    file: (u64, u64),
}

impl Decompress {
    /// The disk in the file that `source` has: the one of the last time, unless the file is another.
    fn disk(&self, source: &Source, export: &OsStr) -> Result<Arc<Disk>> {
        let slot = {
            let mut disks = self.disks.lock();
            if disks.len() >= MOST_DISKS && !disks.contains_key(export) {
                // One that is in use lives on in its connections.
                disks.retain(|_, slot| {
                    slot.try_lock()
                        .is_none_or(|known| known.as_ref().is_some_and(|k| Arc::strong_count(&k.disk) > 1))
                });
            }
            disks.entry(export.to_owned()).or_default().clone()
        };
        let mut known = slot.lock();
        let file = (source.size(), source.fingerprint()?);
        if let Some(known) = known.as_ref().filter(|known| known.file == file) {
            return Ok(known.disk.clone());
        }
        *known = None;
        let format = self.kind.open(source, export)?;
        if format.size() > i64::MAX as u64 {
            return Err(Error::new(Errno::EFBIG, "the decompressed disk is over 2^63-1 bytes"));
        }
        let disk = Arc::new(Disk::new(format));
        *known = Some(Known { disk: disk.clone(), file });
        Ok(disk)
    }
}

impl Filter for Decompress {
    fn info(&self) -> Info {
        self.kind.info()
    }

    fn config(&mut self, key: &str, value: &OsStr, next: &mut NextConfig<'_>) -> anyhow::Result<()> {
        if self.kind.config(key, value)? { Ok(()) } else { next(key, value) }
    }

    fn config_complete(&mut self, next: &mut NextConfigComplete<'_>) -> anyhow::Result<()> {
        self.kind.config_complete()?;
        next()
    }

    fn get_ready(&mut self, model: ThreadModel) -> anyhow::Result<()> {
        self.parallel = model == ThreadModel::Parallel;
        Ok(())
    }

    fn opens_readonly(&self) -> bool {
        true
    }

    fn cleanup(&self, _: &Below) {
        let disks = std::mem::take(&mut *self.disks.lock());
        for known in disks.into_values().filter_map(|slot| slot.lock().take()) {
            known.disk.save();
        }
        self.pool.stop();
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        let below: Next = next.open(&Open { readonly: true, ..open.clone() })?;
        let source = Arc::new(Source::new(below, open.client.clone()));
        let disk = self.disk(&source, &open.export_name).map_err(|e| e.context(self.info().name))?;
        Ok(Box::new(Opened::new(disk, source, self.pool.clone(), self.parallel)))
    }
}

/// An error for what is damaged.
pub(crate) fn damaged(what: impl std::fmt::Display) -> Error {
    Error::new(Errno::EIO, what.to_string())
}

/// The part of a length of `of` that `offset` lies in, in parts of `length` bytes from `start` on.
pub(crate) fn part_of(whole: &Range<u64>, length: u64, offset: u64) -> Range<u64> {
    let start = offset - (offset - whole.start) % length;
    start..start.saturating_add(length).min(whole.end)
}

/// Zeroed memory.
///
/// # Errors
/// `ENOMEM`.
pub(crate) fn zeroed(length: u64) -> Result<Vec<u8>> {
    let fail = || Error::new(Errno::ENOMEM, format!("there is no memory for {length} bytes"));
    let length = usize::try_from(length).map_err(|_| fail())?;
    zerocopy::FromZeros::new_vec_zeroed(length).map_err(|_| fail())
}
