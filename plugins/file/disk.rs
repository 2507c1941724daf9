//! An open file as a disk.

use std::{
    fs::File,
    io::{self, IoSliceMut},
    os::fd::AsFd,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
};

use nbdkit_core::{
    BlockSize, Caps, Data, Errno, Error, Extents, Flags, Handle, Loan, Op, Outcome, Request, Result,
};
use rustix::{
    fs::{
        Advice, FileType, SeekFrom, fadvise, fdatasync, fstat, fstatfs, ioctl_blksszget, major, minor, seek,
    },
    io::{Errno as Sys, ReadWriteFlags, preadv2},
};

use super::{
    Hints, device,
    direct::{Direct, read_all, write_all},
    ranges::{Entered, Files},
    submit::Submitter,
};
use crate::{holes, lock::Lock};

/// File systems in memory, where a read never waits and that do not all know `RWF_NOWAIT`: tmpfs, ramfs.
const IN_MEMORY: [u64; 2] = [0x0102_1994, 0x8584_58f6];

/// Where the page cache is used but to be free, how much may wait in the page cache to be written back, in bytes.
const UNCACHED_WINDOW: u64 = 32 << 20;

/// See the module.
pub(super) struct Disk {
    file: Arc<File>,
    /// With `cache=none`, where the file system can.
    direct: Option<Arc<Direct>>,
    submitter: Submitter,
    size: u64,
    writable: bool,
    /// The logical block size, for a block device.
    device: Option<u64>,
    block_size: BlockSize,
    rotational: bool,
    extents: bool,
    /// To ask for holes is quick.
    near: bool,
    in_memory: bool,
    hints: Hints,
    /// Written since the page cache was last emptied, in bytes, where it is to be free.
    dirty: AtomicU64,
    /// What the file system turned out not to do. To find out anew costs a call each, so each is kept.
    no_nowait: AtomicBool,
    no_punch: AtomicBool,
    no_zero_range: AtomicBool,
    no_discard: AtomicBool,
    no_zero_out: AtomicBool,
    no_dsync: AtomicBool,
    /// Against other programs.
    _lock: Option<Lock>,
}

/// How a range is freed or zeroed: by `fallocate`, or by a request for devices alone, which some of them know only.
#[derive(Clone, Copy, Debug)]
enum Way {
    Punch,
    ZeroRange,
    Discard,
    ZeroOut,
}

impl Disk {
    /// `files` has the writes of all connections.
    pub(super) fn new(
        file: File,
        (writable, lock): (bool, Option<Lock>),
        hints: Hints,
        files: &Files,
    ) -> Result<Self> {
        let file = Arc::new(file);
        let stat = fstat(&file).map_err(io::Error::from)?;
        let is_device = FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice;
        let size = if is_device {
            seek(&file, SeekFrom::End(0)).map_err(io::Error::from)?
        } else {
            stat.st_size.cast_unsigned()
        };
        if let Some(advice) = hints.advice {
            fadvise(&file, 0, None, advice).map_err(io::Error::from)?;
        }
        let device = is_device.then(|| ioctl_blksszget(&file).map_or(512, u64::from));
        let in_memory = !is_device
            && fstatfs(&file).is_ok_and(|fs| IN_MEMORY.contains(&(fs.f_type as u64 & 0xffff_ffff)));
        let direct = (hints.direct && !in_memory)
            .then(|| Direct::open(&file, (writable, is_device), size, files))
            .flatten();
        Ok(Disk {
            direct: direct.map(Arc::new),
            submitter: files.submitter(!hints.no_ring),
            size,
            writable,
            device,
            block_size: if is_device { device::block_size(&file) } else { BlockSize::default() },
            rotational: is_device && is_rotational(stat.st_rdev),
            extents: holes::are_known(&file),
            near: holes::are_near(&file),
            in_memory,
            hints,
            dirty: AtomicU64::new(0),
            no_nowait: AtomicBool::new(false),
            no_punch: AtomicBool::new(false),
            no_zero_range: AtomicBool::new(false),
            no_discard: AtomicBool::new(false),
            no_zero_out: AtomicBool::new(false),
            no_dsync: AtomicBool::new(false),
            file,
            _lock: lock,
        })
    }

    /// Frees or zeroes a range. `EOPNOTSUPP`: it cannot be done this way.
    fn allocate(&self, way: Way, length: u64, offset: u64) -> Result<()> {
        let unsupported = match way {
            Way::Punch => &self.no_punch,
            Way::ZeroRange => &self.no_zero_range,
            Way::Discard => &self.no_discard,
            Way::ZeroOut => &self.no_zero_out,
        };
        // A device takes whole blocks only; that says nothing about the next range.
        let odd = self.device.is_some_and(|block| !(offset | length).is_multiple_of(block));
        let wrong = matches!(way, Way::Discard | Way::ZeroOut) && self.device.is_none();
        if odd || wrong || unsupported.load(Relaxed) {
            return Err(Errno::EOPNOTSUPP.into());
        }
        let done = match way {
            Way::Punch => holes::punch(&self.file, offset, length),
            Way::ZeroRange => holes::zero_range(&self.file, offset, length),
            Way::Discard => device::discard(&self.file, offset, length),
            Way::ZeroOut => device::zero_out(&self.file, offset, length),
        };
        if self.hints.tell {
            log::debug!("file: {way:?} of {length} bytes at {offset}: {done:?}");
        }
        match done {
            Err(e) if holes::is_unsupported(e) => {
                unsupported.store(true, Relaxed);
                Err(Errno::EOPNOTSUPP.into())
            }
            Err(e) => Err(io::Error::from(e).into()),
            Ok(()) => Ok(()),
        }
    }

    /// Fills `buf` from the page cache, if it is all there.
    fn read_nowait(&self, buf: &mut [u8], offset: u64) -> bool {
        if self.in_memory {
            return read_all(&self.file, buf, offset).is_ok();
        }
        if self.no_nowait.load(Relaxed) || self.hints.uncached() {
            return false;
        }
        let length = buf.len();
        match preadv2(&self.file, &mut [IoSliceMut::new(buf)], offset, ReadWriteFlags::NOWAIT) {
            Ok(n) => n == length,
            Err(e) => {
                // Any other error comes again from the read that may wait.
                if matches!(e, Sys::OPNOTSUPP | Sys::NOSYS) {
                    self.no_nowait.store(true, Relaxed);
                }
                false
            }
        }
    }

    /// Whether a read or a write waits in the ring. Where the kernel would have threads of its own wait, there are more of
    /// ours; and the page cache takes writes at once.
    fn waits_in_ring(&self, op: Op) -> bool {
        match &self.direct {
            Some(direct) => !direct.is_refused(),
            None => {
                op == Op::Read && !self.in_memory && !self.hints.uncached() && !self.no_nowait.load(Relaxed)
            }
        }
    }

    /// Starts a read or a write.
    fn start(&self, request: &mut Request<'_>) -> Outcome<'_> {
        match &self.direct {
            Some(direct) => self.submitter.start_direct(direct, request),
            None => self.submitter.start_read(&self.file, request),
        }
    }

    /// As [`allocate`](Self::allocate), in one of several ways.
    fn allocate_by(&self, ways: &[Way], length: u64, offset: u64) -> Result<()> {
        let mut done = Err(Errno::EOPNOTSUPP.into());
        for way in ways {
            if !matches!(&done, Err(e) if Error::is_unsupported(e)) {
                break;
            }
            done = self.allocate(*way, length, offset);
        }
        done
    }

    fn sync_if(&self, flags: Flags) -> Result<()> {
        if flags.contains(Flags::FUA) { self.flush() } else { Ok(()) }
    }

    /// The page cache is used, although it is not to be.
    fn must_drop_cache(&self) -> bool {
        self.hints.uncached() && self.direct.as_ref().is_none_or(|direct| direct.is_refused())
    }

    /// Drops a range that was read from the page cache again; 0: all of the file. Only a hint, so without errors.
    fn drop_cache(&self, offset: u64, length: u64) {
        let _ = fadvise(&self.file, offset, std::num::NonZeroU64::new(length), Advice::DontNeed);
    }

    /// Keeps a range free of writes of parts of blocks, which would bring back what it was.
    fn enter(&self, offset: u64, length: u64) -> Option<Entered> {
        self.direct.as_ref().map(|direct| direct.enter(&(offset..offset + length)))
    }
}

impl Drop for Disk {
    /// What the kernel has read ahead, or keeps in one piece with what another request had, was not dropped with a range.
    fn drop(&mut self) {
        if self.must_drop_cache() {
            self.drop_cache(0, 0);
        }
    }
}

impl Handle for Disk {
    fn capabilities(&self) -> Result<Caps> {
        Ok(Caps::native(self.size)
            .with_block_size(self.block_size)
            .with_write(self.writable)
            .with_extents(self.extents)
            .with_rotational(self.rotational)
            .with_skip_holes(self.near))
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        match &self.direct {
            Some(direct) => direct.read(buf, offset)?,
            None => read_all(&self.file, buf, offset)?,
        }
        if self.must_drop_cache() {
            self.drop_cache(offset, buf.len() as u64);
        }
        Ok(())
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        if request.may_lend() {
            // Where the page cache is to be free we have to see the requests.
            let lent = !self.hints.uncached() && (request.op() == Op::Read || request.flags().is_empty());
            let loan = Loan { fd: self.file.as_fd(), offset: request.offset() };
            return if lent { Outcome::Lent(loan) } else { Outcome::NeedsThread };
        }
        if request.may_wait() {
            return request.run(self);
        }
        let (offset, op, plain) = (request.offset(), request.op(), request.flags().is_empty());
        if let Data::Read(buf) = request.data()
            && self.read_nowait(buf, offset)
        {
            return Outcome::Done(Ok(()));
        }
        let inline = match op {
            Op::Read | Op::Write if self.waits_in_ring(op) => return self.start(request),
            // Into the page cache.
            Op::Write => plain && !self.hints.uncached(),
            Op::Trim => plain && self.device.is_none(),
            Op::Extents => self.in_memory,
            // Zero may have to write, the others may wait for the device.
            Op::Read | Op::Flush | Op::Zero | Op::Cache => false,
        };
        if inline { request.run(self) } else { Outcome::NeedsThread }
    }

    fn pwrite(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
        if let Some(direct) = &self.direct {
            return direct.write(buf, offset, flags);
        }
        write_all(&self.file, buf, offset, flags, &self.no_dsync)?;
        let length = buf.len() as u64;
        if self.hints.uncached() && self.dirty.fetch_add(length, Relaxed) + length >= UNCACHED_WINDOW {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        // Where nothing was written there is nothing to flush, and a read-only file system refuses to.
        if self.writable {
            fdatasync(&self.file).map_err(io::Error::from)?;
        }
        if self.must_drop_cache() {
            self.dirty.store(0, Relaxed);
            self.drop_cache(0, 0);
        }
        Ok(())
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        // The whole blocks within the range, for a device.
        let (start, end) = match self.device {
            Some(block) => (offset.next_multiple_of(block), (offset + length) / block * block),
            None => (offset, offset + length),
        };
        if start < end {
            let _entered = self.enter(start, end - start);
            match self.allocate_by(&[Way::Punch, Way::Discard], end - start, start) {
                // To trim is to advise.
                Err(e) if e.is_unsupported() => {}
                done => done?,
            }
        }
        self.sync_if(flags)
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        let _entered = self.enter(offset, length);
        // For a device the kernel may write the zeroes, which is not fast.
        let may_be_slow = self.device.is_some() && flags.contains(Flags::FAST_ZERO);
        let ways = match (flags.contains(Flags::MAY_TRIM), may_be_slow) {
            (true, true) => &[Way::Punch][..],
            (true, false) => &[Way::Punch, Way::ZeroRange, Way::ZeroOut],
            (false, true) => &[],
            (false, false) => &[Way::ZeroRange, Way::ZeroOut],
        };
        self.allocate_by(ways, length, offset)?;
        self.sync_if(flags)
    }

    fn extents(&self, _: u64, _: u64, flags: Flags, extents: &mut Extents) -> Result<()> {
        holes::find(&self.file, self.size, flags, extents)
    }

    fn cache(&self, length: u64, offset: u64) -> Result<()> {
        if self.hints.uncached() {
            return Ok(());
        }
        fadvise(&self.file, offset, std::num::NonZeroU64::new(length), Advice::WillNeed)
            .map_err(|e| io::Error::from(e).into())
    }
}

/// Whether the kernel takes a block device, or the one that a partition is on, for a spinning one.
fn is_rotational(device: u64) -> bool {
    let sys = format!("/sys/dev/block/{}:{}", major(device), minor(device));
    ["queue/rotational", "../queue/rotational"]
        .iter()
        .find_map(|name| std::fs::read_to_string(Path::new(&sys).join(name)).ok())
        .is_some_and(|text| text.trim() == "1")
}
