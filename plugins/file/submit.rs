//! Requests that wait in the ring: what has to be at hand before one starts, and what follows when it has ended.
//!
//! A request that cannot start at once is given back, and a thread runs it. One that did not end as it should is run
//! again the slow way, on the ring's thread: that meets whatever is wrong again, or does not.

use std::{
    fs::File,
    sync::{Arc, OnceLock},
};

use nbdkit_core::{Completion, Flags};

use super::{
    aligned::{Aligned, Buffers},
    direct::{Direct, read_all},
    ring::{LARGEST, Place, Ring, Transfer, Way},
};

/// A disk's ring, made when it is first needed, and its buffers.
pub(super) struct Submitter {
    ring: OnceLock<Option<Ring>>,
    buffers: Arc<Buffers>,
    /// There may be a ring.
    allowed: bool,
}

impl Submitter {
    pub(super) fn new(buffers: Arc<Buffers>, allowed: bool) -> Self {
        Submitter { ring: OnceLock::new(), buffers, allowed }
    }

    /// The ring, if there can be one.
    fn ring(&self) -> Option<&Ring> {
        let make =
            || Ring::new().inspect_err(|e| log::debug!("file: no io_uring, so threads wait: {e}")).ok();
        self.allowed.then(|| self.ring.get_or_init(make).as_ref())?
    }

    /// What a transfer of `length` bytes needs.
    fn prepare(&self, length: usize) -> Option<(Place<'_>, Aligned)> {
        if length > LARGEST {
            return None;
        }
        let place = self.ring()?.reserve()?;
        Some((place, self.buffers.take(length).ok()?))
    }

    /// Reads by way of the page cache.
    pub(super) fn read(
        &self,
        file: &Arc<File>,
        length: usize,
        offset: u64,
        done: Completion,
    ) -> Option<Completion> {
        let Some((place, buffer)) = self.prepare(length) else { return Some(done) };
        let (cached, buffers) = (file.clone(), self.buffers.clone());
        place.start(Transfer {
            way: Way::Read,
            file: file.clone(),
            offset,
            buffer,
            length,
            done: Box::new(move |result, mut buffer| {
                let read = match result {
                    Ok(n) if n == length => Ok(()),
                    _ => read_all(&cached, &mut buffer[..length], offset),
                };
                let flusher = done.complete(read.map(|()| &buffer[..length]));
                buffers.give(buffer);
                flusher
            }),
        });
        None
    }

    /// Reads past the page cache, the blocks around the range.
    pub(super) fn read_direct(
        &self,
        direct: &Arc<Direct>,
        length: usize,
        offset: u64,
        done: Completion,
    ) -> Option<Completion> {
        let blocks = direct.blocks(offset, length as u64);
        let whole = (blocks.end - blocks.start) as usize;
        let Some((place, buffer)) = self.prepare(whole) else { return Some(done) };
        let start = (offset - blocks.start) as usize;
        let (direct, buffers, range) = (direct.clone(), self.buffers.clone(), start..start + length);
        place.start(Transfer {
            way: Way::Read,
            file: direct.file().clone(),
            offset: blocks.start,
            buffer,
            length: whole,
            done: Box::new(move |result, mut buffer| {
                let read = match result {
                    // The last block of a file may not be there as a whole.
                    Ok(n) if n >= range.end => Ok(()),
                    _ => direct.read(&mut buffer[range.clone()], offset),
                };
                let flusher = done.complete(read.map(|()| &buffer[range]));
                buffers.give(buffer);
                flusher
            }),
        });
        None
    }

    /// Writes whole blocks past the page cache.
    pub(super) fn write_direct(
        &self,
        direct: &Arc<Direct>,
        data: &[u8],
        offset: u64,
        flags: Flags,
        done: Completion,
    ) -> Option<Completion> {
        let length = data.len();
        if !direct.is_whole(offset, length as u64) {
            return Some(done);
        }
        let Some((place, mut buffer)) = self.prepare(length) else { return Some(done) };
        let Some(entered) = direct.try_enter(&(offset..offset + length as u64)) else { return Some(done) };
        buffer[..length].copy_from_slice(data);
        let (direct, buffers) = (direct.clone(), self.buffers.clone());
        place.start(Transfer {
            way: Way::Write { durable: flags.contains(Flags::FUA) },
            file: direct.file().clone(),
            offset,
            buffer,
            length,
            done: Box::new(move |result, buffer| {
                let written = match result {
                    Ok(n) if n == length => Ok(()),
                    _ => direct.write_blocks(&buffer[..length], offset, flags),
                };
                drop(entered);
                buffers.give(buffer);
                done.complete(written.map(|()| &[][..]))
            }),
        });
        None
    }
}
