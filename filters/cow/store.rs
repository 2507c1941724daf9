//! A persistent overlay's file: opened by one process at a time, and made durable in an order that survives a crash
//! at any moment.
//!
//! Plain writes touch the data alone. A flush then 1. notes the states of the blocks that have changed theirs, 2. makes
//! all data durable, 3. writes the noted states into the older slots of their pages and 4. makes those durable. So a
//! block is never in the map before its data are, and what the last flush wrote stays readable until the next one is
//! complete. Flushes that arrive while one runs wait for one that starts after it, together.

use std::{
    collections::{BTreeSet, HashMap},
    ffi::OsStr,
    fs::File,
    io::{self, ErrorKind},
    os::unix::{
        ffi::OsStrExt as _,
        fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
};

use anyhow::{Context as _, anyhow, bail};
use nbdkit_common::Bitmap;
use nbdkit_core::{Errno, Error, Result};
use parking_lot::{Condvar, Mutex};
use rustix::{
    fs::{FlockOperation, OFlags, SeekFrom, flock, seek},
    io::Errno as Os,
};

use super::{
    base::Base,
    format::{HEADER, Header, LONGEST_NAME, PAGE_BLOCKS, Page, REMEDY, SLOT, Slot, base_slot_offset},
};

/// What a disk writes whole, in bytes.
const SECTOR: usize = 512;
/// Pages noted at a time: what a flush needs in memory.
const BATCH: usize = 1024;

/// How often, and after how long, a file that is in use is tried again: two seconds in all.
const IN_USE_WAITS: u32 = 40;
const IN_USE_WAIT: std::time::Duration = std::time::Duration::from_millis(50);

/// A file that this process alone has open as an overlay.
pub(super) struct Claimed {
    pub(super) file: File,
    pub(super) path: PathBuf,
    /// None: it is new and the first client tells what size the disk has.
    pub(super) header: Option<Box<Header>>,
    /// Made by us and still without a header: removed if nothing comes of it.
    created: bool,
    /// Made an overlay by us.
    made: bool,
}

impl Claimed {
    /// Opens an overlay, or makes an empty file when there is none and `create` is set.
    ///
    /// # Errors
    /// No overlay, damaged, in use; those of open(2). The message names the file.
    pub(super) fn open(path: &Path, create: bool) -> anyhow::Result<Self> {
        let shown = path.display();
        let mut waits = 0;
        loop {
            let (file, created) = open(path, create)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                // A server whose mount has gone may still be about to end.
                Err(Os::WOULDBLOCK) if waits < IN_USE_WAITS => {
                    waits += 1;
                    std::thread::sleep(IN_USE_WAIT);
                    continue;
                }
                Err(Os::WOULDBLOCK) => {
                    bail!("{shown} is in use by another process: end that first (fuser {shown} finds it)")
                }
                Err(e) => return Err(io::Error::from(e)).with_context(|| format!("cannot lock {shown}")),
            }
            // Somebody may have removed it between the open and the lock.
            if file.metadata().with_context(|| shown.to_string())?.nlink() > 0 {
                return Claimed::read(file, path, created);
            }
        }
    }

    /// The header of an overlay that others may have open.
    pub(super) fn peek(path: &Path) -> Option<Header> {
        let mut bytes = vec![0; HEADER as usize];
        // It may be anything, a pipe that nobody writes to for one.
        let flags = OFlags::NONBLOCK.bits().cast_signed();
        let file = File::options().read(true).custom_flags(flags).open(path).ok()?;
        file.read_exact_at(&mut bytes, 0).ok()?;
        Header::decode(&bytes).ok()
    }

    fn read(file: File, path: &Path, created: bool) -> anyhow::Result<Self> {
        let mut bytes = vec![0; HEADER as usize];
        let mut length = 0;
        while length < bytes.len() {
            match file.read_at(&mut bytes[length..], length as u64) {
                Ok(0) => break,
                Ok(n) => length += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e).with_context(|| format!("cannot read {}", path.display())),
            }
        }
        bytes.truncate(length);
        // A crash while it was made leaves nothing, or zeroes.
        let fresh = file.metadata()?.len() <= HEADER && bytes.iter().all(|b| *b == 0);
        let header = match fresh {
            true => None,
            false => {
                let header = Header::decode(&bytes).map_err(|why| anyhow!("{} {why}", path.display()))?;
                if header.full_length && file.metadata()?.len() < header.data_start {
                    bail!("{}", truncated(path));
                }
                Some(Box::new(header))
            }
        };
        Ok(Claimed { file, path: path.to_owned(), header, created, made: false })
    }

    /// Checks that the overlay is for an export and a disk of `size` bytes, or makes it so if it is new. Returns the header
    /// and a bitmap of the pages of the map.
    fn prepare(&mut self, export: &OsStr, size: u64, block_size: u64) -> Result<(Header, Bitmap)> {
        let refuse = |why: String| Error::new(Errno::EINVAL, why);
        let shown = self.path.display().to_string();
        let header = match &self.header {
            Some(header) => Header::clone(header),
            None => {
                let mut id = [0; 8];
                getrandom::fill(&mut id).map_err(|e| Error::new(Errno::EIO, e.to_string()))?;
                if export.len() > LONGEST_NAME {
                    return Err(refuse(format!(
                        "{shown}: the name of the export is too long to be kept in it"
                    )));
                }
                Header::new(export.as_bytes(), size, block_size, u64::from_ne_bytes(id))
                    .ok_or_else(|| refuse(format!("no file can hold an overlay of {size} bytes")))?
            }
        };
        if let Some(name) = header.export.as_deref().filter(|name| *name != export.as_bytes()) {
            return Err(wrong_export(&self.path, OsStr::from_bytes(name), export));
        }
        if header.size != size {
            return Err(wrong_size(&self.path, header.size, size));
        }
        let dirty = Bitmap::new(header.pages()).ok_or_else(|| {
            refuse(format!("an overlay of {size} bytes has too many blocks: give a larger cow-block-size"))
        })?;
        if self.header.is_none() {
            let header = self.initialize(header).map_err(|e| Error::from(e).context(shown))?;
            self.header = Some(Box::new(header.clone()));
            return Ok((header, dirty));
        }
        Ok((header, dirty))
    }

    /// Writes the header of a new overlay. It and its name are durable afterwards.
    fn initialize(&mut self, header: Header) -> io::Result<Header> {
        self.file.write_all_at(&header.encode(), 0)?;
        self.file.set_len(header.data_start)?;
        self.file.sync_all()?;
        // Only now: a crash before would leave a file that seems to be cut off.
        let header = header.with_full_length();
        self.file.write_all_at(&header.encode()[..SECTOR], 0)?;
        if let Some(directory) = self.path.parent() {
            File::open(directory)?.sync_all()?;
        }
        (self.created, self.made) = (false, true);
        Ok(header)
    }
}

impl Drop for Claimed {
    fn drop(&mut self) {
        if self.created {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// The error for a file that has lost its end.
fn truncated(path: &Path) -> String {
    format!("{} is truncated: a part of what it held is missing. {REMEDY}", path.display())
}

/// Opens the file for reading and writing, and tells whether it was made.
fn open(path: &Path, create: bool) -> anyhow::Result<(File, bool)> {
    let mut options = File::options();
    options.read(true).write(true).mode(0o600);
    let found = options.open(path);
    let (file, created) = match found {
        Err(e) if create && e.kind() == ErrorKind::NotFound => {
            match options.clone().create_new(true).open(path) {
                // Another process was faster.
                Err(e) if e.kind() == ErrorKind::AlreadyExists => (options.open(path), false),
                made => (made, true),
            }
        }
        found => (found, false),
    };
    let file = file.with_context(|| format!("cannot open the overlay {}", path.display()))?;
    if !file.metadata()?.is_file() {
        bail!("{} is not a regular file: give another file for the overlay", path.display());
    }
    Ok((file, created))
}

/// See the module.
pub(super) struct Store {
    claimed: Claimed,
    header: Header,
    /// Pages of the map whose blocks have changed state since they were written.
    dirty: Bitmap,
    rounds: Mutex<Rounds>,
    round_over: Condvar,
    /// The sequence number of each page that was written; used by the flush that runs.
    sequences: Mutex<HashMap<u64, u64>>,
    /// For tests: called before each fdatasync(2) of a flush.
    #[cfg(test)]
    pub(super) before_sync: Mutex<Option<Hook>>,
}

#[cfg(test)]
type Hook = Box<dyn FnMut(&File) + Send>;

/// The flushes: one runs at a time.
#[derive(Default)]
struct Rounds {
    started: u64,
    finished: u64,
    /// Why the last one failed.
    failed: Option<Errno>,
    /// Data were lost in a way that the map cannot tell: it must not go on.
    broken: bool,
}

impl Store {
    /// Takes an overlay for an export and a disk of `size` bytes, made with `block_size` if it is new.
    ///
    /// # Errors
    /// `EINVAL`: it was made for another export or size, or no file can be that large. Those of the file. What was claimed comes
    /// back with them.
    pub(super) fn new(
        mut claimed: Claimed,
        export: &OsStr,
        size: u64,
        block_size: u64,
    ) -> std::result::Result<Self, (Claimed, Error)> {
        match claimed.prepare(export, size, block_size) {
            Ok((header, dirty)) => Ok(Store {
                claimed,
                header,
                dirty,
                rounds: Mutex::default(),
                round_over: Condvar::new(),
                sequences: Mutex::default(),
                #[cfg(test)]
                before_sync: Mutex::default(),
            }),
            Err(e) => Err((claimed, e)),
        }
    }

    pub(super) fn header(&self) -> &Header {
        &self.header
    }

    /// The error for a disk of another size.
    pub(super) fn wrong_size(&self, size: u64) -> Error {
        wrong_size(self.path(), self.header.size, size)
    }

    pub(super) fn path(&self) -> &Path {
        &self.claimed.path
    }

    pub(super) fn file(&self) -> &File {
        &self.claimed.file
    }

    /// What it keeps of the base, and the number of the record. None: nothing yet, or it is damaged.
    ///
    /// # Errors
    /// Those of the file.
    fn base_record(&self) -> Result<Option<(u64, Base)>> {
        let mut bytes = [0; 2 * SLOT];
        self.read_slots(&mut bytes, base_slot_offset(0))?;
        Ok(Base::newest(&bytes, &self.header))
    }

    /// What it keeps of the base. None: nothing yet; or it is of a version that keeps nothing.
    ///
    /// # Errors
    /// Those of the file.
    pub(super) fn base(&self) -> Result<Option<Base>> {
        if !self.header.has_base() {
            return Ok(None);
        }
        Ok(self.base_record()?.map(|(_, base)| base))
    }

    /// Notes durably what the base is, if the version has a place for it. The caller sees to it that nobody else does.
    ///
    /// # Errors
    /// Those of the file.
    pub(super) fn set_base(&self, base: &Base) -> Result<()> {
        if !self.header.has_base() {
            return Ok(());
        }
        let sequence = self.base_record()?.map_or(0, |(sequence, _)| sequence.wrapping_add(1));
        let slot = base.encode(&self.header, sequence);
        let written = self.file().write_all_at(&slot, base_slot_offset(sequence));
        written.and_then(|()| self.file().sync_data()).map_err(|e| self.failed("write", e))
    }

    fn failed(&self, what: &str, e: impl Into<io::Error>) -> Error {
        Error::from(e.into()).context(format!("cannot {what} the overlay {}", self.path().display()))
    }

    /// Reads the map; gives each page in which something has changed to `each`.
    ///
    /// # Errors
    /// Those of the file; `EIO` when it is damaged.
    pub(super) fn load(&self, mut each: impl FnMut(u64, &Page)) -> Result<()> {
        let mut sequences = self.sequences.lock();
        let (mut bytes, mut damaged) = ([0; 2 * SLOT], 0);
        let length = self.file().metadata().map_err(|e| self.failed("read", e))?.len();
        let end = self.header.slot_offset(self.header.pages(), 0);
        let mut at = self.header.map_start();
        while let Some(page) = self.next_page(at, end)? {
            at = self.header.slot_offset(page + 1, 0);
            self.read_slots(&mut bytes, self.header.slot_offset(page, 0))?;
            match Slot::newest(&bytes, &self.header, page) {
                Some(Slot::Valid(sequence, contents)) => {
                    sequences.insert(page, sequence);
                    let last = contents.last_stored().map_or(0, |last| page * PAGE_BLOCKS + last + 1);
                    let data_end = last.saturating_mul(self.header.block_size).min(self.header.size);
                    if last > 0 && length < self.header.data_start + data_end {
                        return Err(Error::new(Errno::EIO, truncated(self.path())));
                    }
                    each(page, &contents);
                }
                Some(_) => {}
                None => {
                    let shown = self.path().display();
                    return Err(Error::new(
                        Errno::EIO,
                        format!(
                            "{shown} is damaged: page {page} of its block map has no copy that can be read. {REMEDY}"
                        ),
                    ));
                }
            }
            if Slot::has_damage(&bytes, &self.header, page) {
                damaged += 1;
            }
        }
        if damaged > 0 {
            log::warn!(
                "cow: {}: the newer of the two copies of {damaged} page(s) of the block map cannot be read, and the older \
                 is used. That is as it should be after a crash in the middle of a flush; otherwise the file was damaged, \
                 and changes may be missing",
                self.path().display()
            );
        }
        Ok(())
    }

    /// The page of the first data from `at` on. Holes in the map are passed over.
    fn next_page(&self, at: u64, end: u64) -> Result<Option<u64>> {
        let found = match seek(self.file(), SeekFrom::Data(at)) {
            Ok(found) => found,
            Err(Os::NXIO) => return Ok(None),
            // Some file systems do not know.
            Err(Os::INVAL) => at,
            Err(e) => return Err(self.failed("read", e)),
        };
        Ok((found < end).then(|| (found.max(at) - self.header.map_start()) / (2 * SLOT as u64)))
    }

    /// Reads a page's slots; what is past the end of the file is zero.
    fn read_slots(&self, bytes: &mut [u8], offset: u64) -> Result<()> {
        bytes.fill(0);
        let mut done = 0;
        while done < bytes.len() {
            match self.file().read_at(&mut bytes[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(self.failed("read", e)),
            }
        }
        Ok(())
    }

    /// Notes that a block's state has changed.
    pub(super) fn touch(&self, block: u64) {
        self.dirty.set(block / PAGE_BLOCKS);
    }

    /// Whether there are states that only memory has.
    pub(super) fn is_dirty(&self) -> bool {
        self.dirty.next_set(0).is_some()
    }

    /// Makes all that was written before durable. `states` tells the states of a page's blocks.
    ///
    /// # Errors
    /// Those of the file. After a failed fdatasync(2) nobody knows what is lost, so all later flushes fail too.
    pub(super) fn flush(&self, states: impl Fn(u64) -> Page) -> Result<()> {
        let mut rounds = self.rounds.lock();
        // A round that runs already may have noted the states before our caller's writes.
        let wanted = rounds.started + 1;
        while rounds.finished < wanted {
            if rounds.started > rounds.finished {
                self.round_over.wait(&mut rounds);
                continue;
            }
            rounds.started += 1;
            let broken = rounds.broken;
            drop(rounds);
            let result = if broken { Err(Failure::Lost(Errno::EIO)) } else { self.round(&states) };
            rounds = self.rounds.lock();
            rounds.finished = rounds.started;
            (rounds.failed, rounds.broken) = match result {
                Ok(()) => (None, false),
                Err(Failure::Retry(errno)) => (Some(errno), false),
                Err(Failure::Lost(errno)) => (Some(errno), true),
            };
            self.round_over.notify_all();
        }
        match rounds.failed {
            None => Ok(()),
            Some(errno) => Err(self.failed("flush", io::Error::from_raw_os_error(errno as i32))),
        }
    }

    fn round(&self, states: &impl Fn(u64) -> Page) -> std::result::Result<(), Failure> {
        let mut sequences = self.sequences.lock();
        // Each once: a page that is noted again goes into the same slot again.
        let mut written = BTreeSet::new();
        let result = loop {
            let pages = self.take_dirty();
            // In this order: the states are noted before the data are made durable.
            let noted: Vec<_> = pages.iter().map(|page| (*page, states(*page))).collect();
            written.extend(&pages);
            if let Err(e) = self.sync() {
                break Err(Failure::lost(&e));
            }
            let result = noted.iter().try_for_each(|(page, contents)| {
                let sequence = sequences.get(page).map_or(1, |last| last.wrapping_add(1));
                let slot = contents.encode(&self.header, *page, sequence);
                self.file().write_all_at(&slot, self.header.slot_offset(*page, sequence))
            });
            if let Err(e) = result {
                break Err(Failure::Retry(errno(&e)));
            }
            if noted.len() < BATCH {
                break Ok(());
            }
        };
        let result = result.and_then(|()| {
            if written.is_empty() { Ok(()) } else { self.sync().map_err(|e| Failure::lost(&e)) }
        });
        for page in written {
            match result {
                Ok(()) => {
                    let sequence = sequences.entry(page).or_insert(0);
                    *sequence = sequence.wrapping_add(1);
                }
                Err(_) => {
                    self.dirty.set(page);
                }
            }
        }
        result
    }

    fn sync(&self) -> io::Result<()> {
        #[cfg(test)]
        if let Some(hook) = &mut *self.before_sync.lock() {
            hook(self.file());
        }
        self.file().sync_data()
    }

    /// The first dirty pages, which are clean from here on.
    fn take_dirty(&self) -> Vec<u64> {
        let mut pages = Vec::new();
        let mut from = 0;
        while let Some(page) = self.dirty.next_set(from).filter(|_| pages.len() < BATCH) {
            self.dirty.clear(page);
            pages.push(page);
            from = page + 1;
        }
        pages
    }

    /// Gives back the space of all data. The map says, and durably so, that there are none.
    ///
    /// # Errors
    /// Those of the file.
    pub(super) fn drop_data(&self) -> Result<()> {
        // Never the map: its newer slots must not go before the older ones do.
        let result = self.file().set_len(self.header.data_start).and_then(|()| self.file().sync_all());
        result.map_err(|e| self.failed("shrink", e))
    }

    /// Removes the file's name if the overlay was made by this process, in which nothing has changed.
    pub(super) fn remove_if_made(&self) {
        if self.claimed.made
            && let Err(e) = Self::remove(&self.claimed)
        {
            log::debug!("cow: {e:#}");
        }
    }

    /// Removes the file's name.
    ///
    /// # Errors
    /// Those of unlink(2).
    pub(super) fn remove(claimed: &Claimed) -> anyhow::Result<()> {
        let path = &claimed.path;
        std::fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()))
    }
}

/// Why a round failed.
enum Failure {
    /// The map could not be written, for lack of space perhaps. What it said before still holds.
    Retry(Errno),
    /// The kernel could not write what it had taken, and has forgotten it.
    Lost(Errno),
}

impl Failure {
    fn lost(e: &io::Error) -> Self {
        Failure::Lost(errno(e))
    }
}

fn errno(e: &io::Error) -> Errno {
    e.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

/// The error for another export than the one whose changes are in the file.
pub(super) fn wrong_export(path: &Path, made_for: &OsStr, export: &OsStr) -> Error {
    Error::new(
        Errno::EINVAL,
        format!(
            "{} holds the changes of export '{}' alone, not those of '{}': give cow-file= a directory to keep those of several",
            path.display(),
            made_for.display(),
            export.display()
        ),
    )
}

fn wrong_size(path: &Path, made_for: u64, size: u64) -> Error {
    let shown = path.display();
    Error::new(
        Errno::EINVAL,
        format!(
            "{shown} belongs to a disk of {made_for} bytes, but this one has {size}: give the disk that it was made for, \
             or another cow-file"
        ),
    )
}
