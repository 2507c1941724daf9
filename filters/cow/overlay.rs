//! The overlay of the cow filter: which blocks have changed, and a file with what they hold, a temporary one or a
//! [`Store`].
//!
//! A block's data lies in the file at the offset it has on the disk (after the map, in a store), so there is no index
//! to keep; what has not changed is a hole. Each block is in one of three states, kept in two bitmaps:
//!
//! | changed | discarded | state |
//! |---|---|---|
//! | no  | –   | [`State::Below`]: as on the disk below |
//! | yes | no  | [`State::Stored`]: in the file |
//! | yes | yes | [`State::Discarded`]: zeroes |
//!
//! Every change of state ends in the flip of one bit, after the data are in place, so readers need no lock. A
//! change of state is made under the block's lock; to write into a stored block none is needed.

use std::{
    ffi::OsStr,
    fs::File,
    ops::Range,
    os::unix::{ffi::OsStrExt as _, fs::FileExt as _},
    sync::Arc,
};

use nbdkit_common::Bitmap;
use nbdkit_core::{BlockSize, Errno, Error, Result, emulate};
use parking_lot::{Mutex, MutexGuard};
use rustix::{
    fs::{FallocateFlags, fallocate},
    io::{ReadWriteFlags, preadv2},
};

use super::{
    base::{Base, Disk},
    format::{PAGE_BLOCKS, Page},
    store::{Store, wrong_export},
};

/// Blocks share their locks with others at this distance.
const LOCKS: usize = 64;

/// A block is copied at most this many bytes at a time.
const CHUNK: u64 = 1 << 20;

/// Where a block's content is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// On the disk below.
    Below,
    /// In the file.
    Stored,
    /// Nowhere: it reads as zeroes.
    Discarded,
}

/// What a range is to hold.
#[derive(Clone, Copy)]
pub(super) enum Patch<'a> {
    Data(&'a [u8]),
    Zeroes(u64),
}

impl<'a> Patch<'a> {
    pub(super) fn len(self) -> u64 {
        match self {
            Patch::Data(data) => data.len() as u64,
            Patch::Zeroes(length) => length,
        }
    }

    /// The part of `length` bytes from `start` on.
    pub(super) fn part(self, start: u64, length: u64) -> Patch<'a> {
        match self {
            Patch::Data(data) => Patch::Data(&data[start as usize..(start + length) as usize]),
            Patch::Zeroes(_) => Patch::Zeroes(length),
        }
    }

    fn copy_to(self, target: &mut [u8]) {
        match self {
            Patch::Data(data) => target.copy_from_slice(data),
            Patch::Zeroes(_) => target.fill(0),
        }
    }
}

/// A range within one block, or within several of one state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) offset: u64,
    pub(super) length: u64,
    pub(super) state: State,
}

pub(super) struct Overlay {
    source: OverlaySource,
    /// Where the data start in the file.
    data_start: u64,
    /// Size of the disk in bytes.
    size: u64,
    block_size: u64,
    changed: Bitmap,
    discarded: Bitmap,
    locks: [Mutex<()>; LOCKS],
}

/// What an overlay reads its blocks from and writes them to.
enum OverlaySource {
    /// A file without a name, which dies with the server.
    Temporary(Arc<File>),
    Store(Box<Store>),
}

impl Overlay {
    /// An overlay in which nothing has changed, over a file that dies with the server.
    ///
    /// # Errors
    /// `EINVAL`: the disk has more blocks than can be kept track of.
    pub(super) fn temporary(file: Arc<File>, size: u64, block_size: u64) -> Result<Self> {
        Self::new(OverlaySource::Temporary(file), 0, size, block_size)
    }

    /// An overlay as it was when it was last flushed.
    ///
    /// # Errors
    /// Those of the file; `EIO`: it is damaged; `EINVAL`: it has more blocks than can be kept track of.
    pub(super) fn persistent(store: Store) -> Result<Self> {
        let header = store.header().clone();
        let overlay = Self::new(
            OverlaySource::Store(Box::new(store)),
            header.data_start,
            header.size,
            header.block_size,
        )?;
        if let OverlaySource::Store(store) = &overlay.source {
            store.load(|page, states| {
                let first = page * (PAGE_BLOCKS / 64);
                for (index, (changed, discarded)) in states.changed.iter().zip(states.discarded).enumerate() {
                    overlay.discarded.set_word(first + index as u64, discarded);
                    overlay.changed.set_word(first + index as u64, *changed);
                }
            })?;
        }
        Ok(overlay)
    }

    fn new(source: OverlaySource, data_start: u64, size: u64, block_size: u64) -> Result<Self> {
        let blocks = size.div_ceil(block_size);
        let bitmap = || {
            Bitmap::new(blocks).ok_or_else(|| {
                let why = format!(
                    "a disk of {size} bytes has too many blocks of {block_size}: give a larger cow-block-size"
                );
                Error::new(Errno::EINVAL, why)
            })
        };
        Ok(Overlay {
            source,
            data_start,
            size,
            block_size,
            changed: bitmap()?,
            discarded: bitmap()?,
            locks: [const { Mutex::new(()) }; LOCKS],
        })
    }

    /// Size of the disk in bytes.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Checks that the disk below has the size that the overlay is for.
    ///
    /// # Errors
    /// `EINVAL`, with both sizes.
    pub(super) fn check_size(&self, size: u64) -> Result<()> {
        match &self.source {
            _ if size == self.size => Ok(()),
            OverlaySource::Store(store) => Err(store.wrong_size(size)),
            OverlaySource::Temporary(_) => {
                let first = self.size;
                let why = format!("the disk below has {size} bytes, but it had {first} when first opened");
                Err(Error::new(Errno::EINVAL, why))
            }
        }
    }

    /// Checks that the changes are those of an export. An overlay that does not know is anybody's.
    ///
    /// # Errors
    /// `EINVAL`, with both names.
    pub(super) fn check_export(&self, export: &OsStr) -> Result<()> {
        match &self.source {
            OverlaySource::Temporary(_) => Ok(()),
            OverlaySource::Store(store) => match store.header().export.as_deref().map(OsStr::from_bytes) {
                Some(name) if name != export => Err(wrong_export(store.path(), name, export)),
                _ => Ok(()),
            },
        }
    }

    /// Checks that the disk below is the one that the overlay was made over, and as it was then. One without changes gets
    /// along with any. With `force` the disk becomes its base.
    ///
    /// # Errors
    /// `EINVAL`, with what differs; those of the file.
    pub(super) fn identify(&self, disk: &dyn Disk, force: bool) -> Result<()> {
        let OverlaySource::Store(store) = &self.source else { return Ok(()) };
        let Some(base) = store.base()? else {
            if !self.is_unchanged() {
                log::warn!(
                    "cow: {} does not know which disk it belongs to, for it was made by an older version: see to it that \
                     this is the one",
                    store.path().display()
                );
            }
            return store.set_base(&Base::of(disk));
        };
        let committing = base.is_committing() && !self.is_unchanged();
        match base.check(disk, |at| self.state(at / self.block_size) != State::Below) {
            Ok(()) => return Ok(()),
            Err(_) if self.is_unchanged() => {}
            Err(e) if force => log::warn!("cow: {} {e}: it is used all the same", store.path().display()),
            Err(e) => {
                let why = format!(
                    "{} {e}. Give the disk that it was made over, or force it",
                    store.path().display()
                );
                return Err(Error::new(e.errno(), why));
            }
        }
        store.set_base(&Base::of(disk).committing(committing))
    }

    /// Notes that the base gets changes of this overlay from here on.
    ///
    /// # Errors
    /// Those of the file.
    pub(super) fn begin_commit(&self) -> Result<()> {
        let OverlaySource::Store(store) = &self.source else { return Ok(()) };
        match store.base()? {
            Some(base) => store.set_base(&base.committing(true)),
            None => Ok(()),
        }
    }

    /// Notes that the base has all changes, as it is now.
    ///
    /// # Errors
    /// Those of the file.
    pub(super) fn end_commit(&self, disk: &dyn Disk) -> Result<()> {
        match &self.source {
            OverlaySource::Temporary(_) => Ok(()),
            OverlaySource::Store(store) => store.set_base(&Base::of(disk)),
        }
    }

    /// Whether everything is as on the disk below.
    pub(super) fn is_unchanged(&self) -> bool {
        self.changed.next_set(0).is_none()
    }

    /// Closes an overlay without changes: the file comes back if it dies with the server, and is removed if this process has
    /// made it for nothing.
    pub(super) fn close(self) -> Option<Arc<File>> {
        match self.source {
            OverlaySource::Temporary(file) => Some(file),
            OverlaySource::Store(store) => {
                store.remove_if_made();
                None
            }
        }
    }

    /// Unit of the overlay in bytes.
    pub(super) fn block_size(&self) -> u64 {
        self.block_size
    }

    /// Whether it outlives the server.
    pub(super) fn is_persistent(&self) -> bool {
        matches!(self.source, OverlaySource::Store(_))
    }

    fn file(&self) -> &File {
        match &self.source {
            OverlaySource::Temporary(file) => file,
            OverlaySource::Store(store) => store.file(),
        }
    }

    /// Makes everything that was written durable, if the overlay is persistent.
    ///
    /// # Errors
    /// Those of the file.
    pub(super) fn flush(&self) -> Result<()> {
        match &self.source {
            OverlaySource::Temporary(_) => Ok(()),
            OverlaySource::Store(store) => store.flush(|page| self.states(page)),
        }
    }

    #[cfg(test)]
    pub(super) fn before_sync(&self, hook: impl FnMut(&File) + Send + 'static) {
        if let OverlaySource::Store(store) = &self.source {
            *store.before_sync.lock() = Some(Box::new(hook));
        }
    }

    /// The states of the blocks of a page of the map.
    fn states(&self, page: u64) -> Page {
        let first = page * (PAGE_BLOCKS / 64);
        let mut states = Page::EMPTY;
        for (index, (changed, discarded)) in states.changed.iter_mut().zip(&mut states.discarded).enumerate()
        {
            // In this order, as in `state`.
            *changed = self.changed.word(first + index as u64);
            *discarded = self.discarded.word(first + index as u64) & *changed;
        }
        states
    }

    /// After the state of a block has changed.
    fn touch(&self, block: u64) {
        if let OverlaySource::Store(store) = &self.source {
            store.touch(block);
        }
    }

    /// Saves what only memory has of a persistent overlay, at the end of its use.
    ///
    /// # Errors
    /// Those of the file.
    pub(super) fn save(&self) -> Result<()> {
        match &self.source {
            OverlaySource::Store(store) if store.is_dirty() => self.flush(),
            _ => Ok(()),
        }
    }

    /// Forgets all changes, durably, and gives their space back. A crash on the way leaves some of the changes, each
    /// of them whole. Nobody else may use the overlay meanwhile.
    ///
    /// # Errors
    /// Those of the file.
    pub(super) fn clear(&self) -> Result<()> {
        let mut from = 0;
        while let Some(block) = self.changed.next_set(from) {
            let page = block / PAGE_BLOCKS;
            self.changed.set_range(page * PAGE_BLOCKS, PAGE_BLOCKS, false);
            self.discarded.set_range(page * PAGE_BLOCKS, PAGE_BLOCKS, false);
            self.touch(block);
            from = (page + 1) * PAGE_BLOCKS;
        }
        self.flush()?;
        match &self.source {
            OverlaySource::Temporary(_) => Ok(()),
            OverlaySource::Store(store) => store.drop_data(),
        }
    }

    #[cold]
    fn failed(&self, what: &str, e: std::io::Error) -> Error {
        let error = Error::from(e);
        let (file, hint) = match &self.source {
            OverlaySource::Temporary(_) => ("temporary file".into(), "set TMPDIR".into()),
            OverlaySource::Store(store) => {
                (format!("overlay {}", store.path().display()), "put it on another file system".to_string())
            }
        };
        let error = match error.errno() {
            // The disk is larger than the files that the file system takes.
            Errno::EFBIG => Error::new(Errno::ENOSPC, format!("it cannot grow that large there ({hint})")),
            _ => error,
        };
        error.context(format!("cannot {what} the {file}"))
    }

    fn state(&self, block: u64) -> State {
        // In this order: "discarded" is set before "changed" is.
        match (self.changed.get(block), self.discarded.get(block)) {
            (false, _) => State::Below,
            (true, false) => State::Stored,
            (true, true) => State::Discarded,
        }
    }

    /// The longest span of one state from `offset` on, at most `length` bytes, which must be on the disk.
    pub(super) fn span(&self, offset: u64, length: u64) -> Span {
        let block = offset / self.block_size;
        let blocks = (offset + length).div_ceil(self.block_size) - block;
        let (state, blocks) = match self.changed.run(block, blocks) {
            (false, blocks) => (State::Below, blocks),
            (true, blocks) => match self.discarded.run(block, blocks) {
                (false, blocks) => (State::Stored, blocks),
                (true, blocks) => (State::Discarded, blocks),
            },
        };
        let end = (block + blocks).saturating_mul(self.block_size).min(offset + length);
        Span { offset, length: end - offset, state }
    }

    /// The spans of a range, in order. Each is looked up when it is its turn.
    pub(super) fn spans(&self, offset: u64, length: u64) -> impl Iterator<Item = Span> {
        let end = offset + length;
        let mut at = offset;
        std::iter::from_fn(move || {
            let span = (at < end).then(|| self.span(at, end - at))?;
            at += span.length;
            Some(span)
        })
    }

    /// The parts of a range that lie in one block each.
    pub(super) fn blocks(&self, offset: u64, length: u64) -> impl Iterator<Item = (u64, u64)> {
        let end = offset + length;
        let mut at = offset;
        std::iter::from_fn(move || {
            let start = at;
            at = (at / self.block_size + 1).saturating_mul(self.block_size).min(end);
            (start < end).then(|| (start, at - start))
        })
    }

    /// The block at `offset`: its number and where it starts and ends. The last one may be short.
    fn block_at(&self, offset: u64) -> (u64, u64, u64) {
        let block = offset / self.block_size;
        let start = block * self.block_size;
        (block, start, start.saturating_add(self.block_size).min(self.size))
    }

    /// The part of a range that is whole blocks; empty, at the start of the range, when there is none.
    pub(super) fn whole_blocks(&self, offset: u64, length: u64) -> Range<u64> {
        let end = offset + length;
        let first = offset.next_multiple_of(self.block_size);
        let last = if end == self.size { end } else { end - end % self.block_size };
        if first < last { first..last } else { offset..offset }
    }

    fn lock(&self, block: u64) -> MutexGuard<'_, ()> {
        self.locks[block as usize % LOCKS].lock()
    }

    /// Reads a range of stored blocks.
    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.file().read_exact_at(buf, self.data_start + offset).map_err(|e| self.failed("read", e))
    }

    /// Reads a range of stored blocks, if they are in memory.
    pub(super) fn read_nowait(&self, buf: &mut [u8], offset: u64) -> Result<bool> {
        let length = buf.len();
        let target = &mut [std::io::IoSliceMut::new(buf)];
        match preadv2(self.file(), target, self.data_start + offset, ReadWriteFlags::NOWAIT) {
            Ok(n) => Ok(n == length),
            // A file system in memory need not know the question.
            Err(rustix::io::Errno::OPNOTSUPP) => self.read(buf, offset).map(|()| true),
            Err(rustix::io::Errno::AGAIN) => Ok(false),
            Err(e) => Err(self.failed("read", e.into())),
        }
    }

    pub(super) fn write(&self, patch: Patch<'_>, offset: u64) -> Result<()> {
        let write = |data: &[u8], at: u64| {
            self.file().write_all_at(data, self.data_start + at).map_err(|e| self.failed("write", e))
        };
        match patch {
            Patch::Data(data) => write(data, offset),
            Patch::Zeroes(length) => emulate::zero(length, offset, BlockSize::default(), write),
        }
    }

    /// Stores a patch that lies within one block. `read_below` reads what the disk below holds around it.
    pub(super) fn store(
        &self,
        patch: Patch<'_>,
        offset: u64,
        read_below: impl FnMut(&mut [u8], u64) -> Result<()>,
    ) -> Result<()> {
        let (block, ..) = self.block_at(offset);
        if self.state(block) != State::Stored {
            let _guard = self.lock(block);
            let state = self.state(block);
            if state != State::Stored {
                self.fill(patch, offset, state, read_below)?;
                // Whichever of the two makes it stored comes last.
                self.discarded.clear(block);
                self.changed.set(block);
                self.touch(block);
                return Ok(());
            }
        }
        self.write(patch, offset)
    }

    /// Writes the whole block around a patch.
    fn fill(
        &self,
        patch: Patch<'_>,
        offset: u64,
        state: State,
        mut read_below: impl FnMut(&mut [u8], u64) -> Result<()>,
    ) -> Result<()> {
        let (_, start, end) = self.block_at(offset);
        let patch_end = offset + patch.len();
        if (offset, patch_end) == (start, end) {
            return self.write(patch, offset);
        }
        let mut buf = vec![0; CHUNK.min(end - start) as usize];
        let mut at = start;
        while at < end {
            let chunk = &mut buf[..CHUNK.min(end - at) as usize];
            let chunk_end = at + chunk.len() as u64;
            // The patch's part of the chunk, as it lies in the chunk: empty when there is none.
            let from = offset.clamp(at, chunk_end);
            let to = patch_end.clamp(at, chunk_end);
            let (before, rest) = chunk.split_at_mut((from - at) as usize);
            let (middle, after) = rest.split_at_mut((to - from) as usize);
            for (part, part_at) in [(before, at), (after, to)] {
                match state {
                    _ if part.is_empty() => {}
                    State::Below => read_below(part, part_at)?,
                    _ => part.fill(0),
                }
            }
            if !middle.is_empty() {
                patch.part(from - offset, to - from).copy_to(middle);
            }
            self.write(Patch::Data(chunk), at)?;
            at = chunk_end;
        }
        Ok(())
    }

    /// Copies the block at `offset` into the file, unless it has changed.
    pub(super) fn copy_up(
        &self,
        offset: u64,
        read_below: impl FnMut(&mut [u8], u64) -> Result<()>,
    ) -> Result<()> {
        let (block, start, _) = self.block_at(offset);
        let _guard = self.lock(block);
        if self.state(block) == State::Below {
            self.fill(Patch::Zeroes(0), start, State::Below, read_below)?;
            self.discarded.clear(block);
            self.changed.set(block);
            self.touch(block);
        }
        Ok(())
    }

    /// Makes the whole block at `offset` read as zeroes and gives its space back.
    pub(super) fn discard(&self, offset: u64) {
        let (block, start, end) = self.block_at(offset);
        let _guard = self.lock(block);
        let before = self.state(block);
        self.discarded.set(block);
        self.changed.set(block);
        if before != State::Discarded {
            self.touch(block);
        }
        if before == State::Stored {
            // Space that cannot be given back is no error: the state says what the block reads as.
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let _ = fallocate(self.file(), flags, self.data_start + start, end - start);
        }
    }
}
