//! Why a callback failed: the text for the log and the errno for the client.

use std::cell::Cell;

use pyo3::{exceptions::PyOSError, prelude::*};

use crate::server;

thread_local! {
    /// What the script gave to `nbdkit.set_error` during this callback; 0: nothing.
    static SET: Cell<i32> = const { Cell::new(0) };
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Failure {
    text: String,
    errno: i32,
}

/// What a callback comes to.
pub(crate) type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    /// A failure that is not an exception of the script.
    pub(crate) fn new(errno: i32, text: impl Into<String>) -> Self {
        Failure { text: text.into(), errno }
    }

    /// An exception: its traceback, and the errno of an `OSError`.
    pub(crate) fn exception(py: Python<'_>, error: &PyErr) -> Self {
        Failure { text: text(py, error), errno: errno(py, error) }
    }

    /// The errno for the client: what the script set, else that of the failure; 0 is left to the server, which says
    /// `EIO`.
    pub(crate) fn errno(&self) -> i32 {
        if SET.get() == 0 { self.errno } else { SET.get() }
    }

    /// For the log.
    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    /// Tells the server.
    pub(crate) fn report(&self, script: &str, method: &str) {
        nbdkit::bridge::log_error(&format!("{script}: {method}: {}", self.text));
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

/// An exception as Python shows it, with the traceback.
pub(crate) fn text(py: Python<'_>, error: &PyErr) -> String {
    let (kind, value, traceback) = (error.get_type(py), error.value(py), error.traceback(py));
    let lines = py
        .import("traceback")
        .and_then(|module| module.call_method1("format_exception", (kind, value, traceback)))
        .and_then(|lines| lines.extract::<Vec<String>>());
    match lines {
        Ok(lines) => lines.concat().trim_end().to_owned(),
        // The exception cannot be shown, or the traceback module is broken.
        Err(_) => error.to_string(),
    }
}
