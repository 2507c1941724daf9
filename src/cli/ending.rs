//! The end of the chain's life, which must come even where a layer has got stuck.

use std::{
    sync::{Arc, mpsc},
    time::Duration,
};

use nbdkit_core::Chain;

/// How long the layers may take to clean up while requests hang in them.
const PATIENCE: Duration = Duration::from_secs(20);

/// Has the layers clean up, after the last client was served. Where clients were left behind, since a request of theirs
/// does not end, what it holds may be what the layers need (an interpreter's lock for one): then they get a limited time.
pub fn clean_up(chain: Arc<Chain>) {
    if !chain.has_clients() {
        return chain.cleanup();
    }
    let (tell, told) = mpsc::channel();
    let cleaned = chain.clone();
    let thread = std::thread::Builder::new().name("cleanup".into()).spawn(move || {
        cleaned.cleanup();
        // Nobody may wait any more.
        let _ = tell.send(());
    });
    match thread {
        Err(e) => log::error!("the layers do not clean up, since no thread can be had: {e}"),
        Ok(_) if told.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) => log::error!(
            "{}: the layers did not clean up in {} s, since a request of theirs does not end",
            chain.plugin_name(),
            PATIENCE.as_secs()
        ),
        Ok(_) => {}
    }
}
