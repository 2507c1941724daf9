//! The layers below a C filter: `nbdkit_next *`, `nbdkit_context *` and `nbdkit_backend *`, and the functions that
//! take one.
//!
//! A filter's context owns the layer below that belongs to its connection; the filter may take it away and put
//! another one there. Layers that it opens for itself are its own until it closes them.

#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "pointers from C are read or written where they are checked"
)]

mod extents;
mod table;

use std::{
    ffi::{OsString, c_char, c_int, c_void},
    os::unix::ffi::OsStringExt,
    ptr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicPtr, Ordering},
    },
};

use nbdkit_abi as abi;
use nbdkit_core::{Below, Client, Errno, Error, Next, Open, Peer, Result, ShutdownFlag};
use parking_lot::Mutex;

pub(crate) use extents::{nbdkit_extents_aligned, nbdkit_extents_full};

use crate::{
    context::{Opened, current, say_error, server},
    exports::note,
    panic::boundary,
    strings::{Strings, text},
};

/// An open layer below a filter: what `nbdkit_next *` points to.
#[repr(C)]
pub(crate) struct NextLayer {
    /// First: all that C knows of it.
    ops: abi::NextOps,
    pub(crate) next: Next,
    strings: Strings,
    finalized: AtomicBool,
}

impl NextLayer {
    /// Opens the layers of `below`. They belong to the holder of the pointer.
    fn open(below: &Below, open: &Open) -> Result<*mut NextLayer> {
        let next = below.open(open)?;
        let (strings, finalized) = (Strings::default(), AtomicBool::new(false));
        Ok(Box::into_raw(Box::new(NextLayer { ops: table::OPS, next, strings, finalized })))
    }

    /// Finalizes the layers, once.
    pub(crate) fn finalize(&self) {
        if !self.finalized.swap(true, Ordering::Relaxed) {
            self.next.finalize();
        }
    }

    /// Closes layers.
    ///
    /// # Safety
    /// From `open`, and not used again; or null.
    unsafe fn close(layer: *mut NextLayer) {
        if !layer.is_null() {
            // SAFETY: the caller promises it.
            drop(unsafe { Box::from_raw(layer) });
        }
    }

    /// The layer behind an address.
    ///
    /// # Safety
    /// That of a layer which stays open during `'a`, or null.
    pub(crate) unsafe fn from_ptr<'a>(address: *mut abi::NextOps) -> Result<&'a NextLayer> {
        // SAFETY: the caller promises it; the structure begins with what C knows of it.
        unsafe { address.cast::<NextLayer>().as_ref() }
            .ok_or_else(|| Error::new(Errno::EIO, "no layer is open below the filter"))
    }
}

/// The part of the chain below a filter, outside any connection: what `nbdkit_backend *` points to. It stays at its
/// address as long as the filter is loaded.
#[derive(Debug, Default)]
pub(crate) struct Backend(Mutex<Option<Below>>);

impl Backend {
    /// Learns what is below, if it is not known yet.
    pub(crate) fn learn(&self, below: &Below) {
        self.0.lock().get_or_insert_with(|| below.clone());
    }

    /// Lets go of the chain, which holds the filter that holds this.
    pub(crate) fn forget(&self) {
        *self.0.lock() = None;
    }

    /// As C sees it.
    pub(crate) fn as_ptr(&self) -> *mut c_void {
        ptr::from_ref(self).cast_mut().cast()
    }
}

/// A filter of one connection: what `nbdkit_context *` points to.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) opened: Opened,
    backend: Arc<Backend>,
    below: Below,
    next: AtomicPtr<NextLayer>,
}

impl Context {
    pub(crate) fn new(opened: Opened, backend: Arc<Backend>, below: Below) -> Self {
        Context { opened, backend, below, next: AtomicPtr::default() }
    }

    /// As C sees it.
    pub(crate) fn as_ptr(&self) -> *mut c_void {
        ptr::from_ref(self).cast_mut().cast()
    }

    /// The layer below, for C; null when there is none.
    pub(crate) fn next_ptr(&self) -> *mut abi::NextOps {
        self.next.load(Ordering::Acquire).cast()
    }

    /// The layer below.
    ///
    /// # Errors
    /// `EIO` if there is none.
    pub(crate) fn next(&self) -> Result<&NextLayer> {
        // SAFETY: the layer is closed by the code that takes it from here, when no request is running (that is the
        // filter's part of the interface), or when the context is dropped.
        unsafe { NextLayer::from_ptr(self.next_ptr()) }
    }

    /// Opens the layer below for this connection.
    ///
    /// # Errors
    /// Those of the layers.
    pub(crate) fn open_next(&self, readonly: bool, export_name: OsString) -> Result<()> {
        let Opened { client, tls, .. } = &self.opened;
        let open = Open { readonly, export_name, tls: *tls, client: client.clone() };
        let layer = NextLayer::open(&self.below, &open)?;
        let old = self.next.swap(layer, Ordering::AcqRel);
        // SAFETY: it was opened by an earlier call, and the filter has asked for another.
        unsafe { NextLayer::close(old) };
        Ok(())
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: the filter is closed, so nobody uses the layer below it.
        unsafe { NextLayer::close(*self.next.get_mut()) };
    }
}

/// A name that C gave; null is the default one.
///
/// # Safety
/// A terminated string or null.
unsafe fn export_name(name: *const c_char) -> OsString {
    // SAFETY: the caller promises it.
    let name = unsafe { text(name) };
    OsString::from_vec(name.map(|name| name.to_bytes().to_vec()).unwrap_or_default())
}

/// `nbdkit_next_open`: opens the layer below for the connection.
///
/// # Safety
/// The context that `open` was given; a terminated string or null.
pub(crate) unsafe extern "C" fn next_open(
    context: *mut c_void,
    readonly: c_int,
    name: *const c_char,
) -> c_int {
    boundary(-1, || {
        // SAFETY: the caller promises it.
        let context = unsafe { context.cast::<Context>().as_ref() };
        // SAFETY: as above.
        let name = unsafe { export_name(name) };
        match context.map(|context| context.open_next(readonly != 0, name)) {
            Some(Ok(())) => 0,
            Some(Err(e)) => note(&e),
            None => no_context("next_open"),
        }
    })
}

fn no_context(function: &str) -> c_int {
    say_error(format!("{function}: there is no context"));
    Errno::EINVAL.set();
    -1
}

/// What is below the filter of a context.
///
/// # Safety
/// A context or null.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn nbdkit_context_get_backend(context: *mut c_void) -> *mut c_void {
    // SAFETY: the caller promises it.
    boundary(ptr::null_mut(), || match unsafe { context.cast::<Context>().as_ref() } {
        Some(context) => context.backend.as_ptr(),
        None => {
            no_context("nbdkit_context_get_backend");
            ptr::null_mut()
        }
    })
}

/// Opens the layers below a filter: `shared`, outside any connection, else on behalf of the one that this thread
/// serves. The filter closes them.
///
/// # Safety
/// A backend of a loaded filter or null; a terminated string or null.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn nbdkit_next_context_open(
    backend: *mut c_void,
    readonly: c_int,
    name: *const c_char,
    shared: c_int,
) -> *mut abi::NextOps {
    boundary(ptr::null_mut(), || {
        // SAFETY: the caller promises it.
        let below = unsafe { backend.cast::<Backend>().as_ref() }.and_then(|b| b.0.lock().clone());
        // SAFETY: as above.
        let name = unsafe { export_name(name) };
        let opened = below
            .ok_or_else(|| Error::new(Errno::EINVAL, "nbdkit_next_context_open: the chain is not ready"))
            .and_then(|below| NextLayer::open(&below, &wish(readonly != 0, name, shared != 0)?));
        match opened {
            Ok(layer) => layer.cast(),
            Err(e) => {
                say_error(e.to_string());
                e.errno().set();
                ptr::null_mut()
            }
        }
    })
}

/// What a filter asks for that opens a layer itself.
fn wish(readonly: bool, export_name: OsString, shared: bool) -> Result<Open> {
    if shared {
        let server = server().cloned().unwrap_or_else(|| Arc::new(ShutdownFlag::new()));
        let client = Arc::new(Client::new(0, Peer::Local, server));
        return Ok(Open { readonly, export_name, tls: false, client });
    }
    current(|frame| {
        let scope = frame.map(|frame| frame.scope);
        let client = scope.and_then(|scope| scope.client).ok_or_else(|| {
            let text = "nbdkit_next_context_open: this thread serves no connection: open a shared one";
            Error::new(Errno::EINVAL, text)
        })?;
        let tls = scope.is_some_and(|scope| scope.tls);
        Ok(Open { readonly, export_name, tls, client: client.clone() })
    })
}

/// Closes layers that the filter opened itself or took from a context.
///
/// # Safety
/// From `nbdkit_next_context_open` or `nbdkit_context_set_next`, not in a context, not used again; or null.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn nbdkit_next_context_close(next: *mut abi::NextOps) {
    // SAFETY: the caller promises it.
    boundary((), || unsafe { NextLayer::close(next.cast()) });
}

/// Gives a context another layer below, or none. Returns the old one, which is the filter's now.
///
/// # Safety
/// A context; a layer that the filter owns, or null. No request of the connection is running in the old one.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn nbdkit_context_set_next(
    context: *mut c_void,
    next: *mut abi::NextOps,
) -> *mut abi::NextOps {
    // SAFETY: the caller promises it.
    boundary(ptr::null_mut(), || match unsafe { context.cast::<Context>().as_ref() } {
        Some(context) => context.next.swap(next.cast(), Ordering::AcqRel).cast(),
        None => {
            no_context("nbdkit_context_set_next");
            ptr::null_mut()
        }
    })
}
