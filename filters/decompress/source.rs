//! The compressed file below, as decoders read it: by range, for as long as the client is there.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use nbdkit_core::{Client, Errno, Error, Next, Result};
use parking_lot::{Condvar, Mutex};

use super::zeroed;

/// What is read at once, in bytes.
const READ: u64 = 256 << 10;
/// What identifies a file: so much of its start and of its end, in bytes.
const SAMPLE: u64 = 4096;

/// The layers below, opened for a connection.
pub(crate) struct Source {
    next: Next,
    client: Arc<Client>,
    /// Nothing more is to be read for this connection.
    closed: AtomicBool,
    gate: Arc<Gate>,
}

/// Counts those who read from a source or will. Apart from it, so that it can be told that one has let go of the source.
#[derive(Default)]
struct Gate {
    users: Mutex<usize>,
    unused: Condvar,
}

impl Source {
    pub(super) fn new(next: Next, client: Arc<Client>) -> Self {
        Source { next, client, closed: AtomicBool::new(false), gate: Arc::default() }
    }

    pub(super) fn next(&self) -> &Next {
        &self.next
    }

    /// Size of the compressed file in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.next.caps().size
    }

    /// The client is gone, or is about to close the disk.
    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire) || self.client.gone.is_raised()
    }

    /// From now on reads fail.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    /// Waits until nobody reads.
    pub(super) fn wait_unused(&self) {
        let mut users = self.gate.users.lock();
        while *users > 0 {
            self.gate.unused.wait(&mut users);
        }
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// Those of the layer below; `EIO` past the end; `ESHUTDOWN` when the client is gone.
    pub(crate) fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        if self.is_closed() {
            return Err(Errno::ESHUTDOWN.into());
        }
        if buf.is_empty() {
            return Ok(());
        }
        let caps = self.next.caps();
        let end = offset.checked_add(buf.len() as u64).filter(|end| *end <= caps.size).ok_or_else(|| {
            Error::new(Errno::EIO, format!("the file ends at {}, before all of its data", caps.size))
        })?;
        let block = u64::from(caps.block_size.minimum).max(1);
        if offset.is_multiple_of(block) && (end.is_multiple_of(block) || end == caps.size) {
            return self.next.pread(buf, offset);
        }
        let start = offset - offset % block;
        let mut blocks = zeroed(end.next_multiple_of(block).min(caps.size) - start)?;
        self.next.pread(&mut blocks, start)?;
        let skip = (offset - start) as usize;
        buf.copy_from_slice(&blocks[skip..skip + buf.len()]);
        Ok(())
    }

    /// The bytes of a range.
    ///
    /// # Errors
    /// As [`read`](Self::read); `ENOMEM`.
    pub(crate) fn bytes(&self, range: Range<u64>) -> Result<Vec<u8>> {
        let mut bytes = zeroed(range.end.saturating_sub(range.start))?;
        for (i, chunk) in bytes.chunks_mut(READ as usize).enumerate() {
            self.read(chunk, range.start + i as u64 * READ)?;
        }
        Ok(bytes)
    }

    /// The `N` bytes at `offset`.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub(crate) fn array<const N: usize>(&self, offset: u64) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read(&mut bytes, offset)?;
        Ok(bytes)
    }

    /// What tells this file from others of its size: its start and its end.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub(crate) fn fingerprint(&self) -> Result<u64> {
        let size = self.size();
        let start = crc32fast::hash(&self.bytes(0..SAMPLE.min(size))?);
        let end = crc32fast::hash(&self.bytes(size.saturating_sub(SAMPLE)..size)?);
        Ok(u64::from(start) << 32 | u64::from(end))
    }
}

/// Somebody who uses a source: it is not closed before this is dropped.
pub(super) struct User {
    /// Always there, but while it is dropped.
    source: Option<Arc<Source>>,
    gate: Arc<Gate>,
}

impl User {
    pub(super) fn new(source: &Arc<Source>) -> Self {
        *source.gate.users.lock() += 1;
        User { source: Some(source.clone()), gate: source.gate.clone() }
    }

    pub(super) fn source(&self) -> &Arc<Source> {
        match &self.source {
            Some(source) => source,
            None => unreachable!("it is there until it is dropped"),
        }
    }
}

impl Drop for User {
    fn drop(&mut self) {
        // First, so that the connection, and no thread of ours, closes the layers below.
        self.source = None;
        let mut users = self.gate.users.lock();
        *users -= 1;
        if *users == 0 {
            self.gate.unused.notify_all();
        }
    }
}

/// Reads a range of a source in sequence.
pub(crate) struct Reader {
    /// What comes next from the source.
    range: Range<u64>,
    buffer: Vec<u8>,
    used: usize,
}

impl Reader {
    pub(crate) fn new(range: Range<u64>) -> Self {
        Reader { range, buffer: Vec::new(), used: 0 }
    }

    /// Bytes that were read and not consumed; none at the end of the range.
    ///
    /// # Errors
    /// As [`Source::read`].
    pub(crate) fn fill(&mut self, source: &Source) -> Result<&[u8]> {
        if self.used == self.buffer.len() {
            // Full reads end at the same places, whatever the range: friendly to blocks and caches below.
            let until = (self.range.start / READ + 1) * READ;
            let length = until.min(self.range.end).saturating_sub(self.range.start);
            self.buffer.resize(length as usize, 0);
            self.used = 0;
            if let Err(e) = source.read(&mut self.buffer, self.range.start) {
                self.buffer.clear();
                return Err(e);
            }
            self.range.start += length;
        }
        Ok(&self.buffer[self.used..])
    }

    /// Marks `count` bytes of what [`fill`](Self::fill) has told as used.
    pub(crate) fn consume(&mut self, count: usize) {
        self.used = (self.used + count).min(self.buffer.len());
    }

    /// The offset in the source of the next byte.
    pub(crate) fn position(&self) -> u64 {
        self.range.start - (self.buffer.len() - self.used) as u64
    }
}
