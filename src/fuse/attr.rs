//! What stat(2) shows: owner, permissions, times, and the space that is allocated.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant, SystemTime},
};

use fuser::{FileAttr, FileType, INodeNo};
use nbdkit_core::{Flags, Session};
use parking_lot::Mutex;

use crate::{options::Options, tree::Node};

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

/// Attributes of the file and of the directory above it.
#[derive(Debug)]
pub(crate) struct Attributes {
    uid: u32,
    gid: u32,
    file_mode: u16,
    directory_mode: u16,
    mounted: SystemTime,
    /// Last change of the data, in nanoseconds after `mounted`.
    modified: AtomicU64,
    /// Bytes that are not holes, valid unless `changed`.
    allocated: Mutex<u64>,
    changed: AtomicBool,
    /// The chain takes long to tell: it is not asked again.
    slow: AtomicBool,
}

impl Attributes {
    /// Attributes as the options want them; the owner is the server's unless they name another.
    pub(crate) fn new(options: &Options, writable: bool) -> Self {
        let mask = if writable { !options.umask } else { !options.umask & 0o555 };
        Attributes {
            uid: options.uid.unwrap_or(rustix::process::geteuid().as_raw()),
            gid: options.gid.unwrap_or(rustix::process::getegid().as_raw()),
            file_mode: 0o666 & mask,
            directory_mode: 0o777 & mask,
            mounted: SystemTime::now(),
            modified: AtomicU64::new(0),
            allocated: Mutex::new(0),
            changed: AtomicBool::new(true),
            slow: AtomicBool::new(false),
        }
    }

    /// Notes that data was changed.
    pub(crate) fn touch(&self) {
        let elapsed = self.mounted.elapsed().unwrap_or_default().as_nanos();
        self.modified.store(u64::try_from(elapsed).unwrap_or(u64::MAX), Ordering::Relaxed);
        self.changed.store(true, Ordering::Release);
    }

    /// Whether [`get`](Self::get) has to ask the chain for extents.
    pub(crate) fn asks_chain(&self, node: Node, session: &Session) -> bool {
        node == Node::File
            && session.caps().extents
            && !self.slow.load(Ordering::Relaxed)
            && (self.changed.load(Ordering::Relaxed) || self.allocated.is_locked())
    }

    /// The attributes of a node.
    pub(crate) fn get(&self, node: Node, ino: INodeNo, session: &Session) -> FileAttr {
        let modified = self.mounted + Duration::from_nanos(self.modified.load(Ordering::Relaxed));
        let (kind, perm, nlink, size, bytes) = match node {
            Node::Directory => (FileType::Directory, self.directory_mode, 2, 0, 0),
            Node::File => (FileType::RegularFile, self.file_mode, 1, session.size(), self.allocated(session)),
        };
        FileAttr {
            ino,
            size,
            blocks: bytes.div_ceil(SECTOR),
            atime: modified,
            mtime: modified,
            ctime: modified,
            crtime: self.mounted,
            kind,
            perm,
            nlink,
            uid: self.uid,
            gid: self.gid,
            rdev: 0,
            blksize: BLOCK,
            flags: 0,
        }
    }

    /// Bytes that are not holes. Never too few: tar takes a file without any for an empty one.
    fn allocated(&self, session: &Session) -> u64 {
        if !session.caps().extents || self.slow.load(Ordering::Relaxed) {
            return session.size();
        }
        let mut allocated = self.allocated.lock();
        if self.changed.swap(false, Ordering::Acquire) {
            let started = Instant::now();
            *allocated = count(session, started + PATIENCE);
            self.slow.store(started.elapsed() > 5 * PATIENCE, Ordering::Relaxed);
        }
        *allocated
    }
}

/// Adds up the extents that are no holes, until `deadline`.
fn count(session: &Session, deadline: Instant) -> u64 {
    let size = session.size();
    let (mut at, mut holes) = (0, 0);
    for _ in 0..EXTENTS {
        if at >= size || Instant::now() > deadline {
            break;
        }
        let Ok(extents) = session.extents(size - at, at, Flags::REQ_ONE) else { break };
        let Some(extent) = extents.first() else { break };
        if extent.hole && extent.zero {
            holes += extent.length;
        }
        at = extent.end();
    }
    size - holes
}
