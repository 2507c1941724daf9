//! One connection from its first byte to its last.
//!
//! The probes are for SystemTap and bpftrace, two of them under the names that nbdkit gives them; unused, each is one
//! instruction that does nothing.

use std::sync::Arc;

use nbdkit_core::{Chain, Client};
use nbdkit_dispatch::Awake;

use crate::{
    Config, complaints,
    handshake::{self, Wire},
    oldstyle,
    stream::Stream,
    transmission,
};

/// Serves one client and closes the connection. The caller's thread is the connection's.
pub(crate) fn run(
    chain: &Arc<Chain>,
    config: &Config,
    client: &Arc<Client>,
    stream: &Arc<dyn Stream>,
    name: &str,
    awake: Awake,
) {
    probe::probe!(nbdkit, handle_single_connection, client.number);
    log::debug!("connected: {:?}", client.peer);
    close_on_request(client, stream);
    let mut wire = Wire::new(stream.clone(), config.handshake_timeout);
    let end = match begin(chain, config, client, &mut wire) {
        Ok(None) => "the client left the negotiation".to_owned(),
        Err(e) => format!("the negotiation failed: {e:#}"),
        Ok(Some(requests)) => {
            transmission::run(wire.stream(), client, requests, config.threads, name, awake).to_string()
        }
    };
    client.gone.raise();
    wire.stream().close();
    log::debug!("{end}");
}

/// Closes the connection when a layer asks for it by force. Where it asks without, the client is told by the errors that
/// its further requests get, and leaves by itself.
fn close_on_request(client: &Arc<Client>, stream: &Arc<dyn Stream>) {
    let (asked, stream) = (Arc::downgrade(client), stream.clone());
    client.leave.on_raise(move || {
        if asked.upgrade().is_none_or(|client| client.gone.is_raised()) {
            stream.close();
        }
    });
}

/// Everything before the first request.
fn begin(
    chain: &Arc<Chain>,
    config: &Config,
    client: &Arc<Client>,
    wire: &mut Wire,
) -> anyhow::Result<Option<crate::requests::Requests>> {
    probe::probe!(nbdkit, preconnect, client.number, u64::from(config.readonly));
    let connection = chain.connect(client.clone(), config.readonly).map_err(|e| {
        complaints::REFUSED.tell(format_args!("preconnect: {e}"));
        e
    })?;
    let connection = Arc::new(connection);
    if config.oldstyle {
        oldstyle::negotiate(wire, &connection, config)
    } else {
        handshake::negotiate(wire, &connection, config)
    }
}
