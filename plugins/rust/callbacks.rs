//! What the server calls: one C function for each method of [`Server`], each through the border of `panics`.
//!
//! A handle is a box of a box, since C holds one word and a `Box<dyn Server>` is two.

use std::{
    ffi::{CStr, OsStr, c_char, c_int, c_void},
    io::{self, Write},
    os::unix::ffi::OsStrExt,
    ptr, slice,
};

use crate::{
    Error, ExportHandle, ExtentHandle, Flags, Result, Server,
    panics::{border, silent, status},
    sys,
};

type Handle = Box<dyn Server>;

/// # Safety
///
/// `handle` came from `open` and has not been closed.
unsafe fn server<'a>(handle: *mut c_void) -> &'a dyn Server {
    // SAFETY: the caller says that the box lives; only `close` takes it back.
    unsafe { &**handle.cast::<Handle>() }
}

/// # Safety
///
/// `text` is a C string that lives as long as the result is used.
unsafe fn utf8<'a>(what: &str, text: *const c_char) -> Result<&'a str> {
    // SAFETY: the caller says that it is a C string.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().map_err(|_| Error::new(libc::EINVAL, format!("{what} is not UTF-8: {text:?}")))
}

/// A string that the server keeps as long as it needs it; null for none.
fn interned(text: Option<String>) -> Result<*const c_char> {
    let Some(text) = text else { return Ok(ptr::null()) };
    let text = sys::c_string(&text);
    // SAFETY: the server copies a C string that lives through the call.
    let kept = unsafe { sys::nbdkit_strdup_intern(text.as_ptr()) };
    if kept.is_null() { Err(Error::new(libc::ENOMEM, "no memory for a string")) } else { Ok(kept) }
}

/// Functions of the plugin that cannot fail.
macro_rules! silent_functions {
    ($($function:ident),*) => {
        $(pub(crate) unsafe extern "C" fn $function<S: Server>() {
            silent(stringify!($function), S::$function)
        })*
    };
}
silent_functions!(load, unload, cleanup);

/// Functions of the plugin that may fail.
macro_rules! fallible_functions {
    ($($function:ident),*) => {
        $(pub(crate) unsafe extern "C" fn $function<S: Server>() -> c_int {
            status(stringify!($function), S::$function)
        })*
    };
}
fallible_functions!(config_complete, get_ready, after_fork);

pub(crate) unsafe extern "C" fn dump_plugin<S: Server>() {
    silent("dump_plugin", || {
        // The server's lines are in the C library's buffer, the plugin's go through Rust's: keep their order.
        // SAFETY: null means all streams.
        unsafe { libc::fflush(ptr::null_mut()) };
        S::dump_plugin();
        io::stdout().flush().unwrap_or_default();
    })
}

pub(crate) unsafe extern "C" fn config<S: Server>(key: *const c_char, value: *const c_char) -> c_int {
    status("config", || {
        // SAFETY: the server's strings live through the callback.
        let key = unsafe { utf8("a parameter's key", key) }?;
        // SAFETY: as above.
        let value = unsafe { CStr::from_ptr(value) };
        S::config_os(key, OsStr::from_bytes(value.to_bytes()))
    })
}

pub(crate) unsafe extern "C" fn thread_model<S: Server>() -> c_int {
    border("thread_model", -1, || S::thread_model().map(c_int::from))
}

pub(crate) unsafe extern "C" fn preconnect<S: Server>(readonly: c_int) -> c_int {
    status("preconnect", || S::preconnect(readonly != 0))
}

pub(crate) unsafe extern "C" fn list_exports<S: Server>(
    readonly: c_int,
    is_tls: c_int,
    exports: *mut c_void,
) -> c_int {
    status("list_exports", || S::list_exports(readonly != 0, is_tls != 0, &mut ExportHandle::new(exports)))
}

pub(crate) unsafe extern "C" fn default_export<S: Server>(readonly: c_int, is_tls: c_int) -> *const c_char {
    border("default_export", ptr::null(), || S::default_export(readonly != 0, is_tls != 0).and_then(interned))
}

pub(crate) unsafe extern "C" fn open<S: Server>(readonly: c_int) -> *mut c_void {
    border("open", ptr::null_mut(), || {
        let handle: Handle = S::open(readonly != 0)?;
        Ok(Box::into_raw(Box::new(handle)).cast())
    })
}

pub(crate) unsafe extern "C" fn close(handle: *mut c_void) {
    // SAFETY: `open` made it, and the server closes each handle once and does not use it again.
    silent("close", || drop(unsafe { Box::from_raw(handle.cast::<Handle>()) }))
}

pub(crate) unsafe extern "C" fn get_size(handle: *mut c_void) -> i64 {
    border("get_size", -1, || {
        // SAFETY: the server calls with an open handle.
        let size = unsafe { server(handle) }.get_size()?;
        if size < 0 {
            return Err(Error::new(libc::EIO, format!("get_size: the size is negative: {size}")));
        }
        Ok(size)
    })
}

pub(crate) unsafe extern "C" fn export_description(handle: *mut c_void) -> *const c_char {
    border("export_description", ptr::null(), || {
        // SAFETY: the server calls with an open handle.
        unsafe { server(handle) }.export_description().and_then(interned)
    })
}

pub(crate) unsafe extern "C" fn block_size(
    handle: *mut c_void,
    minimum: *mut u32,
    preferred: *mut u32,
    maximum: *mut u32,
) -> c_int {
    status("block_size", || {
        // SAFETY: the server calls with an open handle.
        let size = unsafe { server(handle) }.block_size()?;
        for (place, value) in [(minimum, size.minimum), (preferred, size.preferred), (maximum, size.maximum)]
        {
            // SAFETY: the server gives three places for the answer.
            unsafe { place.write(value) }
        }
        Ok(())
    })
}

/// Questions about what a handle can do.
macro_rules! questions {
    ($($method:ident),*) => {
        $(pub(crate) unsafe extern "C" fn $method(handle: *mut c_void) -> c_int {
            // SAFETY: the server calls with an open handle.
            border(stringify!($method), -1, || unsafe { server(handle) }.$method().map(c_int::from))
        })*
    };
}
questions!(
    can_write,
    can_flush,
    is_rotational,
    can_trim,
    can_zero,
    can_fast_zero,
    can_extents,
    can_fua,
    can_multi_conn,
    can_cache
);

pub(crate) unsafe extern "C" fn read_at(
    handle: *mut c_void,
    buffer: *mut c_void,
    count: u32,
    offset: u64,
    _flags: u32,
) -> c_int {
    status("read_at", || {
        // SAFETY: the buffer is the server's, holds `count` bytes, and nobody else uses it through the callback.
        let buffer = unsafe { slice::from_raw_parts_mut(buffer.cast::<u8>(), count as usize) };
        // SAFETY: the server calls with an open handle.
        unsafe { server(handle) }.read_at(buffer, offset)
    })
}

pub(crate) unsafe extern "C" fn write_at(
    handle: *mut c_void,
    buffer: *const c_void,
    count: u32,
    offset: u64,
    flags: u32,
) -> c_int {
    status("write_at", || {
        // SAFETY: the buffer is the server's, holds `count` bytes, and nobody writes it through the callback.
        let buffer = unsafe { slice::from_raw_parts(buffer.cast::<u8>(), count as usize) };
        // SAFETY: the server calls with an open handle.
        unsafe { server(handle) }.write_at(buffer, offset, Flags::from_bits_retain(flags))
    })
}

pub(crate) unsafe extern "C" fn flush(handle: *mut c_void, _flags: u32) -> c_int {
    // SAFETY: the server calls with an open handle.
    status("flush", || unsafe { server(handle) }.flush())
}

pub(crate) unsafe extern "C" fn trim(handle: *mut c_void, count: u32, offset: u64, flags: u32) -> c_int {
    // SAFETY: the server calls with an open handle.
    status("trim", || unsafe { server(handle) }.trim(count, offset, Flags::from_bits_retain(flags)))
}

/// "Not this way" is no failure yet: the server writes zeroes, or the client wanted to know. (`ENOTSUP` is the same number.)
pub(crate) unsafe extern "C" fn zero(handle: *mut c_void, count: u32, offset: u64, flags: u32) -> c_int {
    border("zero", -1, || {
        // SAFETY: the server calls with an open handle.
        match unsafe { server(handle) }.zero(count, offset, Flags::from_bits_retain(flags)) {
            Err(error) if error.errno() == libc::EOPNOTSUPP => {
                crate::debug!("zero: {error}");
                crate::set_error(error.errno());
                Ok(-1)
            }
            done => done.map(|()| 0),
        }
    })
}

pub(crate) unsafe extern "C" fn extents(
    handle: *mut c_void,
    count: u32,
    offset: u64,
    flags: u32,
    extents: *mut c_void,
) -> c_int {
    status("extents", || {
        let mut list = ExtentHandle::new(extents);
        // SAFETY: the server calls with an open handle.
        unsafe { server(handle) }.extents(count, offset, Flags::from_bits_retain(flags), &mut list)
    })
}

pub(crate) unsafe extern "C" fn cache(handle: *mut c_void, count: u32, offset: u64, _flags: u32) -> c_int {
    // SAFETY: the server calls with an open handle.
    status("cache", || unsafe { server(handle) }.cache(count, offset))
}
