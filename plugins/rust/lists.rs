//! The server's lists that a plugin fills: extents and exports.

use std::{ffi::c_void, io, ptr};

use crate::{Error, ExtentType, Result, sys};

/// Takes the extents that [`Server::extents`](crate::Server::extents) finds.
#[derive(Debug)]
pub struct ExtentHandle(*mut c_void);

impl ExtentHandle {
    #[doc(hidden)]
    pub fn new(extents: *mut c_void) -> Self {
        ExtentHandle(extents)
    }

    /// Reports that `len` bytes from `offset` are of one type.
    ///
    /// Extents are added in ascending order and without gaps. The first may begin before the range that was asked
    /// for and the last may end after it; neighbours of one type need not be joined.
    ///
    /// # Errors
    ///
    /// The server refuses an extent that leaves a gap or goes back.
    pub fn add(&mut self, offset: u64, len: u64, et: ExtentType) -> Result<()> {
        // SAFETY: the server's list lives through the callback, and this handle does not leave it.
        match unsafe { sys::nbdkit_add_extent(self.0, offset, len, et as u32) } {
            0 => Ok(()),
            _ => Err(refused("extent")),
        }
    }
}

/// Takes the exports that [`Server::list_exports`](crate::Server::list_exports) has.
#[derive(Debug)]
pub struct ExportHandle(*mut c_void);

impl ExportHandle {
    #[doc(hidden)]
    pub fn new(exports: *mut c_void) -> Self {
        ExportHandle(exports)
    }

    /// Adds an export: its name, which may be empty, and a description for people. Both are at most 4096 bytes.
    ///
    /// # Errors
    ///
    /// The server refuses strings that are too long and more exports than it can list. `EINVAL` if there is a zero
    /// byte in one of them.
    pub fn add(&mut self, name: &str, description: Option<&str>) -> Result<()> {
        let name = exact(name)?;
        let description = description.map(exact).transpose()?;
        let description = description.as_ref().map_or(ptr::null(), |text| text.as_ptr());
        // SAFETY: the server's list lives through the callback, and the strings, which it copies, through the call.
        match unsafe { sys::nbdkit_add_export(self.0, name.as_ptr(), description) } {
            0 => Ok(()),
            _ => Err(refused("export")),
        }
    }

    /// Adds the export that [`Server::default_export`](crate::Server::default_export) names.
    ///
    /// # Errors
    ///
    /// Those of the server.
    pub fn add_default(&mut self) -> Result<()> {
        // SAFETY: the server's list lives through the callback.
        match unsafe { sys::nbdkit_use_default_export(self.0) } {
            0 => Ok(()),
            _ => Err(refused("default export")),
        }
    }
}

/// A name must reach the client as it is.
fn exact(text: &str) -> Result<std::ffi::CString> {
    std::ffi::CString::new(text).map_err(|_| {
        Error::new(libc::EINVAL, format!("zero byte in an export's name or description: {text:?}"))
    })
}

/// The server has logged why and left an errno.
fn refused(what: &str) -> Error {
    let cause = io::Error::last_os_error();
    let errno = cause.raw_os_error().filter(|&errno| errno > 0).unwrap_or(libc::EIO);
    Error::new(errno, format!("the server refused the {what}: {cause}"))
}
