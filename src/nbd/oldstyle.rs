//! The oldstyle handshake: the server says what there is, and the client takes it or leaves.

use std::sync::Arc;

use anyhow::Context as _;
use nbdkit_core::Connection;

use crate::{
    Config,
    handshake::{Wire, export_flags, open},
    proto::{INIT_PASSWD, OLDSTYLE_MAGIC, Replies},
    requests::Requests,
};

/// Opens the export and describes it.
///
/// # Errors
/// When it cannot be opened: this handshake has no way to say so but to hang up.
pub(crate) fn negotiate(
    wire: &Wire,
    connection: &Arc<Connection>,
    config: &Config,
) -> anyhow::Result<Option<Requests>> {
    let session = open(connection, &config.export_name, false).context("the export cannot be opened")?;
    let mut hello = Vec::new();
    hello.extend(INIT_PASSWD.to_be_bytes());
    hello.extend(OLDSTYLE_MAGIC.to_be_bytes());
    hello.extend(session.size().to_be_bytes());
    hello.extend(0u16.to_be_bytes());
    hello.extend(export_flags(session.caps(), false).to_be_bytes());
    hello.extend([0; 124]);
    wire.send(&hello)?;
    Ok(Some(Requests::new(session, Replies::Simple, Vec::new())))
}
