//! TLS: the server's credentials, and a [`Stream`] that encrypts what goes through another.
//!
//! OpenSSL does it, for its pre-shared keys work with the clients there are, which use GnuTLS. One lock guards its
//! state and is never held while waiting: records are made and taken apart in memory, and the socket below is only
//! asked for what it can do at once.

use std::{
    collections::HashMap,
    fmt,
    io::{self, Read, Write},
    path::Path,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use openssl::{
    ssl::{
        ErrorCode, Ssl, SslContext, SslContextBuilder, SslFiletype, SslMethod, SslMode, SslOptions,
        SslSessionCacheMode, SslStream, SslVerifyMode, SslVersion,
    },
    x509::{
        X509,
        store::{X509Lookup, X509StoreBuilder},
        verify::X509VerifyFlags,
    },
};
use parking_lot::Mutex;

use crate::stream::{Interest, Ready, Stream};

/// Bytes received from, and collected for, the socket at once.
const BUFFER: usize = 256 << 10;
/// Most data in a record.
const RECORD: usize = 16 << 10;
/// For TLS 1.3, fastest first.
const SUITES: &str = "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256";
/// For TLS 1.2 with certificates.
const CIPHERS: &str = "ECDHE+AESGCM:ECDHE+CHACHA20:DHE+AESGCM:!aNULL:!PSK";
/// For TLS 1.2 with pre-shared keys.
const PSK_CIPHERS: &str = "PSK-AES128-GCM-SHA256:PSK-AES256-GCM-SHA384:ECDHE-PSK-CHACHA20-POLY1305:\
                           ECDHE-PSK-AES128-CBC-SHA256:PSK-CHACHA20-POLY1305";

/// What the server shows to its clients, and asks of them.
#[derive(Clone)]
pub struct Credentials(SslContext);

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials")
    }
}

fn context(ciphers: &str) -> anyhow::Result<SslContextBuilder> {
    let mut context = SslContext::builder(SslMethod::tls_server())?;
    context.set_min_proto_version(Some(SslVersion::TLS1_2))?;
    context.set_options(
        SslOptions::CIPHER_SERVER_PREFERENCE
            | SslOptions::NO_TICKET
            | SslOptions::NO_COMPRESSION
            | SslOptions::NO_RENEGOTIATION,
    );
    context.set_mode(SslMode::ENABLE_PARTIAL_WRITE | SslMode::ACCEPT_MOVING_WRITE_BUFFER);
    context.set_session_cache_mode(SslSessionCacheMode::OFF);
    context.set_num_tickets(0)?;
    context.set_ciphersuites(SUITES)?;
    context.set_cipher_list(ciphers).context("--tls-priority: OpenSSL does not know this list of ciphers")?;
    Ok(context)
}

impl Credentials {
    /// Loads `server-cert.pem`, `server-key.pem`, `ca-cert.pem` and perhaps `ca-crl.pem` from a directory. With
    /// `verify_peer` a client needs a certificate that this authority signed. `ciphers` is a list of OpenSSL's.
    ///
    /// # Errors
    /// Files that cannot be read or do not fit together, and an unknown list.
    pub fn certificates(directory: &Path, verify_peer: bool, ciphers: Option<&str>) -> anyhow::Result<Self> {
        let file = |name: &str| directory.join(name);
        let mut context = context(ciphers.unwrap_or(CIPHERS))?;
        let certificate = file("server-cert.pem");
        context
            .set_certificate_chain_file(&certificate)
            .with_context(|| format!("cannot load {}", certificate.display()))?;
        let key = file("server-key.pem");
        context
            .set_private_key_file(&key, SslFiletype::PEM)
            .with_context(|| format!("cannot load {}", key.display()))?;
        context
            .check_private_key()
            .with_context(|| format!("{} is not the key of {}", key.display(), certificate.display()))?;
        let authority = file("ca-cert.pem");
        let pem =
            std::fs::read(&authority).with_context(|| format!("cannot read {}", authority.display()))?;
        let mut store = X509StoreBuilder::new()?;
        for ca in
            X509::stack_from_pem(&pem).with_context(|| format!("cannot load {}", authority.display()))?
        {
            if verify_peer {
                context.add_client_ca(&ca)?;
            }
            store.add_cert(ca)?;
        }
        let revoked = file("ca-crl.pem");
        if revoked.exists() {
            store
                .add_lookup(X509Lookup::file())?
                .load_crl_file(&revoked, SslFiletype::PEM)
                .with_context(|| format!("cannot load {}", revoked.display()))?;
            store.set_flags(X509VerifyFlags::CRL_CHECK)?;
        }
        context.set_cert_store(store.build());
        if verify_peer {
            context.set_verify(SslVerifyMode::PEER | SslVerifyMode::FAIL_IF_NO_PEER_CERT);
        }
        Ok(Credentials(context.build()))
    }

    /// Loads pre-shared keys: lines of a user's name, a colon and the key in hexadecimal.
    ///
    /// # Errors
    /// A file that cannot be read or holds anything else, and an unknown list.
    pub fn keys(file: &Path, ciphers: Option<&str>) -> anyhow::Result<Self> {
        let text = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        let keys = parse_keys(&text).with_context(|| format!("{}", file.display()))?;
        let mut context = context(ciphers.unwrap_or(PSK_CIPHERS))?;
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
        Ok(Credentials(context.build()))
    }
}

fn parse_keys(text: &[u8]) -> anyhow::Result<HashMap<Vec<u8>, Vec<u8>>> {
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

/// What lies between OpenSSL and the socket, in memory.
struct Wire {
    below: Arc<dyn Stream>,
    input: Vec<u8>,
    start: usize,
    end: usize,
    /// Records to be sent.
    output: Vec<u8>,
    sent: usize,
}

impl Wire {
    /// Sends what it can. False: something is left.
    fn flush_now(&mut self) -> io::Result<bool> {
        while self.sent < self.output.len() {
            match self.below.send(&self.output[self.sent..], false) {
                Ok(n) => self.sent += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) => return Err(e),
            }
        }
        self.output.clear();
        self.sent = 0;
        Ok(true)
    }
}

impl Read for Wire {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
            self.end = self.below.recv(&mut self.input, false)?;
        }
        let n = buf.len().min(self.end - self.start);
        buf[..n].copy_from_slice(&self.input[self.start..self.start + n]);
        self.start += n;
        Ok(n)
    }
}

impl Write for Wire {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.output.extend_from_slice(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An encrypted connection over another stream.
pub(crate) struct Encrypted {
    below: Arc<dyn Stream>,
    state: Mutex<State>,
}

struct State {
    ssl: SslStream<Wire>,
    /// So much at the start of the next data was encrypted already, in records that are not all sent. It counts as
    /// sent when they are.
    held: usize,
    ended: bool,
}

/// What a handshake needs next.
pub(crate) enum Progress {
    Done,
    Wants(Interest),
}

impl Encrypted {
    pub(crate) fn new(credentials: &Credentials, below: Arc<dyn Stream>) -> anyhow::Result<Self> {
        let wire = Wire {
            below: below.clone(),
            input: vec![0; BUFFER],
            start: 0,
            end: 0,
            output: Vec::new(),
            sent: 0,
        };
        let ssl = SslStream::new(Ssl::new(&credentials.0)?, wire)?;
        Ok(Encrypted { below, state: Mutex::new(State { ssl, held: 0, ended: false }) })
    }

    /// Goes on with the handshake.
    ///
    /// # Errors
    /// When client and server do not come together. The client was told why.
    pub(crate) fn handshake(&self) -> anyhow::Result<Progress> {
        let state = &mut *self.state.lock();
        let result = state.ssl.accept();
        let flushed = state.ssl.get_mut().flush_now()?;
        let write = Progress::Wants(Interest { write: true, ..Interest::default() });
        match result {
            Ok(()) if flushed => Ok(Progress::Done),
            Ok(()) => Ok(write),
            Err(_) if !flushed => Ok(write),
            Err(e) if e.code() == ErrorCode::WANT_READ => {
                Ok(Progress::Wants(Interest { read: true, ..Interest::default() }))
            }
            Err(e) if e.code() == ErrorCode::ZERO_RETURN || e.ssl_error().is_none() => {
                bail!("the client closed the connection")
            }
            Err(e) => Err(anyhow::anyhow!("{}", reason(&e))),
        }
    }

    /// What was agreed on, for messages.
    pub(crate) fn describe(&self) -> String {
        let state = self.state.lock();
        let ssl = state.ssl.ssl();
        let cipher = ssl.current_cipher().map_or("no cipher", |cipher| cipher.name());
        format!("{} {cipher}", ssl.version_str())
    }
}

/// OpenSSL's reasons, without its places.
fn reason(e: &openssl::ssl::Error) -> String {
    let Some(stack) = e.ssl_error() else { return e.to_string() };
    let reasons: Vec<_> = stack.errors().iter().filter_map(|e| e.reason()).collect();
    if reasons.is_empty() { e.to_string() } else { reasons.join(", ") }
}

impl State {
    /// Fills `buf` from what can be had now; 0 at the end.
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let mut done = 0;
        while done < buf.len() && !self.ended {
            match self.ssl.ssl_read(&mut buf[done..]) {
                Ok(0) => self.ended = true,
                Ok(n) => done += n,
                Err(e) if e.code() == ErrorCode::ZERO_RETURN => self.ended = true,
                Err(e) if matches!(e.code(), ErrorCode::WANT_READ | ErrorCode::WANT_WRITE) => {
                    if done == 0 {
                        return Err(io::ErrorKind::WouldBlock.into());
                    }
                    break;
                }
                Err(_) if done > 0 => break,
                Err(e) => {
                    self.ended = true;
                    match e.io_error() {
                        Some(_) => log::debug!("TLS: the connection failed: {e}"),
                        None => log::debug!("TLS: the client did not end the connection: {}", reason(&e)),
                    }
                }
            }
        }
        Ok(done)
    }

    /// Encrypts and sends of `buf` what can be sent now, and tells how much that was.
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let mut gone = 0;
        loop {
            if !self.ssl.get_mut().flush_now()? {
                break;
            }
            gone += std::mem::take(&mut self.held);
            if gone == buf.len() {
                break;
            }
            let mut last = 0;
            while gone + self.held < buf.len() && self.ssl.get_ref().output.len() < BUFFER {
                let at = gone + self.held;
                let most = buf.len().min(at + RECORD);
                last = self.ssl.ssl_write(&buf[at..most]).map_err(|e| io::Error::other(reason(&e)))?;
                self.held += last;
            }
            if last == 0 {
                break;
            }
        }
        if gone == 0 { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(gone) }
    }

    fn has_input(&self) -> bool {
        let wire = self.ssl.get_ref();
        wire.start < wire.end || self.ssl.ssl().pending() > 0
    }
}

impl Stream for Encrypted {
    fn recv(&self, buf: &mut [u8], wait: bool) -> io::Result<usize> {
        loop {
            match self.state.lock().read(buf) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && wait => {}
                result => return result,
            }
            self.below.wait(Interest { read: true, ..Interest::default() }, None)?;
        }
    }

    fn send(&self, buf: &[u8], wait: bool) -> io::Result<usize> {
        loop {
            match self.state.lock().write(buf) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && wait => {}
                result => return result,
            }
            self.below.wait(Interest { write: true, ..Interest::default() }, None)?;
        }
    }

    fn wait(&self, interest: Interest, timeout: Option<Duration>) -> io::Result<Ready> {
        let at_hand = interest.read && self.state.lock().has_input();
        let timeout = if at_hand { Some(Duration::ZERO) } else { timeout };
        let ready = self.below.wait(interest, timeout)?;
        Ok(Ready { read: ready.read || at_hand, ..ready })
    }

    fn close_input(&self) {
        self.below.close_input();
    }

    fn close(&self) {
        let mut state = self.state.lock();
        // A client who is gone cannot be told.
        let _ = state.ssl.shutdown();
        let _ = state.ssl.get_mut().flush_now();
        drop(state);
        self.below.close();
    }
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
