//! The pages of a memfd in our address space. The one module of the plugin with `unsafe`.
//!
//! A system call on a memfd spends about half of its time looking pages up, which a mapping leaves to the processor. What
//! is mapped is memory that others change at any time: other requests, and the kernel on behalf of those who have the file
//! on loan. So no reference into it is ever made; bytes are only copied in and out by raw pointers, as read(2) and
//! write(2) copy them, and what requests over the same bytes at the same time leave there is any mixture of them, as it
//! is on a disk.
//!
//! Access past the end of the file would be a signal. The file is sealed against shrinking, so it has no end before that of
//! the mapping, and only pages that exist are touched (see `plain`), so none has to be found that memory might not suffice for.

#![allow(unsafe_code)]

use std::{ffi::c_void, fs::File, io, ptr};

use rustix::{
    fs::{SealFlags, fcntl_add_seals},
    mm::{MapFlags, ProtFlags, mlock, mmap, munmap},
};

/// A read of a page that is not in the page tables yet puts its neighbours there as well, up to so many bytes. A write
/// does so for its own page alone.
const FAULT_AROUND: usize = 64 << 10;

/// A mapping of the start of a file.
pub(super) struct Mapping {
    start: *mut u8,
    /// In bytes.
    length: usize,
}

// SAFETY: the pointer is to memory that belongs to no thread, and methods only copy from and to it, as the module
// describes.
unsafe impl Send for Mapping {}
// SAFETY: as for Send.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `length` bytes of a memfd, which becomes one that cannot shrink.
    ///
    /// # Errors
    /// Those of the system; `EINVAL` when the file is shorter, and `ENOMEM` when it does not fit into the address space.
    pub(super) fn new(file: &File, length: u64) -> io::Result<Self> {
        fcntl_add_seals(file, SealFlags::SHRINK)?;
        if file.metadata()?.len() < length {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let length = usize::try_from(length).map_err(|_| io::ErrorKind::OutOfMemory)?;
        if length == 0 {
            return Ok(Mapping { start: ptr::NonNull::dangling().as_ptr(), length });
        }
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping, at an address that the kernel chooses, disturbs none of Rust's memory.
        let start = unsafe { mmap(ptr::null_mut(), length, protection, MapFlags::SHARED, file, 0) }?;
        Ok(Mapping { start: start.cast(), length })
    }

    /// The address of a range, which must be within the mapping.
    fn at(&self, offset: u64, length: usize) -> *mut u8 {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = offset.checked_add(length);
        assert!(end.is_some_and(|end| end <= self.length), "{length} bytes at {offset} are not mapped");
        self.start.wrapping_add(offset)
    }

    /// Copies `data` to `offset`. Panics when that is past the end.
    pub(super) fn write(&self, data: &[u8], offset: u64) {
        let target = self.at(offset, data.len());
        for part in (0..data.len()).step_by(FAULT_AROUND) {
            // SAFETY: it is a byte of the target, which `at` has checked to be within the mapping; any value is a valid one.
            // Others may change it at the same time, and it is not used.
            unsafe { target.wrapping_add(part).read_volatile() };
        }
        // SAFETY: `at` has checked that the target is within the mapping, which lives as long as `self`, and the file
        // cannot become shorter. `data` is Rust's, so it is not in the mapping, into which no reference is ever made.
        unsafe { ptr::copy_nonoverlapping(data.as_ptr(), target, data.len()) };
    }

    /// Fills `buf` from `offset`. Panics when that is past the end.
    pub(super) fn read(&self, buf: &mut [u8], offset: u64) {
        let source = self.at(offset, buf.len());
        // SAFETY: as in `write`; any bytes are valid ones.
        unsafe { ptr::copy_nonoverlapping(source, buf.as_mut_ptr(), buf.len()) };
    }

    /// Allocates all of it and locks it in memory, until it is unmapped.
    ///
    /// # Errors
    /// `ENOMEM`, `EPERM` or `EAGAIN` over the limit of locked memory.
    pub(super) fn lock(&self) -> io::Result<()> {
        if self.length > 0 {
            // SAFETY: it is our mapping, and locking changes none of its bytes.
            unsafe { mlock(self.start.cast::<c_void>(), self.length) }?;
        }
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.length > 0 {
            // SAFETY: it is our mapping, and nothing points into it but `self`.
            let done = unsafe { munmap(self.start.cast::<c_void>(), self.length) };
            debug_assert!(done.is_ok());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    fn file(length: u64) -> File {
        let fd = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        let file = File::from(fd);
        file.set_len(length).unwrap();
        file
    }

    #[test]
    fn the_mapping_is_the_file() {
        let file = file(10_000);
        let mapping = Mapping::new(&file, 10_000).unwrap();
        mapping.write(b"hello", 9_995);
        let mut bytes = [0; 5];
        file.read_exact_at(&mut bytes, 9_995).unwrap();
        assert_eq!(&bytes, b"hello");
        file.write_all_at(b"HE", 9_995).unwrap();
        mapping.read(&mut bytes, 9_995);
        assert_eq!(&bytes, b"HEllo");
        mapping.read(&mut [], 10_000);
    }

    #[test]
    fn the_file_cannot_shrink() {
        let file = file(8192);
        let _mapping = Mapping::new(&file, 8192).unwrap();
        assert_eq!(file.set_len(4096).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        assert!(Mapping::new(&file, 8193).is_err());
    }

    #[test]
    #[should_panic(expected = "are not mapped")]
    fn nothing_past_the_end_is_touched() {
        Mapping::new(&file(4096), 4096).unwrap().write(&[1, 2], 4095);
    }

    #[test]
    fn empty_and_huge_files() {
        Mapping::new(&file(0), 0).unwrap().write(&[], 0);
        assert!(Mapping::new(&file(1 << 60), 1 << 60).is_err());
    }
}
