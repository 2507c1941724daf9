//! What a plugin may ask of the server.

use std::{error, ffi::CStr, fmt};

use crate::{Error, Result, sys, values::argument};

/// Logs a message that is shown when the server runs with `-v`. Takes what [`format!`] takes.
///
/// ```no_run
/// # let path = "/dev/sda";
/// nbdkit::debug!("opened {path}");
/// ```
#[macro_export]
macro_rules! debug {
    ($($argument:tt)*) => {
        $crate::write_debug_message(::std::format_args!($($argument)*))
    };
}

/// What [`debug!`] expands to.
#[doc(hidden)]
pub fn write_debug_message(message: fmt::Arguments<'_>) {
    let message = sys::c_string(&message.to_string());
    // SAFETY: "%s" takes the one string that follows it; both live through the call.
    unsafe { sys::nbdkit_debug(c"%s".as_ptr(), message.as_ptr()) }
}

/// Logs bytes in hexadecimal, sixteen to a line, when the server runs with `-v`. `start` is what the offset of the first
/// one is to be called, `prefix` stands before each line.
///
/// Servers before nbdkit 1.46 cannot; they log how many bytes there are.
///
/// ```no_run
/// # let (buf, offset) = ([0; 512], 0);
/// nbdkit::debug_hexdump(&buf, "read: ", offset);
/// ```
pub fn debug_hexdump(bytes: &[u8], prefix: &str, start: u64) {
    let text = sys::c_string(prefix);
    // SAFETY: that is the function's type.
    match unsafe { sys::newer_function::<sys::Hexdump>(c"nbdkit_debug_hexdump") } {
        // SAFETY: bytes of that length and a C string, which live through the call.
        Some(dump) => unsafe { dump(bytes.as_ptr().cast(), bytes.len(), text.as_ptr(), start) },
        None => crate::debug!("{prefix}{} bytes at {start:#x}", bytes.len()),
    }
}

/// Logs the lines of [`debug_hexdump`] in which `new` differs from `old`, as a diff.
///
/// Servers before nbdkit 1.46 cannot; they log how many bytes differ.
///
/// # Panics
///
/// The two differ in length.
pub fn debug_hexdiff(old: &[u8], new: &[u8], prefix: &str, start: u64) {
    assert_eq!(old.len(), new.len(), "debug_hexdiff compares buffers of the same length");
    let text = sys::c_string(prefix);
    // SAFETY: that is the function's type.
    match unsafe { sys::newer_function::<sys::Hexdiff>(c"nbdkit_debug_hexdiff") } {
        // SAFETY: two buffers of that length and a C string, which live through the call.
        Some(diff) => unsafe {
            diff(old.as_ptr().cast(), new.as_ptr().cast(), old.len(), text.as_ptr(), start);
        },
        None => {
            let changed = old.iter().zip(new).filter(|(old, new)| old != new).count();
            crate::debug!("{prefix}{changed} bytes differ from {start:#x} on");
        }
    }
}

/// Sets the errno that the client gets if the current callback fails with an [`Error`] that has none (0).
pub fn set_error(errno: i32) {
    // SAFETY: any number may be set; it belongs to this thread.
    unsafe { sys::nbdkit_set_error(errno) }
}

/// The name of the export that the current client asked for; empty for the default one.
///
/// Call it from [`Server::open`](crate::Server::open) or a method of the handle.
///
/// # Errors
///
/// There is no client on this thread, or the name is not UTF-8.
pub fn export_name() -> std::result::Result<String, Box<dyn error::Error>> {
    // SAFETY: it may be called at any time and answers null where there is no client.
    let name = unsafe { sys::nbdkit_export_name() };
    if name.is_null() {
        return Err("no export name: not in a callback of a client".into());
    }
    // SAFETY: the server's string lives as long as the connection that this callback serves.
    let name = unsafe { CStr::from_ptr(name) };
    Ok(name.to_str()?.to_owned())
}

/// Whether the current client speaks TLS.
///
/// Call it from [`Server::open`](crate::Server::open) or a method of the handle.
///
/// # Errors
///
/// `EINVAL`: there is no client on this thread.
pub fn is_tls() -> Result<bool> {
    // SAFETY: it may be called at any time and answers -1 where there is no client.
    match unsafe { sys::nbdkit_is_tls() } {
        0 => Ok(false),
        answer if answer > 0 => Ok(true),
        _ => Err(Error::new(libc::EINVAL, "no TLS state: not in a callback of a client")),
    }
}

/// Whether a plugin may read standard input and write standard output while it is being configured.
///
/// It may not when the server speaks NBD there (`-s`), and never after
/// [`Server::config_complete`](crate::Server::config_complete).
pub fn stdio_safe() -> bool {
    // SAFETY: no arguments and no conditions.
    unsafe { sys::nbdkit_stdio_safe() != 0 }
}

/// The same as [`stdio_safe`], under its older name.
pub fn is_stdio_safe() -> bool {
    stdio_safe()
}

/// Asks the server to end. It returns at once; requests that are running are finished first.
pub fn shutdown() {
    // SAFETY: no arguments; it may be called at any time, from any thread.
    unsafe { sys::nbdkit_shutdown() }
}

/// Asks the server to drop the current client: at once if `force`, else after it has had its replies.
///
/// Servers before nbdkit 1.34 cannot; they log an error and go on.
pub fn disconnect(force: bool) {
    // SAFETY: that is the function's type.
    match unsafe { sys::newer_function::<sys::Disconnect>(c"nbdkit_disconnect") } {
        // SAFETY: it may be called in any callback; elsewhere it does nothing.
        Some(disconnect) => unsafe { disconnect(force.into()) },
        None => sys::log_error("this server is too old to disconnect a client: it needs nbdkit 1.34"),
    }
}

/// Parses a size in bytes as every plugin does: a whole number and perhaps a suffix in either case, as in `512`, `64K`
/// and `10G`. `b k m g t p e` are powers of 1024, `s` is a sector of 512 bytes.
///
/// # Errors
///
/// `EINVAL`: not a size, negative, or 2⁶³ bytes and more. The server has logged what is wrong with it.
pub fn parse_size(s: &str) -> Result<i64> {
    let text = argument(s)?;
    // SAFETY: a C string that lives through the call.
    match unsafe { sys::nbdkit_parse_size(text.as_ptr()) } {
        -1 => Err(Error::new(libc::EINVAL, format!("not a size: {s:?}"))),
        size => Ok(size),
    }
}

/// Parses a boolean as every plugin does: `1 true t yes y on` and `0 false f no n off`, in either case.
///
/// # Errors
///
/// `EINVAL`: something else. The server has logged it.
pub fn parse_bool(s: &str) -> Result<bool> {
    let text = argument(s)?;
    // SAFETY: a C string that lives through the call.
    match unsafe { sys::nbdkit_parse_bool(text.as_ptr()) } {
        -1 => Err(Error::new(libc::EINVAL, format!("not a boolean: {s:?}"))),
        answer => Ok(answer != 0),
    }
}

/// Parses a probability: `0.1`, `1e-1`, `10%`, `1:10` or `1/10`. `what` names it in the error message.
///
/// # Errors
///
/// `EINVAL`: not a probability; the server has logged it. `ENOTSUP`: the server is older than nbdkit 1.36.
pub fn parse_probability(what: &str, s: &str) -> Result<f64> {
    // SAFETY: that is the function's type.
    let parse = unsafe { sys::newer_function::<sys::ParseProbability>(c"nbdkit_parse_probability") };
    let Some(parse) = parse else {
        let message = format!("{what}: this server is too old to parse probabilities: it needs nbdkit 1.36");
        return Err(Error::new(libc::ENOTSUP, message));
    };
    let (c_what, text) = (argument(what)?, argument(s)?);
    let mut result = 0.0;
    // SAFETY: two C strings and a place for the result, all of which live through the call.
    match unsafe { parse(c_what.as_ptr(), text.as_ptr(), &raw mut result) } {
        -1 => Err(Error::new(libc::EINVAL, format!("{what}: not a probability: {s:?}"))),
        _ => Ok(result),
    }
}
