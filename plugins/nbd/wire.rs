//! The bytes of a connection, encrypted or not. Nothing here blocks but the functions that have a deadline, which are for
//! the negotiation.

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Instant,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{
        RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, recvmsg, sendmsg, shutdown,
    },
};

#[cfg(feature = "tls")]
use super::encrypted::Encrypted;

/// See the module.
#[derive(Debug)]
pub(super) struct Wire {
    socket: OwnedFd,
    #[cfg(feature = "tls")]
    encrypted: Option<Encrypted>,
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Receives what there is; 0 is the end.
pub(super) fn receive(socket: BorrowedFd<'_>, parts: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
    loop {
        match recvmsg(socket, parts, &mut RecvAncillaryBuffer::default(), RecvFlags::DONTWAIT) {
            Err(rustix::io::Errno::INTR) => {}
            result => return Ok(result?.bytes),
        }
    }
}

/// Sends what can be sent.
pub(super) fn send(socket: BorrowedFd<'_>, parts: &[IoSlice<'_>]) -> io::Result<usize> {
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    loop {
        match sendmsg(socket, parts, &mut SendAncillaryBuffer::default(), flags) {
            Err(rustix::io::Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
}

impl Wire {
    /// A connected socket, which does not block.
    pub(super) fn new(socket: OwnedFd) -> Self {
        Wire {
            socket,
            #[cfg(feature = "tls")]
            encrypted: None,
        }
    }

    /// Encrypts from here on.
    ///
    /// # Errors
    /// The two sides do not come together, or not before the deadline.
    #[cfg(feature = "tls")]
    pub(super) fn encrypt(
        &mut self,
        credentials: &nbdkit_tls::ClientCredentials,
        host: Option<&str>,
        deadline: Instant,
    ) -> anyhow::Result<()> {
        let encrypted = Encrypted::new(credentials.session(host)?)?;
        while let Some(interest) = encrypted.handshake(self.as_fd(), credentials)? {
            self.wait(interest, deadline)?;
        }
        self.encrypted = Some(encrypted);
        Ok(())
    }

    /// Whether it is encrypted.
    pub(super) fn is_encrypted(&self) -> bool {
        #[cfg(feature = "tls")]
        return self.encrypted.is_some();
        #[cfg(not(feature = "tls"))]
        false
    }

    /// Receives what there is; 0 is the end. Where it is encrypted there may be more, although the socket is not readable.
    pub(super) fn recv(&self, parts: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        #[cfg(feature = "tls")]
        if let Some(encrypted) = &self.encrypted {
            return encrypted.recv(self.as_fd(), parts);
        }
        receive(self.as_fd(), parts)
    }

    /// Takes what can be sent or, where it is encrypted, kept to be sent.
    pub(super) fn send(&self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        #[cfg(feature = "tls")]
        if let Some(encrypted) = &self.encrypted {
            return encrypted.send(self.as_fd(), parts);
        }
        send(self.as_fd(), parts)
    }

    /// Sends what was kept. False: something is left.
    pub(super) fn flush(&self) -> io::Result<bool> {
        #[cfg(feature = "tls")]
        if let Some(encrypted) = &self.encrypted {
            return encrypted.flush(self.as_fd());
        }
        Ok(true)
    }

    /// The end: nothing is received or sent any more.
    pub(super) fn close(&self) {
        #[cfg(feature = "tls")]
        if let Some(encrypted) = &self.encrypted {
            encrypted.close(self.as_fd());
        }
        let _ = shutdown(&self.socket, Shutdown::Both);
    }

    fn wait(&self, interest: PollFlags, deadline: Instant) -> io::Result<()> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(&self.socket, interest)], Some(&left)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Fills `buf`.
    ///
    /// # Errors
    /// `UnexpectedEof`, `TimedOut`, and those of the socket.
    pub(super) fn read_exact(&self, mut buf: &mut [u8], deadline: Instant) -> io::Result<()> {
        while !buf.is_empty() {
            match self.recv(&mut [IoSliceMut::new(buf)]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => buf = &mut buf[n..],
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.wait(PollFlags::IN, deadline)?,
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Sends all of `buf`.
    ///
    /// # Errors
    /// `TimedOut`, and those of the socket.
    pub(super) fn write_all(&self, mut buf: &[u8], deadline: Instant) -> io::Result<()> {
        while !buf.is_empty() {
            match self.send(&[IoSlice::new(buf)]) {
                Ok(n) => buf = &buf[n..],
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.wait(PollFlags::OUT, deadline)?,
                Err(e) => return Err(e),
            }
        }
        while !self.flush()? {
            self.wait(PollFlags::OUT, deadline)?;
        }
        Ok(())
    }
}
