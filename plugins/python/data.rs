//! The requests of clients: what reads, writes and describes the data.

use std::{
    ffi::{c_int, c_void},
    slice,
};

use nbdkit::bridge::abi;
use pyo3::{
    intern,
    prelude::*,
    types::{PyByteArray, PyBytes},
};

use crate::{
    callbacks::{Handle, call, exception, extract, object, status, unexpected},
    failure::{self, Failure, Result},
    lend,
    script::{Script, Style},
};

pub(crate) unsafe extern "C" fn pread(
    handle: Handle,
    buffer: *mut c_void,
    count: u32,
    offset: u64,
    flags: u32,
) -> c_int {
    status("pread", |py, script| {
        // SAFETY: the buffer is the server's, holds `count` bytes, and nobody else uses it through the callback.
        let buffer = unsafe { slice::from_raw_parts_mut(buffer.cast::<u8>(), count as usize) };
        // SAFETY: the server calls with an open handle.
        let handle = unsafe { object(py, handle) };
        let pread = script.required(py, intern!(py, "pread"))?;
        let answer = match script.style {
            Style::First => pread.call1((handle, count, offset)),
            Style::Counted => pread.call1((handle, count, offset, flags)),
            Style::Filled => {
                // It has held what others read and wrote, and a script need not fill it.
                buffer.fill(0);
                return lend::to_fill(py, buffer, |view| {
                    let answer = pread.call1((handle, view, offset, flags)).map_err(exception(py))?;
                    no_data(&answer)
                });
            }
        };
        lend::copy(&answer.map_err(exception(py))?, buffer)
    })
}

/// A script that returns the data instead of filling the buffer would be read as whatever was there.
fn no_data(answer: &Bound<'_, PyAny>) -> Result<()> {
    if answer.is_instance_of::<PyBytes>() || answer.is_instance_of::<PyByteArray>() {
        let text = "it must fill the buffer that is its second parameter; \
                    to return the data, call that parameter count";
        return Err(Failure::new(libc::EIO, text));
    }
    Ok(())
}

pub(crate) unsafe extern "C" fn pwrite(
    handle: Handle,
    buffer: *const c_void,
    count: u32,
    offset: u64,
    flags: u32,
) -> c_int {
    status("pwrite", |py, script| {
        // SAFETY: the buffer is the server's, holds `count` bytes, and nobody writes it through the callback.
        let data = unsafe { slice::from_raw_parts(buffer.cast::<u8>(), count as usize) };
        // SAFETY: the server calls with an open handle.
        let handle = unsafe { object(py, handle) };
        let pwrite = script.required(py, intern!(py, "pwrite"))?;
        match script.style {
            Style::First => lend::to_keep(py, data, |view| {
                pwrite.call1((handle, view, offset)).map(drop).map_err(exception(py))
            }),
            Style::Counted => lend::to_keep(py, data, |view| {
                pwrite.call1((handle, view, offset, flags)).map(drop).map_err(exception(py))
            }),
            Style::Filled => lend::to_read(py, data, |view| {
                pwrite.call1((handle, view, offset, flags)).map(drop).map_err(exception(py))
            }),
        }
    })
}

pub(crate) unsafe extern "C" fn flush(handle: Handle, flags: u32) -> c_int {
    status("flush", |py, script| {
        // SAFETY: the server calls with an open handle.
        let handle = unsafe { object(py, handle) };
        let flush = script.required(py, intern!(py, "flush"))?;
        let answer = if script.has_flags() { flush.call1((handle, flags)) } else { flush.call1((handle,)) };
        answer.map(drop).map_err(exception(py))
    })
}

pub(crate) unsafe extern "C" fn trim(handle: Handle, count: u32, offset: u64, flags: u32) -> c_int {
    status("trim", |py, script| {
        // SAFETY: the server calls with an open handle.
        let handle = unsafe { object(py, handle) };
        let trim = script.required(py, intern!(py, "trim"))?;
        let answer = if script.has_flags() {
            trim.call1((handle, count, offset, flags))
        } else {
            trim.call1((handle, count, offset))
        };
        answer.map(drop).map_err(exception(py))
    })
}

pub(crate) unsafe extern "C" fn zero(handle: Handle, count: u32, offset: u64, flags: u32) -> c_int {
    call("zero", -1, |py, script| {
        let fast = flags & abi::FLAG_FAST_ZERO != 0;
        let zero = script.function(py, intern!(py, "zero"))?;
        // Version 1 cannot be told to be fast.
        let zero = zero.filter(|_| script.has_flags() || !fast);
        let Some(zero) = zero else {
            nbdkit::set_error(libc::EOPNOTSUPP);
            return Ok(-1);
        };
        // SAFETY: the server calls with an open handle.
        let handle = unsafe { object(py, handle) };
        let answer = if script.has_flags() {
            zero.call1((handle, count, offset, flags))
        } else {
            zero.call1((handle, count, offset, flags & abi::FLAG_MAY_TRIM != 0))
        };
        // That is no error but asks for zeroes to be written, and a script may ask without an exception.
        let errno = match &answer {
            Ok(_) => failure::set_by_script(),
            Err(error) => Failure::exception(py, error).errno(),
        };
        if failure::is_unsupported(errno) {
            nbdkit::set_error(errno);
            return Ok(-1);
        }
        answer.map(|_| 0).map_err(exception(py))
    })
}

pub(crate) unsafe extern "C" fn cache(handle: Handle, count: u32, offset: u64, flags: u32) -> c_int {
    status("cache", |py, script| {
        // SAFETY: the server calls with an open handle.
        let handle = unsafe { object(py, handle) };
        // A script may offer it without having it: then there is nothing to do.
        script.call(py, intern!(py, "cache"), (handle, count, offset, flags)).map(drop)
    })
}

pub(crate) unsafe extern "C" fn extents(
    handle: Handle,
    count: u32,
    offset: u64,
    flags: u32,
    extents: *mut c_void,
) -> c_int {
    status("extents", |py, script| {
        // SAFETY: the server calls with an open handle.
        let handle = unsafe { object(py, handle) };
        let method = script.required(py, intern!(py, "extents"))?;
        let answer = method.call1((handle, count, offset, flags)).map_err(exception(py))?;
        let wanted = "an iterable of (offset, length, type) tuples";
        for item in answer.try_iter().map_err(|_| unexpected(&answer, wanted))? {
            let item = item.map_err(exception(py))?;
            let (offset, length, kind): (u64, u64, u32) = extract(&item, wanted)?;
            if !crate::server::add_extent(extents, offset, length, kind) {
                let text = format!("the server refused the extent ({offset}, {length}, {kind})");
                return Err(Failure::new(libc::EINVAL, text));
            }
        }
        Ok(())
    })
}

impl Script {
    /// Whether requests have flags.
    pub(crate) fn has_flags(&self) -> bool {
        self.style != Style::First
    }
}
