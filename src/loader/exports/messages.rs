//! Errors, debug messages, and the errno of a request.

use std::{
    ffi::{c_char, c_int, c_void},
    fmt::Write,
};

use log::Level;
use nbdkit_core::Errno;

use crate::{
    context::{TARGET, current, say_error},
    panic::boundary,
    strings::owned,
};

/// Reports an error as the server, for the functions here.
pub(super) fn error(text: impl std::fmt::Display) {
    say_error(text.to_string());
}

/// As [`error`], and sets errno.
pub(super) fn error_with(errno: Errno, text: impl std::fmt::Display) {
    error(text);
    errno.set();
}

/// `nbdkit_error`, formatted.
///
/// # Safety
/// A terminated string.
#[unsafe(no_mangle)]
unsafe extern "C" fn nbdkitrs_error(text: *const c_char) {
    boundary((), || {
        // SAFETY: the caller promises it.
        let text = unsafe { owned(text) };
        say_error(text.trim_end_matches('\n').to_owned());
    });
}

/// `nbdkit_debug`, formatted.
///
/// # Safety
/// A terminated string.
#[unsafe(no_mangle)]
unsafe extern "C" fn nbdkitrs_debug(text: *const c_char) {
    boundary((), || {
        // SAFETY: the caller promises it.
        let text = unsafe { owned(text) };
        log::debug!(target: TARGET, "{}", text.trim_end_matches('\n'));
    });
}

/// Whether debug messages are worth formatting.
#[unsafe(no_mangle)]
extern "C" fn nbdkitrs_is_verbose() -> c_int {
    log::log_enabled!(target: TARGET, Level::Debug).into()
}

/// The errno of the request, should it fail.
#[unsafe(no_mangle)]
pub(super) extern "C" fn nbdkit_set_error(errno: c_int) {
    boundary((), || current(|frame| frame.map_or((), |frame| frame.set_errno(errno))));
}

/// How many bytes a line of a dump shows.
const ROW: u64 = 16;

/// The line of a dump that shows `bytes`, which start at `at`.
fn row(at: u64, bytes: &[u8], shown: impl Fn(usize) -> bool) -> String {
    let start = at / ROW * ROW;
    let skip = (at - start) as usize;
    let mut hex = String::new();
    let mut text = String::new();
    for column in 0..ROW as usize {
        if column == ROW as usize / 2 {
            hex.push(' ');
        }
        match column.checked_sub(skip).and_then(|i| bytes.get(i).map(|b| (i, *b))) {
            Some((i, byte)) if shown(i) => {
                // Writing to a String cannot fail.
                let _ = write!(hex, "{byte:02x} ");
                text.push(if (0x20..0x7f).contains(&byte) { char::from(byte) } else { '.' });
            }
            _ => {
                hex.push_str("   ");
                text.push(' ');
            }
        }
    }
    format!("{start:08x}: {hex}|{text}|")
}

/// The rows of a buffer: where each starts, and its part of the buffer.
fn rows(bytes: &[u8], at: u64) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let from = done;
        let start = at.wrapping_add(from as u64);
        let room = (ROW - start % ROW) as usize;
        done = bytes.len().min(from + room);
        (from < done).then_some((start, from..done))
    })
}

/// # Safety
/// Null, or `length` bytes that stay as they are during `'a`.
unsafe fn slice<'a>(bytes: *const c_void, length: usize) -> &'a [u8] {
    if bytes.is_null() || length == 0 {
        return &[];
    }
    // SAFETY: the caller promises it.
    unsafe { std::slice::from_raw_parts(bytes.cast(), length) }
}

/// Dumps a buffer as debug messages; `start` is its offset.
///
/// # Safety
/// A buffer of `length` bytes; a terminated string or null.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn nbdkit_debug_hexdump(
    buffer: *const c_void,
    length: usize,
    prefix: *const c_char,
    start: u64,
) {
    boundary((), || {
        if nbdkitrs_is_verbose() == 0 {
            return;
        }
        // SAFETY: the caller promises it.
        let (buffer, prefix) = unsafe { (slice(buffer, length), owned(prefix)) };
        for (at, part) in rows(buffer, start) {
            log::debug!(target: TARGET, "{prefix}{}", row(at, &buffer[part], |_| true));
        }
    });
}

/// Dumps the rows in which two buffers differ: what was, and what is.
///
/// # Safety
/// Two buffers of `length` bytes; a terminated string or null.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn nbdkit_debug_hexdiff(
    old: *const c_void,
    new: *const c_void,
    length: usize,
    prefix: *const c_char,
    start: u64,
) {
    boundary((), || {
        if nbdkitrs_is_verbose() == 0 {
            return;
        }
        // SAFETY: the caller promises it.
        let (old, new, prefix) = unsafe { (slice(old, length), slice(new, length), owned(prefix)) };
        for (at, part) in rows(old, start) {
            let Some(is) = new.get(part.clone()) else { return };
            let was = &old[part];
            if was != is {
                log::debug!(target: TARGET, "{prefix}-{}", row(at, was, |_| true));
                log::debug!(target: TARGET, "{prefix}+{}", row(at, is, |i| was[i] != is[i]));
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dumps_keep_their_columns() {
        let bytes: Vec<u8> = (0x41..0x41 + 20).collect();
        let lines: Vec<_> = rows(&bytes, 0x1c).map(|(at, part)| row(at, &bytes[part], |_| true)).collect();
        assert_eq!(lines.len(), 2);
        assert!(lines[0].starts_with("00000010: "), "{}", lines[0]);
        assert!(lines[0].ends_with("|            ABCD|"), "{}", lines[0]);
        assert!(lines[1].starts_with("00000020: 45 46"), "{}", lines[1]);
        assert!(lines[1].ends_with("|EFGHIJKLMNOPQRST|"), "{}", lines[1]);
        assert_eq!(rows(&[], 3).count(), 0);
    }
}
