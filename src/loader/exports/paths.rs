//! Paths, made to last: the server may change its directory when it goes to the background.

use std::{ffi::c_char, os::unix::ffi::OsStrExt, ptr};

use nbdkit_core::Errno;

use super::{
    messages::{error, error_with},
    strings::allocate,
};
use crate::{
    panic::boundary,
    strings::{c_string, os, owned, text},
};

/// The path with the current directory before it, unless it is absolute. The caller frees it.
///
/// # Safety
/// A terminated string or null.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn nbdkit_absolute_path(path: *const c_char) -> *mut c_char {
    boundary(ptr::null_mut(), || {
        // SAFETY: the caller promises it.
        let Some(path) = (unsafe { text(path) }).filter(|path| !path.is_empty()) else {
            error_with(Errno::EINVAL, "cannot make an absolute path of an empty one");
            return ptr::null_mut();
        };
        match std::env::current_dir() {
            Ok(directory) => allocate(&c_string(directory.join(os(path)).as_os_str().as_bytes())),
            Err(e) => {
                error(format!("cannot tell the current directory: {e}"));
                ptr::null_mut()
            }
        }
    })
}

/// The path without symbolic links; it must exist. The caller frees it.
///
/// # Safety
/// A terminated string or null.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn nbdkit_realpath(path: *const c_char) -> *mut c_char {
    boundary(ptr::null_mut(), || {
        if path.is_null() {
            error_with(Errno::EINVAL, "cannot make a real path of an empty one");
            return ptr::null_mut();
        }
        // SAFETY: a terminated string; with null the result is allocated.
        let real = unsafe { nix::libc::realpath(path, ptr::null_mut()) };
        if real.is_null() {
            let errno = Errno::last();
            // SAFETY: as above.
            error_with(errno, format!("realpath: {}: {}", unsafe { owned(path) }, errno.desc()));
        }
        real
    })
}
