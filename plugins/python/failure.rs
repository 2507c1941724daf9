//! Why a callback failed: the text for the log and the errno for the client.

use std::cell::Cell;

use nbdkit::bridge::log_error;
use pyo3::{exceptions::PyOSError, prelude::*};

use crate::server;

thread_local! {
    /// What the script gave to `nbdkit.set_error` during this callback; 0: nothing.
    static SET: Cell<i32> = const { Cell::new(0) };
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Failure {
    /// Where an exception was raised, for the log only.
    traceback: String,
    /// What it was. The server may pass it on to the client.
    text: String,
    errno: i32,
}

/// What a callback comes to.
pub(crate) type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    /// A failure that is not an exception of the script.
    pub(crate) fn new(errno: i32, text: impl Into<String>) -> Self {
        Failure { traceback: String::new(), text: text.into(), errno }
    }

    /// An exception: its traceback, and the errno of an `OSError`.
    pub(crate) fn exception(py: Python<'_>, error: &PyErr) -> Self {
        let (traceback, text) = lines(py, error);
        Failure { traceback, text, errno: errno(py, error) }
    }

    /// The errno for the client: what the script set, else that of the failure; 0 is left to the server, which says
    /// `EIO`.
    pub(crate) fn errno(&self) -> i32 {
        if SET.get() == 0 { self.errno } else { SET.get() }
    }

    /// Tells the server. `place` says where it happened.
    pub(crate) fn report(&self, place: &str) {
        for part in [&self.traceback, &self.text] {
            if !part.is_empty() {
                log_error(&format!("{place}: {part}"));
            }
        }
        if self.errno() > 0 {
            nbdkit::set_error(self.errno());
        }
    }
}

/// A new callback begins: what an earlier one set is forgotten.
pub(crate) fn begin() {
    SET.set(0);
}

/// `nbdkit.set_error`.
pub(crate) fn set_error(errno: i32) {
    SET.set(errno);
    server::set_error(errno);
}

/// What `nbdkit.set_error` was given during this callback; 0: nothing.
pub(crate) fn set_by_script() -> i32 {
    SET.get()
}

/// Whether an errno of zero means that zeroes should be written instead.
pub(crate) fn is_unsupported(errno: i32) -> bool {
    errno == libc::EOPNOTSUPP || errno == libc::ENOTSUP
}

fn errno(py: Python<'_>, error: &PyErr) -> i32 {
    if !error.is_instance_of::<PyOSError>(py) {
        return 0;
    }
    let errno = error.value(py).getattr("errno").and_then(|errno| errno.extract::<i32>());
    errno.unwrap_or(0)
}

/// An exception as Python shows it: the traceback, and what comes last.
fn lines(py: Python<'_>, error: &PyErr) -> (String, String) {
    let (kind, value, traceback) = (error.get_type(py), error.value(py), error.traceback(py));
    let lines = py
        .import("traceback")
        .and_then(|module| module.call_method1("format_exception", (kind, value, traceback)))
        .and_then(|lines| lines.extract::<Vec<String>>());
    match lines.as_deref() {
        Ok([before @ .., last]) => (before.concat().trim_end().to_owned(), last.trim_end().to_owned()),
        // The exception cannot be shown, or the traceback module is broken.
        _ => (String::new(), error.to_string()),
    }
}
