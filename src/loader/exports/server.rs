//! The server and the connection: what they are, and how to end them.

use std::{
    ffi::{c_char, c_int, c_uint},
    ptr,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use nbdkit_core::Errno;

use super::messages::{error, error_with};
use crate::{
    context::{current, server, shut_down},
    panic::boundary,
};

static STDIO_IS_TAKEN: AtomicBool = AtomicBool::new(false);

/// Standard input and output belong to a client, or point to nowhere: plugins are told not to use them.
pub fn stdio_is_taken() {
    STDIO_IS_TAKEN.store(true, Ordering::Relaxed);
}

/// Whether a plugin may use standard input and output.
pub(super) fn stdio_is_safe() -> bool {
    !STDIO_IS_TAKEN.load(Ordering::Relaxed)
}

/// Whether standard input and output may be used: only while the server starts, and not with `-s`.
#[unsafe(no_mangle)]
pub(super) extern "C" fn nbdkit_stdio_safe() -> c_int {
    stdio_is_safe().into()
}

/// Sleeps; ends early with `ESHUTDOWN` when the client is gone or the server stops.
#[unsafe(no_mangle)]
pub(super) extern "C" fn nbdkit_nanosleep(seconds: c_uint, nanoseconds: c_uint) -> c_int {
    boundary(-1, || {
        let time = Duration::from_secs(seconds.into()) + Duration::from_nanos(nanoseconds.into());
        if time.as_secs() > c_int::MAX as u64 {
            error_with(Errno::EINVAL, "nbdkit_nanosleep: the sleep is too long");
            return -1;
        }
        let client = current(|frame| frame.and_then(|frame| frame.scope.client).cloned());
        let slept = match (client, server()) {
            (Some(client), _) => client.sleep(time).is_ok(),
            (None, Some(server)) => !server.wait_for(time),
            (None, None) => {
                std::thread::sleep(time);
                true
            }
        };
        if !slept {
            error_with(Errno::ESHUTDOWN, "the sleep ended early: the client or the server stops");
            return -1;
        }
        0
    })
}

/// Asks the server to stop.
#[unsafe(no_mangle)]
pub(super) extern "C" fn nbdkit_shutdown() {
    boundary((), || {
        let client = current(|frame| frame.and_then(|frame| frame.scope.client).cloned());
        match client {
            Some(client) => client.shut_down_server(),
            None => shut_down(),
        }
    });
}

/// Asks for the end of the connection: with `force` at once, else by failing all further requests with `ESHUTDOWN`.
#[unsafe(no_mangle)]
pub(super) extern "C" fn nbdkit_disconnect(force: c_int) {
    boundary((), || match current(|frame| frame.and_then(|frame| frame.scope.client).cloned()) {
        Some(client) => client.disconnect(force != 0),
        None => log::debug!("nbdkit_disconnect: this thread serves no connection"),
    });
}

/// The name that the client asked for. Stays until the connection ends.
#[unsafe(no_mangle)]
pub(super) extern "C" fn nbdkit_export_name() -> *const c_char {
    boundary(ptr::null(), || {
        let name = current(|frame| frame.and_then(|f| f.scope.opened).map(|o| o.export_name.as_ptr()));
        name.unwrap_or_else(|| {
            error("nbdkit_export_name: this thread serves no connection");
            ptr::null()
        })
    })
}

/// Whether the client speaks TLS; -1 outside any call.
#[unsafe(no_mangle)]
pub(super) extern "C" fn nbdkit_is_tls() -> c_int {
    boundary(-1, || match current(|frame| frame.map(|frame| frame.scope.tls)) {
        Some(tls) => tls.into(),
        None => {
            error("nbdkit_is_tls: this thread serves no connection");
            -1
        }
    })
}
