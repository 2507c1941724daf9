//! What stat(2) shows: owner, permissions, times, and the space that is allocated.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant, SystemTime},
};

use fuser::{FileAttr, FileType, INodeNo};
use nbdkit_core::{Flags, Op, Session};

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
const PATIENCE: Duration = Duration::from_millis(20);

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
    /// Bytes allocated, valid unless `changed`.
    allocated: AtomicU64,
    changed: AtomicBool,
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
            allocated: AtomicU64::new(0),
            changed: AtomicBool::new(true),
        }
    }

    /// Notes that data was changed.
    pub(crate) fn touch(&self) {
        let elapsed = self.mounted.elapsed().unwrap_or_default().as_nanos();
        self.modified.store(u64::try_from(elapsed).unwrap_or(u64::MAX), Ordering::Relaxed);
        self.changed.store(true, Ordering::Release);
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

    /// Bytes that are not holes. Never waits: a chain that would have to counts as full.
    fn allocated(&self, session: &Session) -> u64 {
        if !session.caps().extents || session.may_block(Op::Extents) {
            return session.size();
        }
        if self.changed.swap(false, Ordering::Acquire) {
            self.allocated.store(count(session), Ordering::Relaxed);
        }
        self.allocated.load(Ordering::Relaxed)
    }
}

/// Adds up the extents that are no holes.
fn count(session: &Session) -> u64 {
    let (size, started) = (session.size(), Instant::now());
    let (mut at, mut holes) = (0, 0);
    for _ in 0..EXTENTS {
        if at >= size || started.elapsed() > PATIENCE {
            break;
        }
        let Ok(extents) = session.extents(size - at, at, Flags::REQ_ONE) else { break };
        let Some(extent) = extents.first() else { break };
        if extent.hole {
            holes += extent.length;
        }
        at = extent.end();
    }
    size - holes
}
