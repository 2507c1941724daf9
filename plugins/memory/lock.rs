//! Keeping the disk out of swap. The one module of the plugin with `unsafe`: only a mapping can be locked.

#![allow(unsafe_code)]

use std::{fs::File, io, ptr};

use rustix::mm::{MapFlags, ProtFlags, mlock, mmap};

/// Allocates and locks the first `size` bytes of `file` in memory, until the process ends.
///
/// # Errors
/// `ENOMEM`, `EPERM` or `EAGAIN` over the limit of locked memory.
pub(super) fn pin(file: &File, size: u64) -> io::Result<()> {
    if size == 0 {
        return Ok(());
    }
    let length = usize::try_from(size).map_err(|_| io::ErrorKind::OutOfMemory)?;
    // SAFETY: a new mapping, at an address that the kernel chooses, disturbs none of Rust's memory.
    let start = unsafe {
        mmap(ptr::null_mut(), length, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, file, 0)
    }?;
    // SAFETY: it is the mapping just made. It is never unmapped, so it stays locked; nothing reads or writes
    // through it.
    unsafe { mlock(start, length) }?;
    Ok(())
}
