//! SIGINT, SIGTERM, SIGHUP and SIGQUIT ask for a clean end.

use std::sync::{Arc, LazyLock, OnceLock};

use anyhow::{Context as _, Result};
use nbdkit_core::Stop;
use nix::sys::signal::{SigSet, Signal};

/// The signal that came; a process has one such state.
static SIGNAL: OnceLock<Signal> = OnceLock::new();
/// Up once it came.
static RECEIVED: LazyLock<Stop> = LazyLock::new(Stop::new);

/// The signals that end the server.
fn set() -> SigSet {
    [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT].into_iter().collect()
}

/// Blocks the signals in this thread and those it starts. Call it before the first thread is started.
///
/// # Errors
/// If the kernel refuses.
pub(crate) fn block() -> Result<()> {
    set().thread_block().context("cannot block signals")
}

/// Raises `stop` at the first of the signals.
///
/// # Errors
/// If no thread can be started.
pub(crate) fn watch(stop: Arc<Stop>) -> Result<()> {
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            if let Ok(signal) = set().wait() {
                log::debug!("received {signal}: shutting down");
                let _ = SIGNAL.set(signal);
                stop.raise();
                RECEIVED.raise();
            }
        })
        .context("cannot start a thread")?;
    Ok(())
}

/// Runs `hook` with the signal that came, when one does.
pub(crate) fn on_receipt(hook: impl FnOnce(Signal) + Send + 'static) {
    RECEIVED.on_raise(move || {
        if let Some(&signal) = SIGNAL.get() {
            hook(signal);
        }
    });
}
