//! What the server does for plugins with files, passwords and time, so that all plugins do it alike.

use std::{
    ffi::{CStr, CString, OsString, c_char},
    io,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
    ptr,
    time::Duration,
};

use crate::{Error, Result, sys};

/// Parses an integer as every plugin does: decimal, octal after `0` or hexadecimal after `0x`. `what` names it in the error
/// message.
///
/// # Errors
///
/// `EINVAL`: not an integer of 64 bits; the server has logged it.
pub fn parse_int(what: &str, s: &str) -> Result<i64> {
    let (c_what, text) = (argument(what)?, argument(s)?);
    let mut result = 0;
    // SAFETY: two C strings and a place for the result, all of which live through the call.
    match unsafe { sys::nbdkit_parse_int64_t(c_what.as_ptr(), text.as_ptr(), &raw mut result) } {
        -1 => Err(Error::new(libc::EINVAL, format!("{what}: not an integer: {s:?}"))),
        _ => Ok(result),
    }
}

/// Parses a delay: a number of seconds, or with a suffix: `1.5`, `100ms`, `20us`, `5ns`. `what` names it in the error
/// message.
///
/// # Errors
///
/// `EINVAL`: not a delay; the server has logged it. `ENOTSUP`: the server is too old to parse delays.
pub fn parse_delay(what: &str, s: &str) -> Result<Duration> {
    // SAFETY: that is the function's type.
    let parse = unsafe { sys::newer_function::<sys::ParseDelay>(c"nbdkit_parse_delay") };
    let Some(parse) = parse else {
        return Err(Error::new(libc::ENOTSUP, format!("{what}: this server is too old to parse delays")));
    };
    let (c_what, text) = (argument(what)?, argument(s)?);
    let (mut seconds, mut nanoseconds) = (0, 0);
    // SAFETY: two C strings and places for the results, all of which live through the call.
    match unsafe { parse(c_what.as_ptr(), text.as_ptr(), &raw mut seconds, &raw mut nanoseconds) } {
        -1 => Err(Error::new(libc::EINVAL, format!("{what}: not a delay: {s:?}"))),
        _ => Ok(Duration::new(seconds.into(), nanoseconds)),
    }
}

/// Reads a password from where `value` says: it is the password itself, or `-` for the terminal, `+FILE` for a file,
/// `-FD` for a file descriptor.
///
/// # Errors
///
/// The server has logged why.
pub fn read_password(value: impl AsRef<[u8]>) -> Result<Vec<u8>> {
    let value = argument(value)?;
    let mut password = ptr::null_mut();
    // SAFETY: a C string and a place for the result, which live through the call.
    let answer = unsafe { sys::nbdkit_read_password(value.as_ptr(), &raw mut password) };
    // SAFETY: the server allocates the password for its caller.
    let password = unsafe { taken(password) };
    password.filter(|_| answer != -1).ok_or_else(|| Error::new(libc::EINVAL, "the password cannot be read"))
}

/// `path` from the root on. Paths in parameters are relative to the directory that the server was started in, and it
/// may leave that: call this in [`Server::config`](crate::Server::config). The file need not exist.
///
/// # Errors
///
/// The server has logged why.
pub fn absolute_path(path: &Path) -> Result<PathBuf> {
    by_server(path, sys::nbdkit_absolute_path)
}

/// As [`absolute_path`], and without symbolic links. The file must exist.
///
/// # Errors
///
/// The server has logged why.
pub fn realpath(path: &Path) -> Result<PathBuf> {
    by_server(path, sys::nbdkit_realpath)
}

/// Sleeps, unless the server ends or the client goes away in the meantime.
///
/// # Errors
///
/// `ESHUTDOWN`: the sleep was cut short, and the callback should end.
pub fn nanosleep(duration: Duration) -> Result<()> {
    let seconds = libc::c_uint::try_from(duration.as_secs()).unwrap_or(libc::c_uint::MAX);
    // SAFETY: two numbers, the second below a milliard.
    match unsafe { sys::nbdkit_nanosleep(seconds, duration.subsec_nanos()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error().into()),
    }
}

fn by_server(path: &Path, function: unsafe extern "C" fn(*const c_char) -> *mut c_char) -> Result<PathBuf> {
    let text = argument(path.as_os_str().as_bytes())?;
    // SAFETY: a C string that lives through the call.
    let answer = unsafe { function(text.as_ptr()) };
    // SAFETY: the server allocates it for its caller.
    let answer = unsafe { taken(answer) };
    let answer = answer.map(|bytes| PathBuf::from(OsString::from_vec(bytes)));
    answer.ok_or_else(|| {
        let cause = io::Error::last_os_error();
        Error::new(cause.raw_os_error().unwrap_or(0), format!("{}: {cause}", path.display()))
    })
}

/// Takes over a string that the server has allocated; None for null.
///
/// # Safety
///
/// Null or a C string from malloc, which nobody uses after this.
pub(crate) unsafe fn taken(text: *mut c_char) -> Option<Vec<u8>> {
    if text.is_null() {
        return None;
    }
    // SAFETY: the caller says that it is a C string.
    let bytes = unsafe { CStr::from_ptr(text) }.to_bytes().to_vec();
    // SAFETY: the caller says that it is from malloc.
    unsafe { libc::free(text.cast()) };
    Some(bytes)
}

/// A value to hand over must not be cut short.
pub(crate) fn argument(text: impl AsRef<[u8]>) -> Result<CString> {
    let text = text.as_ref();
    CString::new(text)
        .map_err(|_| Error::new(libc::EINVAL, format!("zero byte in {:?}", String::from_utf8_lossy(text))))
}
