//! File descriptors that the caller passed to us by number. `unsafe`, for a number
//! proves nothing, so borrowing it must be vouched for.

#![allow(unsafe_code)]

use std::{
    ffi::OsStr,
    os::fd::{BorrowedFd, OwnedFd, RawFd},
};

use anyhow::{Context as _, bail};
use nbdkit_core::params;
use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};

/// A copy of the descriptor whose number is `value`, and no child of ours inherits either.
///
/// # Errors
/// No number, 0 to 2, or not open.
pub(crate) fn inherited(key: &str, value: &OsStr) -> anyhow::Result<OwnedFd> {
    let fd: RawFd = params::integer(key, value)?;
    if fd < 3 {
        bail!("{key}={fd}: use a descriptor from 3 up (0, 1 and 2 are the standard ones)");
    }
    // SAFETY: the borrow ends within this function, and nothing closes descriptors while parameters are read. If
    // the number is not open, the calls below fail with EBADF and do nothing else.
    let theirs = unsafe { BorrowedFd::borrow_raw(fd) };
    let ours = fcntl_dupfd_cloexec(theirs, 3).with_context(|| {
        format!("{key}={fd} is not open: pass a descriptor, as the shell does with {fd}<>disk.img")
    })?;
    fcntl_setfd(theirs, FdFlags::CLOEXEC).with_context(|| format!("{key}={fd}"))?;
    Ok(ours)
}
