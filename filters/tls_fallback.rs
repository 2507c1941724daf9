//! Shows clients that do not speak TLS a small disk with a message, and only the others the real one.

use std::{
    ffi::{OsStr, OsString},
    sync::Arc,
};

use anyhow::ensure;
use nbdkit_core::{
    Below, Caps, Exports, Extents, Filter, Flags, Handle, Info, NextConfig, Open, Outcome, Request, Result,
    ThreadModel,
};

use crate::passthrough::Passthrough;

const HELP: &str = "tlsreadme=<MESSAGE>   What clients without TLS read.";

/// The size of the small disk is a multiple of this.
const SECTOR: usize = 512;

pub(crate) fn new() -> Box<dyn Filter> {
    let message = "This NBD server requires TLS authentication before it will serve useful data.\n";
    Box::new(TlsFallback { content: content(message.as_bytes()) })
}

struct TlsFallback {
    /// Never empty.
    content: Arc<[u8]>,
}

/// The disk with a message.
fn content(message: &[u8]) -> Arc<[u8]> {
    let mut content = message.to_vec();
    content.resize(message.len().next_multiple_of(SECTOR).max(SECTOR), 0);
    content.into()
}

impl Filter for TlsFallback {
    fn info(&self) -> Info {
        Info::bundled("tls-fallback", "nbdkit tls-fallback filter", HELP)
    }

    fn config(&mut self, key: &str, value: &OsStr, next: &mut NextConfig<'_>) -> anyhow::Result<()> {
        match key {
            "tlsreadme" => self.content = content(value.as_encoded_bytes()),
            _ => return next(key, value),
        }
        Ok(())
    }

    fn get_ready(&mut self, model: ThreadModel) -> anyhow::Result<()> {
        ensure!(
            model != ThreadModel::SerializeConnections,
            "the tls-fallback filter needs a plugin that serves several connections at once: \
             a client without TLS could keep all others out"
        );
        Ok(())
    }

    fn list_exports(&self, next: &Below, readonly: bool, tls: bool) -> Result<Exports> {
        if tls {
            return next.list_exports(readonly, tls);
        }
        let mut exports = Exports::new();
        exports.add("", None)?;
        Ok(exports)
    }

    fn default_export(&self, next: &Below, readonly: bool, tls: bool) -> Result<Option<OsString>> {
        if tls { next.default_export(readonly, tls) } else { Ok(Some(OsString::new())) }
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        Ok(if open.tls {
            Box::new(Passthrough(next.open(open)?))
        } else {
            Box::new(Message(self.content.clone()))
        })
    }
}

/// The small disk. There is nothing below it.
struct Message(Arc<[u8]>);

impl Handle for Message {
    fn capabilities(&self) -> Result<Caps> {
        Ok(Caps::of_size(self.0.len() as u64).with_extents(true))
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let from = offset as usize;
        buf.copy_from_slice(&self.0[from..from + buf.len()]);
        Ok(())
    }

    fn extents(&self, length: u64, offset: u64, _: Flags, extents: &mut Extents) -> Result<()> {
        extents.add_data(offset, length)
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        request.run(self)
    }
}

#[cfg(test)]
mod tests {
    use nbdkit_core::{Connection, Op, Session};

    use super::*;
    use crate::testing::{Disk, Spec, chain, client, lent, needs_thread, pattern};

    fn connect(disk: &Disk, filters: &[&str], params: &[(&str, &str)]) -> Arc<Connection> {
        Arc::new(chain(disk, filters, params).unwrap().connect(client(), false).unwrap())
    }

    fn open(disk: &Disk, params: &[(&str, &str)], name: &str, tls: bool) -> Session {
        connect(disk, &["tls-fallback"], params).open(OsStr::new(name), tls).unwrap()
    }

    fn read(session: &Session) -> Vec<u8> {
        let mut buf = vec![0; session.size() as usize];
        session.pread(&mut buf, 0).unwrap();
        buf
    }

    #[test]
    fn without_tls_there_is_a_message_only() {
        let disk = Spec::default().disk();
        for name in ["", "secret"] {
            let session = open(&disk, &[], name, false);
            let caps = session.caps();
            assert_eq!(session.size(), 512);
            assert!(!caps.write && !caps.flush && !caps.multi_conn);
            assert!(read(&session).starts_with(b"This NBD server requires TLS authentication"));
            assert_eq!(session.extents(512, 0, Flags::empty()).unwrap().len(), 1);
            assert!(lent(&session, Op::Read, 0, 512).is_none());
            assert!(!needs_thread(&session, Op::Read));
        }
        assert!(disk.calls().is_empty());
    }

    #[test]
    fn with_tls_there_is_the_disk() {
        let disk = Spec::sized(20_000).disk();
        let session = open(&disk, &[], "", true);
        assert!(session.caps().write && lent(&session, Op::Write, 0, 512).is_some());
        assert_eq!(read(&session), pattern(20_000));
    }

    #[test]
    fn only_clients_with_tls_learn_of_exports() {
        let disk = Spec::default().disk();
        let params =
            [("exportname-list", "explicit"), ("exportname", "secret"), ("default-export", "secret")];
        let connection = connect(&disk, &["tls-fallback", "exportname"], &params);
        let names = |tls| -> Vec<OsString> {
            connection.list_exports(tls).unwrap().into_iter().map(|export| export.name.clone()).collect()
        };
        assert_eq!(names(false), [""]);
        assert_eq!(names(true), ["secret"]);
        assert_eq!(connection.default_export(false).unwrap().unwrap(), "");
        assert_eq!(connection.default_export(true).unwrap().unwrap(), "secret");
    }

    #[test]
    fn the_message_can_be_chosen() {
        let disk = Spec::default().disk();
        let long = "x".repeat(600);
        for (message, size) in [("hello", 512), ("", 512), (long.as_str(), 1024)] {
            let found = read(&open(&disk, &[("tlsreadme", message)], "", false));
            assert_eq!(found.len(), size);
            assert!(found.starts_with(message.as_bytes()) && found[message.len()..].iter().all(|b| *b == 0));
        }
    }

    #[test]
    fn a_plugin_for_one_connection_at_a_time_is_refused() {
        let spec = Spec { thread_model: ThreadModel::SerializeConnections, ..Spec::default() };
        let error = chain(&spec.disk(), &["tls-fallback"], &[]).unwrap_err().to_string();
        assert!(error.contains("several connections at once"), "{error}");
    }
}
