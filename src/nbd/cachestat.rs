//! Whether a range of a file is in memory. With `unsafe`, for no library has the system call.

#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::libc;

/// `struct cachestat_range`.
#[repr(C)]
struct Range {
    offset: u64,
    length: u64,
}

/// `struct cachestat`, in pages.
#[repr(C)]
#[derive(Default)]
struct Pages {
    cached: u64,
    dirty: u64,
    written_back: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// Since Linux 6.5; the same for all architectures.
const CACHESTAT: libc::c_long = 451;

/// Whether every page of a range is in the page cache, as far as the kernel tells: it does not for files that the caller
/// could not write to, and not before Linux 6.5.
pub(crate) fn is_resident(file: BorrowedFd<'_>, offset: u64, length: u64) -> bool {
    let page = rustix::param::page_size() as u64;
    let Some(end) = offset.checked_add(length) else { return false };
    let needed = end.div_ceil(page) - offset / page;
    let range = Range { offset, length };
    let mut pages = Pages::default();
    // SAFETY: the kernel reads a `Range` and writes a `Pages`, which both live until it returns, and keeps neither.
    let done = unsafe { libc::syscall(CACHESTAT, file.as_raw_fd(), &raw const range, &raw mut pages, 0_u32) };
    done == 0 && pages.cached >= needed
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::fd::AsFd};

    use super::*;

    #[test]
    fn what_was_written_is_and_what_is_not_there_is_not() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 100_000]).unwrap();
        // Not every kernel tells.
        if is_resident(file.as_fd(), 0, 1) {
            assert!(is_resident(file.as_fd(), 1, 99_999));
            assert!(is_resident(file.as_fd(), 4095, 2));
        }
        assert!(!is_resident(file.as_fd(), 0, 1 << 20));
        assert!(!is_resident(file.as_fd(), u64::MAX, 2));
        file.set_len(1 << 20).unwrap();
        assert!(!is_resident(file.as_fd(), 65536, 65536));
    }
}
