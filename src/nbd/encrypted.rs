//! A [`Stream`] that encrypts what goes through another.
//!
//! One lock guards OpenSSL's state and is never held while waiting: records are made and taken apart in memory, and
//! the socket below is only asked for what it can do at once. The receiving thread waits for input outside of the
//! lock, so a small request costs one call of the kernel, as it does without TLS.

use std::{
    io::{self, Read, Write},
    sync::Arc,
    time::Duration,
};

use anyhow::bail;
use nbdkit_core::{Certificate, sync::Mutex};
use nbdkit_dispatch::reclaim::give_back;
use openssl::{
    ssl::{ErrorCode, Ssl, SslStream},
    x509::X509VerifyResult,
};

use crate::{
    certificate,
    stream::{Interest, Ready, Stream},
    tls::{self, Credentials},
};

/// Bytes received at once.
const INPUT: usize = 128 << 10;
/// Bytes encrypted before they are sent.
const OUTPUT: usize = 128 << 10;
/// Most data in a record.
const RECORD: usize = 16 << 10;

const READ: Interest<'static> = Interest { read: true, write: false, hangup: false, wake: None };
const WRITE: Interest<'static> = Interest { read: false, write: true, hangup: false, wake: None };

/// What lies between OpenSSL and the socket, in memory.
struct Wire {
    below: Arc<dyn Stream>,
    /// Received: `input[start..end]`. Empty while somebody receives into it.
    input: Vec<u8>,
    start: usize,
    end: usize,
    /// The socket had no more than this; it is not asked again for now.
    exhausted: bool,
    /// Nothing will come any more.
    eof: bool,
    /// Records to be sent.
    output: Vec<u8>,
    sent: usize,
}

impl Wire {
    /// Takes what was received into `input`.
    fn received(&mut self, n: usize) {
        (self.start, self.end) = (0, n);
        self.eof |= n == 0;
        self.exhausted = n < self.input.len();
    }

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
        if self.start == self.end && !self.eof {
            if self.exhausted || self.input.is_empty() {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let n = self.below.recv(&mut self.input, false)?;
            self.received(n);
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
    credentials: Credentials,
    below: Arc<dyn Stream>,
    state: Mutex<State>,
}

struct State {
    ssl: SslStream<Wire>,
    /// So much at the start of the next data was encrypted already, in records that are not all sent. It counts as
    /// sent when they are.
    held: usize,
    /// Nothing can be received any more.
    ended: bool,
}

/// What a handshake needs next.
pub(crate) enum Progress {
    Done,
    Wants(Interest<'static>),
}

impl Encrypted {
    pub(crate) fn new(credentials: &Credentials, below: Arc<dyn Stream>) -> anyhow::Result<Self> {
        let wire = Wire {
            below: below.clone(),
            input: vec![0; INPUT],
            start: 0,
            end: 0,
            exhausted: false,
            eof: false,
            output: Vec::new(),
            sent: 0,
        };
        let ssl = SslStream::new(Ssl::new(credentials.context())?, wire)?;
        Ok(Encrypted {
            credentials: credentials.clone(),
            below,
            state: Mutex::new(State { ssl, held: 0, ended: false }),
        })
    }

    /// Goes on with the handshake.
    ///
    /// # Errors
    /// When client and server do not come together. The client was told why.
    pub(crate) fn handshake(&self) -> anyhow::Result<Progress> {
        let state = &mut *self.state.lock();
        state.ssl.get_mut().exhausted = false;
        let result = state.ssl.accept();
        self.log_step(state);
        let flushed = state.ssl.get_mut().flush_now()?;
        match result {
            _ if !flushed => Ok(Progress::Wants(WRITE)),
            Ok(()) => Ok(Progress::Done),
            Err(e) if e.code() == ErrorCode::WANT_READ => Ok(Progress::Wants(READ)),
            Err(e) if e.code() == ErrorCode::ZERO_RETURN || e.ssl_error().is_none() => {
                bail!("the client closed the connection in the handshake{}", self.credentials.doubt())
            }
            Err(e) => {
                let reason = reason(&e);
                let hint = self.credentials.hint(&reason);
                match state.ssl.ssl().verify_result() {
                    X509VerifyResult::OK => bail!("{hint}{reason}"),
                    verified => bail!("{reason}: {}", verified.error_string()),
                }
            }
        }
    }

    /// Tells how far the handshake has come, if that is wanted.
    fn log_step(&self, state: &State) {
        let (level, session) = tls::debug();
        if level == 0 && !session {
            return;
        }
        let ssl = state.ssl.ssl();
        let wire = state.ssl.get_ref();
        if level > 0 {
            log::debug!("TLS: handshake: {}", ssl.state_string_long());
        }
        if level > 1 {
            log::debug!("TLS: {} bytes received, {} to be sent", wire.end, wire.output.len());
        }
        if session && ssl.is_init_finished() {
            let cipher = ssl.current_cipher().map_or("none", |cipher| cipher.name());
            let client = match ssl.peer_certificate() {
                Some(_) if ssl.verify_result() == X509VerifyResult::OK => "with a certificate",
                Some(_) => "with a certificate that was not verified",
                None => "without a certificate",
            };
            let (version, kind) = (ssl.version_str(), self.credentials.kind());
            log::debug!("TLS: session: {version}, cipher {cipher}, by {kind}, a client {client}");
        }
    }

    /// What was agreed on, for messages.
    pub(crate) fn describe(&self) -> String {
        let state = self.state.lock();
        let ssl = state.ssl.ssl();
        let cipher = ssl.current_cipher().map_or("no cipher", |cipher| cipher.name());
        format!("{} {cipher}", ssl.version_str())
    }

    /// Who the client is, by a certificate that was verified.
    pub(crate) fn certificate(&self) -> Option<Certificate> {
        let state = self.state.lock();
        let ssl = state.ssl.ssl();
        let certificate = ssl.peer_certificate().filter(|_| ssl.verify_result() == X509VerifyResult::OK)?;
        certificate::names(&certificate)
    }
}

/// OpenSSL's reasons, without its places.
fn reason(e: &openssl::ssl::Error) -> String {
    let Some(stack) = e.ssl_error() else { return e.to_string() };
    let reasons: Vec<_> = stack.errors().iter().filter_map(|e| e.reason()).collect();
    if reasons.is_empty() { e.to_string() } else { reasons.join(", ") }
}

impl State {
    /// Fills `buf` from what can be had now, or with `at_hand` from what was received before; 0 at the end.
    fn read(&mut self, buf: &mut [u8], at_hand: bool) -> io::Result<usize> {
        self.ssl.get_mut().exhausted = at_hand;
        let mut done = 0;
        while done < buf.len() && !self.ended {
            match self.ssl.ssl_read(&mut buf[done..]) {
                Ok(n) if n > 0 => done += n,
                Err(e) if matches!(e.code(), ErrorCode::WANT_READ | ErrorCode::WANT_WRITE) => {
                    if done == 0 {
                        return Err(io::ErrorKind::WouldBlock.into());
                    }
                    break;
                }
                result => {
                    self.ended = true;
                    match result {
                        Err(e) if e.code() == ErrorCode::ZERO_RETURN => {}
                        Err(e) if self.ssl.get_ref().eof => {
                            log::debug!(
                                "TLS: the connection was cut, for no close_notify came: {}",
                                reason(&e)
                            );
                        }
                        Err(e) => log::debug!("TLS: the connection failed: {}", reason(&e)),
                        Ok(_) => {}
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
            while gone + self.held < buf.len() && self.ssl.get_ref().output.len() < OUTPUT {
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
        wire.start < wire.end || wire.eof || self.ssl.ssl().pending() > 0
    }
}

impl Stream for Encrypted {
    fn recv(&self, buf: &mut [u8], wait: bool) -> io::Result<usize> {
        loop {
            let mut input = {
                let mut state = self.state.lock();
                match state.read(buf, wait) {
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock && wait => {}
                    result => return result,
                }
                std::mem::take(&mut state.ssl.get_mut().input)
            };
            let received = self.below.recv(&mut input, true);
            let mut state = self.state.lock();
            let wire = state.ssl.get_mut();
            wire.input = input;
            wire.received(received?);
        }
    }

    fn send(&self, buf: &[u8], wait: bool) -> io::Result<usize> {
        loop {
            match self.state.lock().write(buf) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && wait => {}
                result => return result,
            }
            self.below.wait(WRITE, None)?;
        }
    }

    fn wait(&self, interest: Interest<'_>, timeout: Option<Duration>) -> io::Result<Ready> {
        let at_hand = interest.read && self.state.lock().has_input();
        let timeout = if at_hand { Some(Duration::ZERO) } else { timeout };
        let ready = self.below.wait(interest, timeout)?;
        Ok(Ready { read: ready.read || at_hand, ..ready })
    }

    fn set_patience(&self, patience: Duration) {
        self.below.set_patience(patience);
    }

    fn give_back(&self) {
        let mut state = self.state.lock();
        let wire = state.ssl.get_mut();
        if wire.start == wire.end {
            give_back(&mut wire.input);
        }
        if wire.output.is_empty() {
            wire.output = Vec::new();
        }
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
