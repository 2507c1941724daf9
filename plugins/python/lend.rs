//! The server's buffers, lent to a script for one call as a memoryview.
//!
//! The memory belongs to the server and is gone or in other use after the call, so no view of it may outlive that.
//! Each loan is an object of its own that counts the views of it, slices and arrays made from them included. The view
//! that the script was given is released after the call; if others are left, the call fails, and from then on the
//! script gets copies: it has shown that it needs them.

use std::{
    ffi::{c_int, c_void},
    slice,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

use pyo3::{
    exceptions::PyBufferError,
    ffi,
    prelude::*,
    types::{PyByteArray, PyBytes},
};

use crate::failure::{Failure, Result};

/// Whether the script has kept a view of a buffer before.
static COPY: AtomicBool = AtomicBool::new(false);

/// A buffer that is lent.
#[pyclass(frozen, name = "buffer", module = "nbdkit")]
pub(crate) struct Loan {
    address: usize,
    length: usize,
    writable: bool,
    /// 0 once the call is over.
    open: AtomicBool,
    views: AtomicUsize,
}

#[pymethods]
impl Loan {
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let loan = slf.get();
        if !loan.open.load(Ordering::Acquire) {
            return Err(PyBufferError::new_err("the buffer was lent for one call, which is over"));
        }
        let readonly = c_int::from(!loan.writable);
        // SAFETY: the memory is the server's until the loan is closed, which looks at the count of views.
        let filled = unsafe {
            let address = loan.address as *mut c_void;
            ffi::PyBuffer_FillInfo(view, slf.as_ptr(), address, loan.length.cast_signed(), readonly, flags)
        };
        if filled == -1 {
            return Err(PyErr::fetch(slf.py()));
        }
        loan.views.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        self.views.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Calls `body` with a view of the memory, and sees to it that none is left.
fn lend<'py, T>(
    py: Python<'py>,
    address: usize,
    length: usize,
    writable: bool,
    body: impl FnOnce(Bound<'py, PyAny>) -> Result<T>,
) -> Result<T> {
    let exception = |error: PyErr| Failure::exception(py, &error);
    let loan = Loan { address, length, writable, open: AtomicBool::new(true), views: AtomicUsize::new(0) };
    let loan = Bound::new(py, loan).map_err(exception)?;
    let view = memoryview(&loan).map_err(exception)?;
    let outcome = body(view.clone());
    loan.get().open.store(false, Ordering::Release);
    // It fails if there are views of this view; the count tells.
    let _ = view.call_method0(pyo3::intern!(py, "release"));
    drop(view);
    if loan.get().views.load(Ordering::Acquire) > 0 {
        // Perhaps in a cycle that nobody has.
        let _ = py.import("gc").and_then(|gc| gc.call_method0("collect"));
    }
    if loan.get().views.load(Ordering::Acquire) > 0 {
        COPY.store(true, Ordering::Relaxed);
        return Err(Failure::new(
            libc::EIO,
            "the script keeps a view of the buffer, which is the server's again: copy what is needed later, \
             as in bytes(buf)",
        ));
    }
    outcome
}

fn memoryview<'py>(object: &Bound<'py, impl Sized>) -> PyResult<Bound<'py, PyAny>> {
    // SAFETY: an object.
    let view = unsafe { ffi::PyMemoryView_FromObject(object.as_ptr()) };
    // SAFETY: a new reference, or null with an exception.
    unsafe { Bound::from_owned_ptr_or_err(object.py(), view) }
}

/// Calls `body` with a writable view of the buffer.
pub(crate) fn to_fill<'py, T>(
    py: Python<'py>,
    buffer: &mut [u8],
    body: impl FnOnce(Bound<'py, PyAny>) -> Result<T>,
) -> Result<T> {
    if !COPY.load(Ordering::Relaxed) {
        return lend(py, buffer.as_mut_ptr().expose_provenance(), buffer.len(), true, body);
    }
    let exception = |error: PyErr| Failure::exception(py, &error);
    let own = PyByteArray::new_with(py, buffer.len(), |_| Ok(())).map_err(exception)?;
    let answer = body(memoryview(&own).map_err(exception)?)?;
    copy(&own, buffer)?;
    Ok(answer)
}

/// Calls `body` with a read-only view of the data.
pub(crate) fn to_read<'py, T>(
    py: Python<'py>,
    data: &[u8],
    body: impl FnOnce(Bound<'py, PyAny>) -> Result<T>,
) -> Result<T> {
    if COPY.load(Ordering::Relaxed) {
        return to_keep(py, data, body);
    }
    lend(py, data.as_ptr().expose_provenance(), data.len(), false, body)
}

/// Calls `body` with a read-only view of a copy of the data, which the script may keep.
pub(crate) fn to_keep<'py, T>(
    py: Python<'py>,
    data: &[u8],
    body: impl FnOnce(Bound<'py, PyAny>) -> Result<T>,
) -> Result<T> {
    body(memoryview(&PyBytes::new(py, data)).map_err(|error| Failure::exception(py, &error))?)
}

/// Copies the beginning of whatever has the buffer protocol, which must be long enough.
pub(crate) fn copy(from: &Bound<'_, PyAny>, to: &mut [u8]) -> Result<()> {
    let py = from.py();
    let source = View::of(from).map_err(|_| {
        let kind = from.get_type().name().map_or_else(|_| "?".to_owned(), |name| name.to_string());
        Failure::new(
            libc::EIO,
            format!("it must return a buffer, such as bytes or a bytearray, and not {kind}"),
        )
    })?;
    let length = source.0.len.cast_unsigned();
    if length < to.len() {
        return Err(Failure::new(
            libc::EIO,
            format!("it returned a buffer of {length} bytes where {} were asked for", to.len()),
        ));
    }
    source.copy_to(py, to).map_err(|error| Failure::exception(py, &error))
}

/// A view of an object's buffer.
struct View(Box<ffi::Py_buffer>);

impl View {
    fn of(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let mut view = Box::new(ffi::Py_buffer::new());
        // SAFETY: an object, and a place for its view that does not move until it is released.
        match unsafe { ffi::PyObject_GetBuffer(object.as_ptr(), &raw mut *view, ffi::PyBUF_FULL_RO) } {
            0 => Ok(View(view)),
            _ => Err(PyErr::fetch(object.py())),
        }
    }

    /// Copies the first bytes, in the order of C whatever the order in memory is.
    fn copy_to(&self, py: Python<'_>, to: &mut [u8]) -> PyResult<()> {
        let order = b'C'.cast_signed();
        // SAFETY: the view is not released yet.
        if unsafe { ffi::PyBuffer_IsContiguous(&raw const *self.0, order as _) } != 0 {
            // SAFETY: the object keeps that many bytes there, as long as the view is not released.
            let bytes = unsafe { slice::from_raw_parts(self.0.buf.cast::<u8>(), to.len()) };
            to.copy_from_slice(bytes);
            return Ok(());
        }
        let length = self.0.len;
        let mut all = vec![0; length.cast_unsigned()];
        // SAFETY: the view is not released, and there is room for all of it. Before Python 3.11 the view is not const.
        let copied = unsafe {
            let to = all.as_mut_ptr().cast();
            ffi::PyBuffer_ToContiguous(to, (&raw const *self.0).cast_mut(), length, order as _)
        };
        if copied == -1 {
            return Err(PyErr::fetch(py));
        }
        to.copy_from_slice(&all[..to.len()]);
        Ok(())
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: `of` filled it, and views do not leave `attach`.
        unsafe { ffi::PyBuffer_Release(&raw mut *self.0) }
    }
}
