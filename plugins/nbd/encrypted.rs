//! TLS between a connection and its socket: records are made and taken apart in memory, under one lock that is not held
//! while anybody waits.

use std::{
    io::{self, IoSlice, IoSliceMut, Read, Write},
    os::fd::BorrowedFd,
};

use anyhow::bail;
use nbdkit_core::sync::Mutex;
use nbdkit_tls::ClientCredentials;
use openssl::{
    ssl::{ErrorCode, Ssl, SslStream},
    x509::X509VerifyResult,
};
use rustix::event::PollFlags;

use super::wire::{receive, send};

/// Bytes received at once.
const INPUT: usize = 128 << 10;
/// Bytes that may wait to be sent.
const OUTPUT: usize = 128 << 10;
/// Most data in a record.
const RECORD: usize = 16 << 10;

/// What lies between OpenSSL and the socket.
struct Records {
    /// Received: `input[start..end]`.
    input: Vec<u8>,
    start: usize,
    end: usize,
    /// To be sent: from `sent` on.
    output: Vec<u8>,
    sent: usize,
    /// Nothing comes any more.
    eof: bool,
}

impl Read for Records {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.start == self.end && !self.eof {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let n = buf.len().min(self.end - self.start);
        buf[..n].copy_from_slice(&self.input[self.start..self.start + n]);
        self.start += n;
        Ok(n)
    }
}

impl Write for Records {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.output.extend_from_slice(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Records {
    /// Receives more. `WouldBlock`: there is nothing.
    fn fill(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let n = receive(socket, &mut [IoSliceMut::new(&mut self.input)])?;
        (self.start, self.end, self.eof) = (0, n, n == 0);
        Ok(())
    }

    /// Sends what it can. False: something is left.
    fn flush_now(&mut self, socket: BorrowedFd<'_>) -> io::Result<bool> {
        while self.sent < self.output.len() {
            match send(socket, &[IoSlice::new(&self.output[self.sent..])]) {
                Ok(n) => self.sent += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) => return Err(e),
            }
        }
        self.output.clear();
        self.sent = 0;
        Ok(true)
    }
}

/// See the module.
pub(super) struct Encrypted(Mutex<SslStream<Records>>);

impl std::fmt::Debug for Encrypted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Encrypted")
    }
}

/// OpenSSL's reasons, without its places.
fn reason(e: &openssl::ssl::Error) -> String {
    let Some(stack) = e.ssl_error() else { return e.to_string() };
    let reasons: Vec<_> = stack.errors().iter().filter_map(|e| e.reason()).collect();
    if reasons.is_empty() { e.to_string() } else { reasons.join(", ") }
}

impl Encrypted {
    pub(super) fn new(ssl: Ssl) -> anyhow::Result<Self> {
        let records =
            Records { input: vec![0; INPUT], start: 0, end: 0, output: Vec::new(), sent: 0, eof: false };
        Ok(Encrypted(Mutex::new(SslStream::new(ssl, records)?)))
    }

    /// Goes on with the handshake. Some: what has to be waited for.
    ///
    /// # Errors
    /// The two sides do not come together.
    pub(super) fn handshake(
        &self,
        socket: BorrowedFd<'_>,
        credentials: &ClientCredentials,
    ) -> anyhow::Result<Option<PollFlags>> {
        let ssl = &mut *self.0.lock();
        loop {
            let result = ssl.connect();
            let flushed = ssl.get_mut().flush_now(socket)?;
            match result {
                _ if !flushed => return Ok(Some(PollFlags::OUT)),
                Ok(()) => return Ok(None),
                Err(e) if e.code() == ErrorCode::WANT_READ => match ssl.get_mut().fill(socket) {
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Some(PollFlags::IN)),
                    result => result?,
                },
                Err(e) if e.code() == ErrorCode::ZERO_RETURN || e.ssl_error().is_none() => {
                    bail!("the server closed the connection in the TLS handshake")
                }
                Err(e) => {
                    let reason = reason(&e);
                    let hint = credentials.hint(&reason);
                    match ssl.ssl().verify_result() {
                        X509VerifyResult::OK => bail!("{hint}{reason}"),
                        verified => bail!("{hint}{reason}: {}", verified.error_string()),
                    }
                }
            }
        }
    }

    pub(super) fn recv(&self, socket: BorrowedFd<'_>, parts: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let ssl = &mut *self.0.lock();
        let mut all = 0;
        for part in parts {
            let mut done = 0;
            while done < part.len() {
                match ssl.ssl_read(&mut part[done..]) {
                    Ok(n) if n > 0 => done += n,
                    Ok(_) => return Ok(all + done),
                    Err(e) if e.code() == ErrorCode::WANT_READ => match ssl.get_mut().fill(socket) {
                        Err(e) if e.kind() == io::ErrorKind::WouldBlock && all + done > 0 => {
                            return Ok(all + done);
                        }
                        result => result?,
                    },
                    // The end, in good order or cut.
                    Err(e) if e.code() == ErrorCode::ZERO_RETURN || ssl.get_ref().eof => {
                        return Ok(all + done);
                    }
                    Err(e) => return Err(io::Error::other(reason(&e))),
                }
            }
            all += done;
        }
        Ok(all)
    }

    pub(super) fn send(&self, socket: BorrowedFd<'_>, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let ssl = &mut *self.0.lock();
        if ssl.get_ref().output.len() >= OUTPUT && !ssl.get_mut().flush_now(socket)? {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let mut all = 0;
        'parts: for part in parts {
            let mut done = 0;
            while done < part.len() {
                if ssl.get_ref().output.len() >= OUTPUT && !ssl.get_mut().flush_now(socket)? {
                    all += done;
                    break 'parts;
                }
                let end = part.len().min(done + RECORD);
                done += ssl.ssl_write(&part[done..end]).map_err(|e| io::Error::other(reason(&e)))?;
            }
            all += done;
        }
        ssl.get_mut().flush_now(socket)?;
        Ok(all)
    }

    pub(super) fn flush(&self, socket: BorrowedFd<'_>) -> io::Result<bool> {
        self.0.lock().get_mut().flush_now(socket)
    }

    /// Tells the server that this is the end; one that is gone cannot be told.
    pub(super) fn close(&self, socket: BorrowedFd<'_>) {
        let ssl = &mut *self.0.lock();
        let _ = ssl.shutdown();
        let _ = ssl.get_mut().flush_now(socket);
    }
}
