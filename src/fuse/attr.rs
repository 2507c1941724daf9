//! What stat(2) shows: owner, permissions, times, and the space that is allocated.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant, SystemTime},
};

use fuser::{FileAttr, FileType, INodeNo};
use nbdkit_core::{Session, sync::Mutex};

use crate::{export_file::first_extent, options::Options, tree::BY_NAME};

/// How long the kernel may keep attributes and names: the size never changes, and the kernel itself asks again after
/// it has written.
pub(crate) const TTL: Duration = Duration::from_secs(365 * 24 * 3600);

/// Preferred size of I/O in bytes: the page, as with a block device.
const BLOCK: u32 = 4096;
/// Unit of the allocated space, in bytes (stat(2)).
const SECTOR: u64 = 512;

/// Allocated space is asked for in at most this many requests …
const EXTENTS: usize = 256;
/// … and for this long; what is not known then counts as allocated.
const PATIENCE: Duration = Duration::from_millis(200);

/// What all files of a mount have in common.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Owner {
    uid: u32,
    gid: u32,
    umask: u16,
    /// The kernel keeps what is written until it wants to write it.
    writeback: bool,
    mounted: SystemTime,
}

impl Owner {
    /// As the options want it; the owner is the server's unless they name another.
    pub(crate) fn new(options: &Options, writeback: bool) -> Self {
        Owner {
            uid: options.uid.unwrap_or(rustix::process::geteuid().as_raw()),
            gid: options.gid.unwrap_or(rustix::process::getegid().as_raw()),
            umask: options.umask,
            writeback,
            mounted: SystemTime::now(),
        }
    }

    /// Attributes of the directory.
    pub(crate) fn directory(&self, writable: bool) -> FileAttr {
        let perm = !self.umask & if writable { 0o777 } else { 0o555 };
        self.attr(INodeNo::ROOT, FileType::Directory, perm, self.mounted, (0, 0))
    }

    /// Attributes of the directory of links.
    pub(crate) fn links(&self) -> FileAttr {
        self.attr(BY_NAME, FileType::Directory, !self.umask & 0o555, self.mounted, (0, 0))
    }

    /// Attributes of a link with a target of that many bytes.
    pub(crate) fn link(&self, ino: INodeNo, length: usize) -> FileAttr {
        self.attr(ino, FileType::Symlink, 0o777, self.mounted, (length as u64, 0))
    }

    fn attr(
        &self,
        ino: INodeNo,
        kind: FileType,
        perm: u16,
        time: SystemTime,
        (size, bytes): (u64, u64),
    ) -> FileAttr {
        FileAttr {
            ino,
            size,
            blocks: bytes.div_ceil(SECTOR),
            atime: time,
            mtime: time,
            ctime: time,
            crtime: self.mounted,
            kind,
            perm,
            nlink: if kind == FileType::Directory { 2 } else { 1 },
            uid: self.uid,
            gid: self.gid,
            rdev: 0,
            blksize: BLOCK,
            flags: 0,
        }
    }
}

/// Attributes of one file, which shows `length` bytes from `start` on.
#[derive(Debug)]
pub(crate) struct Attributes {
    owner: Owner,
    perm: u16,
    start: u64,
    length: u64,
    /// Last change of the data, in nanoseconds after the mount.
    modified: AtomicU64,
    /// Bytes that are not holes, valid unless `changed`.
    allocated: Mutex<u64>,
    changed: AtomicBool,
    /// The chain takes long to tell: it is not asked again.
    slow: AtomicBool,
}

impl Attributes {
    pub(crate) fn new(owner: Owner, writable: bool, start: u64, length: u64) -> Self {
        Attributes {
            owner,
            perm: !owner.umask & if writable { 0o666 } else { 0o444 },
            start,
            length,
            modified: AtomicU64::new(0),
            allocated: Mutex::new(0),
            changed: AtomicBool::new(true),
            slow: AtomicBool::new(false),
        }
    }

    /// Notes that data was changed.
    pub(crate) fn touch(&self) {
        let elapsed = self.owner.mounted.elapsed().unwrap_or_default().as_nanos();
        self.modified.store(u64::try_from(elapsed).unwrap_or(u64::MAX), Ordering::Relaxed);
        self.changed.store(true, Ordering::Release);
    }

    /// The attributes. None: the chain has to be asked, and this may not wait for it.
    /// `kept`: the kernel may have data that the chain does not have yet.
    pub(crate) fn get(
        &self,
        ino: INodeNo,
        session: &Session,
        kept: bool,
        may_wait: bool,
    ) -> Option<FileAttr> {
        let modified = self.owner.mounted + Duration::from_nanos(self.modified.load(Ordering::Relaxed));
        let allocated = match kept {
            true if self.owner.writeback => self.length,
            // Only what is stored through mappings is kept then: tar takes a file without any space for an empty one.
            true => self.allocated(session, may_wait)?.max(u64::from(BLOCK).min(self.length)),
            false => self.allocated(session, may_wait)?,
        };
        let sizes = (self.length, allocated);
        Some(self.owner.attr(ino, FileType::RegularFile, self.perm, modified, sizes))
    }

    /// Bytes that are not holes. Never too few: tar takes a file without any for an empty one.
    fn allocated(&self, session: &Session, may_wait: bool) -> Option<u64> {
        if !session.caps().extents || self.slow.load(Ordering::Relaxed) {
            return Some(self.length);
        }
        let mut allocated = if may_wait { self.allocated.lock() } else { self.allocated.try_lock()? };
        if self.changed.swap(false, Ordering::Acquire) {
            let started = Instant::now();
            match self.count(session, started + PATIENCE, may_wait) {
                Some(count) => *allocated = count,
                None => {
                    self.changed.store(true, Ordering::Relaxed);
                    return None;
                }
            }
            self.slow.store(started.elapsed() > 5 * PATIENCE, Ordering::Relaxed);
        }
        Some(*allocated)
    }

    /// Adds up the extents that are no holes, until `deadline`.
    fn count(&self, session: &Session, deadline: Instant, may_wait: bool) -> Option<u64> {
        let end = self.start + self.length;
        let (mut at, mut holes) = (self.start, 0);
        for _ in 0..EXTENTS {
            if at >= end || Instant::now() > deadline {
                break;
            }
            let Ok(extent) = first_extent(session, at..end, may_wait)? else { break };
            if extent.hole && extent.zero {
                holes += extent.length;
            }
            at = extent.end();
        }
        Some(self.length - holes)
    }
}
