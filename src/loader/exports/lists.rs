//! Lists that C code fills and reads: `struct nbdkit_extents`, which is [`Extents`] itself, and
//! `struct nbdkit_exports`.

use std::{
    ffi::{CStr, CString, OsString, c_char, c_int, c_void},
    os::unix::ffi::{OsStrExt, OsStringExt},
    ptr,
};

use nbdkit_abi as abi;
use nbdkit_core::{Errno, Error, Exports, Extents, Result};

use super::messages::error_with;
use crate::{
    context::current,
    panic::boundary,
    strings::{c_string, text},
};

/// Adds an extent. Those before the range are dropped, those past its end are cut.
///
/// # Safety
/// A list from `nbdkit_extents_new` or the server, or null.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn nbdkit_add_extent(
    list: *mut Extents,
    offset: u64,
    length: u64,
    kind: u32,
) -> c_int {
    boundary(-1, || {
        // SAFETY: the caller promises it.
        let Some(list) = (unsafe { list.as_mut() }) else { return no_list("nbdkit_add_extent") };
        let (hole, zero) = (kind & abi::EXTENT_HOLE != 0, kind & abi::EXTENT_ZERO != 0);
        match list.add(offset, length, hole, zero) {
            Ok(()) => 0,
            Err(e) => {
                error_with(e.errno(), format!("nbdkit_add_extent: {e}"));
                -1
            }
        }
    })
}

fn no_list(function: &str) -> c_int {
    error_with(Errno::EFAULT, format!("{function}: there is no list"));
    -1
}

/// A new list of the extents of `start..end`.
#[unsafe(no_mangle)]
pub(super) extern "C" fn nbdkit_extents_new(start: u64, end: u64) -> *mut Extents {
    boundary(ptr::null_mut(), || {
        if start > end || end > i64::MAX as u64 {
            let text = format!("nbdkit_extents_new: {start} to {end} is not a range within 2^63-1");
            error_with(Errno::ERANGE, text);
            return ptr::null_mut();
        }
        Box::into_raw(Box::new(Extents::new(start, end)))
    })
}

/// Frees a list.
///
/// # Safety
/// A list from `nbdkit_extents_new` that is not used again, or null.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn nbdkit_extents_free(list: *mut Extents) {
    if !list.is_null() {
        // SAFETY: the caller promises it.
        drop(unsafe { Box::from_raw(list) });
    }
}

/// How many extents there are.
///
/// # Safety
/// A list or null.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn nbdkit_extents_count(list: *const Extents) -> usize {
    // SAFETY: the caller promises it.
    unsafe { list.as_ref() }.map_or(0, |list| list.as_slice().len())
}

/// The extent number `index`, from 0.
///
/// # Safety
/// A list or null.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn nbdkit_get_extent(list: *const Extents, index: usize) -> abi::Extent {
    boundary(abi::Extent::default(), || {
        // SAFETY: the caller promises it.
        let list = unsafe { list.as_ref() };
        let Some((list, extent)) = list.and_then(|l| l.as_slice().get(index).map(|e| (l, e))) else {
            error_with(Errno::EINVAL, format!("nbdkit_get_extent: there is no extent {index}"));
            return abi::Extent::default();
        };
        // A plugin may know more than it was asked for; a filter counts on the range it gave.
        let length = extent.end().min(list.end()) - extent.offset;
        abi::Extent { offset: extent.offset, length, r#type: extent.kind() }
    })
}

/// A list of exports, with the strings that C reads.
#[derive(Debug, Default)]
pub(crate) struct ExportList {
    exports: Exports,
    strings: Vec<(CString, Option<CString>)>,
    use_default: bool,
}

impl ExportList {
    /// As C sees it.
    pub(crate) fn as_ptr(&mut self) -> *mut c_void {
        ptr::from_mut(self).cast()
    }

    /// The list behind an address.
    ///
    /// # Safety
    /// From `as_ptr` or `nbdkit_exports_new`, and nobody else uses it during `'a`; or null.
    pub(crate) unsafe fn from_ptr<'a>(address: *mut c_void) -> Option<&'a mut Self> {
        // SAFETY: the caller promises it.
        unsafe { address.cast::<Self>().as_mut() }
    }

    /// The default export belongs to the list.
    pub(crate) fn use_default(&mut self) {
        self.use_default = true;
    }

    /// # Errors
    /// Too many, or too long.
    fn add(&mut self, name: &CStr, description: Option<&CStr>) -> Result<()> {
        let shown = description.map(|d| d.to_string_lossy().into_owned());
        self.exports.add(OsString::from_vec(name.to_bytes().to_vec()), shown)?;
        self.strings.push((name.to_owned(), description.map(CStr::to_owned)));
        Ok(())
    }

    /// Adds those of another list.
    ///
    /// # Errors
    /// Too many.
    pub(crate) fn extend(&mut self, exports: &Exports) -> Result<()> {
        for export in exports {
            let description = export.description.as_ref().map(|d| c_string(d.as_bytes()));
            self.add(&c_string(export.name.as_bytes()), description.as_deref())?;
        }
        Ok(())
    }

    /// The list.
    pub(crate) fn finish(mut self) -> Exports {
        if self.use_default {
            self.exports.use_default();
        }
        self.exports
    }
}

/// Adds an export.
///
/// # Safety
/// A list; a terminated string; a terminated string or null.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn nbdkit_add_export(
    list: *mut c_void,
    name: *const c_char,
    description: *const c_char,
) -> c_int {
    boundary(-1, || {
        // SAFETY: the caller promises it.
        let (list, name, description) =
            unsafe { (ExportList::from_ptr(list), text(name), text(description)) };
        let Some(list) = list else { return no_list("nbdkit_add_export") };
        let added = match name {
            Some(name) => list.add(name, description),
            None => Err(Error::new(Errno::EINVAL, "there is no name")),
        };
        match added {
            Ok(()) => 0,
            Err(e) => {
                error_with(e.errno(), format!("nbdkit_add_export: {e}"));
                -1
            }
        }
    })
}

/// Adds the default export.
///
/// # Safety
/// A list.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn nbdkit_use_default_export(list: *mut c_void) -> c_int {
    // SAFETY: the caller promises it.
    boundary(-1, || match unsafe { ExportList::from_ptr(list) } {
        Some(list) => {
            list.use_default();
            0
        }
        None => no_list("nbdkit_use_default_export"),
    })
}

/// A new list.
#[unsafe(no_mangle)]
pub(super) extern "C" fn nbdkit_exports_new() -> *mut c_void {
    boundary(ptr::null_mut(), || Box::into_raw(Box::new(ExportList::default())).cast())
}

/// Frees a list.
///
/// # Safety
/// A list from `nbdkit_exports_new` that is not used again, or null.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn nbdkit_exports_free(list: *mut c_void) {
    if !list.is_null() {
        // SAFETY: the caller promises it.
        drop(unsafe { Box::from_raw(list.cast::<ExportList>()) });
    }
}

/// How many exports there are.
///
/// # Safety
/// A list or null.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn nbdkit_exports_count(list: *const c_void) -> usize {
    // SAFETY: the caller promises it.
    unsafe { list.cast::<ExportList>().as_ref() }.map_or(0, |list| list.strings.len())
}

/// The export number `index`, from 0. Its strings stay until the list is freed.
///
/// # Safety
/// A list or null.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn nbdkit_get_export(list: *const c_void, index: usize) -> abi::Export {
    const NONE: abi::Export = abi::Export { name: ptr::null_mut(), description: ptr::null_mut() };
    boundary(NONE, || {
        // SAFETY: the caller promises it.
        let list = unsafe { list.cast::<ExportList>().as_ref() };
        let Some((name, description)) = list.and_then(|list| list.strings.get(index)) else {
            error_with(Errno::EINVAL, format!("nbdkit_get_export: there is no export {index}"));
            return NONE;
        };
        let description = description.as_ref().map_or(ptr::null(), |d| d.as_ptr());
        abi::Export { name: name.as_ptr().cast_mut(), description: description.cast_mut() }
    })
}

/// Tells the current call why the layer below failed. Returns -1 for its caller.
pub(crate) fn note(error: &Error) -> c_int {
    current(|frame| frame.map_or((), |frame| frame.note(error)));
    error.errno().set();
    -1
}
