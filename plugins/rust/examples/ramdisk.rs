//! A disk in memory, shared by all clients.
//!
//! ```console
//! $ cargo build --example ramdisk
//! $ nbdkit target/debug/examples/libramdisk.so size=100M --run 'nbdcopy disk.img "$uri"'
//! ```

use std::sync::{
    OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
    atomic::{AtomicI64, Ordering},
};

use nbdkit::*;

static SIZE: AtomicI64 = AtomicI64::new(64 << 20);
static DISK: OnceLock<RwLock<Vec<u8>>> = OnceLock::new();

struct RamDisk;

fn disk() -> Result<&'static RwLock<Vec<u8>>> {
    DISK.get().ok_or_else(|| Error::new(libc::EIO, "the disk is not ready"))
}

fn shared() -> Result<RwLockReadGuard<'static, Vec<u8>>> {
    Ok(disk()?.read().unwrap_or_else(PoisonError::into_inner))
}

fn exclusive() -> Result<RwLockWriteGuard<'static, Vec<u8>>> {
    Ok(disk()?.write().unwrap_or_else(PoisonError::into_inner))
}

// The server has checked that requests lie within get_size.
impl Server for RamDisk {
    fn name() -> &'static str {
        "ramdisk"
    }

    fn description() -> Option<&'static str> {
        Some("a disk in memory, shared by all clients")
    }

    fn config_help() -> Option<&'static str> {
        Some("size=<SIZE>  size of the disk, 64M unless given")
    }

    fn magic_config_key() -> Option<&'static str> {
        Some("size")
    }

    fn config(key: &str, value: &str) -> Result<()> {
        match key {
            "size" => SIZE.store(parse_size(value)?, Ordering::Relaxed),
            _ => {
                return Err(Error::new(
                    libc::EINVAL,
                    format!("unknown parameter {key}: there is only size="),
                ));
            }
        }
        Ok(())
    }

    fn get_ready() -> Result<()> {
        let size = SIZE.load(Ordering::Relaxed);
        let mut bytes = Vec::new();
        usize::try_from(size)
            .ok()
            .and_then(|size| bytes.try_reserve_exact(size).ok().map(|()| bytes.resize(size, 0)))
            .ok_or_else(|| Error::new(libc::ENOMEM, format!("size={size}: there is not that much memory")))?;
        DISK.get_or_init(|| RwLock::new(bytes));
        Ok(())
    }

    fn open(readonly: bool) -> Result<Box<dyn Server>> {
        debug!("export {:?}, readonly {readonly}", export_name().unwrap_or_default());
        Ok(Box::new(RamDisk))
    }

    fn get_size(&self) -> Result<i64> {
        Ok(SIZE.load(Ordering::Relaxed))
    }

    fn can_multi_conn(&self) -> Result<bool> {
        Ok(true)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let start = offset as usize;
        buf.copy_from_slice(&shared()?[start..start + buf.len()]);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64, _flags: Flags) -> Result<()> {
        let start = offset as usize;
        exclusive()?[start..start + buf.len()].copy_from_slice(buf);
        Ok(())
    }

    fn zero(&self, count: u32, offset: u64, _flags: Flags) -> Result<()> {
        let start = offset as usize;
        exclusive()?[start..start + count as usize].fill(0);
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }
}

plugin!(RamDisk { config, get_ready, can_multi_conn, write_at, zero, flush });
