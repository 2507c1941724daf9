//! The file system as the kernel sees it: each request is checked against the tree, run or handed to the executor, and
//! answered.

use std::{
    ffi::{OsStr, OsString},
    io,
    os::unix::ffi::OsStrExt,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType, Filesystem,
    FopenFlags, Generation, INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags,
    PollEvents, PollFlags, PollNotifier, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite,
    ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use log::debug;
use rustix::fs::OFlags;

use crate::{
    attr::TTL,
    export_file::{ExportFile, is_synchronous},
    mount::Ended,
    passthrough,
    reply::Answer,
    requests::Requests,
    stats,
    transfer::Write,
    tree::{BY_NAME, BY_NAME_DIR, LINKS, NAME_MAX, Node, PARTITIONS},
    volume::{PendingWrite, Volume},
};

/// Largest write, and with it the largest read, in bytes: what the kernel sends at most by default.
const MAX_WRITE: u32 = 1 << 20;
/// Requests of read-ahead and of asynchronous direct I/O that the kernel has under way at most.
const MAX_BACKGROUND: u16 = 128;

/// Kernel features asked for, each where the kernel has it. `FUSE_OVER_IO_URING` must never be among them: fuser does
/// not serve its queues.
const FEATURES: [InitFlags; 3] =
    [InitFlags::FUSE_ASYNC_DIO, InitFlags::FUSE_PARALLEL_DIROPS, InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP];

/// Handles of files that are read only, and of those whose pages somebody may change in the kernel.
const READER: FileHandle = FileHandle(0);
const WRITER: FileHandle = FileHandle(1);

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
    /// Dropped before those are that wait for their end.
    _ended: Ended,
    volume: Arc<Volume>,
    requests: Requests,
    cache: Cache,
    /// The kernel has passthrough.
    passthrough: bool,
}

impl Fs {
    pub(crate) fn new(ended: Ended, volume: Arc<Volume>, requests: Requests, cache: Cache) -> Self {
        Fs { _ended: ended, volume, requests, cache, passthrough: false }
    }

    /// Why the tree cannot be changed.
    fn fixed(&self) -> Errno {
        if self.volume.style.writable { Errno::EPERM } else { Errno::EROFS }
    }

    fn reply_attr(&self, ino: INodeNo, reply: ReplyAttr) {
        let file = match self.volume.file(ino) {
            Ok(file) => file.clone(),
            Err(_) if ino == INodeNo::ROOT => {
                return reply.attr(&TTL, &self.volume.style.owner.directory(self.volume.style.writable));
            }
            Err(_) if ino == BY_NAME => return reply.attr(&TTL, &self.volume.style.owner.links()),
            Err(_) if ino.0 >= LINKS => return self.reply_link(ino, reply),
            Err(e) => return reply.error(e),
        };
        let ttl = ttl(&file);
        let ask = move |may_wait| file.attr(may_wait);
        self.requests.ask("getattr", reply, ask, move |answer, attr| {
            answer.give(Ok(attr), |reply, attr| reply.attr(&ttl, &attr));
        });
    }

    /// The attributes of a link of the table as it is now.
    fn reply_link(&self, ino: INodeNo, reply: ReplyAttr) {
        let volume = self.volume.clone();
        let ask = move |_| Some(volume.link(ino).map(|link| volume.style.owner.link(ino, link.target.len())));
        self.requests.ask_on_thread("getattr", reply, ask, |answer, attr| {
            answer.give(attr, |reply, attr| reply.attr(&Duration::ZERO, &attr));
        });
    }

    /// Looks for the directory of links, or for a link in it.
    fn look_up_link(&self, parent: Node, name: OsString, reply: ReplyEntry) {
        let volume = self.volume.clone();
        let ask = move |_| {
            let names = volume.names();
            let owner = volume.style.owner;
            let found = match parent {
                Node::ByName => names
                    .into_iter()
                    .find(|link| link.name == name)
                    .map(|link| owner.link(link.ino(), link.target.len())),
                _ => (!names.is_empty()).then(|| owner.links()),
            };
            Some(found.ok_or(Errno::ENOENT))
        };
        self.requests.ask_on_thread("lookup", reply, ask, |answer, found| {
            answer.give(found, |reply, attr| reply.entry(&Duration::ZERO, &attr, Generation(0)));
        });
    }

    fn flush_to(&self, ino: INodeNo, reply: ReplyEmpty) {
        let mut files: Vec<Arc<ExportFile>> = match self.volume.file(ino) {
            Ok(file) => vec![file.clone()],
            // The directory: everything that is open.
            Err(_) => self.volume.opened().cloned().collect(),
        };
        let mut flushed = Ok(());
        let ask = move |may_wait| {
            while let Some(file) = files.last() {
                flushed = file.flush(may_wait)?.and(flushed);
                files.pop();
            }
            Some(flushed)
        };
        self.requests
            .ask("flush", reply, ask, |answer, flushed| answer.give(flushed, |reply, ()| reply.ok()));
    }

    /// Whether a request comes from this very process.
    fn is_own(&self, request: &Request) -> bool {
        std::path::Path::new("/proc/self/task").join(request.pid().to_string()).exists()
    }
}

/// What an entry of a directory is.
fn kind(ino: INodeNo) -> FileType {
    match ino {
        BY_NAME => FileType::Directory,
        INodeNo(LINKS..) => FileType::Symlink,
        _ => FileType::RegularFile,
    }
}

/// How long the kernel may keep what it knows of a file: partitions may come and go, and what is written takes space.
fn ttl(file: &ExportFile) -> Duration {
    if file.ino.0 >= PARTITIONS || file.may_be_kept() { Duration::ZERO } else { TTL }
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
        match self.volume.tree.node(parent) {
            Some(Node::Directory) if name == BY_NAME_DIR && self.volume.shows_names() => {
                return self.look_up_link(Node::Directory, name.to_owned(), reply);
            }
            Some(Node::Directory) => {}
            Some(Node::ByName) => return self.look_up_link(Node::ByName, name.to_owned(), reply),
            _ => return reply.error(Errno::ENOTDIR),
        }
        let at_hand = self.volume.is_at_hand(name);
        if !at_hand && self.volume.is_opening() && self.is_own(req) {
            // It would wait for itself.
            log::error!("the plugin looks for {} in the mount itself: mount elsewhere", name.display());
            return reply.error(Errno::EDEADLK);
        }
        let (volume, name) = (self.volume.clone(), name.to_owned());
        let ask = move |may_wait| match volume.look_up(&name) {
            Ok(file) => file.attr(may_wait).map(|attr| Ok((ttl(&file), attr))),
            Err(e) => Some(Err(e)),
        };
        let answer = |answer: Answer<ReplyEntry>, found| {
            answer.give(found, |reply, (ttl, attr): (Duration, FileAttr)| {
                reply.entry(&ttl, &attr, Generation(0));
            });
        };
        if at_hand {
            self.requests.ask("lookup", reply, ask, answer);
        } else {
            // To open an export may itself make requests that this thread has to answer.
            self.requests.ask_on_thread("lookup", reply, ask, answer);
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
        let own = self.volume.file(ino).map(|file| file.size()).unwrap_or_default();
        if size.is_some_and(|size| size != own) && !truncating_open {
            return reply.error(self.fixed());
        }
        // Times are taken without complaint and not kept: copying tools set them and would report a failure.
        self.reply_attr(ino, reply);
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        let volume = self.volume.clone();
        let ask = move |_| Some(volume.link(ino).map(|link| link.target));
        self.requests.ask_on_thread("readlink", reply, ask, |answer, target| {
            answer.give(target, |reply, target| reply.data(target.as_bytes()));
        });
    }

    fn open(&self, _req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let file = match self.volume.file(ino) {
            Ok(file) => file,
            Err(e) => return reply.error(e),
        };
        if flags.acc_mode() != OpenAccMode::O_RDONLY && !file.is_writable() {
            return reply.error(Errno::EROFS);
        }
        let reply = match self.passthrough {
            false => reply,
            true => match file.passthrough.open(&file.session, reply) {
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
        file.note_opened();
        let handle = match flags.acc_mode() {
            OpenAccMode::O_RDONLY => READER,
            _ => {
                file.add_writer();
                self.volume.coherence.drop_attributes(ino);
                WRITER
            }
        };
        reply.opened(handle, cache);
    }

    fn release(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        if fh == WRITER
            && let Ok(file) = self.volume.file(ino)
        {
            file.remove_writer();
        }
        reply.ok();
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
        let file = match self.volume.file(ino) {
            Ok(file) => file,
            Err(e) => return reply.error(e),
        };
        let length = file.room(offset, size as usize);
        if length == 0 {
            return reply.data(&[]);
        }
        self.requests.read(&file, offset, length, reply);
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
        let file = match self.volume.file(ino) {
            Ok(file) => file,
            Err(e) => return reply.error(e),
        };
        let data = &data[..file.room(offset, data.len())];
        if data.is_empty() {
            return reply.error(Errno::ENOSPC);
        }
        let from_cache = write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        let write = Write {
            synchronous: is_synchronous(flags.0) && !from_cache,
            from_cache,
            pending: self.volume.begin_write(&file, offset, data.len() as u64, from_cache),
        };
        self.requests.write(&file, offset, data, write, reply);
    }

    fn flush(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        // Not a flush of the disk but the close of a file.
        if !self.volume.opened().any(|file| file.passthrough.is_on()) {
            // The kernel then stops asking.
            return reply.error(Errno::ENOSYS);
        }
        match self.volume.file(ino).and_then(|file| file.passthrough.check(&file.session)) {
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
        let file = match self.volume.file(ino) {
            Ok(file) => file.clone(),
            Err(e) => return reply.error(e),
        };
        let (length, mut flags) = match file.plan_fallocate(offset, length, mode) {
            Ok(Some(plan)) => plan,
            Ok(None) => return reply.ok(),
            Err(e) => return reply.error(e),
        };
        let volume = self.volume.clone();
        let mut pending = volume.begin_write(&file, offset, length, false);
        let blocking = pending.as_mut().filter(|pending| pending.is_blocked());
        let blocking = blocking.map(PendingWrite::take_blocking);
        let ask = move |may_wait| {
            let zeroed = file.zero(length, offset, &mut flags, may_wait)?;
            Some((zeroed, pending.take()))
        };
        let answer = move |answer: Answer<ReplyEmpty>, (zeroed, pending)| {
            let answer = move || answer.give(zeroed, |reply, ()| reply.ok());
            match pending {
                None => answer(),
                Some(pending) => volume.end_write(pending, false, answer),
            }
        };
        match blocking {
            None => self.requests.ask("zero", reply, ask, answer),
            Some(blocking) => self.requests.ask_unblocked("zero", reply, blocking, ask, answer),
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
        match self.volume.file(ino) {
            Ok(file) => self.requests.seek(&file, offset, whence, reply),
            Err(e) => reply.error(e),
        }
    }

    fn opendir(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let cache = match self.volume.style.partitions {
            false => FopenFlags::FOPEN_CACHE_DIR | FopenFlags::FOPEN_KEEP_CACHE,
            true => FopenFlags::empty(),
        };
        reply.opened(FileHandle(0), cache);
    }

    fn readdir(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, reply: ReplyDirectory) {
        let node = self.volume.tree.node(ino);
        if !matches!(node, Some(Node::Directory | Node::ByName)) {
            return reply.error(Errno::ENOTDIR);
        }
        let links = node == Some(Node::ByName);
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let volume = self.volume.clone();
        // Those of partitions have to be read from the disk.
        let waits = volume.style.partitions;
        let ask = move |may_wait| {
            (may_wait || !waits).then(|| if links { volume.link_entries() } else { volume.entries() })
        };
        self.requests.ask("readdir", reply, ask, move |answer, files| {
            answer.give(Ok(files), |mut reply, files| {
                let dots = [(".", ino), ("..", INodeNo::ROOT)];
                let dots = dots.map(|(name, ino)| (ino, FileType::Directory, OsStr::new(name)));
                let files = files.iter().map(|file| (file.ino, kind(file.ino), file.name.as_os_str()));
                for (i, (ino, kind, name)) in dots.into_iter().chain(files).enumerate().skip(from) {
                    if reply.add(ino, i as u64 + 1, kind, name) {
                        break;
                    }
                }
                reply.ok();
            });
        });
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        const BLOCK: u32 = 4096;
        let size = self.volume.opened().fold(0_u64, |all, file| all.saturating_add(file.size()));
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
