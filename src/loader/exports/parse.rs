//! Values of parameters. The syntax is `nbdkit_core::params`' own; here it meets C.

use std::ffi::{OsStr, c_char, c_int, c_uint};

use nbdkit_core::{Errno, params};

use super::messages::{error, error_with};
use crate::{
    panic::boundary,
    strings::{os, owned, text},
};

/// Reads a value; None after an error was reported.
///
/// # Safety
/// A terminated string or null.
unsafe fn read<T>(value: *const c_char, parse: impl FnOnce(&OsStr) -> anyhow::Result<T>) -> Option<T> {
    // SAFETY: the caller promises it.
    let Some(value) = (unsafe { text(value) }) else {
        error_with(Errno::EINVAL, "there is no value to parse");
        return None;
    };
    parse(os(value)).map_err(|e| error_with(Errno::EINVAL, format!("{e:#}"))).ok()
}

/// Stores a value where C wants it; null: nowhere.
///
/// # Safety
/// Null or room for a `T`.
unsafe fn store<T>(place: *mut T, value: T) {
    if !place.is_null() {
        // SAFETY: the caller promises it.
        unsafe { place.write(value) };
    }
}

/// A size in bytes, or -1.
///
/// # Safety
/// A terminated string or null.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn nbdkit_parse_size(value: *const c_char) -> i64 {
    // SAFETY: the caller promises it.
    boundary(-1, || match unsafe { read(value, params::size) } {
        Some(size) => i64::try_from(size).unwrap_or(-1),
        None => -1,
    })
}

/// 1, 0, or -1.
///
/// # Safety
/// A terminated string or null.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn nbdkit_parse_bool(value: *const c_char) -> c_int {
    // SAFETY: the caller promises it.
    boundary(-1, || unsafe { read(value, params::boolean) }.map_or(-1, c_int::from))
}

/// A number from 0 to 1.
///
/// # Safety
/// Terminated strings or null; room for the result or null.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn nbdkit_parse_probability(
    what: *const c_char,
    value: *const c_char,
    result: *mut f64,
) -> c_int {
    boundary(-1, || {
        // SAFETY: the caller promises it.
        let what = unsafe { owned(what) };
        let parse = |value: &OsStr| params::probability(value).map_err(|e| e.context(what));
        // SAFETY: the caller promises it.
        let Some(probability) = (unsafe { read(value, parse) }) else { return -1 };
        // SAFETY: the caller promises it.
        unsafe { store(result, probability) };
        0
    })
}

/// A delay in seconds and nanoseconds.
///
/// # Safety
/// Terminated strings or null; room for the results or null.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn nbdkit_parse_delay(
    what: *const c_char,
    value: *const c_char,
    seconds: *mut c_uint,
    nanoseconds: *mut c_uint,
) -> c_int {
    boundary(-1, || {
        // SAFETY: the caller promises it.
        let what = unsafe { owned(what) };
        let parse = |value: &OsStr| params::delay(value).map_err(|e| e.context(what.clone()));
        // SAFETY: the caller promises it.
        let Some(delay) = (unsafe { read(value, parse) }) else { return -1 };
        let Ok(whole) = c_uint::try_from(delay.as_secs()) else {
            error(format!("{what}: the delay is too long"));
            return -1;
        };
        // SAFETY: the caller promises it.
        unsafe {
            store(seconds, whole);
            store(nanoseconds, delay.subsec_nanos());
        }
        0
    })
}

macro_rules! integers {
    ($($name:ident: $type:ty,)*) => {
        $(
            /// An integer of the type in the name.
            ///
            /// # Safety
            /// Terminated strings or null; room for the result or null.
            #[unsafe(no_mangle)]
            pub(super) unsafe extern "C" fn $name(
                what: *const c_char,
                value: *const c_char,
                result: *mut $type,
            ) -> c_int {
                boundary(-1, || {
                    // SAFETY: the caller promises it.
                    let what = unsafe { owned(what) };
                    // SAFETY: the caller promises it.
                    let parsed = unsafe { read(value, |value| params::integer::<$type>(&what, value)) };
                    let Some(number) = parsed else { return -1 };
                    // SAFETY: the caller promises it.
                    unsafe { store(result, number) };
                    0
                })
            }
        )*
    };
}

integers! {
    nbdkit_parse_int: c_int,
    nbdkit_parse_unsigned: c_uint,
    nbdkit_parse_int8_t: i8,
    nbdkit_parse_uint8_t: u8,
    nbdkit_parse_int16_t: i16,
    nbdkit_parse_uint16_t: u16,
    nbdkit_parse_int32_t: i32,
    nbdkit_parse_uint32_t: u32,
    nbdkit_parse_int64_t: i64,
    nbdkit_parse_uint64_t: u64,
}
