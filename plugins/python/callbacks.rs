//! What the server calls: one C function for each callback. Which of them a script has is known only once it is
//! loaded, so all are registered, and the defaults of those that are missing are here.

use std::{
    ffi::{CStr, OsStr, c_char, c_int, c_void},
    os::unix::ffi::OsStrExt,
    ptr,
};

use nbdkit::{
    ExportHandle,
    bridge::{abi, border, c_string, log_error},
};
use pyo3::{prelude::*, types::PyTuple};

use crate::{
    failure::{self, Failure, Result},
    interpreter, module,
    script::Script,
    server,
};

/// An open handle: the script's object, owned by the server.
pub(crate) type Handle = *mut c_void;

/// Calls the script. A failure is reported, and `failed` is what C gets.
pub(crate) fn call<T>(
    method: &str,
    failed: T,
    body: impl FnOnce(Python<'_>, &'static Script) -> Result<T>,
) -> T {
    border(method, None, || {
        let Some(script) = Script::get() else {
            log_error("no script was given: nbdkit python SCRIPT.py");
            return Ok(None);
        };
        failure::begin();
        let outcome = interpreter::attach(|py| body(py, script));
        Ok(outcome.map_err(|failure| failure.report(&format!("{}: {method}", script.name))).ok())
    })
    .unwrap_or(failed)
}

/// The same for callbacks that answer 0 or -1.
pub(crate) fn status(method: &str, body: impl FnOnce(Python<'_>, &'static Script) -> Result<()>) -> c_int {
    call(method, -1, |py, script| body(py, script).map(|()| 0))
}

/// An answer of the script in the type that it must have.
pub(crate) fn extract<'py, T: FromPyObjectOwned<'py>>(answer: &Bound<'py, PyAny>, wanted: &str) -> Result<T> {
    answer.extract().map_err(|_| unexpected(answer, wanted))
}

pub(crate) fn unexpected(answer: &Bound<'_, PyAny>, wanted: &str) -> Failure {
    let shown = answer.repr().map_or_else(|_| "an object".to_owned(), |repr| repr.to_string());
    let shown: String = if shown.chars().count() > 100 {
        shown.chars().take(100).chain("...".chars()).collect()
    } else {
        shown
    };
    Failure::new(libc::EIO, format!("it must return {wanted}, and not {shown}"))
}

pub(crate) fn exception(py: Python<'_>) -> impl Fn(PyErr) -> Failure {
    move |error| Failure::exception(py, &error)
}

/// The script's object.
///
/// # Safety
///
/// `open` made the handle and it has not been closed.
pub(crate) unsafe fn object(py: Python<'_>, handle: Handle) -> Bound<'_, PyAny> {
    // SAFETY: the caller says that the server holds a reference.
    unsafe { Bound::from_borrowed_ptr(py, handle.cast()) }
}

pub(crate) unsafe extern "C" fn load() {
    border("load", (), || {
        let started = interpreter::start()
            .and_then(|()| interpreter::attach(|py| module::install(py).map_err(|error| error.to_string())));
        if let Err(reason) = started {
            log_error(&format!("cannot start the Python interpreter: {reason}"));
        }
        Ok(())
    })
}

pub(crate) unsafe extern "C" fn unload() {
    border("unload", (), || {
        interpreter::end();
        Ok(())
    })
}

/// The script's docstring; null if there is none.
pub(crate) fn description() -> *const c_char {
    if Script::get().is_none() {
        return ptr::null();
    }
    call("__doc__", ptr::null(), |py, script| optional_text(script.docstring(py)))
}

pub(crate) unsafe extern "C" fn dump_plugin() {
    border("dump_plugin", (), || {
        // SAFETY: null means all streams.
        unsafe { libc::fflush(ptr::null_mut()) };
        println!("python_version={}", interpreter::version());
        println!("python_pep_384_abi_version=3");
        println!("nbdkit_python_maximum_api_version={}", crate::script::MAX_VERSION);
        if let Some(script) = Script::get() {
            println!("python_script={}", script.name);
            call("dump_plugin", (), |py, script| {
                script.call(py, "dump_plugin", ())?;
                interpreter::flush(py);
                Ok(())
            });
        }
        Ok(())
    })
}

pub(crate) unsafe extern "C" fn config(key: *const c_char, value: *const c_char) -> c_int {
    // SAFETY: the server's strings live through the callback.
    let key = unsafe { CStr::from_ptr(key) };
    // SAFETY: as above.
    let value = unsafe { CStr::from_ptr(value) };
    let (key, value) = (key.to_string_lossy(), OsStr::from_bytes(value.to_bytes()));
    if Script::get().is_some() {
        return status("config", |py, script| {
            if script.call(py, "config", (&*key, value))?.is_none() {
                let text = format!("the script takes no parameters, and there is {key}={}", value.display());
                return Err(Failure::new(0, text));
            }
            interpreter::flush(py);
            Ok(())
        });
    }
    border("config", -1, || {
        if !interpreter::is_running() {
            log_error("there is no Python interpreter");
            return Ok(-1);
        }
        if key != "script" {
            log_error("the first parameter must be the script: nbdkit python SCRIPT.py [KEY=VALUE ...]");
            return Ok(-1);
        }
        let loaded = interpreter::attach(|py| Script::load(py, value).inspect(|()| interpreter::flush(py)));
        Ok(loaded.map_err(|failure| failure.report(&value.display().to_string())).map_or(-1, |()| 0))
    })
}

pub(crate) unsafe extern "C" fn config_complete() -> c_int {
    status("config_complete", |py, script| {
        script.call(py, "config_complete", ())?;
        interpreter::flush(py);
        Ok(())
    })
}

pub(crate) unsafe extern "C" fn get_ready() -> c_int {
    let status = status("get_ready", |py, script| {
        script.call(py, "get_ready", ())?;
        interpreter::flush(py);
        Ok(())
    });
    if status == 0 {
        interpreter::before_fork();
    }
    status
}

pub(crate) unsafe extern "C" fn after_fork() -> c_int {
    interpreter::after_fork();
    let status = status("after_fork", |py, script| script.call(py, "after_fork", ()).map(drop));
    interpreter::release();
    status
}

pub(crate) unsafe extern "C" fn cleanup() {
    call("cleanup", (), |py, script| {
        let called = script.call(py, "cleanup", ()).map(drop);
        interpreter::flush(py);
        called
    })
}

pub(crate) unsafe extern "C" fn thread_model() -> c_int {
    if Script::get().is_none() {
        return abi::THREAD_MODEL_SERIALIZE_ALL_REQUESTS;
    }
    call("thread_model", -1, |py, script| {
        let Some(answer) = script.call(py, "thread_model", ())? else {
            return Ok(abi::THREAD_MODEL_SERIALIZE_ALL_REQUESTS);
        };
        let wanted = "one of nbdkit.THREAD_MODEL_*";
        match extract(&answer, wanted)? {
            model @ abi::THREAD_MODEL_SERIALIZE_CONNECTIONS..=abi::THREAD_MODEL_PARALLEL => Ok(model),
            _ => Err(unexpected(&answer, wanted)),
        }
    })
}

pub(crate) unsafe extern "C" fn preconnect(readonly: c_int) -> c_int {
    status("preconnect", |py, script| script.call(py, "preconnect", (readonly != 0,)).map(drop))
}

pub(crate) unsafe extern "C" fn list_exports(readonly: c_int, is_tls: c_int, exports: *mut c_void) -> c_int {
    status("list_exports", |py, script| {
        let mut list = ExportHandle::new(exports);
        let refused = |error: nbdkit::Error| Failure::new(error.errno(), error.to_string());
        let Some(answer) = script.call(py, "list_exports", (readonly != 0, is_tls != 0))? else {
            return list.add_default().map_err(refused);
        };
        let wanted = "an iterable of names and (name, description) tuples";
        for item in answer.try_iter().map_err(|_| unexpected(&answer, wanted))? {
            let item = item.map_err(exception(py))?;
            let (name, description): (String, Option<String>) = match item.cast::<PyTuple>() {
                Ok(_) => extract(&item, wanted)?,
                Err(_) => (extract(&item, wanted)?, None),
            };
            list.add(&name, description.as_deref()).map_err(refused)?;
        }
        Ok(())
    })
}

/// A string that the server keeps; null for None.
fn optional_text(answer: Option<Bound<'_, PyAny>>) -> Result<*const c_char> {
    let Some(answer) = answer.filter(|answer| !answer.is_none()) else { return Ok(ptr::null()) };
    let text: String = extract(&answer, "a string")?;
    Ok(server::intern(&c_string(&text)))
}

pub(crate) unsafe extern "C" fn default_export(readonly: c_int, is_tls: c_int) -> *const c_char {
    call("default_export", ptr::null(), |py, script| {
        match script.call(py, "default_export", (readonly != 0, is_tls != 0))? {
            None => Ok(c"".as_ptr()),
            answer => optional_text(answer),
        }
    })
}

pub(crate) unsafe extern "C" fn open(readonly: c_int) -> Handle {
    call("open", ptr::null_mut(), |py, script| {
        let handle = script.call(py, "open", (readonly != 0,))?;
        Ok(handle.map_or(ptr::null_mut(), |handle| handle.into_ptr().cast()))
    })
}

pub(crate) unsafe extern "C" fn close(handle: Handle) {
    call("close", (), |py, script| {
        // SAFETY: `open` gave this reference to the server, which gives it back.
        let object = unsafe { Bound::from_owned_ptr(py, handle.cast()) };
        script.call(py, "close", (object,)).map(drop)
    })
}

/// Asks a question about a handle; None if the script does not have the function.
unsafe fn ask<T>(
    handle: Handle,
    method: &str,
    failed: T,
    answer: impl FnOnce(Python<'_>, &'static Script, Option<Bound<'_, PyAny>>) -> Result<T>,
) -> T {
    call(method, failed, |py, script| {
        // SAFETY: the server calls with an open handle.
        let handle = unsafe { object(py, handle) };
        let said = script.call(py, method, (handle,))?;
        answer(py, script, said)
    })
}

pub(crate) unsafe extern "C" fn export_description(handle: Handle) -> *const c_char {
    // SAFETY: the server calls with an open handle.
    unsafe { ask(handle, "export_description", ptr::null(), |_, _, said| optional_text(said)) }
}

pub(crate) unsafe extern "C" fn get_size(handle: Handle) -> i64 {
    let answer = |py: Python<'_>, _: &Script, said: Option<Bound<'_, PyAny>>| {
        let said = said.unwrap_or_else(|| py.None().into_bound(py));
        let wanted = "the size in bytes, from 0 to 2**63 - 1";
        let size: i64 = extract(&said, wanted)?;
        if size < 0 { Err(unexpected(&said, wanted)) } else { Ok(size) }
    };
    // SAFETY: the server calls with an open handle.
    unsafe { ask(handle, "get_size", -1, answer) }
}

pub(crate) unsafe extern "C" fn block_size(
    handle: Handle,
    minimum: *mut u32,
    preferred: *mut u32,
    maximum: *mut u32,
) -> c_int {
    let answer = |_: Python<'_>, _: &Script, said: Option<Bound<'_, PyAny>>| {
        let sizes: [u32; 3] = match said {
            Some(said) => extract(&said, "(minimum, preferred, maximum), each from 0 to 2**32 - 1")?,
            None => [0; 3],
        };
        for (place, size) in [minimum, preferred, maximum].into_iter().zip(sizes) {
            // SAFETY: the server gives three places for the answer.
            unsafe { place.write(size) };
        }
        Ok(0)
    };
    // SAFETY: the server calls with an open handle.
    unsafe { ask(handle, "block_size", -1, answer) }
}

/// Questions with yes or no for an answer, and what a script without the function means.
macro_rules! questions {
    ($($method:ident: $missing:expr;)*) => {
        $(pub(crate) unsafe extern "C" fn $method(handle: Handle) -> c_int {
            let answer = |py: Python<'_>, script: &'static Script, said: Option<Bound<'_, PyAny>>| {
                let missing: fn(Python<'_>, &'static Script) -> Result<bool> = $missing;
                let answer = match said {
                    Some(said) => said.is_truthy().map_err(exception(py)),
                    None => missing(py, script),
                };
                answer.map(c_int::from)
            };
            // SAFETY: the server calls with an open handle.
            unsafe { ask(handle, stringify!($method), -1, answer) }
        })*
    };
}
questions! {
    can_write: |py, script| script.has(py, "pwrite");
    can_flush: |py, script| script.has(py, "flush");
    can_trim: |py, script| script.has(py, "trim");
    can_zero: |py, script| script.has(py, "zero");
    can_extents: |py, script| script.has(py, "extents");
    is_rotational: |_, _| Ok(false);
    can_multi_conn: |_, _| Ok(false);
}

pub(crate) unsafe extern "C" fn can_fast_zero(handle: Handle) -> c_int {
    let answer = |py: Python<'_>, script: &'static Script, said: Option<Bound<'_, PyAny>>| {
        let answer = match said {
            Some(said) => said.is_truthy().map_err(exception(py))?,
            None if !script.has(py, "zero")? => true,
            None => {
                // SAFETY: the server calls with an open handle.
                let handle = unsafe { object(py, handle) };
                let can_zero = script.call(py, "can_zero", (handle,))?;
                // To fail is fast.
                can_zero.is_some_and(|can| !can.is_truthy().unwrap_or(true))
            }
        };
        Ok(answer.into())
    };
    // SAFETY: as above.
    unsafe { ask(handle, "can_fast_zero", -1, answer) }
}

/// One of three answers.
fn one_of_three(said: &Bound<'_, PyAny>, wanted: &str) -> Result<c_int> {
    match extract(said, wanted)? {
        answer @ 0..=2 => Ok(answer),
        _ => Err(unexpected(said, wanted)),
    }
}

pub(crate) unsafe extern "C" fn can_fua(handle: Handle) -> c_int {
    let answer = |py: Python<'_>, script: &'static Script, said: Option<Bound<'_, PyAny>>| {
        let by_flush = if script.has(py, "flush")? { abi::FUA_EMULATE } else { abi::FUA_NONE };
        match said {
            None => Ok(by_flush),
            Some(said) => {
                let answer = one_of_three(&said, "one of nbdkit.FUA_*")?;
                // Version 1 cannot be told to write through.
                let native = answer == abi::FUA_NATIVE;
                Ok(if native && !script.has_flags() { by_flush } else { answer })
            }
        }
    };
    // SAFETY: the server calls with an open handle.
    unsafe { ask(handle, "can_fua", -1, answer) }
}

pub(crate) unsafe extern "C" fn can_cache(handle: Handle) -> c_int {
    let answer = |py: Python<'_>, script: &'static Script, said: Option<Bound<'_, PyAny>>| match said {
        Some(said) => one_of_three(&said, "one of nbdkit.CACHE_*"),
        None if script.has(py, "cache")? => Ok(abi::CACHE_NATIVE),
        None => Ok(abi::CACHE_NONE),
    };
    // SAFETY: the server calls with an open handle.
    unsafe { ask(handle, "can_cache", -1, answer) }
}
