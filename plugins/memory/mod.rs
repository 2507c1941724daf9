//! The memory plugin: a disk in memory, sparse and shared by all connections.
//!
//! The disk is one memfd: the kernel allocates pages as they are written, frees those that are trimmed, finds holes,
//! and lends the file to the doors. A read of a hole allocates nothing.

use std::{
    ffi::OsStr,
    fs::File,
    ops::Range,
    os::{fd::AsFd, unix::fs::FileExt},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use anyhow::{Context as _, bail};
use nbdkit_core::{
    Errno, Error, Extents, Flags, Handle, Info, Loan, Op, Open, Outcome, Plugin, Request, Result, Stop,
    Support, params,
};
use parking_lot::Mutex;
use rustix::fs::MemfdFlags;

use crate::holes;

mod lock;
#[cfg(test)]
mod tests;

/// The granularity of holes in a memfd.
const PAGE: u64 = 4096;
/// `lseek` does not find data or holes from here on: the end of the last page does not fit its offsets.
const BLIND: u64 = i64::MAX as u64 / PAGE * PAGE;

pub(crate) fn new() -> Box<dyn Plugin> {
    Box::<Memory>::default()
}

#[derive(Default)]
struct Memory {
    size: Option<u64>,
    mlock: bool,
    disk: Option<Arc<Disk>>,
}

impl Plugin for Memory {
    fn info(&self) -> Info {
        Info::bundled(
            "memory",
            "a sparse disk in memory",
            "[size=]SIZE  (required) Size of the disk\n\
             allocator=sparse|malloc[,mlock=BOOL]|zstd\n\
             \u{20}                       Accepted for compatibility; mlock=true keeps the disk out of swap",
        )
        .magic("size")
    }

    fn callbacks(&self) -> Vec<&'static str> {
        [crate::EVERYTHING, &["config_complete", "dump_plugin", "get_ready", "after_fork"]].concat()
    }

    fn config(&mut self, key: &str, value: &OsStr) -> anyhow::Result<bool> {
        match key {
            "size" => self.size = Some(params::size(value)?),
            "allocator" => self.mlock = allocator(params::text(value)?)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn config_complete(&mut self) -> anyhow::Result<()> {
        self.size.context("you must specify size=SIZE on the command line, such as size=1G")?;
        Ok(())
    }

    fn dump(&self) -> Vec<(String, String)> {
        vec![("mlock".into(), "yes".into())]
    }

    fn get_ready(&mut self) -> anyhow::Result<()> {
        let size = self.size.context("the size is not known yet")?;
        self.disk = Some(Arc::new(Disk::new(size, self.mlock)?));
        Ok(())
    }

    fn after_fork(&self, _: &Arc<Stop>) -> anyhow::Result<()> {
        // Locks on memory do not survive a fork.
        match &self.disk {
            Some(disk) if disk.mlock => lock::pin(&disk.file, disk.size).with_context(|| {
                format!(
                    "cannot lock {} bytes of memory: raise 'ulimit -l' or leave mlock=true out",
                    disk.size
                )
            }),
            _ => Ok(()),
        }
    }

    fn open(&self, _: &Open) -> Result<Box<dyn Handle>> {
        let disk = self.disk.clone().ok_or_else(|| Error::new(Errno::EINVAL, "memory is not ready"))?;
        Ok(Box::new(Shared { disk, known: Mutex::default() }))
    }
}

/// Parses the allocator of upstream's plugin: whether the memory shall be locked.
fn allocator(value: &str) -> anyhow::Result<bool> {
    let mut mlock = false;
    let (name, options) = value.split_once(',').unwrap_or((value, ""));
    for option in options.split(',').filter(|o| !o.is_empty()) {
        match (name, option.split_once('=')) {
            ("malloc", Some(("mlock", value))) => mlock = params::boolean(OsStr::new(value))?,
            ("zstd", Some(("level", value))) => drop(params::integer::<i32>("level", OsStr::new(value))?),
            _ => bail!("allocator={name} does not take the option '{option}'"),
        }
    }
    match name {
        "sparse" | "malloc" | "zstd" => Ok(mlock),
        _ => bail!("unknown allocator '{name}': use sparse, malloc or zstd"),
    }
}

/// The disk, one for all connections.
struct Disk {
    file: File,
    size: u64,
    /// Every page is in memory and stays there.
    mlock: bool,
    /// How often a hole was made.
    punches: AtomicU64,
}

impl Disk {
    fn new(size: u64, mlock: bool) -> anyhow::Result<Self> {
        let memfd = rustix::fs::memfd_create("nbdkit-memory", MemfdFlags::CLOEXEC);
        let file = File::from(memfd.context("cannot create a file in memory")?);
        // Whole pages, so that all of the last one can become a hole.
        file.set_len(size.next_multiple_of(PAGE).min(i64::MAX as u64))
            .with_context(|| format!("cannot make a file of {size} bytes in memory"))?;
        Ok(Disk { file, size, mlock, punches: AtomicU64::new(0) })
    }

    fn punch(&self, length: u64, offset: u64) -> Result<()> {
        if self.mlock {
            // A hole that is written to later would be a page that is not locked: have zeroes written instead.
            return Err(Errno::EOPNOTSUPP.into());
        }
        let end = offset + length;
        let end = if end == self.size { end.next_multiple_of(PAGE).min(i64::MAX as u64) } else { end };
        let done = holes::punch(&self.file, offset, end - offset);
        // After the hole is there: extents remembered until now are not believed any more.
        self.punches.fetch_add(1, Ordering::Release);
        done.map_err(|e| std::io::Error::from(e).into())
    }

    /// Adds the part of the last page of a disk of nearly 8 EiB: see [`BLIND`].
    fn blind_extent(&self, extents: &mut Extents) -> Result<()> {
        let at = extents.covered_to();
        let mut page = [0; PAGE as usize];
        let part = page.get_mut(..(self.size - at) as usize).ok_or(Errno::EIO)?;
        self.file.read_exact_at(part, at)?;
        let zero = part.iter().all(|b| *b == 0);
        extents.add(at, self.size - at, zero, zero)
    }
}

/// A handle. `known` is an extent of data, and the number of punches when it was found: looking for the end of data
/// takes time for each page of it, so a client that maps a full disk piece by piece must not start anew each time.
struct Shared {
    disk: Arc<Disk>,
    known: Mutex<(u64, Range<u64>)>,
}

impl Handle for Shared {
    fn get_size(&self) -> Result<u64> {
        Ok(self.disk.size)
    }

    fn can_write(&self) -> Result<bool> {
        Ok(true)
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
        Ok(true)
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        Ok(self.disk.file.read_exact_at(buf, offset)?)
    }

    fn pwrite(&self, buf: &[u8], offset: u64, _: Flags) -> Result<()> {
        Ok(self.disk.file.write_all_at(buf, offset)?)
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn trim(&self, length: u64, offset: u64, _: Flags) -> Result<()> {
        match self.disk.punch(length, offset) {
            Err(e) if e.is_unsupported() => Ok(()),
            done => done,
        }
    }

    fn zero(&self, length: u64, offset: u64, _: Flags) -> Result<()> {
        self.disk.punch(length, offset)
    }

    fn extents(&self, _: u64, offset: u64, flags: Flags, extents: &mut Extents) -> Result<()> {
        let punches = self.disk.punches.load(Ordering::Acquire);
        let (then, known) = self.known.lock().clone();
        if then == punches && known.contains(&offset) {
            extents.add_data(offset, known.end - offset)?;
        }
        holes::find(&self.disk.file, self.disk.size.min(BLIND), flags, extents)?;
        if let Some(last) = extents.as_slice().last()
            && !last.hole
        {
            *self.known.lock() = (punches, last.offset..last.end());
        }
        let done = flags.contains(Flags::REQ_ONE) && !extents.as_slice().is_empty();
        if extents.covered_to() >= BLIND && !extents.is_complete() && !done {
            self.disk.blind_extent(extents)?;
        }
        Ok(())
    }

    fn cache(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        if request.may_lend() {
            return Outcome::Lent(Loan { fd: self.disk.file.as_fd(), offset: request.offset() });
        }
        // Zeroes that have to be written take longer than a copy.
        if request.op() == Op::Zero && self.disk.mlock && !request.may_wait() {
            return Outcome::NeedsThread;
        }
        request.run(self)
    }

    fn may_skip_holes(&self) -> bool {
        true
    }
}
