//! An open file as a disk.

use std::{
    fs::File,
    io::{self, IoSlice, IoSliceMut},
    os::{fd::AsFd, unix::fs::FileExt},
    path::Path,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
};

use nbdkit_core::{Errno, Error, Extents, Flags, Handle, Loan, Op, Result, Support};
use rustix::{
    fs::{
        Advice, FileType, SeekFrom, fadvise, fdatasync, fstat, fstatfs, ioctl_blksszget, major, minor, seek,
    },
    io::{Errno as Sys, ReadWriteFlags, preadv2, pwritev2},
};

use super::Hints;
use crate::holes;

/// File systems in memory, where a read never waits and that do not all know `RWF_NOWAIT`: tmpfs, ramfs.
const IN_MEMORY: [u64; 2] = [0x0102_1994, 0x8584_58f6];

/// With `cache=none`, how much may wait in the page cache to be written back, in bytes.
const UNCACHED_WINDOW: u64 = 32 << 20;

/// See the module.
pub(super) struct Disk {
    file: File,
    size: u64,
    writable: bool,
    /// The logical block size, for a block device.
    device: Option<u64>,
    rotational: bool,
    extents: bool,
    /// To ask for holes is quick.
    near: bool,
    in_memory: bool,
    hints: Hints,
    /// Written since the page cache was last emptied, in bytes (with `cache=none`).
    dirty: AtomicU64,
    /// What the file system turned out not to do. To find out anew costs a call each, so each is kept.
    no_nowait: AtomicBool,
    no_punch: AtomicBool,
    no_zero_range: AtomicBool,
    no_dsync: AtomicBool,
}

/// Which of the two ways of `fallocate` makes zeroes.
#[derive(Clone, Copy)]
enum Way {
    Punch,
    ZeroRange,
}

impl Disk {
    pub(super) fn new(file: File, writable: bool, hints: Hints) -> Result<Self> {
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
        Ok(Disk {
            size,
            writable,
            device,
            rotational: is_device && is_rotational(stat.st_rdev),
            extents: holes::are_known(&file),
            near: holes::are_near(&file),
            in_memory,
            hints,
            dirty: AtomicU64::new(0),
            no_nowait: AtomicBool::new(false),
            no_punch: AtomicBool::new(false),
            no_zero_range: AtomicBool::new(false),
            no_dsync: AtomicBool::new(false),
            file,
        })
    }

    /// Frees or zeroes a range by `fallocate`. `EOPNOTSUPP`: it cannot be done this way.
    fn allocate(&self, way: Way, length: u64, offset: u64) -> Result<()> {
        let unsupported = match way {
            Way::Punch => &self.no_punch,
            Way::ZeroRange => &self.no_zero_range,
        };
        // A device takes whole blocks only; that says nothing about the next range.
        let odd = self.device.is_some_and(|block| !(offset | length).is_multiple_of(block));
        if odd || unsupported.load(Relaxed) {
            return Err(Errno::EOPNOTSUPP.into());
        }
        let done = match way {
            Way::Punch => holes::punch(&self.file, offset, length),
            Way::ZeroRange => holes::zero_range(&self.file, offset, length),
        };
        match done {
            Err(e) if holes::is_unsupported(e) => {
                unsupported.store(true, Relaxed);
                Err(Errno::EOPNOTSUPP.into())
            }
            Err(e) => Err(io::Error::from(e).into()),
            Ok(()) => Ok(()),
        }
    }

    fn sync_if(&self, flags: Flags) -> Result<()> {
        if flags.contains(Flags::FUA) { self.flush() } else { Ok(()) }
    }

    /// Writes everything and returns when it is durable.
    fn write_durable(&self, mut buf: &[u8], mut offset: u64) -> Result<()> {
        while !buf.is_empty() && !self.no_dsync.load(Relaxed) {
            match pwritev2(&self.file, &[IoSlice::new(buf)], offset, ReadWriteFlags::DSYNC) {
                Ok(0) => return Err(Error::new(Errno::EIO, "the file took no data")),
                Ok(n) => {
                    buf = &buf[n..];
                    offset += n as u64;
                }
                Err(Sys::INTR) => {}
                Err(Sys::OPNOTSUPP | Sys::NOSYS) => self.no_dsync.store(true, Relaxed),
                Err(e) => return Err(io::Error::from(e).into()),
            }
        }
        if buf.is_empty() {
            return Ok(());
        }
        self.file.write_all_at(buf, offset)?;
        self.flush()
    }

    /// Drops a range that was read from the page cache again; 0: all of the file. Only a hint, so without errors.
    fn drop_cache(&self, offset: u64, length: u64) {
        let _ = fadvise(&self.file, offset, std::num::NonZeroU64::new(length), Advice::DontNeed);
    }
}

impl Handle for Disk {
    fn get_size(&self) -> Result<u64> {
        Ok(self.size)
    }

    fn is_rotational(&self) -> Result<bool> {
        Ok(self.rotational)
    }

    fn can_write(&self) -> Result<bool> {
        Ok(self.writable)
    }

    fn can_flush(&self) -> Result<bool> {
        Ok(true)
    }

    fn can_trim(&self) -> Result<bool> {
        Ok(true)
    }

    fn can_zero(&self) -> Result<Support> {
        Ok(Support::Native)
    }

    fn can_fast_zero(&self) -> Result<bool> {
        Ok(true)
    }

    fn can_fua(&self) -> Result<Support> {
        Ok(Support::Native)
    }

    fn can_multi_conn(&self) -> Result<bool> {
        Ok(true)
    }

    fn can_cache(&self) -> Result<Support> {
        Ok(Support::Native)
    }

    fn can_extents(&self) -> Result<bool> {
        Ok(self.extents)
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_exact_at(buf, offset).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => {
                Error::new(Errno::EIO, "the file ends early: it was made shorter while it was open")
            }
            _ => e.into(),
        })?;
        if self.hints.uncached {
            self.drop_cache(offset, buf.len() as u64);
        }
        Ok(())
    }

    fn pread_nowait(&self, buf: &mut [u8], offset: u64) -> Result<bool> {
        if self.in_memory {
            return self.pread(buf, offset).map(|()| true);
        }
        if self.no_nowait.load(Relaxed) || self.hints.uncached {
            return Ok(false);
        }
        let length = buf.len();
        match preadv2(&self.file, &mut [IoSliceMut::new(buf)], offset, ReadWriteFlags::NOWAIT) {
            Ok(n) => Ok(n == length),
            Err(e) => {
                // Any other error comes again from the read that may wait.
                if matches!(e, Sys::OPNOTSUPP | Sys::NOSYS) {
                    self.no_nowait.store(true, Relaxed);
                }
                Ok(false)
            }
        }
    }

    fn pwrite(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
        if flags.contains(Flags::FUA) {
            self.write_durable(buf, offset)?;
        } else {
            self.file.write_all_at(buf, offset)?;
        }
        let length = buf.len() as u64;
        if self.hints.uncached && self.dirty.fetch_add(length, Relaxed) + length >= UNCACHED_WINDOW {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        fdatasync(&self.file).map_err(io::Error::from)?;
        if self.hints.uncached {
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
            match self.allocate(Way::Punch, end - start, start) {
                // To trim is to advise.
                Err(e) if e.is_unsupported() => {}
                done => done?,
            }
        }
        self.sync_if(flags)
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        let mut done = Err(Errno::EOPNOTSUPP.into());
        if flags.contains(Flags::MAY_TRIM) {
            done = self.allocate(Way::Punch, length, offset);
        }
        // For a device the kernel may write the zeroes, which is not fast.
        let may_be_slow = self.device.is_some() && flags.contains(Flags::FAST_ZERO);
        if matches!(&done, Err(e) if Error::is_unsupported(e)) && !may_be_slow {
            done = self.allocate(Way::ZeroRange, length, offset);
        }
        done?;
        self.sync_if(flags)
    }

    fn extents(&self, _: u64, _: u64, flags: Flags, extents: &mut Extents) -> Result<()> {
        holes::find(&self.file, self.size, flags, extents)
    }

    fn cache(&self, length: u64, offset: u64) -> Result<()> {
        fadvise(&self.file, offset, std::num::NonZeroU64::new(length), Advice::WillNeed)
            .map_err(|e| io::Error::from(e).into())
    }

    fn may_block(&self, op: Op) -> bool {
        match op {
            // A read asks `pread_nowait` first.
            Op::Read => !self.in_memory,
            // Into the page cache.
            Op::Write => self.hints.uncached,
            Op::Trim => self.device.is_some(),
            // Zero may have to write, the others may wait for the device.
            Op::Extents => !self.in_memory,
            Op::Flush | Op::Zero | Op::Cache => true,
        }
    }

    fn may_skip_holes(&self) -> bool {
        self.near
    }

    fn loan(&self, offset: u64, _: u64) -> Option<Loan<'_>> {
        // With `cache=none` we have to see the requests.
        (!self.hints.uncached).then(|| Loan { fd: self.file.as_fd(), offset, writable: self.writable })
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
