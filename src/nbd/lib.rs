//! The NBD front end: listeners, the handshake and the transmission loop in front of a [`Chain`].
//!
//! One thread per connection runs to completion: it receives, decodes and answers whatever cannot block, and hands
//! the rest to an executor of its own. The protocol is the public specification of the `NetworkBlockDevice/nbd`
//! repository (`doc/proto.md`); comments name its sections. The bytes are in
//! the package nbdkit-proto, TLS is in nbdkit-tls, for a client needs them too.
//!
//! * `handshake` and `oldstyle` end with an open session,
//! * `transmission` is the loop, `requests` and `sparse` the work, `output` and `reply_coalescing` the way out,
//! * `splice` moves large data past us, `cachestat` tells when,
//! * `encrypted` is the stream under TLS, `certificate` has clients' names,
//! * `server` holds the connections, [`listen`] makes the sockets.

#![deny(unsafe_code)]

pub mod listen;

mod buffer;
mod cachestat;
#[cfg(feature = "tls")]
mod certificate;
mod complaints;
mod connection;
#[cfg(feature = "tls")]
mod encrypted;
mod handshake;
mod in_memory;
mod oldstyle;
mod output;
mod reply_coalescing;
mod requests;
mod server;
mod sparse;
mod splice;
mod stream;
#[cfg(test)]
mod tests;
mod transmission;

use std::{
    ffi::OsString,
    os::fd::{BorrowedFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use nbdkit_core::{Chain, ShutdownFlag};

pub use in_memory::converse;
pub use listen::Listener;
use nbdkit_proto as proto;
#[cfg(feature = "tls")]
pub use nbdkit_tls as tls;

/// Whether connections are encrypted.
#[derive(Clone, Debug, Default)]
pub enum Tls {
    /// Never.
    #[default]
    Off,
    /// When the client asks for it.
    #[cfg(feature = "tls")]
    On(tls::Credentials),
    /// Before a client learns anything of the exports.
    #[cfg(feature = "tls")]
    Require(tls::Credentials),
}

/// How the front end behaves.
#[derive(Clone, Debug)]
pub struct Config {
    /// Clients cannot change data, whatever the chain offers.
    pub readonly: bool,
    /// Speak the oldstyle handshake.
    pub oldstyle: bool,
    /// Requests of one connection that may wait in the chain at once, at least 1; with 1 they keep their order.
    pub threads: usize,
    /// How long a client may take from its turn to the end of the negotiation. None: for ever.
    pub handshake_timeout: Option<Duration>,
    /// Options a client may send before it chooses an export, and as many again for each export it is told of.
    pub handshake_options: usize,
    /// Bytes of data in those options, all together; more ends the connection.
    pub handshake_bytes: u64,
    /// The global handshake flags are ANDed with this (for tests of clients).
    pub mask_handshake: u16,
    /// Structured replies may be negotiated.
    pub structured_replies: bool,
    /// Meta contexts may be negotiated.
    pub meta_contexts: bool,
    /// Clients served at once; more wait to be accepted. None: any number.
    pub max_connections: Option<usize>,
    /// Whether connections are encrypted; with the oldstyle handshake they are not.
    pub tls: Tls,
    /// TCP connections are probed when idle.
    pub keepalive: bool,
    /// The export that oldstyle clients, who cannot name one, are given.
    pub export_name: OsString,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            readonly: false,
            oldstyle: false,
            threads: 16,
            handshake_timeout: Some(Duration::from_secs(60)),
            handshake_options: 32,
            handshake_bytes: 16 << 20,
            mask_handshake: u16::MAX,
            structured_replies: true,
            meta_contexts: true,
            tls: Tls::Off,
            max_connections: None,
            keepalive: true,
            export_name: OsString::new(),
        }
    }
}

/// A further descriptor that the accepting thread polls beside the listeners.
#[derive(Clone, Copy)]
pub struct AuxiliaryDescriptor<'a> {
    /// Polled for input.
    pub fd: BorrowedFd<'a>,
    /// Called when there is input; it must not block.
    pub ready: &'a dyn Fn(),
}

impl std::fmt::Debug for AuxiliaryDescriptor<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AuxiliaryDescriptor({:?})", self.fd)
    }
}

/// Serves clients until `stop` is raised. Then no new ones are taken, sleeping requests end, those in flight are
/// answered for a few seconds, and what remains is cut off.
///
/// # Errors
/// When the listeners cannot be waited for; never because of what a client does.
pub fn serve(
    chain: Arc<Chain>,
    config: Config,
    listeners: Vec<Listener>,
    stop: Arc<ShutdownFlag>,
    auxiliary: Option<AuxiliaryDescriptor<'_>>,
) -> anyhow::Result<()> {
    server::Server::new(chain, config, stop).run(&listeners, auxiliary)
}

/// Serves one client, who is at the other end of `input` and `output` (one socket, or two pipes), until it or
/// `stop` ends the connection.
///
/// # Errors
/// When the descriptors cannot be used.
pub fn serve_one(
    chain: Arc<Chain>,
    config: Config,
    input: OwnedFd,
    output: OwnedFd,
    stop: Arc<ShutdownFlag>,
) -> anyhow::Result<()> {
    server::Server::new(chain, config, stop).run_one(input, output)
}
