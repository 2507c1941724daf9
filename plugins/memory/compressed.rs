//! A disk whose pages are compressed by zstd, each for itself. A page that was never written, or was zeroed or trimmed as
//! a whole, is a hole and takes nothing.
//!
//! The map of pages is locked only to look up or to replace a page: compressing takes a hundred times as long. Changes of
//! a part of a page are serialized by one of some locks that pages share, so that two of them do not lose each other.

use std::{collections::BTreeMap, ops::Range, sync::Arc};

use nbdkit_core::{
    Errno, Error, Extents, Flags, Result,
    sync::{Mutex, RwLock},
};
use zstd::bulk::{Compressor, Decompressor};

/// What is compressed at a time, in bytes: small enough for small writes, large enough to compress well.
pub(super) const PAGE: u64 = 32768;
/// How many locks the pages share.
const LOCKS: usize = 64;
/// Most extents of one answer, which may be shorter than the question.
const MAX_EXTENTS: usize = 1 << 16;

pub(super) struct Compressed {
    size: u64,
    level: i32,
    /// By number. One that cannot be compressed is as long as a page.
    pages: RwLock<BTreeMap<u64, Arc<[u8]>>>,
    locks: [Mutex<()>; LOCKS],
    /// To make one takes longer than to use it. There are as many as there were requests at a time.
    codecs: Mutex<Vec<Codec>>,
}

struct Codec {
    compressor: Compressor<'static>,
    decompressor: Decompressor<'static>,
    /// Room for a page, and for one that is compressed.
    page: Vec<u8>,
    packed: Vec<u8>,
}

/// The part of a request in one page.
struct Part {
    page: u64,
    /// In the page.
    range: Range<usize>,
    /// Of the request.
    at: usize,
}

/// A request, cut at the borders of pages.
fn parts(offset: u64, length: u64) -> impl Iterator<Item = Part> {
    let end = offset + length;
    (offset / PAGE..end.div_ceil(PAGE)).map(move |page| {
        let start = page * PAGE;
        let (from, to) = (offset.max(start), end.min(start + PAGE));
        Part { page, range: (from - start) as usize..(to - start) as usize, at: (from - offset) as usize }
    })
}

fn failed(e: std::io::Error) -> Error {
    Error::new(Errno::EIO, format!("zstd: {e}"))
}

impl Codec {
    fn new(level: i32) -> Result<Self> {
        Ok(Codec {
            compressor: Compressor::new(level).map_err(failed)?,
            decompressor: Decompressor::new().map_err(failed)?,
            page: vec![0; PAGE as usize],
            packed: vec![0; zstd::zstd_safe::compress_bound(PAGE as usize)],
        })
    }

    /// Unpacks a page into `self.page`.
    fn unpack(&mut self, packed: Option<&[u8]>) -> Result<()> {
        match packed {
            None => self.page.fill(0),
            Some(plain) if plain.len() == PAGE as usize => self.page.copy_from_slice(plain),
            Some(packed) => {
                let length =
                    self.decompressor.decompress_to_buffer(packed, &mut self.page[..]).map_err(failed)?;
                if length != PAGE as usize {
                    return Err(Error::new(Errno::EIO, "zstd: a page is not complete"));
                }
            }
        }
        Ok(())
    }

    /// Packs `self.page`.
    fn pack(&mut self) -> Result<Arc<[u8]>> {
        let length =
            self.compressor.compress_to_buffer(&self.page[..], &mut self.packed[..]).map_err(failed)?;
        Ok(if length < PAGE as usize { self.packed[..length].into() } else { self.page[..].into() })
    }
}

impl Compressed {
    pub(super) fn new(size: u64, level: i32) -> Self {
        Compressed {
            size,
            level,
            pages: RwLock::default(),
            locks: std::array::from_fn(|_| Mutex::default()),
            codecs: Mutex::default(),
        }
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    fn with_codec<T>(&self, work: impl FnOnce(&mut Codec) -> Result<T>) -> Result<T> {
        let idle = self.codecs.lock().pop();
        let mut codec = match idle {
            Some(codec) => codec,
            None => Codec::new(self.level)?,
        };
        let done = work(&mut codec);
        self.codecs.lock().push(codec);
        done
    }

    fn page(&self, page: u64) -> Option<Arc<[u8]>> {
        self.pages.read().get(&page).cloned()
    }

    fn lock(&self, page: u64) -> parking_lot::MutexGuard<'_, ()> {
        self.locks[page as usize % LOCKS].lock()
    }

    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        for part in parts(offset, buf.len() as u64) {
            let target = &mut buf[part.at..][..part.range.len()];
            match self.page(part.page) {
                None => target.fill(0),
                Some(packed) => self.with_codec(|codec| {
                    codec.unpack(Some(&packed))?;
                    target.copy_from_slice(&codec.page[part.range]);
                    Ok(())
                })?,
            }
        }
        Ok(())
    }

    pub(super) fn write(&self, data: &[u8], offset: u64) -> Result<()> {
        self.with_codec(|codec| {
            for part in parts(offset, data.len() as u64) {
                let data = &data[part.at..][..part.range.len()];
                let _lock = self.lock(part.page);
                if part.range.len() < PAGE as usize {
                    codec.unpack(self.page(part.page).as_deref())?;
                }
                codec.page[part.range].copy_from_slice(data);
                let packed = codec.pack()?;
                self.pages.write().insert(part.page, packed);
            }
            Ok(())
        })
    }

    /// Makes a range read as zeroes. Whole pages become holes, and so does one that is all zero then.
    pub(super) fn zero(&self, length: u64, offset: u64) -> Result<()> {
        let end = offset + length;
        // Those that are made meanwhile were written at the same time: either order will do.
        let pages: Vec<u64> =
            self.pages.read().range(offset / PAGE..end.div_ceil(PAGE)).map(|(page, _)| *page).collect();
        for page in pages {
            let _lock = self.lock(page);
            let start = page * PAGE;
            // The last page of the disk may be a part of one.
            let whole = (start.max(offset), end.min(start + PAGE)) == (start, self.size.min(start + PAGE));
            if whole {
                self.pages.write().remove(&page);
                continue;
            }
            let Some(packed) = self.page(page) else { continue };
            self.with_codec(|codec| {
                codec.unpack(Some(&packed))?;
                let range = offset.max(start) - start..end.min(start + PAGE) - start;
                codec.page[range.start as usize..range.end as usize].fill(0);
                if codec.page.iter().all(|byte| *byte == 0) {
                    self.pages.write().remove(&page);
                } else {
                    let packed = codec.pack()?;
                    self.pages.write().insert(page, packed);
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Adds the extents of a range, or of its start.
    pub(super) fn extents(
        &self,
        length: u64,
        offset: u64,
        flags: Flags,
        extents: &mut Extents,
    ) -> Result<()> {
        let end = offset + length;
        let done = |extents: &Extents| {
            extents.as_slice().len() >= MAX_EXTENTS
                || flags.contains(Flags::REQ_ONE) && extents.as_slice().len() > 1
        };
        let pages = self.pages.read();
        for (page, _) in pages.range(offset / PAGE..end.div_ceil(PAGE)) {
            let (from, to) = ((page * PAGE).max(offset), (page * PAGE + PAGE).min(end));
            let at = extents.covered_to();
            if at < from {
                extents.add(at, from - at, true, true)?;
            }
            extents.add_data(from, to - from)?;
            if done(extents) {
                return Ok(());
            }
        }
        let at = extents.covered_to();
        if at < end {
            extents.add(at, end - at, true, true)?;
        }
        Ok(())
    }

    /// What the pages take, in bytes.
    #[cfg(test)]
    pub(super) fn allocated(&self) -> usize {
        self.pages.read().values().map(|page| page.len()).sum()
    }
}
