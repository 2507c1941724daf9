//! A file or block device that holds data of a disk, addressed by range.

use std::{
    fs::File,
    io::{self, IoSliceMut},
    num::NonZeroU64,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::{FileExt, FileTypeExt},
    },
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use nbdkit_core::{Errno, Error, Extents, Flags, Result};
use rustix::{
    fs::{Advice, CWD, FileType},
    io::{Errno as Os, ReadWriteFlags},
};

use crate::{
    holes,
    open_disk::{self, NoDisk, Reach},
};

/// Opened data, its length as it was then.
pub(crate) struct BlockFile {
    name: String,
    file: File,
    length: u64,
    writable: bool,
    kind: Kind,
    holes_known: bool,
    /// To ask for holes is quick.
    near: bool,
    /// The file system has answered that it does not know `RWF_NOWAIT`, as tmpfs does.
    never_waits: AtomicBool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    File,
    BlockDevice,
}

impl BlockFile {
    /// Opens a regular file or block device; for reading only when `readonly` is set or writing is not allowed.
    ///
    /// # Errors
    /// Those of the system, with the path; `EINVAL` for other kinds of files.
    pub(crate) fn open(path: &Path, readonly: bool) -> Result<Self> {
        let fail = |e: io::Error| Error::from(e).context(path.display());
        Self::kind(path)?;
        let open = |write| open_disk::open(CWD, path, write, Reach::Anywhere).map_err(NoDisk::into_io);
        let ((mut file, found), writable) = match open(!readonly) {
            Ok(opened) => (opened, !readonly),
            Err(e) if !readonly && is_refusal(&e) => (open(false).map_err(fail)?, false),
            Err(e) => return Err(fail(e)),
        };
        let kind = if found == FileType::BlockDevice { Kind::BlockDevice } else { Kind::File };
        // The length of a block device is where its end is.
        let length = io::Seek::seek(&mut file, io::SeekFrom::End(0)).map_err(fail)?;
        let name = path.display().to_string();
        let (holes_known, near) = (holes::are_known(&file), holes::are_near(&file));
        let never_waits = AtomicBool::new(false);
        Ok(BlockFile { name, file, length, writable, kind, holes_known, near, never_waits })
    }

    /// Checks that a path can be opened as far as that is possible without opening it.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub(crate) fn check(path: &Path) -> Result<()> {
        Self::kind(path).map(drop)
    }

    /// The kind is asked before the open, which would wait at a FIFO.
    fn kind(path: &Path) -> Result<Kind> {
        let refuse = |errno, what: &str| Err(Error::new(errno, format!("{}: {what}", path.display())));
        let metadata = match path.metadata() {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return refuse(
                    Errno::ENOENT,
                    "No such file or directory: create it first, or correct the name",
                );
            }
            metadata => metadata.map_err(|e| Error::from(e).context(path.display()))?,
        };
        match metadata.file_type() {
            kind if kind.is_file() => Ok(Kind::File),
            kind if kind.is_block_device() => Ok(Kind::BlockDevice),
            kind if kind.is_dir() => refuse(Errno::EISDIR, "is a directory: give a file or block device"),
            _ => refuse(Errno::EINVAL, "is neither a regular file nor a block device"),
        }
    }

    /// The file.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Length in bytes when it was opened.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    pub(crate) fn is_writable(&self) -> bool {
        self.writable
    }

    /// Whether to ask for holes is quick.
    pub(crate) fn is_near(&self) -> bool {
        self.near
    }

    /// Whether zeroing is a change of metadata, if it works at all.
    pub(crate) fn zeroes_fast(&self) -> bool {
        self.kind != Kind::BlockDevice
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn fail(&self, e: impl Into<io::Error>) -> Error {
        match e.into() {
            e if e.kind() == io::ErrorKind::UnexpectedEof => {
                Error::new(Errno::EIO, format!("{}: the file is shorter than when it was opened", self.name))
            }
            e => Error::from(e).context(&self.name),
        }
    }

    pub(crate) fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_exact_at(buf, offset).map_err(|e| self.fail(e))
    }

    /// Reads what is in memory; false: not all of it is.
    pub(crate) fn read_nowait(&self, buf: &mut [u8], offset: u64) -> Result<bool> {
        if !self.never_waits.load(Ordering::Relaxed) {
            let target = &mut [IoSliceMut::new(buf)];
            match rustix::io::preadv2(&self.file, target, offset, ReadWriteFlags::NOWAIT) {
                Ok(n) => return Ok(n == buf.len()),
                Err(Os::AGAIN | Os::INTR) => return Ok(false),
                Err(Os::OPNOTSUPP) => self.never_waits.store(true, Ordering::Relaxed),
                Err(e) => return Err(self.fail(e)),
            }
        }
        self.read(buf, offset).map(|()| true)
    }

    pub(crate) fn write(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.file.write_all_at(buf, offset).map_err(|e| self.fail(e))
    }

    /// Makes what was written durable.
    pub(crate) fn sync(&self) -> Result<()> {
        if !self.writable {
            return Ok(());
        }
        self.file.sync_data().map_err(|e| self.fail(e))
    }

    /// Gives the space of a range back, where that is possible.
    pub(crate) fn discard(&self, length: u64, offset: u64) -> Result<()> {
        match self.punch(length, offset) {
            Err(e) if e.is_unsupported() => Ok(()),
            done => done,
        }
    }

    /// Makes a range read as zeroes without writing them.
    ///
    /// # Errors
    /// Those of the system; `EOPNOTSUPP` when it has no such call for this file.
    pub(crate) fn zero(&self, length: u64, offset: u64, may_trim: bool) -> Result<()> {
        if may_trim {
            match self.punch(length, offset) {
                Err(e) if e.is_unsupported() => {}
                done => return done,
            }
        }
        holes::zero_range(&self.file, offset, length).map_err(|e| self.fail_to_allocate(e))
    }

    fn punch(&self, length: u64, offset: u64) -> Result<()> {
        holes::punch(&self.file, offset, length).map_err(|e| self.fail_to_allocate(e))
    }

    fn fail_to_allocate(&self, e: Os) -> Error {
        // A block device refuses ranges that are not whole sectors: writing copes with those.
        if holes::is_unsupported(e) || (e == Os::INVAL && self.kind == Kind::BlockDevice) {
            return Errno::EOPNOTSUPP.into();
        }
        self.fail(e)
    }

    /// Asks the system to read ahead.
    pub(crate) fn advise_will_need(&self, length: u64, offset: u64) -> Result<()> {
        match rustix::fs::fadvise(&self.file, offset, NonZeroU64::new(length), Advice::WillNeed) {
            Ok(()) | Err(Os::INVAL | Os::NOSYS | Os::OPNOTSUPP) => Ok(()),
            Err(e) => Err(self.fail(e)),
        }
    }

    /// Adds the extents of `offset..offset+length`, or of its start, to an answer in which the range starts at `at`.
    /// Flags: REQ_ONE.
    pub(crate) fn extents(
        &self,
        length: u64,
        offset: u64,
        flags: Flags,
        at: u64,
        extents: &mut Extents,
    ) -> Result<()> {
        if !self.holes_known {
            return extents.add_data(at, length);
        }
        let end = offset + length;
        let mut found = Extents::new(offset, end);
        holes::find(&self.file, end, flags, &mut found)?;
        for extent in found.as_slice() {
            extents.add(at + (extent.offset - offset), extent.length, extent.hole, extent.zero)?;
        }
        Ok(())
    }
}

/// Whether reading may still be allowed.
fn is_refusal(e: &io::Error) -> bool {
    let refusals = [Os::ACCESS, Os::PERM, Os::ROFS, Os::TXTBSY];
    refusals.iter().any(|refusal| e.raw_os_error() == Some(refusal.raw_os_error()))
}
