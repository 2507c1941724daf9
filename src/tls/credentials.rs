//! What a server shows to its clients over TLS, and asks of them; and what both sides have in common.
//!
//! OpenSSL does it, for its pre-shared keys work with the clients there are, which use GnuTLS.

use std::{
    collections::HashMap,
    fmt,
    fs::File,
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
};

use anyhow::{Context as _, bail, ensure};
use openssl::{
    asn1::Asn1Time,
    ssl::{
        SslContext, SslContextBuilder, SslContextRef, SslMethod, SslMode, SslOptions, SslSessionCacheMode,
        SslVerifyMode,
    },
};

use crate::{
    files::{show, trust},
    priority::{Kind, Priority},
};

/// How much the handshakes tell under `-v`: `-D nbdkit.tls.log=N`.
static LOG: AtomicU32 = AtomicU32::new(0);
/// Whether each session is described under `-v`: `-D nbdkit.tls.session=1`.
static SESSION: AtomicBool = AtomicBool::new(false);

/// Sets how much debug messages tell of TLS: `log` of handshakes (0: nothing, 1: each step, 2: the bytes of each too), and
/// `session` of what was agreed on.
pub fn set_debug(log: u32, session: bool) {
    LOG.store(log, Ordering::Relaxed);
    SESSION.store(session, Ordering::Relaxed);
}

/// What `set_debug` was told.
pub fn debug() -> (u32, bool) {
    (LOG.load(Ordering::Relaxed), SESSION.load(Ordering::Relaxed))
}

/// The file that the sessions' secrets go to, in the NSS format that Wireshark reads. Anyone who has it can decrypt the
/// traffic.
fn key_log_file() -> Option<File> {
    let path = std::env::var_os("SSLKEYLOGFILE").filter(|path| !path.is_empty())?;
    let file = File::options().append(true).create(true).mode(0o600).open(&path);
    match file {
        Ok(file) => {
            log::warn!(
                "TLS: the keys of all sessions are written to {}, as SSLKEYLOGFILE says",
                path.display()
            );
            Some(file)
        }
        Err(e) => {
            log::warn!("TLS: cannot write keys to {}, as SSLKEYLOGFILE says: {e}", path.display());
            None
        }
    }
}

/// What the server shows to its clients, and asks of them.
#[derive(Clone)]
pub struct Credentials {
    context: SslContext,
    kind: Kind,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials")
    }
}

fn context(priority: Option<&str>, kind: Kind) -> anyhow::Result<SslContextBuilder> {
    #[cfg(openssl_on_demand)]
    crate::libssl::load()?;
    let priority = Priority::parse(priority, kind)?;
    let mut context = SslContext::builder(SslMethod::tls_server())?;
    context.set_min_proto_version(Some(priority.min))?;
    context.set_max_proto_version(Some(priority.max))?;
    context.set_options(
        SslOptions::CIPHER_SERVER_PREFERENCE
            | SslOptions::NO_TICKET
            | SslOptions::NO_COMPRESSION
            | SslOptions::NO_RENEGOTIATION,
    );
    context.set_mode(SslMode::ENABLE_PARTIAL_WRITE | SslMode::ACCEPT_MOVING_WRITE_BUFFER);
    context.set_session_cache_mode(SslSessionCacheMode::OFF);
    context.set_num_tickets(0)?;
    let unknown = "--tls-priority: neither a priority string of GnuTLS nor ciphers that OpenSSL knows";
    context.set_ciphersuites(&priority.suites).context(unknown)?;
    context.set_cipher_list(&priority.ciphers).context(unknown)?;
    key_log(&mut context);
    Ok(context)
}

/// Has the sessions' secrets written, if the environment says so.
pub(crate) fn key_log(context: &mut SslContextBuilder) {
    if let Some(file) = key_log_file() {
        context.set_keylog_callback(move |_, line| {
            // One write for a line, for several connections write here.
            let _ = (&file).write_all(format!("{line}\n").as_bytes());
        });
    }
}

impl Credentials {
    /// What connections are made with.
    pub fn context(&self) -> &SslContextRef {
        &self.context
    }

    /// What a failed handshake means, if OpenSSL's reason does not tell; empty: it does.
    pub fn hint(&self, reason: &str) -> &'static str {
        match self.kind {
            Kind::Keys if ["binder does not verify", "bad record mac"].iter().any(|r| reason.contains(r)) => {
                "the client's pre-shared key is not the one that its user has here: "
            }
            _ => "",
        }
    }

    /// By what the sides know each other, for messages.
    pub fn kind(&self) -> &'static str {
        match self.kind {
            Kind::Certificates => "certificates",
            Kind::Keys => "pre-shared keys",
        }
    }

    /// Why a client may have gone in the handshake without a word.
    pub fn doubt(&self) -> &'static str {
        match self.kind {
            Kind::Certificates => ": it may not trust the server's certificate",
            Kind::Keys => "",
        }
    }

    /// Loads `server-cert.pem`, `server-key.pem`, `ca-cert.pem` and perhaps `ca-crl.pem` from a directory. With
    /// `verify_peer` a client needs a certificate that this authority signed. `priority` is a string of GnuTLS or a list of
    /// OpenSSL's ciphers; None: what is fast and good.
    ///
    /// # Errors
    /// Files that cannot be read or do not fit together, and an unknown list.
    pub fn certificates(directory: &Path, verify_peer: bool, priority: Option<&str>) -> anyhow::Result<Self> {
        let file = |name: &str| directory.join(name);
        ensure!(
            directory.is_dir(),
            "there is no directory {}: name one with certificates, such as certtool makes",
            directory.display()
        );
        let names = ["server-cert.pem", "server-key.pem", "ca-cert.pem"];
        let missing: Vec<_> = names.into_iter().filter(|name| !file(name).exists()).collect();
        ensure!(
            missing.is_empty(),
            "the directory {} lacks {}: such files are made by certtool",
            directory.display(),
            missing.join(", ")
        );
        let mut context = context(priority, Kind::Certificates)?;
        let certificate = file("server-cert.pem");
        show(&mut context, &certificate, &file("server-key.pem"))?;
        let authority = file("ca-cert.pem");
        let pem =
            std::fs::read(&authority).with_context(|| format!("cannot read {}", authority.display()))?;
        trust(&mut context, directory, (&authority, &pem), verify_peer)?;
        if verify_peer {
            context.set_verify(SslVerifyMode::PEER | SslVerifyMode::FAIL_IF_NO_PEER_CERT);
        }
        let context = context.build();
        if let Some(shown) = context.certificate() {
            let now = Asn1Time::days_from_now(0)?;
            if shown.not_after() < now {
                log::warn!("TLS: {} expired: {}", certificate.display(), shown.not_after());
            } else if shown.not_before() > now {
                log::warn!("TLS: {} is not valid before {}", certificate.display(), shown.not_before());
            }
        }
        Ok(Credentials { context, kind: Kind::Certificates })
    }

    /// Loads pre-shared keys: lines of a user's name, a colon and the key in hexadecimal.
    ///
    /// # Errors
    /// A file that cannot be read or holds anything else, and an unknown list.
    pub fn keys(file: &Path, priority: Option<&str>) -> anyhow::Result<Self> {
        let text = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        let keys = parse_keys(&text).with_context(|| format!("{}", file.display()))?;
        let mut context = context(priority, Kind::Keys)?;
        context.set_psk_server_callback(move |_, user, out| {
            let key = user.and_then(|user| keys.get(user));
            let Some((key, out)) = key.and_then(|key| Some((key, out.get_mut(..key.len())?))) else {
                log::error!(
                    "TLS: no pre-shared key for the user \"{}\"",
                    user.unwrap_or_default().escape_ascii()
                );
                return Ok(0);
            };
            out.copy_from_slice(key);
            Ok(key.len())
        });
        Ok(Credentials { context: context.build(), kind: Kind::Keys })
    }
}

pub(crate) fn parse_keys(text: &[u8]) -> anyhow::Result<HashMap<Vec<u8>, Vec<u8>>> {
    let mut keys = HashMap::new();
    for (number, line) in text.split(|b| *b == b'\n').enumerate() {
        let line = line.trim_ascii();
        if line.is_empty() || line.starts_with(b"#") {
            continue;
        }
        let colon = line.iter().rposition(|b| *b == b':');
        let (user, key) = colon.map_or((line, &line[..0]), |at| (&line[..at], &line[at + 1..]));
        let digits: Option<Vec<u8>> =
            key.iter().map(|b| char::from(*b).to_digit(16).map(|digit| digit as u8)).collect();
        let Some(digits) = digits.filter(|d| !d.is_empty() && d.len() % 2 == 0) else {
            bail!("line {}: expected USER:KEY with the key in hexadecimal", number + 1);
        };
        keys.insert(user.to_vec(), digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect());
    }
    ensure!(!keys.is_empty(), "there are no keys in the file: make one with psktool");
    Ok(keys)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_files() {
        let keys = parse_keys(b"# keys\nalice:0a0B\n\nbob:the:builder:ff\n").unwrap();
        assert_eq!(keys[&b"alice"[..]], [10, 11]);
        assert_eq!(keys[&b"bob:the:builder"[..]], [255]);
        for bad in [&b""[..], b"alice", b"alice:", b"alice:abc", b"alice:xy"] {
            assert!(parse_keys(bad).is_err(), "{bad:?}");
        }
    }
}
