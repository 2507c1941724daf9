//! `struct nbdkit_next_ops`: the functions through which a filter calls the layer below.
//!
//! The capabilities were asked when the layer was opened, so those functions only look them up. Data functions store
//! the errno of a failure where the filter wants it, and remember the reason.

use std::{
    ffi::{c_char, c_int, c_void},
    ptr,
};

use nbdkit_abi as abi;
use nbdkit_core::{Caps, Errno, Error, Extents, Flags, Result};

use super::NextLayer;
use crate::{exports::note, panic::boundary, strings::c_string};

/// The same for every layer.
pub(super) const OPS: abi::NextOps = abi::NextOps {
    prepare,
    finalize,
    get_size,
    export_description,
    block_size,
    can_write,
    can_flush,
    is_rotational,
    can_trim,
    can_zero,
    can_fast_zero,
    can_extents,
    can_fua,
    can_multi_conn,
    can_cache,
    pread,
    pwrite,
    flush,
    trim,
    zero,
    extents,
    cache,
};

/// A layer is prepared when it is opened.
unsafe extern "C" fn prepare(next: *mut abi::NextOps) -> c_int {
    // SAFETY: the filter gives a layer of its own.
    boundary(-1, || unsafe { NextLayer::from_ptr(next) }.map_or_else(|e| note(&e), |_| 0))
}

unsafe extern "C" fn finalize(next: *mut abi::NextOps) -> c_int {
    // SAFETY: the filter gives a layer of its own.
    boundary(-1, || match unsafe { NextLayer::from_ptr(next) } {
        Ok(layer) => {
            layer.finalize();
            0
        }
        Err(e) => note(&e),
    })
}

/// Looks a capability up; -1 without a layer, or if the layer failed to answer.
///
/// # Safety
/// A layer that is open, or null.
unsafe fn ask<T: From<i8>>(next: *mut abi::NextOps, answer: impl FnOnce(&Caps) -> Result<T>) -> T {
    // SAFETY: the caller promises it.
    boundary((-1).into(), || {
        // SAFETY: the caller promises it.
        let layer = unsafe { NextLayer::from_ptr(next) };
        layer.and_then(|layer| answer(layer.next.caps())).unwrap_or_else(|e| {
            note(&e);
            (-1).into()
        })
    })
}

macro_rules! capabilities {
    ($($name:ident -> $type:ty: $answer:expr,)*) => {
        $(
            unsafe extern "C" fn $name(next: *mut abi::NextOps) -> $type {
                // SAFETY: the filter gives a layer of its own.
                unsafe { ask(next, $answer) }
            }
        )*
    };
}

capabilities! {
    get_size -> i64: |caps| Ok(i64::try_from(caps.size).unwrap_or(i64::MAX)),
    can_write -> c_int: |caps| caps.can_write().map(c_int::from),
    can_flush -> c_int: |caps| caps.can_flush().map(c_int::from),
    is_rotational -> c_int: |caps| caps.is_rotational().map(c_int::from),
    can_trim -> c_int: |caps| caps.can_trim().map(c_int::from),
    can_zero -> c_int: |caps| caps.can_zero().map(|zero| zero as c_int),
    can_fast_zero -> c_int: |caps| caps.can_fast_zero().map(c_int::from),
    can_extents -> c_int: |caps| caps.can_extents().map(c_int::from),
    can_fua -> c_int: |caps| caps.can_fua().map(|fua| fua as c_int),
    can_multi_conn -> c_int: |caps| caps.can_multi_conn().map(c_int::from),
    can_cache -> c_int: |caps| caps.can_cache().map(|cache| cache as c_int),
}

unsafe extern "C" fn export_description(next: *mut abi::NextOps) -> *const c_char {
    boundary(ptr::null(), || {
        // SAFETY: the filter gives a layer of its own.
        let layer = unsafe { NextLayer::from_ptr(next) };
        let description = layer.and_then(|layer| Ok((layer, layer.next.export_description()?)));
        match description {
            Ok((layer, Some(text))) => layer.strings.keep(c_string(text.as_bytes())),
            Ok((_, None)) => ptr::null(),
            Err(e) => {
                note(&e);
                ptr::null()
            }
        }
    })
}

unsafe extern "C" fn block_size(
    next: *mut abi::NextOps,
    minimum: *mut u32,
    preferred: *mut u32,
    maximum: *mut u32,
) -> c_int {
    // SAFETY: the filter gives a layer of its own, and room for the three.
    unsafe {
        ask(next, |caps| {
            minimum.write(caps.block_size.minimum);
            preferred.write(caps.block_size.preferred);
            maximum.write(caps.block_size.maximum);
            Ok(0)
        })
    }
}

/// Makes a request of the layer below.
///
/// # Safety
/// A layer that is open, or null; room for an int, or null.
unsafe fn request(
    next: *mut abi::NextOps,
    err: *mut c_int,
    run: impl FnOnce(&NextLayer) -> Result<()>,
) -> c_int {
    // SAFETY: the caller promises it.
    let layer = unsafe { NextLayer::from_ptr(next) };
    let panicked = || Err(Error::new(Errno::EIO, "a layer below the filter panicked"));
    match layer.and_then(|layer| boundary(None, || Some(run(layer))).unwrap_or_else(panicked)) {
        Ok(()) => 0,
        Err(e) => {
            if !err.is_null() {
                // SAFETY: the caller promises it.
                unsafe { err.write(e.errno() as c_int) };
            }
            note(&e)
        }
    }
}

fn legal(flags: u32) -> Result<Flags> {
    Flags::from_bits(flags)
        .ok_or_else(|| Error::new(Errno::EINVAL, format!("the filter gave unknown flags {flags:#x}")))
}

unsafe extern "C" fn pread(
    next: *mut abi::NextOps,
    buf: *mut c_void,
    count: u32,
    offset: u64,
    _flags: u32,
    err: *mut c_int,
) -> c_int {
    // SAFETY: the filter gives a layer of its own, room for `count` bytes, and room for an int.
    unsafe {
        request(next, err, |layer| {
            let buf: &mut [u8] = match count {
                0 => &mut [],
                count => std::slice::from_raw_parts_mut(buf.cast(), count as usize),
            };
            layer.next.pread(buf, offset)
        })
    }
}

unsafe extern "C" fn pwrite(
    next: *mut abi::NextOps,
    buf: *const c_void,
    count: u32,
    offset: u64,
    flags: u32,
    err: *mut c_int,
) -> c_int {
    // SAFETY: the filter gives a layer of its own, `count` bytes, and room for an int.
    unsafe {
        request(next, err, |layer| {
            let buf: &[u8] = match count {
                0 => &[],
                count => std::slice::from_raw_parts(buf.cast(), count as usize),
            };
            layer.next.pwrite(buf, offset, legal(flags)?)
        })
    }
}

unsafe extern "C" fn flush(next: *mut abi::NextOps, _flags: u32, err: *mut c_int) -> c_int {
    // SAFETY: the filter gives a layer of its own, and room for an int.
    unsafe { request(next, err, |layer| layer.next.flush()) }
}

unsafe extern "C" fn trim(
    next: *mut abi::NextOps,
    count: u32,
    offset: u64,
    flags: u32,
    err: *mut c_int,
) -> c_int {
    // SAFETY: the filter gives a layer of its own, and room for an int.
    unsafe { request(next, err, |layer| layer.next.trim(count.into(), offset, legal(flags)?)) }
}

unsafe extern "C" fn zero(
    next: *mut abi::NextOps,
    count: u32,
    offset: u64,
    flags: u32,
    err: *mut c_int,
) -> c_int {
    // SAFETY: the filter gives a layer of its own, and room for an int.
    unsafe { request(next, err, |layer| layer.next.zero(count.into(), offset, legal(flags)?)) }
}

unsafe extern "C" fn extents(
    next: *mut abi::NextOps,
    count: u32,
    offset: u64,
    flags: u32,
    extents: *mut c_void,
    err: *mut c_int,
) -> c_int {
    // SAFETY: the filter gives a layer of its own, a list of extents, and room for an int.
    unsafe {
        request(next, err, |layer| match extents.cast::<Extents>().as_mut() {
            Some(list) => layer.next.extents(count.into(), offset, legal(flags)?, list),
            None => Err(Error::new(Errno::EINVAL, "the filter gave no list of extents")),
        })
    }
}

unsafe extern "C" fn cache(
    next: *mut abi::NextOps,
    count: u32,
    offset: u64,
    _flags: u32,
    err: *mut c_int,
) -> c_int {
    // SAFETY: the filter gives a layer of its own, and room for an int.
    unsafe { request(next, err, |layer| layer.next.cache(count.into(), offset)) }
}
