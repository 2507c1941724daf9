//! Interned strings: those of a connection stay as long as it is open, others as long as the server.

use std::ffi::{CStr, CString, c_char};

use nbdkit_core::Errno;

use super::messages::error_with;
use crate::{
    context::current,
    panic::boundary,
    strings::{GLOBAL, c_string, text},
};

/// Keeps a string for the layer that this thread is in.
pub(super) fn intern(text: CString) -> *const c_char {
    current(|frame| match frame.and_then(|frame| frame.scope.opened) {
        Some(opened) => opened.strings.keep(text),
        None => GLOBAL.keep(text),
    })
}

fn null(function: &str) -> *const c_char {
    error_with(Errno::EINVAL, format!("{function}: there is no string"));
    std::ptr::null()
}

/// `nbdkit_printf_intern`, formatted.
///
/// # Safety
/// A terminated string.
#[unsafe(no_mangle)]
unsafe extern "C" fn nbdkitrs_intern(string: *const c_char) -> *const c_char {
    // SAFETY: the caller promises it.
    unsafe { nbdkit_strdup_intern(string) }
}

/// Interns a copy of a string.
///
/// # Safety
/// A terminated string or null.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn nbdkit_strdup_intern(string: *const c_char) -> *const c_char {
    // SAFETY: the caller promises it.
    boundary(std::ptr::null(), || match unsafe { text(string) } {
        Some(text) => intern(text.to_owned()),
        None => null("nbdkit_strdup_intern"),
    })
}

/// Interns a copy of the first `length` bytes of a string, or of all that there are.
///
/// # Safety
/// `length` bytes, or fewer with a NUL, or null.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn nbdkit_strndup_intern(string: *const c_char, length: usize) -> *const c_char {
    boundary(std::ptr::null(), || {
        if string.is_null() {
            return null("nbdkit_strndup_intern");
        }
        // SAFETY: the caller promises that there are as many before the NUL.
        let length = unsafe { nix::libc::strnlen(string, length) };
        // SAFETY: as above.
        let bytes = unsafe { std::slice::from_raw_parts(string.cast::<u8>(), length) };
        intern(c_string(bytes))
    })
}

/// A copy that C may free, as `strdup` makes it; null without memory.
pub(super) fn allocate(text: &CStr) -> *mut c_char {
    // SAFETY: a terminated string.
    unsafe { nix::libc::strdup(text.as_ptr()) }
}
