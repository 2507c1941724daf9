//! A disk in memory, written for the crate nbdkit 0.3.0. It is compiled against that and against this project's SDK.

use std::sync::{Mutex, MutexGuard};

use nbdkit::*;

static SIZE: Mutex<i64> = Mutex::new(1 << 20);
static DISK: Mutex<Vec<u8>> = Mutex::new(Vec::new());

#[derive(Default)]
struct RamDisk {
    /// Something for the box to own.
    _readonly: bool,
}

fn disk() -> MutexGuard<'static, Vec<u8>> {
    DISK.lock().unwrap()
}

fn zeroes(count: u32, offset: u64) {
    let start = offset as usize;
    disk()[start..start + count as usize].fill(0);
}

impl Server for RamDisk {
    fn name() -> &'static str {
        "ramdisk"
    }

    fn longname() -> Option<&'static str> {
        Some("a disk in memory")
    }

    fn config_help() -> Option<&'static str> {
        Some("size=<SIZE>  The size, 1M unless given.")
    }

    fn magic_config_key() -> Option<&'static str> {
        Some("size")
    }

    fn config(key: &str, value: &str) -> Result<()> {
        match key {
            "size" => *SIZE.lock().unwrap() = parse_size(value).map_err(|e| Error::new(libc::EINVAL, e))?,
            _ => return Err(Error::new(libc::EINVAL, format!("unknown parameter '{}'", key))),
        }
        Ok(())
    }

    fn config_complete() -> Result<()> {
        disk().resize(*SIZE.lock().unwrap() as usize, 0);
        Ok(())
    }

    fn thread_model() -> Result<ThreadModel> {
        Ok(ThreadModel::Parallel)
    }

    fn dump_plugin() {
        println!("ramdisk_is_rust=yes");
    }

    fn open(readonly: bool) -> Result<Box<dyn Server>> {
        let name = export_name().map_err(|e| Error::new(libc::EIO, e))?;
        if name == "none" {
            return Err(Error::new(libc::ENOENT, "there is no such disk"));
        }
        Ok(Box::new(RamDisk { _readonly: readonly }))
    }

    fn get_size(&self) -> Result<i64> {
        Ok(disk().len() as i64)
    }

    fn can_multi_conn(&self) -> Result<bool> {
        Ok(true)
    }

    fn can_fua(&self) -> Result<FuaFlags> {
        Ok(FuaFlags::Native)
    }

    fn can_cache(&self) -> Result<CacheFlags> {
        Ok(CacheFlags::Native)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let start = offset as usize;
        buf.copy_from_slice(&disk()[start..start + buf.len()]);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64, _flags: Flags) -> Result<()> {
        let start = offset as usize;
        if buf.starts_with(b"no space") {
            return Err(Error::new(libc::ENOSPC, "the disk is full"));
        }
        disk()[start..start + buf.len()].copy_from_slice(buf);
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn trim(&self, count: u32, offset: u64, _flags: Flags) -> Result<()> {
        zeroes(count, offset);
        Ok(())
    }

    fn zero(&self, count: u32, offset: u64, _flags: Flags) -> Result<()> {
        zeroes(count, offset);
        Ok(())
    }

    fn extents(&self, count: u32, offset: u64, _flags: Flags, extents: &mut ExtentHandle) -> Result<()> {
        let disk = disk();
        let data = &disk[offset as usize..offset as usize + count as usize];
        let is_zero = data.iter().all(|byte| *byte == 0);
        let kind = if is_zero { ExtentType::HoleZero } else { ExtentType::Allocated };
        extents.add(offset, u64::from(count), kind)
    }

    fn cache(&self, _count: u32, _offset: u64) -> Result<()> {
        Ok(())
    }
}

plugin!(RamDisk {
    cache,
    can_cache,
    can_fua,
    can_multi_conn,
    config,
    config_complete,
    config_help,
    dump_plugin,
    extents,
    flush,
    thread_model,
    trim,
    write_at,
    zero
});
