//! Where a server is: a socket by its path, or an NBD URI without TLS.

use std::{
    net::TcpStream,
    os::{
        fd::OwnedFd,
        unix::{ffi::OsStringExt, net::UnixStream},
    },
    path::{Path, PathBuf},
    str::FromStr,
};

use anyhow::{Context, Result, bail, ensure};

/// An export of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    server: Server,
    /// The export's name.
    pub(super) export: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Server {
    Unix(PathBuf),
    /// Host and port.
    Tcp(String),
}

impl Address {
    /// The default export of the server at a Unix socket.
    pub(crate) fn socket(path: &Path) -> Self {
        Address { server: Server::Unix(path.to_owned()), export: String::new() }
    }

    pub(super) fn connect(&self) -> Result<OwnedFd> {
        let stream: Result<OwnedFd> = match &self.server {
            Server::Unix(path) => UnixStream::connect(path).map(Into::into).map_err(Into::into),
            Server::Tcp(host) => TcpStream::connect(host).map_err(Into::into).and_then(|stream| {
                stream.set_nodelay(true)?;
                Ok(stream.into())
            }),
        };
        stream.context("cannot connect")
    }
}

impl FromStr for Address {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let Some((scheme, rest)) = text.split_once("://") else {
            ensure!(!text.is_empty(), "the address is empty");
            return Ok(Address::socket(Path::new(text)));
        };
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (host, export) = place.split_once('/').unwrap_or((place, ""));
        let export = String::from_utf8(decode(export)?).context("the export's name is not UTF-8")?;
        let server = match scheme {
            "nbd+unix" => {
                let socket = query.split('&').find_map(|field| field.strip_prefix("socket="));
                let socket = decode(socket.context("the URI lacks ?socket=PATH")?)?;
                Server::Unix(PathBuf::from(std::ffi::OsString::from_vec(socket)))
            }
            "nbd" => {
                ensure!(!host.is_empty(), "the URI lacks the host");
                let port = host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
                Server::Tcp(if port { host.to_owned() } else { format!("{host}:10809") })
            }
            _ => bail!("no client for {scheme}:// here: use nbd://HOST, nbd+unix:///?socket=PATH or PATH"),
        };
        Ok(Address { server, export })
    }
}

/// Undoes the percent encoding of a URI.
fn decode(text: &str) -> Result<Vec<u8>> {
    let mut bytes = text.bytes();
    let mut decoded = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => {
                let mut digit = || char::from(bytes.next()?).to_digit(16);
                let value = digit().and_then(|high| Some(high * 16 + digit()?));
                value.and_then(|v| u8::try_from(v).ok()).context("% without two digits in the URI")?
            }
            byte => byte,
        });
    }
    Ok(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Address> {
        text.parse()
    }

    #[test]
    fn paths_and_uris() {
        let unix =
            |path: &str, export: &str| Address { server: Server::Unix(path.into()), export: export.into() };
        let tcp =
            |host: &str, export: &str| Address { server: Server::Tcp(host.into()), export: export.into() };
        assert_eq!(parse("/run/x?socket=y").unwrap(), unix("/run/x?socket=y", ""));
        assert_eq!(parse("nbd+unix:///?socket=/run/s").unwrap(), unix("/run/s", ""));
        assert_eq!(parse("nbd+unix:///a%20b/c?x=1&socket=/r%2fs").unwrap(), unix("/r/s", "a b/c"));
        assert_eq!(parse("nbd://localhost").unwrap(), tcp("localhost:10809", ""));
        assert_eq!(parse("nbd://host:99/disk").unwrap(), tcp("host:99", "disk"));
        assert_eq!(parse("nbd://[::1]/").unwrap(), tcp("[::1]:10809", ""));
        assert_eq!(parse("nbd://[::1]:7/").unwrap(), tcp("[::1]:7", ""));
    }

    #[test]
    fn what_is_wrong_is_said() {
        let message = |text| parse(text).unwrap_err().to_string();
        assert!(message("nbds://host").contains("nbds"));
        assert!(message("nbd+unix:///disk").contains("socket"));
        assert!(message("nbd:///disk").contains("host"));
        assert!(message("nbd://host/%4").contains("two digits"));
        assert!(message("nbd://host/%ff").contains("UTF-8"));
    }
}
