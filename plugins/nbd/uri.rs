//! NBD URIs: where a server is, which of its exports is meant, and whether and how to encrypt (`doc/uri.md` of the
//! protocol's repository).

use std::{ffi::OsString, os::unix::ffi::OsStringExt, path::PathBuf};

use anyhow::{Context as _, bail, ensure};

use super::target::{Address, DEFAULT_PORT};

/// What a URI says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Uri {
    pub(super) address: Address,
    pub(super) export: OsString,
    /// The connection has to be encrypted.
    pub(super) encrypted: bool,
    /// For pre-shared keys.
    pub(super) user: Option<String>,
    pub(super) certificates: Option<PathBuf>,
    pub(super) keys: Option<PathBuf>,
    /// The name that the server's certificate has to have.
    pub(super) server_name: Option<String>,
    /// False: any certificate will do.
    pub(super) verify: Option<bool>,
}

/// Whether a word is meant to be such a URI.
pub(crate) fn is_uri(word: &str) -> bool {
    let Some((scheme, _)) = word.split_once(':') else { return false };
    parts(scheme).is_some() && word[scheme.len()..].starts_with(':')
}

/// Whether a scheme stands for encryption, and its way of transport.
fn parts(scheme: &str) -> Option<(bool, &'static str)> {
    let scheme = scheme.to_ascii_lowercase();
    let (encrypted, rest) = match scheme.strip_prefix("nbds") {
        Some(rest) => (true, rest),
        None => (false, scheme.strip_prefix("nbd")?),
    };
    let transport = ["", "+tcp", "+unix", "+vsock"].into_iter().find(|known| *known == rest)?;
    Some((encrypted, transport))
}

impl Uri {
    /// Reads a URI.
    ///
    /// # Errors
    /// It is none of NBD, or says too little or too much.
    pub(super) fn parse(text: &str) -> anyhow::Result<Self> {
        let example = "write nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH";
        let (scheme, rest) =
            text.split_once(':').with_context(|| format!("'{text}' is no NBD URI: {example}"))?;
        let (encrypted, transport) =
            parts(scheme).with_context(|| format!("'{scheme}:' is no kind of NBD URI: {example}"))?;
        let rest = rest.split('#').next().unwrap_or_default();
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = match place.strip_prefix("//") {
            Some(place) => place.find('/').map_or((place, ""), |at| place.split_at(at)),
            None => ("", place),
        };
        let export = decode(path.strip_prefix('/').unwrap_or(path))?;
        let (user, server) = match authority.rsplit_once('@') {
            Some((user, server)) => (Some(text_of(user)?), server),
            None => (None, authority),
        };
        let (host, port) = split_port(server)?;
        let mut uri = Uri {
            address: Address::Tcp { host: String::new(), port: DEFAULT_PORT },
            export: OsString::from_vec(export),
            encrypted,
            user: user.filter(|user| !user.is_empty()),
            certificates: None,
            keys: None,
            server_name: None,
            verify: None,
        };
        let mut socket = None;
        for pair in query.split(['&', ';']).filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let bytes = decode(value)?;
            let path = || PathBuf::from(OsString::from_vec(bytes.clone()));
            match key {
                "socket" => socket = Some(path()),
                "tls-certificates" => uri.certificates = Some(path()),
                "tls-psk-file" => uri.keys = Some(path()),
                "tls-hostname" => uri.server_name = Some(text_of(value)?),
                "tls-verify-peer" => {
                    uri.verify = Some(nbdkit_core::params::boolean(&OsString::from_vec(bytes))?);
                }
                // A client passes over what it does not know.
                _ => log::debug!("nbd: the URI's '{key}' is not known and ignored"),
            }
        }
        uri.address = match transport {
            "+unix" => {
                ensure!(host.is_empty(), "'{text}' names a host and a Unix socket: leave the host out");
                let socket = socket.filter(|path| !path.as_os_str().is_empty());
                Address::Unix(socket.with_context(|| format!("'{text}' names no socket: add ?socket=PATH"))?)
            }
            _ if socket.is_some() => {
                bail!("'{text}' names a socket, which is for {scheme}+unix:// URIs")
            }
            "+vsock" => Address::Vsock {
                cid: match &*host {
                    "" => 2,
                    host => {
                        host.parse().with_context(|| format!("'{text}': '{host}' is no number (of a CID)"))?
                    }
                },
                port: port.map_or(Ok(DEFAULT_PORT.into()), str::parse).context("the port of a URI")?,
            },
            _ => Address::Tcp {
                host: if host.is_empty() { "localhost".into() } else { host },
                port: port
                    .map_or(Ok(DEFAULT_PORT), str::parse)
                    .with_context(|| format!("'{text}': the port is not a number up to 65535"))?,
            },
        };
        Ok(uri)
    }
}

/// Splits `HOST:PORT`, where the host may be an address of IPv6 in brackets.
fn split_port(server: &str) -> anyhow::Result<(String, Option<&str>)> {
    let (host, rest) = match server.strip_prefix('[') {
        Some(inner) => {
            let (host, rest) =
                inner.split_once(']').with_context(|| format!("'{server}' has no closing bracket"))?;
            (host.to_owned(), rest)
        }
        None => {
            let at = server.find(':').unwrap_or(server.len());
            (text_of(&server[..at])?, &server[at..])
        }
    };
    let port = rest.strip_prefix(':').filter(|port| !port.is_empty());
    ensure!(rest.is_empty() || rest.starts_with(':'), "'{rest}' after the host is no port");
    Ok((host, port))
}

fn text_of(encoded: &str) -> anyhow::Result<String> {
    String::from_utf8(decode(encoded)?).with_context(|| format!("'{encoded}' in a URI is not UTF-8"))
}

/// Replaces `%XX`.
fn decode(text: &str) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        rest = tail;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digits = tail.first_chunk().and_then(|[high, low]| {
            let digit = |c: &u8| char::from(*c).to_digit(16);
            u8::try_from(digit(high)? << 4 | digit(low)?).ok()
        });
        let Some(byte) = digits else { bail!("'{text}': % in a URI needs two hexadecimal digits after it") };
        ensure!(byte != 0, "'{text}': a URI must not have %00");
        bytes.push(byte);
        rest = &tail[2..];
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16) -> Address {
        Address::Tcp { host: host.into(), port }
    }

    #[test]
    fn places() {
        let address = |text| Uri::parse(text).unwrap().address;
        assert_eq!(address("nbd://example.com"), tcp("example.com", 10809));
        assert_eq!(address("nbd://example.com:1/x"), tcp("example.com", 1));
        assert_eq!(address("nbd://[::1]:2/"), tcp("::1", 2));
        assert_eq!(address("nbd:"), tcp("localhost", 10809));
        assert_eq!(address("nbd+unix:///?socket=/a%20b"), Address::Unix("/a b".into()));
        assert_eq!(address("nbd+vsock://3:4/"), Address::Vsock { cid: 3, port: 4 });
        assert_eq!(address("nbds+vsock:///x"), Address::Vsock { cid: 2, port: 10809 });
    }

    #[test]
    fn what_else_is_said() {
        let uri = Uri::parse("nbds://al%69ce@h/a/b%2fc?tls-psk-file=/k&x=y").unwrap();
        assert!(uri.encrypted);
        assert_eq!((uri.user.as_deref(), uri.keys), (Some("alice"), Some("/k".into())));
        assert_eq!(uri.export, "a/b/c");
        let uri = Uri::parse("NBD+UNIX:///x?socket=/s;tls-verify-peer=false").unwrap();
        assert_eq!((uri.encrypted, uri.verify, uri.export.to_str()), (false, Some(false), Some("x")));
    }

    #[test]
    fn nonsense() {
        for (text, why) in [
            ("x", "no NBD URI"),
            ("http://x", "no kind of NBD URI"),
            ("nbd+unix:///", "?socket=PATH"),
            ("nbd+unix://host/?socket=/s", "leave the host out"),
            ("nbd://h/?socket=/s", "nbd+unix"),
            ("nbd://h:x/", "port"),
            ("nbd://[::1/", "bracket"),
            ("nbd://h/%", "hexadecimal"),
            ("nbd://h/%4", "hexadecimal"),
            ("nbd://h/%00", "%00"),
            ("nbd+vsock://x/", "CID"),
        ] {
            let error = format!("{:#}", Uri::parse(text).unwrap_err());
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn words() {
        assert!(is_uri("nbd://x") && is_uri("nbds+unix:") && !is_uri("nbdx://") && !is_uri("nbd"));
    }
}
