//! The file system as the kernel sees it: each request is checked against the tree, run or handed to the pool, and
//! answered.

use std::{ffi::OsStr, io, path::Path, sync::Arc, time::SystemTime};

use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType, Filesystem,
    FopenFlags, Generation, INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags,
    PollEvents, PollFlags, PollNotifier, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite,
    ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use log::debug;
use nbdkit_core::Op;
use rustix::fs::OFlags;

use crate::{
    attr::TTL,
    buffer,
    door::{Door, is_synchronous},
    passthrough::Passthrough,
    pool::Pool,
    stats,
    tree::{NAME_MAX, Node},
};

/// Largest write, and with it the largest read, in bytes: what the kernel sends at most by default.
const MAX_WRITE: u32 = 1 << 20;
/// Requests of read-ahead and of asynchronous direct I/O that the kernel has under way at most.
const MAX_BACKGROUND: u16 = 128;

/// Kernel features asked for, each where the kernel has it. `FUSE_OVER_IO_URING` must never be among them: fuser does
/// not serve its queues.
const FEATURES: [InitFlags; 3] =
    [InitFlags::FUSE_ASYNC_DIO, InitFlags::FUSE_PARALLEL_DIROPS, InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP];

/// See the module.
pub(crate) struct Fs {
    door: Arc<Door>,
    passthrough: Passthrough,
    /// None: all requests run on the one thread that receives them.
    pool: Option<Pool>,
}

impl Fs {
    pub(crate) fn new(door: Arc<Door>, passthrough: Passthrough, pool: Option<Pool>) -> Self {
        Fs { door, passthrough, pool }
    }

    /// The pool, when a request of this kind may have to wait.
    fn pool_for(&self, op: Op) -> Option<&Pool> {
        self.pool.as_ref().filter(|_| self.door.session.may_block(op))
    }

    fn is_file(&self, ino: INodeNo) -> Result<(), Errno> {
        match self.door.tree.node(ino) {
            Some(Node::File) => Ok(()),
            Some(Node::Directory) => Err(Errno::EISDIR),
            None => Err(Errno::ENOENT),
        }
    }

    /// Why the tree cannot be changed.
    fn fixed(&self) -> Errno {
        if self.door.session.caps().write { Errno::EPERM } else { Errno::EROFS }
    }

    /// Gives the attributes of a node to `then`, which may be called on another thread.
    fn with_attributes(&self, node: Node, ino: INodeNo, then: impl FnOnce(&FileAttr) + Send + 'static) {
        let door = &self.door;
        match self.pool_for(Op::Extents) {
            Some(pool) if door.attributes.asks_chain(node, &door.session) => {
                let door = door.clone();
                pool.run(move || then(&door.attributes.get(node, ino, &door.session)));
            }
            _ => then(&door.attributes.get(node, ino, &door.session)),
        }
    }

    fn reply_attr(&self, ino: INodeNo, reply: ReplyAttr) {
        match self.door.tree.node(ino) {
            Some(node) => self.with_attributes(node, ino, move |attr| reply.attr(&TTL, attr)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn flush_to(&self, reply: ReplyEmpty) {
        let Some(pool) = self.pool_for(Op::Flush) else { return done(reply, self.door.flush()) };
        let door = self.door.clone();
        pool.run(move || done(reply, door.flush()));
    }
}

fn done(reply: ReplyEmpty, result: Result<(), Errno>) {
    match result {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(e),
    }
}

fn read_to(reply: ReplyData, door: &Door, offset: u64, length: usize) {
    buffer::with(length, |buffer| match door.read(buffer, offset) {
        Ok(()) => reply.data(buffer),
        Err(e) => reply.error(e),
    });
}

fn write_to(reply: ReplyWrite, door: &Door, data: &[u8], offset: u64, synchronous: bool) {
    match door.write(data, offset, synchronous) {
        Ok(()) => reply.written(data.len() as u32),
        Err(e) => reply.error(e),
    }
}

impl Filesystem for Fs {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        for feature in FEATURES {
            if config.add_capabilities(feature).is_err() {
                debug!("the kernel lacks {feature:?}");
            }
        }
        self.passthrough.negotiate(config);
        // Each of these only fails with the nearest value that would not, and these values are legal.
        let _ = config.set_max_write(MAX_WRITE);
        let _ = config.set_max_background(MAX_BACKGROUND);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let tree = &self.door.tree;
        if !tree.is_file(parent, name) {
            return reply.error(Errno::ENOENT);
        }
        self.with_attributes(Node::File, tree.file(), move |attr| reply.entry(&TTL, attr, Generation(0)));
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        self.reply_attr(ino, reply);
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        if mode.is_some() || uid.is_some() || gid.is_some() {
            return reply.error(self.fixed());
        }
        // An open with O_TRUNC arrives as size 0 without a file handle. A disk ignores it, so that copying an image
        // onto the file works; any other change of the size is refused.
        let truncating_open = size == Some(0) && fh.is_none();
        if size.is_some_and(|size| size != self.door.session.size()) && !truncating_open {
            return reply.error(self.fixed());
        }
        // Times are taken without complaint and not kept: copying tools set them and would report a failure.
        self.reply_attr(ino, reply);
    }

    fn open(&self, _req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if let Err(e) = self.is_file(ino) {
            return reply.error(e);
        }
        if flags.acc_mode() != OpenAccMode::O_RDONLY && !self.door.session.caps().write {
            return reply.error(Errno::EROFS);
        }
        let Err(reply) = self.passthrough.open(&self.door.session, reply) else { return };
        let cache = if flags.0 as u32 & OFlags::DIRECT.bits() != 0 {
            FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
        } else {
            FopenFlags::FOPEN_KEEP_CACHE
        };
        reply.opened(FileHandle(0), cache);
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        if let Err(e) = self.is_file(ino) {
            return reply.error(e);
        }
        let length = self.door.room(offset, size as usize);
        if length == 0 {
            return reply.data(&[]);
        }
        let Some(pool) = &self.pool else { return read_to(reply, &self.door, offset, length) };
        let reply = buffer::with(length, |buffer| match self.door.read_nowait(buffer, offset) {
            Ok(true) => {
                reply.data(buffer);
                None
            }
            Ok(false) => Some(reply),
            Err(e) => {
                reply.error(e);
                None
            }
        });
        if let Some(reply) = reply {
            let door = self.door.clone();
            pool.run(move || read_to(reply, &door, offset, length));
        }
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        if let Err(e) = self.is_file(ino) {
            return reply.error(e);
        }
        let data = &data[..self.door.room(offset, data.len())];
        if data.is_empty() {
            return reply.error(Errno::ENOSPC);
        }
        let synchronous = is_synchronous(flags.0);
        match &self.pool {
            Some(pool) if self.door.write_may_block(synchronous) => {
                let (door, data) = (self.door.clone(), data.to_vec());
                pool.run(move || write_to(reply, &door, &data, offset, synchronous));
            }
            _ => write_to(reply, &self.door, data, offset, synchronous),
        }
    }

    fn flush(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        // Not a flush of the disk but the close of a file. The kernel then stops asking.
        reply.error(Errno::ENOSYS);
    }

    fn fsync(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.flush_to(reply);
    }

    fn fsyncdir(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.flush_to(reply);
    }

    fn fallocate(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let plan = self.is_file(ino).and_then(|()| self.door.plan_fallocate(offset, length, mode));
        match (plan, self.pool_for(Op::Zero)) {
            (Err(e), _) => reply.error(e),
            (Ok(None), _) => reply.ok(),
            (Ok(Some((length, flags))), None) => done(reply, self.door.zero(length, offset, flags)),
            (Ok(Some((length, flags))), Some(pool)) => {
                let door = self.door.clone();
                pool.run(move || done(reply, door.zero(length, offset, flags)));
            }
        }
    }

    fn lseek(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        if let Err(e) = self.is_file(ino) {
            return reply.error(e);
        }
        if !self.door.session.caps().extents {
            // The kernel then answers by itself: all is data.
            return reply.error(Errno::ENOSYS);
        }
        let seek = move |door: &Door, reply: ReplyLseek| match door.seek(offset, whence) {
            Ok(at) => reply.offset(at),
            Err(e) => reply.error(e),
        };
        let Some(pool) = self.pool_for(Op::Extents) else { return seek(&self.door, reply) };
        let door = self.door.clone();
        pool.run(move || seek(&door, reply));
    }

    fn opendir(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_CACHE_DIR | FopenFlags::FOPEN_KEEP_CACHE);
    }

    fn readdir(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        if self.door.tree.node(ino) != Some(Node::Directory) {
            return reply.error(Errno::ENOTDIR);
        }
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (i, (ino, node, name)) in self.door.tree.entries().enumerate().skip(from) {
            let kind = match node {
                Node::Directory => FileType::Directory,
                Node::File => FileType::RegularFile,
            };
            if reply.add(ino, i as u64 + 1, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        const BLOCK: u32 = 4096;
        let blocks = self.door.session.size().div_ceil(BLOCK.into());
        reply.statfs(blocks, 0, 0, 2, 0, BLOCK, NAME_MAX, BLOCK);
    }

    // What follows is refused: the tree is fixed, or the kernel does it as well without us. `ENOSYS` tells it not to
    // ask again.

    fn access(&self, _req: &Request, _ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn mknod(
        &self,
        _r: &Request,
        _p: INodeNo,
        _n: &OsStr,
        _mode: u32,
        _um: u32,
        _dev: u32,
        reply: ReplyEntry,
    ) {
        reply.error(self.fixed());
    }

    fn mkdir(&self, _req: &Request, _p: INodeNo, _name: &OsStr, _mode: u32, _umask: u32, reply: ReplyEntry) {
        reply.error(self.fixed());
    }

    fn unlink(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(self.fixed());
    }

    fn rmdir(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(self.fixed());
    }

    fn symlink(&self, _req: &Request, _p: INodeNo, _name: &OsStr, _target: &Path, reply: ReplyEntry) {
        reply.error(self.fixed());
    }

    fn link(&self, _req: &Request, _ino: INodeNo, _p: INodeNo, _name: &OsStr, reply: ReplyEntry) {
        reply.error(self.fixed());
    }

    fn rename(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _newparent: INodeNo,
        _newname: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(self.fixed());
    }

    fn create(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        reply.error(self.fixed());
    }

    fn setxattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn getxattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _req: &Request, _ino: INodeNo, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn removexattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        match stats::answer(self.door.session.chain(), cmd) {
            Some(Ok(answer)) => reply.ioctl(0, &answer),
            Some(Err(e)) => reply.error(e),
            // ENOSYS would be for ever.
            None => reply.error(Errno::ENOTTY),
        }
    }

    fn poll(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _ph: PollNotifier,
        _events: PollEvents,
        _flags: PollFlags,
        reply: ReplyPoll,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn copy_file_range(
        &self,
        _req: &Request,
        _ino_in: INodeNo,
        _fh_in: FileHandle,
        _offset_in: u64,
        _ino_out: INodeNo,
        _fh_out: FileHandle,
        _offset_out: u64,
        _len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::ENOSYS);
    }
}
