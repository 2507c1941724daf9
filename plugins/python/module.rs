//! The module `nbdkit` that scripts import: the server's functions and the constants of the interface.

use std::borrow::Cow;
use std::ffi::{CStr, CString, OsString};
use std::os::unix::ffi::OsStringExt;

use nbdkit::bridge::abi;
use pyo3::{
    exceptions::{PyOSError, PyRuntimeError, PyValueError},
    prelude::*,
    types::{PyModule, PyString},
};

use crate::{
    failure,
    server::{self, Newer},
};

/// Puts the module where `import` finds it.
pub(crate) fn install(py: Python<'_>) -> PyResult<()> {
    let module = PyModule::new(py, "nbdkit")?;
    module.setattr("__doc__", "The functions of the server for plugins; see nbdkit-python-plugin(3).")?;
    functions(&module)?;
    constants(&module)?;
    py.import("sys")?.getattr("modules")?.set_item("nbdkit", module)
}

fn functions(module: &Bound<'_, PyModule>) -> PyResult<()> {
    macro_rules! add {
        ($($function:ident),*) => { $(module.add_function(wrap_pyfunction!($function, module)?)?;)* };
    }
    add!(debug, export_name, set_error, parse_size, parse_probability, parse_delay, shutdown, disconnect);
    add!(is_tls, stdio_safe, nanosleep, read_password, peer_pid, peer_uid, peer_gid);
    add!(peer_security_context, peer_tls_dn, peer_tls_issuer_dn);
    Ok(())
}

fn constants(module: &Bound<'_, PyModule>) -> PyResult<()> {
    macro_rules! add {
        ($($constant:ident),* $(,)?) => { $(module.add(stringify!($constant), abi::$constant)?;)* };
    }
    add!(
        THREAD_MODEL_SERIALIZE_CONNECTIONS,
        THREAD_MODEL_SERIALIZE_ALL_REQUESTS,
        THREAD_MODEL_SERIALIZE_REQUESTS,
        THREAD_MODEL_PARALLEL,
        FLAG_MAY_TRIM,
        FLAG_FUA,
        FLAG_REQ_ONE,
        FLAG_FAST_ZERO,
        FUA_NONE,
        FUA_EMULATE,
        FUA_NATIVE,
        CACHE_NONE,
        CACHE_EMULATE,
        CACHE_NATIVE,
        EXTENT_HOLE,
        EXTENT_ZERO,
    );
    Ok(())
}

/// A string that need not be UTF-8, as Python has file names.
fn text(bytes: Vec<u8>) -> OsString {
    OsString::from_vec(bytes)
}

fn argument(value: OsString) -> PyResult<CString> {
    server::c_text(value.into_vec())
        .ok_or_else(|| PyValueError::new_err("there is a zero byte in the string"))
}

fn newer<T>(function: &str, answer: Newer<T>) -> PyResult<Option<T>> {
    match answer {
        Newer::Answer(answer) => Ok(Some(answer)),
        Newer::Failed => Ok(None),
        Newer::Missing => Err(PyRuntimeError::new_err(format!(
            "{function}: this server does not have it: a newer nbdkit is needed"
        ))),
    }
}

fn no_client(function: &str) -> PyErr {
    PyRuntimeError::new_err(format!("{function}: not known here: it is about the client of a callback"))
}

/// Write a message to the log, which is shown if the server runs with -v.
#[pyfunction]
fn debug(msg: &Bound<'_, PyString>) {
    nbdkit::write_debug_message(format_args!("{}", msg.to_string_lossy()));
}

/// Return the name of the export that the client asked for.
#[pyfunction]
fn export_name() -> PyResult<OsString> {
    server::export_name().map(text).ok_or_else(|| no_client("export_name"))
}

/// Set the errno that the client gets if this callback raises an exception.
#[pyfunction]
fn set_error(err: i32) {
    failure::set_error(err);
}

/// Parse a size, such as "100M", into bytes.
#[pyfunction]
fn parse_size(str: OsString) -> PyResult<i64> {
    let shown = str.display().to_string();
    server::parse_size(&argument(str)?).ok_or_else(|| PyValueError::new_err(format!("not a size: {shown}")))
}

/// Parse a probability, such as "0.1", "10%" or "1:10", into a float.
#[pyfunction]
fn parse_probability(what: OsString, str: OsString) -> PyResult<f64> {
    let shown = format!("{}: not a probability: {}", what.display(), str.display());
    let answer = server::parse_probability(&argument(what)?, &argument(str)?);
    newer("parse_probability", answer)?.ok_or_else(|| PyValueError::new_err(shown))
}

/// Parse a delay, such as "10ms", into a tuple of seconds and nanoseconds.
#[pyfunction]
fn parse_delay(what: OsString, str: OsString) -> PyResult<(u32, u32)> {
    let shown = format!("{}: not a delay: {}", what.display(), str.display());
    let answer = server::parse_delay(&argument(what)?, &argument(str)?);
    newer("parse_delay", answer)?.ok_or_else(|| PyValueError::new_err(shown))
}

/// Ask the server to end.
#[pyfunction]
fn shutdown() {
    nbdkit::shutdown();
}

/// Ask the server to drop this client: at once if force, else after it has had its replies.
#[pyfunction]
fn disconnect(force: bool) -> PyResult<()> {
    let done = if server::disconnect(force) { Newer::Answer(()) } else { Newer::Missing };
    newer("disconnect", done).map(|_| ())
}

/// Return whether the client speaks TLS.
#[pyfunction]
fn is_tls() -> PyResult<bool> {
    nbdkit::is_tls().map_err(|_| no_client("is_tls"))
}

/// Return whether standard input and output may be used.
#[pyfunction]
fn stdio_safe() -> bool {
    nbdkit::stdio_safe()
}

/// Sleep. It ends early, with OSError(ESHUTDOWN), if the server ends or the client has gone.
#[pyfunction]
fn nanosleep(py: Python<'_>, sec: u32, nsec: u32) -> PyResult<()> {
    if py.detach(|| server::nanosleep(sec, nsec)) {
        return Ok(());
    }
    Err(PyOSError::new_err((libc::ESHUTDOWN, "the sleep ended early: the client or the server stops")))
}

/// Read a password, as bytes: the value itself, "-" asks for it, "+FILE" and "-FD" read it.
#[pyfunction]
fn read_password(py: Python<'_>, value: OsString) -> PyResult<Cow<'static, [u8]>> {
    let value = argument(value)?;
    let password = py.detach(|| server::read_password(&value));
    password.map(Cow::Owned).ok_or_else(|| PyRuntimeError::new_err("the password cannot be read"))
}

/// Return the process ID of the client, which must be on a Unix socket.
#[pyfunction]
fn peer_pid() -> PyResult<i64> {
    server::peer_pid().ok_or_else(|| no_client("peer_pid"))
}

/// Return the user ID of the client, which must be on a Unix socket.
#[pyfunction]
fn peer_uid() -> PyResult<i64> {
    server::peer_uid().ok_or_else(|| no_client("peer_uid"))
}

/// Return the group ID of the client, which must be on a Unix socket.
#[pyfunction]
fn peer_gid() -> PyResult<i64> {
    server::peer_gid().ok_or_else(|| no_client("peer_gid"))
}

fn peer_text(function: &str, symbol: &CStr) -> PyResult<OsString> {
    newer(function, server::peer_text(symbol))?.map(text).ok_or_else(|| no_client(function))
}

/// Return the security label of the client's socket.
#[pyfunction]
fn peer_security_context() -> PyResult<OsString> {
    peer_text("peer_security_context", c"nbdkit_peer_security_context")
}

/// Return the distinguished name in the client's certificate.
#[pyfunction]
fn peer_tls_dn() -> PyResult<OsString> {
    peer_text("peer_tls_dn", c"nbdkit_peer_tls_dn")
}

/// Return the distinguished name of the issuer of the client's certificate.
#[pyfunction]
fn peer_tls_issuer_dn() -> PyResult<OsString> {
    peer_text("peer_tls_issuer_dn", c"nbdkit_peer_tls_issuer_dn")
}
