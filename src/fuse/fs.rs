//! The file system as the kernel sees it: each request is checked against the tree, run or handed to the pool, and
//! answered.

use std::{
    ffi::OsStr,
    io,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, PollEvents,
    PollFlags, PollNotifier, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty,
    ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request,
    TimeOrNow, WriteFlags,
};
use log::debug;
use nbdkit_core::{Flags, Op};
use rustix::fs::OFlags;

use crate::{
    answer::{Answer, Reply, Watch},
    attr::TTL,
    buffer,
    door::{Door, is_synchronous},
    later,
    mount::Ended,
    passthrough,
    pool::Pool,
    stats,
    tree::{NAME_MAX, Node, PARTITIONS},
    volume::Volume,
};

/// Largest write, and with it the largest read, in bytes: what the kernel sends at most by default.
const MAX_WRITE: u32 = 1 << 20;
/// Requests of read-ahead and of asynchronous direct I/O that the kernel has under way at most.
const MAX_BACKGROUND: u16 = 128;

/// Kernel features asked for, each where the kernel has it. `FUSE_OVER_IO_URING` must never be among them: fuser does
/// not serve its queues.
const FEATURES: [InitFlags; 3] =
    [InitFlags::FUSE_ASYNC_DIO, InitFlags::FUSE_PARALLEL_DIROPS, InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP];

/// How cached data is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cache {
    /// As that of a block device: what was read is kept, what is written goes through at once.
    #[default]
    Auto,
    /// Nothing is kept.
    None,
    /// What is written is kept too, until fsync(2) or until the kernel wants to.
    Writeback,
}

/// See the module.
pub(crate) struct Fs {
    /// Dropped before the pool is, which waits for its requests.
    _ended: Ended,
    volume: Arc<Volume>,
    pool: Pool,
    /// All requests run on the one thread that receives them.
    serial: bool,
    watch: Option<Watch>,
    cache: Cache,
    /// The kernel has passthrough.
    passthrough: bool,
}

impl Fs {
    pub(crate) fn new(
        ended: Ended,
        volume: Arc<Volume>,
        pool: Pool,
        serial: bool,
        watch: Option<Watch>,
        cache: Cache,
    ) -> Self {
        Fs { _ended: ended, volume, pool, serial, watch, cache, passthrough: false }
    }

    /// Why the tree cannot be changed.
    fn fixed(&self) -> Errno {
        if self.volume.style.writable { Errno::EPERM } else { Errno::EROFS }
    }

    /// Runs a request: on a thread of the pool if it `may_block`, else here. With a time limit, `job` may find that
    /// there is nobody left to answer; one that has not started by then does not start.
    fn run<R: Reply>(
        &self,
        may_block: bool,
        what: &'static str,
        reply: R,
        job: impl FnOnce(Answer<R>) + Send + 'static,
    ) {
        if !may_block {
            return job(Answer::Own(reply));
        }
        match &self.watch {
            None if self.serial => job(Answer::Own(reply)),
            None => self.pool.run(move || job(Answer::Own(reply))),
            Some(watch) => {
                let answer = watch.over(reply, what);
                self.pool.run(move || {
                    if answer.is_open() {
                        job(answer);
                    }
                });
            }
        }
    }

    /// Runs a request that may block and whose reply others may have too.
    fn run_shared<R: Reply>(&self, answer: Answer<R>, job: impl FnOnce(Answer<R>) + Send + 'static) {
        if self.serial && self.watch.is_none() {
            return job(answer);
        }
        self.pool.run(move || {
            if answer.is_open() {
                job(answer);
            }
        });
    }

    fn reply_attr(&self, ino: INodeNo, reply: ReplyAttr) {
        let door = match self.volume.door(ino) {
            Ok(door) => door.clone(),
            Err(_) if ino == INodeNo::ROOT => {
                return reply.attr(&TTL, &self.volume.style.owner.directory(self.volume.style.writable));
            }
            Err(e) => return reply.error(e),
        };
        let may_block = door.attributes.asks_chain(&door.session) && door.session.may_block(Op::Extents);
        self.run(may_block, "getattr", reply, move |answer| {
            let attr = door.attr();
            if let Some(reply) = answer.take() {
                reply.attr(&ttl(&door), &attr);
            }
        });
    }

    fn flush_to(&self, ino: INodeNo, reply: ReplyEmpty) {
        let doors: Vec<Arc<Door>> = match self.volume.door(ino) {
            Ok(door) => vec![door.clone()],
            // The directory: everything that is open.
            Err(_) => self.volume.opened().cloned().collect(),
        };
        let may_block = doors.iter().any(|door| door.session.may_block(Op::Flush));
        self.run(may_block, "flush", reply, move |answer| {
            let flushed = doors.iter().map(|door| door.flush()).fold(Ok(()), Result::and);
            done(answer, flushed);
        });
    }

    /// Whether a request comes from this very process.
    fn is_own(&self, request: &Request) -> bool {
        std::path::Path::new("/proc/self/task").join(request.pid().to_string()).exists()
    }
}

/// How long the kernel may keep what it knows of a file: partitions may come and go.
fn ttl(door: &Door) -> Duration {
    if door.ino.0 >= PARTITIONS { Duration::ZERO } else { TTL }
}

fn done(answer: Answer<ReplyEmpty>, result: Result<(), Errno>) {
    match (answer, result) {
        (answer, Err(e)) => answer.fail(e),
        (answer, Ok(())) => {
            if let Some(reply) = answer.take() {
                reply.ok();
            }
        }
    }
}

fn read_to(answer: Answer<ReplyData>, door: &Door, offset: u64, length: usize) {
    buffer::with(length, |buffer| match door.read(buffer, offset) {
        Ok(()) => {
            if let Some(reply) = answer.take() {
                reply.data(buffer);
            }
        }
        Err(e) => answer.fail(e),
    });
}

/// A write request but for its data.
pub(crate) struct Write {
    pub(crate) offset: u64,
    pub(crate) synchronous: bool,
    /// The kernel writes pages that it kept.
    from_cache: bool,
}

fn write_to(answer: Answer<ReplyWrite>, volume: &Volume, door: &Door, data: &[u8], write: &Write) {
    let length = data.len() as u64;
    let pending = volume.begin_write(door, write.offset, length);
    let result = door.write(data, write.offset, write.synchronous);
    let reply = move || match (answer, result) {
        (answer, Err(e)) => answer.fail(e),
        (answer, Ok(())) => {
            if let Some(reply) = answer.take() {
                reply.written(length as u32);
            }
        }
    };
    match pending {
        None => reply(),
        Some(pending) => volume.end_write(&pending, write.from_cache, reply),
    }
}

fn zero_to(
    answer: Answer<ReplyEmpty>,
    volume: &Volume,
    door: &Door,
    (offset, length): (u64, u64),
    flags: Flags,
) {
    let pending = volume.begin_write(door, offset, length);
    let result = door.zero(length, offset, flags);
    match pending {
        None => done(answer, result),
        Some(pending) => volume.end_write(&pending, false, move || done(answer, result)),
    }
}

impl Filesystem for Fs {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        for feature in FEATURES {
            if config.add_capabilities(feature).is_err() {
                debug!("the kernel lacks {feature:?}");
            }
        }
        if self.cache == Cache::Writeback && config.add_capabilities(InitFlags::FUSE_WRITEBACK_CACHE).is_err()
        {
            log::warn!("the kernel cannot keep what is written: it is written through at once");
        }
        self.passthrough = self.volume.style.passthrough && passthrough::negotiate(config);
        // Each of these only fails with the nearest value that would not, and these values are legal.
        let _ = config.set_max_write(MAX_WRITE);
        let _ = config.set_max_background(MAX_BACKGROUND);
        Ok(())
    }

    fn lookup(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if self.volume.tree.node(parent) != Some(Node::Directory) {
            return reply.error(Errno::ENOTDIR);
        }
        let at_hand = self.volume.is_at_hand(name);
        if !at_hand && self.volume.is_opening() && self.is_own(req) {
            // It would wait for itself.
            log::error!("the plugin looks for {} in the mount itself: mount elsewhere", name.display());
            return reply.error(Errno::EDEADLK);
        }
        let may_block = !at_hand
            || self.volume.tree.export(name).is_some_and(|index| {
                self.volume.door(self.volume.tree.inode(index)).is_ok_and(|door| {
                    door.attributes.asks_chain(&door.session) && door.session.may_block(Op::Extents)
                })
            });
        let (volume, name) = (self.volume.clone(), name.to_owned());
        let job = move |answer: Answer<ReplyEntry>| match volume.look_up(&name) {
            Ok(door) => {
                let attr = door.attr();
                if let Some(reply) = answer.take() {
                    reply.entry(&ttl(&door), &attr, Generation(0));
                }
            }
            Err(e) => answer.fail(e),
        };
        // Opening an export never runs here: it may itself make requests that this thread has to answer.
        match &self.watch {
            None if !at_hand => self.pool.run(move || job(Answer::Own(reply))),
            _ => self.run(may_block, "lookup", reply, job),
        }
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
        let own = self.volume.door(ino).map(|door| door.size()).unwrap_or_default();
        if size.is_some_and(|size| size != own) && !truncating_open {
            return reply.error(self.fixed());
        }
        // Times are taken without complaint and not kept: copying tools set them and would report a failure.
        self.reply_attr(ino, reply);
    }

    fn open(&self, _req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let door = match self.volume.door(ino) {
            Ok(door) => door,
            Err(e) => return reply.error(e),
        };
        if flags.acc_mode() != OpenAccMode::O_RDONLY && !door.is_writable() {
            return reply.error(Errno::EROFS);
        }
        let reply = match self.passthrough {
            false => reply,
            true => match door.passthrough.open(&door.session, reply) {
                Ok(()) => return,
                Err(reply) => reply,
            },
        };
        let direct = flags.0 as u32 & OFlags::DIRECT.bits() != 0 || self.cache == Cache::None;
        let cache = if direct {
            FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
        } else {
            FopenFlags::FOPEN_KEEP_CACHE
        };
        door.note_opened();
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
        let door = match self.volume.door(ino) {
            Ok(door) => door,
            Err(e) => return reply.error(e),
        };
        let length = door.room(offset, size as usize);
        if length == 0 {
            return reply.data(&[]);
        }
        let reply = if self.serial {
            Some(reply)
        } else {
            buffer::with(length, |buffer| match door.read_nowait(buffer, offset) {
                Ok(true) => {
                    reply.data(buffer);
                    None
                }
                Ok(false) => Some(reply),
                Err(e) => {
                    reply.error(e);
                    None
                }
            })
        };
        if let Some(reply) = reply {
            let answer = later::share(reply, "read", self.watch.as_ref());
            if self.serial || !later::read(&self.pool, &answer, &door, offset, length) {
                let door = door.clone();
                self.run_shared(answer, move |answer| read_to(answer, &door, offset, length));
            }
        }
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let door = match self.volume.door(ino) {
            Ok(door) => door,
            Err(e) => return reply.error(e),
        };
        let data = &data[..door.room(offset, data.len())];
        if data.is_empty() {
            return reply.error(Errno::ENOSPC);
        }
        let from_cache = write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        let write = Write { offset, synchronous: is_synchronous(flags.0) && !from_cache, from_cache };
        let may_block = door.write_may_block(write.synchronous);
        if !may_block || self.serial && self.watch.is_none() {
            return write_to(Answer::Own(reply), &self.volume, &door, data, &write);
        }
        let answer = later::share(reply, "write", self.watch.as_ref());
        // Of a write to a disk with partitions other files are told before it is answered.
        let alone = !self.serial && !self.volume.style.partitions;
        if alone && later::write(&self.pool, &answer, &door, data, &write) {
            return;
        }
        let (volume, door, data) = (self.volume.clone(), door.clone(), data.to_vec());
        self.run_shared(answer, move |answer| write_to(answer, &volume, &door, &data, &write));
    }

    fn flush(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        // Not a flush of the disk but the close of a file.
        if !self.volume.opened().any(|door| door.passthrough.is_on()) {
            // The kernel then stops asking.
            return reply.error(Errno::ENOSYS);
        }
        match self.volume.door(ino).and_then(|door| door.passthrough.check(&door.session)) {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(e),
        }
    }

    fn fsync(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.flush_to(ino, reply);
    }

    fn fsyncdir(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.flush_to(ino, reply);
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
        let door = match self.volume.door(ino) {
            Ok(door) => door.clone(),
            Err(e) => return reply.error(e),
        };
        let (length, flags) = match door.plan_fallocate(offset, length, mode) {
            Ok(Some(plan)) => plan,
            Ok(None) => return reply.ok(),
            Err(e) => return reply.error(e),
        };
        let volume = self.volume.clone();
        let may_block = door.session.may_block(Op::Zero);
        self.run(may_block, "zero", reply, move |answer| {
            zero_to(answer, &volume, &door, (offset, length), flags);
        });
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
        let door = match self.volume.door(ino) {
            Ok(door) => door.clone(),
            Err(e) => return reply.error(e),
        };
        let may_block = door.session.may_block(Op::Extents);
        self.run(may_block, "extents", reply, move |answer| match door.seek(offset, whence) {
            Ok(at) => {
                if let Some(reply) = answer.take() {
                    reply.offset(at);
                }
            }
            Err(e) => answer.fail(e),
        });
    }

    fn opendir(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let cache = match self.volume.style.partitions {
            false => FopenFlags::FOPEN_CACHE_DIR | FopenFlags::FOPEN_KEEP_CACHE,
            true => FopenFlags::empty(),
        };
        reply.opened(FileHandle(0), cache);
    }

    fn readdir(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, reply: ReplyDirectory) {
        if self.volume.tree.node(ino) != Some(Node::Directory) {
            return reply.error(Errno::ENOTDIR);
        }
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let volume = self.volume.clone();
        self.run(self.volume.style.partitions, "readdir", reply, move |answer| {
            let files = volume.entries();
            let Some(mut reply) = answer.take() else { return };
            let dots = [".", ".."].map(|name| (INodeNo::ROOT, FileType::Directory, OsStr::new(name)));
            let files = files.iter().map(|file| (file.ino, FileType::RegularFile, file.name.as_os_str()));
            for (i, (ino, kind, name)) in dots.into_iter().chain(files).enumerate().skip(from) {
                if reply.add(ino, i as u64 + 1, kind, name) {
                    break;
                }
            }
            reply.ok();
        });
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        const BLOCK: u32 = 4096;
        let size = self.volume.opened().fold(0_u64, |all, door| all.saturating_add(door.size()));
        let files = self.volume.tree.names().len() as u64 + u64::from(!self.volume.tree.is_bare());
        reply.statfs(size.div_ceil(BLOCK.into()), 0, 0, files, 0, BLOCK, NAME_MAX, BLOCK);
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
        match stats::answer(self.volume.chain(), cmd) {
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
