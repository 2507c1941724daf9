//! What a thread is doing for whom, while it is inside C code: the one thread-local of the program.
//!
//! The C interface has functions without a handle (`nbdkit_set_error`, `nbdkit_export_name`, `nbdkit_peer_name`): they
//! are about the call that the thread is in. Each call into C puts a [`Frame`] on top of a stack, and takes it off
//! when it returns. A frame also collects what the callee says with `nbdkit_error`.

use std::{
    cell::{Cell, RefCell},
    ffi::{CString, c_int},
    ptr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use nbdkit_core::{Below, Client, Errno, Error, ShutdownFlag};

use crate::strings::Strings;

/// The log target of what plugins and filters say.
pub(crate) const TARGET: &str = "nbdkit::plugin";

/// What an open layer of C code may ask about, and the strings it has interned.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) client: Arc<Client>,
    pub(crate) export_name: CString,
    pub(crate) tls: bool,
    pub(crate) strings: Strings,
}

impl Opened {
    pub(crate) fn new(open: &nbdkit_core::Open, export_name: CString) -> Self {
        serve(open.client.server());
        Opened { client: open.client.clone(), export_name, tls: open.tls, strings: Strings::default() }
    }
}

/// The server's shutdown flag, known since `after_fork`.
static SERVER: OnceLock<Arc<ShutdownFlag>> = OnceLock::new();
/// C code has asked for the end of a server that did not serve yet.
static ASKED_EARLY: AtomicBool = AtomicBool::new(false);

/// The server's shutdown flag.
pub(crate) fn server() -> Option<&'static Arc<ShutdownFlag>> {
    SERVER.get()
}

/// From now on this is the flag that C code raises. It is raised at once if that was asked for before.
pub(crate) fn serve(server: &Arc<ShutdownFlag>) {
    let _ = SERVER.set(server.clone());
    if ASKED_EARLY.swap(false, Ordering::AcqRel) {
        server.raise();
    }
}

/// Asks the server to stop, on nobody's behalf: at once or, if it does not serve yet, when it does.
pub(crate) fn shut_down() {
    match server() {
        Some(server) => server.raise(),
        None => ASKED_EARLY.store(true, Ordering::Release),
    }
}

/// When what a callee says is logged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Say {
    /// At once.
    #[default]
    AtOnce,
    /// When the call is over; if it failed, the last message is the reason, and the code that handles the failure
    /// reports it.
    Later,
}

/// The circumstances of a call.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Scope<'a> {
    /// The client it is for.
    pub(crate) client: Option<&'a Arc<Client>>,
    /// The open layer that is called.
    pub(crate) opened: Option<&'a Opened>,
    /// The layers below a filter.
    pub(crate) below: Option<&'a Below>,
    /// The client speaks TLS, as far as is known.
    pub(crate) tls: bool,
    pub(crate) say: Say,
}

impl<'a> Scope<'a> {
    /// A call of an open layer.
    pub(crate) fn of(opened: &'a Opened) -> Self {
        Scope { client: Some(&opened.client), opened: Some(opened), tls: opened.tls, ..Scope::default() }
    }

    /// A call before the server serves.
    pub(crate) fn start() -> Self {
        Scope { say: Say::Later, ..Scope::default() }
    }
}

#[derive(Debug)]
struct Message {
    text: String,
    logged: bool,
}

/// A call in progress.
#[derive(Debug)]
pub(crate) struct Frame<'a> {
    pub(crate) scope: Scope<'a>,
    errno: Cell<c_int>,
    messages: RefCell<Vec<Message>>,
    parent: *const Frame<'static>,
}

thread_local! {
    static TOP: Cell<*const Frame<'static>> = const { Cell::new(ptr::null()) };
}

/// Calls `f` with the call that this thread is in, if any.
pub(crate) fn current<R>(f: impl FnOnce(Option<&Frame<'_>>) -> R) -> R {
    // SAFETY: the pointer is null or that of a frame further up this thread's stack, in `call`, which takes it off
    // before the frame ends; nothing on this thread can do so while `f` runs.
    let frame = unsafe { TOP.get().as_ref() };
    f(frame)
}

/// What came of a call.
#[derive(Debug)]
pub(crate) struct Outcome<R> {
    /// What the callee returned.
    pub(crate) value: R,
    /// What it gave to `nbdkit_set_error`; 0: nothing.
    pub(crate) set_errno: c_int,
    /// The errno it left behind; 0: none.
    pub(crate) errno: c_int,
    messages: Vec<Message>,
}

/// Takes the frame off again, whatever happens.
struct Restore(*const Frame<'static>);

impl Drop for Restore {
    fn drop(&mut self) {
        TOP.set(self.0);
    }
}

/// Calls into C.
pub(crate) fn call<R>(scope: Scope<'_>, body: impl FnOnce() -> R) -> Outcome<R> {
    let frame = Frame { scope, errno: Cell::new(0), messages: RefCell::default(), parent: TOP.get() };
    let restore = Restore(TOP.replace(ptr::from_ref(&frame).cast()));
    Errno::clear();
    let value = body();
    let errno = Errno::last_raw();
    drop(restore);
    Outcome { value, set_errno: frame.errno.get(), errno, messages: frame.messages.into_inner() }
}

impl<R> Outcome<R> {
    /// What is left to log when the call succeeded; returns its value.
    pub(crate) fn succeeded(self) -> R {
        for message in self.messages {
            message.log();
        }
        self.value
    }

    /// The reason why a request failed. `errno` is the callee's own word; 0: none. Then `nbdkit_set_error`'s counts,
    /// then `EIO`.
    pub(crate) fn error(mut self, what: &str, errno: c_int) -> Error {
        let errno = [errno, self.set_errno].into_iter().find(|e| *e != 0).map(Errno::from_raw);
        let errno = errno.filter(|e| *e != Errno::UnknownErrno).unwrap_or(Errno::EIO);
        match self.messages.pop() {
            Some(Message { text, logged: true }) => Error::new(errno, text).logged(),
            Some(Message { text, logged: false }) => Error::new(errno, text),
            None => Error::new(errno, format!("{what}: {}", errno.desc())),
        }
    }

    /// The reason why a step of the start failed, for people; earlier messages are logged.
    pub(crate) fn failure(mut self, what: &str) -> anyhow::Error {
        let last = self.messages.pop();
        for message in self.messages {
            message.log();
        }
        match last {
            Some(message) => anyhow::Error::msg(message.text),
            None => anyhow::anyhow!("{what} failed without saying why: -v shows more"),
        }
    }
}

impl Message {
    fn log(self) {
        if !self.logged {
            log::error!(target: TARGET, "{}", self.text);
        }
    }
}

impl Frame<'_> {
    /// `nbdkit_set_error`.
    pub(crate) fn set_errno(&self, errno: c_int) {
        self.errno.set(errno);
    }

    fn push(&self, message: Message) {
        let mut messages = self.messages.borrow_mut();
        if self.scope.say == Say::AtOnce {
            messages.clear();
        }
        messages.push(message);
    }

    /// Keeps the reason why the layer below failed: should the callee fail too and say nothing, it is the reason
    /// for that as well.
    pub(crate) fn note(&self, error: &Error) {
        self.push(Message { text: error.to_string(), logged: error.is_logged() });
    }

    /// As [`note`](Self::note), for a step of the start.
    pub(crate) fn note_failure(&self, error: &anyhow::Error) {
        self.push(Message { text: format!("{error:#}"), logged: false });
    }
}

/// `nbdkit_error`: tells the current call's caller, and the log.
pub(crate) fn say_error(text: String) {
    current(|frame| match frame {
        Some(frame) => {
            let logged = frame.scope.say == Say::AtOnce;
            if logged {
                log::error!(target: TARGET, "{text}");
            }
            frame.push(Message { text, logged });
        }
        None => log::error!(target: TARGET, "{text}"),
    });
}

/// Logs what is still held back on this thread: the callee has called `exit`.
pub(crate) extern "C" fn last_words() {
    crate::panic::boundary((), || {
        let mut next = TOP.get();
        // SAFETY: as in `current`: exit() was called from within these frames, which stay until the process ends.
        while let Some(frame) = unsafe { next.as_ref() } {
            if let Ok(mut messages) = frame.messages.try_borrow_mut() {
                messages.drain(..).for_each(Message::log);
            }
            next = frame.parent;
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_nest() {
        let outer = call(Scope::default(), || {
            current(|f| f.unwrap().set_errno(5));
            let inner = call(Scope::default(), || {
                say_error("inner".into());
                current(|f| f.unwrap().set_errno(28));
                -1
            });
            let error = inner.error("pread", 0);
            assert_eq!((error.errno(), error.to_string()), (Errno::ENOSPC, "inner".into()));
            current(|f| f.unwrap().note(&error));
            -1
        });
        let error = outer.error("pread", 0);
        assert_eq!((error.errno(), error.to_string()), (Errno::EIO, "inner".into()));
        assert!(error.is_logged());
        current(|f| assert!(f.is_none()));
    }

    #[test]
    fn the_frame_goes_when_the_call_panics() {
        let panicked = std::panic::catch_unwind(|| call(Scope::default(), || panic!("on purpose")).value);
        assert!(panicked.is_err());
        current(|f| assert!(f.is_none()));
    }

    #[test]
    fn the_last_message_is_the_reason() {
        let outcome = call(Scope::start(), || {
            say_error("first".into());
            say_error("second".into());
        });
        assert_eq!(outcome.failure("config").to_string(), "second");
    }
}
