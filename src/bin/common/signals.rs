//! SIGINT, SIGTERM, SIGHUP and SIGQUIT ask for a clean end.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use nbdkit_core::Stop;
use nix::sys::signal::{SigSet, Signal};

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
                stop.raise();
            }
        })
        .context("cannot start a thread")?;
    Ok(())
}
