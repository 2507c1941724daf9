//! Extents that filters want: of a whole range, or in whole blocks.

use std::{ffi::c_int, ptr};

use nbdkit_abi as abi;
use nbdkit_core::{Errno, Error, Extent, Extents, Flags, Next, Result};

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

/// What the layer says of `offset..end`, cut to it.
fn ask(next: &Next, offset: u64, end: u64, flags: Flags) -> Result<Vec<Extent>> {
    let mut list = Extents::new(offset, end);
    next.extents(end - offset, offset, flags, &mut list)?;
    let cut = |e: &Extent| Extent { length: e.end().min(end) - e.offset, ..*e };
    Ok(list.as_slice().iter().map(cut).collect())
}

fn end_of(count: u32, offset: u64) -> Result<u64> {
    offset.checked_add(count.into()).ok_or_else(|| Error::new(Errno::EINVAL, "the range passes 2^64"))
}

/// All extents of a range, however often the layer has to be asked.
fn full(next: &Next, mut offset: u64, end: u64, flags: Flags) -> Result<Extents> {
    let mut all = Extents::new(offset, end);
    while offset < end && !all.is_complete() {
        for e in ask(next, offset, end, flags)? {
            all.add(e.offset, e.length, e.hole, e.zero)?;
            offset = e.end();
        }
    }
    Ok(all)
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
        let flags = Flags::from_bits_truncate(flags) - Flags::REQ_ONE;
        // SAFETY: the caller promises it.
        let layer = unsafe { NextLayer::from_ptr(next) };
        match layer.and_then(|layer| full(&layer.next, offset, end_of(count, offset)?, flags)) {
            Ok(list) => Box::into_raw(Box::new(list)),
            Err(e) => {
                // SAFETY: as above.
                unsafe { fail(&e, err) };
                ptr::null_mut()
            }
        }
    })
}

/// The extents of a range in blocks of `align` bytes: a block of several kinds is what all of them have in common.
/// The answer may be shorter than the range.
fn aligned(next: &Next, offset: u64, end: u64, flags: Flags, align: u64) -> Result<Vec<Extent>> {
    let mut list: Vec<Extent> = Vec::new();
    for e in ask(next, offset, end, flags)? {
        let start = list.last().map_or(offset, Extent::end);
        let whole = e.end() - e.end() % align;
        if e.offset == start && whole > start {
            list.push(Extent { length: whole - start, ..e });
        }
        if e.offset != start || whole != e.end() {
            break;
        }
    }
    if list.is_empty() {
        let block = full(next, offset, (offset + align).min(end), flags - Flags::REQ_ONE)?;
        let all = |has: fn(&Extent) -> bool| block.as_slice().iter().all(has);
        let (hole, zero) = (all(|e| e.hole), all(|e| e.zero));
        list.push(Extent { offset, length: align.min(end - offset), hole, zero });
    }
    Ok(list)
}

/// Adds the extents of an aligned range to an empty list, in whole blocks of `align` bytes.
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
            if align == 0 || !offset.is_multiple_of(align) || !end.is_multiple_of(align) {
                let text = format!("nbdkit_extents_aligned: {offset}+{count} is not in blocks of {align}");
                return Err(Error::new(Errno::EINVAL, text));
            }
            let flags = Flags::from_bits_truncate(flags);
            for e in aligned(&layer.next, offset, end, flags, align)? {
                list.add(e.offset, e.length, e.hole, e.zero)?;
            }
            Ok(())
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
