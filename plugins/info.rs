//! A disk that tells the client about itself: its export's name, its address, or a time.

use std::{
    ffi::OsStr,
    net::SocketAddr,
    os::unix::ffi::OsStrExt,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::bail;
use nbdkit_core::{
    Caps, Errno, Error, Handle, Info, Open, Outcome, Peer, Plugin, Request, Result, Support, params,
};

use crate::data::decode_base64;

const HELP: &str = "\
mode=exportname|base64exportname|address|time|uptime|conntime|version
                  What the disk holds (default exportname).";

pub(crate) fn new() -> Box<dyn Plugin> {
    Box::new(Reflection { mode: Mode::ExportName, started: Instant::now() })
}

#[derive(Clone, Copy)]
enum Mode {
    ExportName,
    Base64ExportName,
    Address,
    Time,
    Uptime,
    ConnTime,
    Version,
}

struct Reflection {
    mode: Mode,
    started: Instant,
}

impl Plugin for Reflection {
    fn info(&self) -> Info {
        Info::bundled("info", "nbdkit info plugin", HELP).magic("mode")
    }

    fn callbacks(&self) -> Option<Vec<&'static str>> {
        Some([crate::READ_ONLY, &["dump_plugin"]].concat())
    }

    fn config(&mut self, key: &str, value: &OsStr) -> anyhow::Result<bool> {
        if key != "mode" {
            return Ok(false);
        }
        self.mode = match &*params::text(value)?.to_ascii_lowercase() {
            "exportname" | "export-name" => Mode::ExportName,
            "base64exportname" | "base64-export-name" => Mode::Base64ExportName,
            "address" => Mode::Address,
            "time" => Mode::Time,
            "uptime" => Mode::Uptime,
            "conntime" => Mode::ConnTime,
            "version" => Mode::Version,
            other => bail!(
                "unknown mode '{other}': use exportname, base64exportname, address, time, uptime, conntime or \
                 version"
            ),
        };
        Ok(true)
    }

    fn dump(&self) -> Vec<(String, String)> {
        ["info_address", "info_base64"].map(|key| (key.into(), "yes".into())).into()
    }

    fn open(&self, open: &Open) -> Result<Box<dyn Handle>> {
        let name = open.export_name.as_bytes();
        Ok(Box::new(match self.mode {
            Mode::ExportName => Content::Name(name.to_vec()),
            Mode::Base64ExportName => Content::Name(decode_base64(name).map_err(|e| {
                Error::new(Errno::EINVAL, format!("the export name is not valid base64: {e}"))
            })?),
            Mode::Address => Content::Address(address(&open.client.peer).into_bytes()),
            Mode::Version => Content::Name(env!("CARGO_PKG_VERSION").into()),
            Mode::Time => Content::Time,
            Mode::Uptime => Content::Since(self.started),
            Mode::ConnTime => Content::Since(Instant::now()),
        }))
    }
}

/// No path of a Unix socket: that would tell about the server's machine.
fn address(peer: &Peer) -> String {
    match peer {
        Peer::Tcp(address) => SocketAddr::new(address.ip().to_canonical(), address.port()).to_string(),
        Peer::Unix { .. } => "unix".into(),
        Peer::Vsock { cid, port } => format!("vsock:{cid}:{port}"),
        Peer::Local => "local".into(),
        Peer::Other => "unknown".into(),
    }
}

/// What the open disk holds.
enum Content {
    /// The same for each connection that asks for the same export.
    Name(Vec<u8>),
    Address(Vec<u8>),
    /// The time of day.
    Time,
    /// The time since then.
    Since(Instant),
}

/// Seconds in 8 bytes and microseconds in 4, big-endian.
fn clock(time: Duration) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[..8].copy_from_slice(&time.as_secs().to_be_bytes());
    bytes[8..].copy_from_slice(&time.subsec_micros().to_be_bytes());
    bytes
}

impl Handle for Content {
    fn capabilities(&self) -> Result<Caps> {
        let size = match self {
            Content::Name(bytes) | Content::Address(bytes) => bytes.len() as u64,
            Content::Time | Content::Since(_) => 12,
        };
        let caps = Caps::of_size(size).with_multi_conn(matches!(self, Content::Name(_)));
        // There is nothing to read ahead.
        Ok(caps.with_cache(Support::Native))
    }

    fn cache(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let time;
        let bytes = match self {
            Content::Name(bytes) | Content::Address(bytes) => &bytes[..],
            Content::Time => {
                time = clock(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default());
                &time
            }
            Content::Since(start) => {
                time = clock(start.elapsed());
                &time
            }
        };
        let from = usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..));
        buf.copy_from_slice(from.and_then(|bytes| bytes.get(..buf.len())).ok_or(Errno::EINVAL)?);
        Ok(())
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        request.run(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testkit::{config_error, open_as, read_all, start};

    fn reflect(mode: &str, peer: Peer, name: &str) -> Result<Vec<u8>> {
        let chain = start("info", &[("mode", mode)]).unwrap();
        open_as(&chain, peer, name).map(|session| read_all(&session))
    }

    #[test]
    fn names_come_back() {
        let name = |mode, name| reflect(mode, Peer::Local, name);
        assert_eq!(name("exportname", "hello").unwrap(), b"hello");
        assert_eq!(name("exportname", "").unwrap(), b"");
        assert_eq!(name("base64exportname", "aGVsbG8=").unwrap(), b"hello");
        assert_eq!(name("base64exportname", "AP8").unwrap(), b"\0\xff");
        let error = name("base64exportname", "!!").unwrap_err();
        assert!(error.to_string().contains("not valid base64"), "{error}");
    }

    #[test]
    fn addresses_are_written_in_the_usual_form() {
        for (peer, text) in [
            (Peer::Tcp("127.0.0.1:10809".parse().unwrap()), "127.0.0.1:10809"),
            (Peer::Tcp("[::1]:58912".parse().unwrap()), "[::1]:58912"),
            (Peer::Tcp("[::ffff:10.0.0.1]:1".parse().unwrap()), "10.0.0.1:1"),
            (Peer::Unix { pid: 1, uid: 2, gid: 3 }, "unix"),
            (Peer::Local, "local"),
        ] {
            assert_eq!(reflect("address", peer, "").unwrap(), text.as_bytes());
        }
    }

    #[test]
    fn times_are_seconds_and_microseconds() {
        assert_eq!(clock(Duration::new(0x0102, 0x030405 * 1000)), [0, 0, 0, 0, 0, 0, 1, 2, 0, 3, 4, 5]);
        let seconds = |mode| {
            let bytes = reflect(mode, Peer::Local, "").unwrap();
            assert_eq!(bytes.len(), 12);
            u64::from_be_bytes(*bytes.first_chunk().unwrap())
        };
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let before = now();
        assert!((before..=now() + 1).contains(&seconds("time")));
        // Decades before the time of day.
        assert!(seconds("uptime") < 1_000_000 && seconds("conntime") < 1_000_000);
    }

    #[test]
    fn what_changes_is_not_the_same_for_all_connections() {
        for (mode, same) in [("exportname", true), ("address", false), ("time", false), ("conntime", false)] {
            let chain = start("info", &[("mode", mode)]).unwrap();
            let caps = open_as(&chain, Peer::Local, "x").unwrap().caps().clone();
            assert_eq!((caps.multi_conn, caps.write), (same, false), "{mode}");
        }
    }

    #[test]
    fn an_unknown_mode_lists_those_there_are() {
        assert!(config_error("info", &[("mode", "foo")]).contains("unknown mode 'foo': use exportname,"));
    }
}
