//! The curl plugin: a file on a server of HTTP, FTP or another protocol of libcurl's, read-only.
//!
//! This file owns the parameters; `settings` has them in libcurl's terms, `engine` the transfers, `disk` an open file.

use std::{
    ffi::{CString, OsStr},
    os::unix::ffi::OsStrExt as _,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use nbdkit_core::{Errno, Error, Handle, Info, Open, Plugin, Result, params, sync::Mutex};

use self::{disk::Disk, engine::Engine, libcurl::Opt, settings::Settings};
use crate::secret::secret;

mod answer;
mod disk;
mod engine;
mod libcurl;
mod settings;

/// Connections, unless the user says otherwise.
const CONNECTIONS: u32 = 4;

pub(crate) fn new() -> Box<dyn Plugin> {
    Box::<CurlPlugin>::default()
}

#[derive(Default)]
struct CurlPlugin {
    /// Until the engine has them.
    settings: Mutex<Settings>,
    connections: Option<u32>,
    may_change: bool,
    http: bool,
    /// From the first client on.
    engine: Mutex<Option<Arc<Engine>>>,
}

impl CurlPlugin {
    fn engine(&self) -> Result<Arc<Engine>> {
        let mut engine = self.engine.lock();
        if let Some(engine) = &*engine {
            return Ok(engine.clone());
        }
        let settings = std::mem::take(&mut *self.settings.lock());
        let new = Engine::new(settings, self.connections.unwrap_or(CONNECTIONS))
            .map_err(|e| Error::new(Errno::EIO, format!("{e:#}")))?;
        Ok(engine.insert(Arc::new(new)).clone())
    }
}

/// The number that libcurl has for a word.
fn word(key: &str, value: &OsStr, known: &[(&str, i64)]) -> anyhow::Result<i64> {
    let text = params::text(value)?;
    let found = known.iter().find(|(name, _)| *name == text);
    let names = || known.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    found.map(|(_, number)| *number).with_context(|| format!("unknown {key}={text}: use {}", names()))
}

const HTTP_VERSIONS: &[(&str, i64)] = &[
    ("none", 0),
    ("1.0", 1),
    ("1.1", 2),
    ("2.0", 3),
    ("2TLS", 4),
    ("2-prior-knowledge", 5),
    ("3", 30),
    ("3only", 31),
];
const IP_VERSIONS: &[(&str, i64)] = &[("any", 0), ("whatever", 0), ("v4", 1), ("v6", 2)];
const SSL_VERSIONS: &[(&str, i64)] = &[
    ("default", 0),
    ("tlsv1", 1),
    ("sslv2", 2),
    ("sslv3", 3),
    ("tlsv1.0", 4),
    ("tlsv1.1", 5),
    ("tlsv1.2", 6),
    ("tlsv1.3", 7),
    ("max-default", 1 << 16),
    ("max-tlsv1.0", 4 << 16),
    ("max-tlsv1.1", 5 << 16),
    ("max-tlsv1.2", 6 << 16),
    ("max-tlsv1.3", 7 << 16),
];

/// A parameter that libcurl takes as it is.
fn plain(key: &str) -> Option<Opt> {
    Some(match key {
        "cookiefile" => Opt::CookieFile,
        "cookiejar" => Opt::CookieJar,
        "proxy" => Opt::Proxy,
        "proxy-user" => Opt::ProxyUserName,
        "ssl-cipher-list" => Opt::SslCipherList,
        "tls13-ciphers" => Opt::Tls13Ciphers,
        "user" => Opt::UserName,
        "user-agent" => Opt::UserAgent,
        _ => return None,
    })
}

/// A parameter that is the name of a file.
fn path(key: &str) -> Option<Opt> {
    Some(match key {
        "cainfo" => Opt::CaInfo,
        "capath" => Opt::CaPath,
        "proxy-cainfo" => Opt::ProxyCaInfo,
        "proxy-capath" => Opt::ProxyCaPath,
        "unix-socket-path" | "unix_socket_path" => Opt::UnixSocketPath,
        _ => return None,
    })
}

/// Whether a word is a URL for this plugin.
pub(crate) fn is_uri(word: &str) -> bool {
    let scheme = word.split_once("://").map(|(scheme, _)| scheme.to_ascii_lowercase());
    matches!(scheme.as_deref(), Some("http" | "https" | "ftp" | "ftps"))
}

impl Plugin for CurlPlugin {
    fn info(&self) -> Info {
        Info::bundled(
            "curl",
            "serves a file on a web or FTP server",
            "[url=]URL               (required) The file: http://, https://, ftp://, ftps:// or file://\n\
             cainfo=FILENAME         The certificates of authorities to trust\n\
             capath=PATH             The directory with such certificates\n\
             change=fail|ignore      What to do when the file changes on the server while it is open (default fail)\n\
             connections=N           Connections to the server at most (default 4)\n\
             cookie=COOKIE           Cookies to send, or from where: +FILENAME, - or -FD\n\
             cookiefile=FILENAME     Take cookies from a file; empty: only keep those of the server\n\
             cookiejar=FILENAME      Write cookies to a file at the end\n\
             cookie-script=SCRIPT    A script that prints cookies\n\
             cookie-script-renew=SECS  How long these are good (default: for ever)\n\
             followlocation=BOOL     If false, redirections are errors\n\
             header=HEADER           A header to send, as often as needed\n\
             header-script=SCRIPT    A script that prints headers\n\
             header-script-renew=SECS  How long these are good (default: for ever)\n\
             http-version=VERSION    none, 1.0, 1.1, 2.0, 2TLS, 2-prior-knowledge, 3 or 3only\n\
             ipresolve=any|v4|v6     Which addresses to use\n\
             password=PASSWORD       The password of the user, or from where: +FILENAME, - or -FD\n\
             protocols=PROTO,...     Protocols that may be used\n\
             proxy=PROXY             The proxy\n\
             proxy-cainfo=FILENAME   As cainfo, for the proxy\n\
             proxy-capath=PATH       As capath, for the proxy\n\
             proxy-password=PASSWORD  As password, for the proxy\n\
             proxy-user=USERNAME     The user at the proxy\n\
             resolve=HOST:PORT:ADDRESS  The address of a host, as often as needed\n\
             ssl-cipher-list=CIPHERS  Ciphers up to TLS 1.2\n\
             ssl-version=VERSION     default, tlsv1.2, tlsv1.3, max-tlsv1.2...\n\
             sslverify=BOOL          If false, the server may be anybody\n\
             tcp-keepalive=BOOL      Probe idle connections\n\
             tcp-nodelay=BOOL        If false, small packets are joined\n\
             timeout=SECS            How long a request may take (0: for ever)\n\
             tls13-ciphers=CIPHERS   Ciphers of TLS 1.3\n\
             unix-socket-path=PATH   Connect to this Unix socket instead\n\
             user=USERNAME           The user\n\
             user-agent=USER-AGENT   The name of the client",
        )
        .magic("url")
    }

    fn callbacks(&self) -> Option<Vec<&'static str>> {
        Some(vec!["config_complete", "dump_plugin", "get_ready", "can_multi_conn", "cleanup"])
    }

    fn config(&mut self, key: &str, value: &OsStr) -> anyhow::Result<bool> {
        let settings = self.settings.get_mut();
        let text = |bytes: &[u8]| CString::new(bytes).with_context(|| format!("{key}= holds a zero byte"));
        let seconds = || -> anyhow::Result<i64> { Ok(params::integer::<u32>(key, value)?.into()) };
        match key {
            "url" => {
                ensure!(settings.url.is_empty(), "url= was given twice: one file is a disk");
                settings.url = text(value.as_bytes())?;
            }
            "change" => {
                self.may_change = match params::text(value)? {
                    "fail" => false,
                    "ignore" => true,
                    other => bail!("unknown change={other}: use fail or ignore"),
                }
            }
            "connections" => {
                let connections = params::integer(key, value)?;
                ensure!(connections > 0, "connections=0: at least one is needed");
                self.connections = Some(connections);
            }
            "cookie" => settings.texts.push((Opt::Cookie, text(&secret(key, value)?)?)),
            "password" => settings.texts.push((Opt::Password, text(&secret(key, value)?)?)),
            "proxy-password" => settings.texts.push((Opt::ProxyPassword, text(&secret(key, value)?)?)),
            "header" => settings.headers.push(text(value.as_bytes())?),
            "resolve" => settings.resolve.push(text(value.as_bytes())?),
            "header-script" => settings.header_script.get_or_insert_default().text = value.to_owned(),
            "cookie-script" => settings.cookie_script.get_or_insert_default().text = value.to_owned(),
            "header-script-renew" => {
                let renew = Duration::from_secs(seconds()?.unsigned_abs());
                settings.header_script.get_or_insert_default().renew = renew;
            }
            "cookie-script-renew" => {
                let renew = Duration::from_secs(seconds()?.unsigned_abs());
                settings.cookie_script.get_or_insert_default().renew = renew;
            }
            "followlocation" => {
                settings.numbers.push((Opt::FollowLocation, params::boolean(value)?.into()));
            }
            "sslverify" => {
                let verify = params::boolean(value)?;
                settings.numbers.push((Opt::SslVerifyPeer, verify.into()));
                settings.numbers.push((Opt::SslVerifyHost, if verify { 2 } else { 0 }));
            }
            "tcp-keepalive" => settings.numbers.push((Opt::TcpKeepalive, params::boolean(value)?.into())),
            "tcp-nodelay" => settings.numbers.push((Opt::TcpNoDelay, params::boolean(value)?.into())),
            "timeout" => settings.timeout = Some(seconds()?),
            "http-version" => settings.numbers.push((Opt::HttpVersion, word(key, value, HTTP_VERSIONS)?)),
            "ipresolve" => settings.numbers.push((Opt::IpResolve, word(key, value, IP_VERSIONS)?)),
            "ssl-version" => settings.numbers.push((Opt::SslVersion, word(key, value, SSL_VERSIONS)?)),
            "protocols" => {
                for option in [Opt::ProtocolsStr, Opt::RedirProtocolsStr] {
                    settings.texts.push((option, text(value.as_bytes())?));
                }
            }
            _ => {
                if let Some(option) = plain(key) {
                    settings.texts.push((option, text(value.as_bytes())?));
                } else if let Some(option) = path(key) {
                    // The server changes to `/` before it serves.
                    let path: PathBuf = std::path::absolute(value).with_context(|| format!("{key}="))?;
                    settings.texts.push((option, text(path.as_os_str().as_bytes())?));
                } else {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    fn config_complete(&mut self) -> anyhow::Result<()> {
        let settings = self.settings.get_mut();
        ensure!(!settings.url.is_empty(), "you must supply [url=]URL after the plugin name");
        for (script, key) in
            [(&settings.header_script, "header-script"), (&settings.cookie_script, "cookie-script")]
        {
            let empty = script.as_ref().is_some_and(|script| script.text.is_empty());
            ensure!(!empty, "{key}-renew= is for {key}=: add that");
        }
        let url = settings.url.to_string_lossy().to_ascii_lowercase();
        self.http = !["ftp://", "ftps://", "file://", "sftp://", "scp://"].iter().any(|s| url.starts_with(s));
        Ok(())
    }

    fn get_ready(&mut self) -> anyhow::Result<()> {
        libcurl::load()?;
        // What this libcurl does not know is an error of the start.
        self.settings.get_mut().easy().map(drop).context("this libcurl cannot do what a parameter asks for")
    }

    fn dump(&self) -> Vec<(String, String)> {
        match libcurl::load() {
            Ok(()) => vec![("curl_version".into(), libcurl::version())],
            Err(_) => Vec::new(),
        }
    }

    fn cleanup(&self) {
        self.engine.lock().take();
    }

    fn open(&self, open: &Open) -> Result<Box<dyn Handle>> {
        let disk = Disk::open(&self.engine()?, &open.client, self.http, self.may_change)?;
        Ok(Box::new(disk))
    }
}
