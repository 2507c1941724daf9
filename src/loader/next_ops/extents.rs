//! Extents that filters want: of a whole range, or in whole blocks.

use std::{ffi::c_int, ptr};

use nbdkit_abi as abi;
use nbdkit_core::{Errno, Error, Extents, Flags, Result};

use super::NextLayer;
use crate::{exports::note, panic::boundary};

/// Stores the errno of a failure and remembers the reason.
///
/// # Safety
/// Room for an int, or null.
unsafe fn fail(error: &Error, err: *mut c_int) {
    if !err.is_null() {
        // SAFETY: the caller promises it.
        unsafe { err.write(error.errno() as c_int) };
    }
    note(error);
}

fn end_of(count: u32, offset: u64) -> Result<u64> {
    offset.checked_add(count.into()).ok_or_else(|| Error::new(Errno::EINVAL, "the range passes 2^64"))
}

/// All extents of a range in a new list; null on failure.
///
/// # Safety
/// A layer that is open, or null; room for an int, or null.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn nbdkit_extents_full(
    next: *mut abi::NextOps,
    count: u32,
    offset: u64,
    flags: u32,
    err: *mut c_int,
) -> *mut Extents {
    boundary(ptr::null_mut(), || {
        // All are wanted.
        let _ = flags;
        // SAFETY: the caller promises it.
        let layer = unsafe { NextLayer::from_ptr(next) };
        match layer.and_then(|layer| layer.next.extents_full(count.into(), offset)) {
            Ok(list) => Box::into_raw(Box::new(list)),
            Err(e) => {
                // SAFETY: as above.
                unsafe { fail(&e, err) };
                ptr::null_mut()
            }
        }
    })
}

/// Adds the extents of an aligned range to an empty list, in whole blocks of `align` bytes. The range may end where the
/// disk does, in the middle of a block.
///
/// # Safety
/// A layer that is open, or null; a list; room for an int, or null.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn nbdkit_extents_aligned(
    next: *mut abi::NextOps,
    count: u32,
    offset: u64,
    flags: u32,
    align: u32,
    extents: *mut Extents,
    err: *mut c_int,
) -> c_int {
    boundary(-1, || {
        // SAFETY: the caller promises it.
        let (layer, list) = unsafe { (NextLayer::from_ptr(next), extents.as_mut()) };
        let added = layer.and_then(|layer| {
            let list = list.ok_or_else(|| Error::new(Errno::EINVAL, "there is no list of extents"))?;
            let (end, align) = (end_of(count, offset)?, u64::from(align));
            let whole = end.is_multiple_of(align) || end == layer.next.caps().size;
            if align == 0 || !offset.is_multiple_of(align) || !whole {
                let text = format!("nbdkit_extents_aligned: {offset}+{count} is not in blocks of {align}");
                return Err(Error::new(Errno::EINVAL, text));
            }
            let flags = Flags::from_bits_truncate(flags);
            layer.next.extents_aligned(count.into(), offset, flags, align, list)
        });
        match added {
            Ok(()) => 0,
            Err(e) => {
                // SAFETY: as above.
                unsafe { fail(&e, err) };
                -1
            }
        }
    })
}
