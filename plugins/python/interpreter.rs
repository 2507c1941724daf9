//! The interpreter: how it starts, how threads come and go, how it survives the fork to the background, and its end.
//!
//! Between callbacks no thread holds the interpreter's lock, so a script's own threads run while the server waits. The
//! one exception is the fork: the main thread takes the lock in `get_ready` and keeps it until `after_fork`, since a
//! lock that another thread held at the fork would be held in the child for ever.

use std::{
    cell::Cell,
    ffi::{CStr, CString},
    os::unix::ffi::OsStringExt,
    path::PathBuf,
    sync::{
        Condvar, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread::ThreadId,
    time::Duration,
};

use pyo3::{Python, ffi, prelude::*};

/// The Python that the plugin was built for.
const PROGRAM: &str = env!("NBDKIT_PYTHON_PROGRAM");

/// The thread that started the interpreter.
static STARTED: OnceLock<ThreadId> = OnceLock::new();
/// How long the end waits for threads of the server that have called Python.
const PATIENCE: Duration = Duration::from_secs(1);

/// Starts the interpreter, once.
///
/// # Errors
/// The interpreter's reason, such as a standard library that is missing.
pub(crate) fn start() -> Result<(), String> {
    if is_running() {
        return Ok(());
    }
    // SAFETY: no interpreter runs, and this is the only thread that starts one.
    unsafe { initialize() }?;
    let _ = STARTED.set(std::thread::current().id());
    Python::attach(|py| {
        // The module takes the thread that imports it first for the main thread.
        let _ = py.import("threading");
    });
    // SAFETY: this thread is attached by the start; the state stays with it for `attach`.
    unsafe { ffi::PyEval_SaveThread() };
    Ok(())
}

/// Whether there is an interpreter.
pub(crate) fn is_running() -> bool {
    // SAFETY: it may be called at any time.
    unsafe { ffi::Py_IsInitialized() != 0 }
}

/// The version of the interpreter, as in `3.11.2`.
pub(crate) fn version() -> String {
    // SAFETY: it may be called at any time.
    let version = unsafe { ffi::Py_GetVersion() };
    // SAFETY: a static string of the library.
    let version = unsafe { CStr::from_ptr(version) };
    version.to_string_lossy().split_whitespace().next().unwrap_or_default().to_owned()
}

/// # Safety
///
/// No interpreter runs, and no other thread starts one.
unsafe fn initialize() -> Result<(), String> {
    // SAFETY: integers, all of which may be 0; the next call sets them.
    let mut before: ffi::PyPreConfig = unsafe { std::mem::zeroed() };
    // SAFETY: a place for the settings.
    unsafe { ffi::PyPreConfig_InitPythonConfig(&raw mut before) };
    before.parse_argv = 0;
    // The environment is the server's: a locale forced on Python would reach the commands that the server runs.
    before.coerce_c_locale = 0;
    before.coerce_c_locale_warn = 0;
    // SAFETY: settings that were initialised.
    check(unsafe { ffi::Py_PreInitialize(&raw const before) })?;

    // SAFETY: integers and pointers, all of which may be 0; the next call sets them.
    let mut config: ffi::PyConfig = unsafe { std::mem::zeroed() };
    // SAFETY: a place for the settings.
    unsafe { ffi::PyConfig_InitPythonConfig(&raw mut config) };
    config.parse_argv = 0;
    // Signals and the buffers of standard output are the server's.
    config.install_signal_handlers = 0;
    config.configure_c_stdio = 0;
    let mut status = Ok(());
    if let Some(program) = program() {
        // SAFETY: the settings were initialised, and the name is a string that lives through the call.
        status = check(unsafe {
            let field = &raw mut config.program_name;
            ffi::PyConfig_SetBytesString(&raw mut config, field, program.as_ptr())
        });
    }
    if status.is_ok() {
        // SAFETY: settings that were initialised; the caller says that there is no interpreter.
        status = check(unsafe { ffi::Py_InitializeFromConfig(&raw const config) });
    }
    // SAFETY: settings that were initialised and are not used any more.
    unsafe { ffi::PyConfig_Clear(&raw mut config) };
    status
}

fn check(status: ffi::PyStatus) -> Result<(), String> {
    // SAFETY: it only looks at the value.
    if unsafe { ffi::PyStatus_Exception(status) } == 0 {
        return Ok(());
    }
    if status.err_msg.is_null() {
        return Err("no reason given".to_owned());
    }
    // SAFETY: a static string of the library.
    Err(unsafe { CStr::from_ptr(status.err_msg) }.to_string_lossy().into_owned())
}

/// The program that the interpreter takes itself for, by which it finds its modules: that of an active virtual
/// environment of the same version, else the one it was built for. Another Python that comes first in PATH has
/// modules of another version.
fn program() -> Option<CString> {
    let version = version();
    let minor = version.rsplit_once('.').map_or(&*version, |(minor, _)| minor);
    let environment = std::env::var_os("VIRTUAL_ENV").map(PathBuf::from);
    let environment = environment.filter(|path| path.join(format!("lib/python{minor}")).is_dir());
    let program = match environment {
        Some(path) => path.join("bin/python3"),
        None => PathBuf::from(PROGRAM),
    };
    let found = program.is_absolute() && program.exists();
    found.then(|| CString::new(program.into_os_string().into_vec()).ok()).flatten()
}

/// The process that took the lock for the fork.
static BEFORE_FORK: AtomicU32 = AtomicU32::new(0);

thread_local! {
    static KEPT: Kept = Kept::new();
    /// The lock is held by this thread from `get_ready` to `after_fork`.
    static HELD: Cell<Option<ffi::PyGILState_STATE>> = const { Cell::new(None) };
}

/// A thread's state in the interpreter. The server's threads make many calls; a state that lives as long as its thread
/// saves making one for each.
struct Kept(Option<(*mut ffi::PyThreadState, ffi::PyGILState_STATE)>);

/// The states that are kept.
struct States {
    count: usize,
    /// The interpreter is about to end: states that are left go with it.
    over: bool,
}

static STATES: Mutex<States> = Mutex::new(States { count: 0, over: false });
/// One state less.
static GONE: Condvar = Condvar::new();

fn states() -> MutexGuard<'static, States> {
    STATES.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Kept {
    fn new() -> Self {
        // SAFETY: there is an interpreter: this is called from `attach`.
        if !unsafe { ffi::PyGILState_GetThisThreadState() }.is_null() {
            return Kept(None);
        }
        states().count += 1;
        // SAFETY: as above.
        let before = unsafe { ffi::PyGILState_Ensure() };
        // SAFETY: the line above attached this thread.
        Kept(Some((unsafe { ffi::PyEval_SaveThread() }, before)))
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let Some((state, before)) = self.0.take() else { return };
        let mut states = states();
        if states.over {
            return;
        }
        // SAFETY: the state is this thread's, which is not attached, and the interpreter does not end meanwhile.
        unsafe { ffi::PyEval_RestoreThread(state) };
        // SAFETY: it is now; this takes back what `new` did.
        unsafe { ffi::PyGILState_Release(before) };
        states.count -= 1;
        GONE.notify_all();
    }
}

/// Runs Python on this thread. There must be an interpreter.
pub(crate) fn attach<R>(body: impl FnOnce(Python<'_>) -> R) -> R {
    // When the thread is ending its state may be gone already; attaching then makes one for this call.
    let _ = KEPT.try_with(|_| ());
    Python::attach(body)
}

/// Keeps the lock for the fork that may follow.
pub(crate) fn before_fork() {
    BEFORE_FORK.store(std::process::id(), Ordering::Relaxed);
    if HELD.get().is_none() {
        // SAFETY: there is an interpreter.
        HELD.set(Some(unsafe { ffi::PyGILState_Ensure() }));
    }
}

/// After the fork: in a child the interpreter puts its locks in order.
pub(crate) fn after_fork() {
    let is_child = BEFORE_FORK.load(Ordering::Relaxed) != std::process::id();
    if is_child && HELD.get().is_some() {
        // SAFETY: this thread is attached, and it is the only one that the fork left.
        unsafe { ffi::PyOS_AfterFork_Child() };
    }
}

/// Lets go of the lock that was kept for the fork.
pub(crate) fn release() {
    if let Some(before) = HELD.take() {
        // SAFETY: `before_fork` attached this thread.
        unsafe { ffi::PyGILState_Release(before) };
    }
}

/// The end. Functions registered with atexit run, and what was printed and written to files is written. Then the
/// interpreter is taken down, if that needs to wait for nobody; otherwise the threads that the script has left are
/// stopped, by never letting go of the lock, until the process ends.
pub(crate) fn end() {
    if !is_running() {
        return;
    }
    // The server's threads are ending.
    let (mut states, _) = GONE
        .wait_timeout_while(states(), PATIENCE, |states| states.count > 0)
        .unwrap_or_else(PoisonError::into_inner);
    states.over = true;
    drop(states);
    // SAFETY: there is an interpreter. Without a matching release: it ends, or the lock is kept.
    let _: ffi::PyGILState_STATE = unsafe { ffi::PyGILState_Ensure() };
    let alone = Python::attach(|py| {
        let finished = py.import("atexit").and_then(|atexit| atexit.call_method0("_run_exitfuncs"));
        if let Err(error) = finished {
            crate::failure::Failure::exception(py, &error).report("atexit");
        }
        flush(py);
        let alone = is_alone(py);
        if !alone {
            flush_files(py);
        }
        alone
    });
    if alone {
        // SAFETY: this thread started the interpreter and is the only one that it knows.
        unsafe { ffi::Py_FinalizeEx() };
    }
}

/// Whether this thread is the main one and there are no others.
fn is_alone(_: Python<'_>) -> bool {
    // SAFETY: this thread is attached.
    let this = unsafe { ffi::PyThreadState_Get() };
    // SAFETY: there is an interpreter.
    let interpreter = unsafe { ffi::PyInterpreterState_Get() };
    // SAFETY: as above.
    let first = unsafe { ffi::PyInterpreterState_ThreadHead(interpreter) };
    // SAFETY: a state that lives.
    let second = unsafe { ffi::PyThreadState_Next(first) };
    first == this && second.is_null() && STARTED.get() == Some(&std::thread::current().id())
}

/// Writes what is in the buffers of open files, which Python does when it takes down an interpreter.
fn flush_files(py: Python<'_>) {
    let files = py.import("io").and_then(|io| io.getattr("IOBase"));
    let objects = py.import("gc").and_then(|gc| gc.call_method0("get_objects"));
    let (Ok(files), Ok(objects)) = (files, objects) else { return };
    let Ok(objects) = objects.try_iter() else { return };
    for object in objects.flatten() {
        if object.is_instance(&files).unwrap_or(false) {
            // It may be closed, or open for reading.
            let _ = object.call_method0("flush");
        }
    }
}

/// Writes what the script has printed.
pub(crate) fn flush(py: Python<'_>) {
    for name in ["stdout", "stderr"] {
        // A script may have closed or replaced them.
        let stream = py.import("sys").and_then(|sys| sys.getattr(name));
        let _ = stream.and_then(|stream| stream.call_method0("flush"));
    }
}
