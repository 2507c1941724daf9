//! The bytes between us and one client.
//!
//! The handshake and the transmission loop see only [`Stream`], so that TLS can be put under both. One thread
//! receives, one at a time sends, and any may close.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    net::{
        RecvFlags, SendFlags, Shutdown, recv, send, shutdown,
        sockopt::{Timeout, set_socket_timeout},
    },
};

/// What to wait for.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Interest<'a> {
    pub(crate) read: bool,
    pub(crate) write: bool,
    /// That the client stops sending.
    pub(crate) hangup: bool,
    /// That somebody else has something to say: this is readable.
    pub(crate) wake: Option<BorrowedFd<'a>>,
}

/// What has come. All false: the time is over.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Ready {
    pub(crate) read: bool,
    pub(crate) write: bool,
    /// The client is gone, or will not send any more.
    pub(crate) hangup: bool,
    /// `wake` is readable.
    pub(crate) woken: bool,
}

/// A connection. `wait` says whether a call may block; if not, it fails with `WouldBlock` instead.
pub(crate) trait Stream: Send + Sync {
    /// Receives at most `buf.len()` bytes; 0 at the end of the stream.
    fn recv(&self, buf: &mut [u8], wait: bool) -> io::Result<usize>;

    /// Receives, and waits until `buf` is full if that can be had in one call.
    fn recv_full(&self, buf: &mut [u8]) -> io::Result<usize> {
        self.recv(buf, true)
    }

    /// From now on [`recv`](Self::recv) does not wait much longer than that; then it fails with `WouldBlock`.
    fn set_patience(&self, _patience: Duration) {}

    /// Gives memory back that is not in use.
    fn give_back(&self) {}

    /// Sends some of `buf`.
    fn send(&self, buf: &[u8], wait: bool) -> io::Result<usize>;

    /// Waits until something can be done. A broken connection always ends the wait.
    fn wait(&self, interest: Interest<'_>, timeout: Option<Duration>) -> io::Result<Ready>;

    /// Nothing more is received: who waits for input sees the end of the stream.
    fn close_input(&self);

    /// The end: nothing is received or sent any more, and all who wait see it.
    fn close(&self);

    /// The socket, if its bytes are those of the stream.
    fn socket(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Sends all of `buf`.
    fn send_all(&self, mut buf: &[u8]) -> io::Result<()> {
        while !buf.is_empty() {
            match self.send(buf, true) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => buf = &buf[n..],
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

fn poll_for(fds: &mut [PollFd<'_>], timeout: Option<Duration>) -> io::Result<()> {
    let timeout = timeout.map(|t| Timespec { tv_sec: t.as_secs() as i64, tv_nsec: t.subsec_nanos().into() });
    match poll(fds, timeout.as_ref()) {
        Ok(_) => Ok(()),
        Err(rustix::io::Errno::INTR) => {
            for fd in fds {
                fd.clear_revents();
            }
            Ok(())
        }
        Err(e) => Err(e.into()),
    }
}

const GONE: PollFlags = PollFlags::RDHUP.union(PollFlags::HUP).union(PollFlags::ERR);

/// A socket.
pub(crate) struct Socket {
    fd: OwnedFd,
    /// TCP goes on receiving after shutdown(2).
    no_input: AtomicBool,
}

impl Socket {
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Socket { fd, no_input: AtomicBool::new(false) }
    }
}

impl Stream for Socket {
    fn recv(&self, buf: &mut [u8], wait: bool) -> io::Result<usize> {
        if self.no_input.load(Ordering::Acquire) {
            return Ok(0);
        }
        let flags = if wait { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
        Ok(recv(&self.fd, buf, flags)?.0)
    }

    fn recv_full(&self, buf: &mut [u8]) -> io::Result<usize> {
        if self.no_input.load(Ordering::Acquire) {
            return Ok(0);
        }
        Ok(recv(&self.fd, buf, RecvFlags::WAITALL)?.0)
    }

    fn set_patience(&self, patience: Duration) {
        if let Err(e) = set_socket_timeout(&self.fd, Timeout::Recv, Some(patience)) {
            log::debug!("no memory is given back while the client says nothing: {e}");
        }
    }

    fn send(&self, buf: &[u8], wait: bool) -> io::Result<usize> {
        let flags = if wait { SendFlags::empty() } else { SendFlags::DONTWAIT };
        loop {
            match send(&self.fd, buf, flags | SendFlags::NOSIGNAL) {
                // The socket may have a timeout, for those who splice.
                Err(rustix::io::Errno::AGAIN) if wait => {}
                result => return Ok(result?),
            }
        }
    }

    fn wait(&self, interest: Interest<'_>, timeout: Option<Duration>) -> io::Result<Ready> {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, interest.read);
        flags.set(PollFlags::RDHUP, interest.hangup);
        flags.set(PollFlags::OUT, interest.write);
        let mut fds = [PollFd::new(&self.fd, flags), PollFd::new(&self.fd, PollFlags::empty())];
        if let Some(wake) = interest.wake {
            fds[1] = PollFd::from_borrowed_fd(wake, PollFlags::IN);
        }
        let count = if interest.wake.is_some() { 2 } else { 1 };
        poll_for(&mut fds[..count], timeout)?;
        let got = fds[0].revents();
        Ok(Ready {
            woken: count == 2 && !fds[1].revents().is_empty(),
            read: got.intersects(PollFlags::IN),
            write: got.intersects(PollFlags::OUT),
            hangup: got.intersects(GONE),
        })
    }

    fn close_input(&self) {
        self.no_input.store(true, Ordering::Release);
        let _ = shutdown(&self.fd, Shutdown::Read);
    }

    fn close(&self) {
        let _ = shutdown(&self.fd, Shutdown::Both);
    }

    fn socket(&self) -> Option<BorrowedFd<'_>> {
        (!self.no_input.load(Ordering::Acquire)).then(|| self.fd.as_fd())
    }
}

/// Two descriptors that are not one socket: pipes, most likely standard input and output.
///
/// They are left in blocking mode, which they may share with other processes; each call polls first, and an
/// event descriptor stands in for shutdown(2).
pub(crate) struct Pipes {
    input: File,
    output: File,
    /// Readable once the input is closed.
    no_input: OwnedFd,
    /// Readable once all is closed.
    closed: OwnedFd,
}

/// A pipe that is ready to be written to takes this much without blocking.
const PIPE_BUF: usize = 4096;

impl Pipes {
    pub(crate) fn new(input: OwnedFd, output: OwnedFd) -> io::Result<Self> {
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Ok(Pipes { input: input.into(), output: output.into(), no_input: event()?, closed: event()? })
    }

    /// Polls `fd`, and whether it was closed by us: Some(false) when ready, Some(true) when closed.
    fn ready(
        &self,
        fd: BorrowedFd<'_>,
        flags: PollFlags,
        closed: &OwnedFd,
        wait: bool,
    ) -> io::Result<Option<bool>> {
        let mut fds = [PollFd::from_borrowed_fd(fd, flags), PollFd::new(closed, PollFlags::IN)];
        poll_for(&mut fds, (!wait).then_some(Duration::ZERO))?;
        if !fds[1].revents().is_empty() {
            return Ok(Some(true));
        }
        Ok((!fds[0].revents().is_empty()).then_some(false))
    }
}

fn raise(event: &OwnedFd) {
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}

impl Stream for Pipes {
    fn recv(&self, buf: &mut [u8], wait: bool) -> io::Result<usize> {
        match self.ready(self.input.as_fd(), PollFlags::IN, &self.no_input, wait)? {
            Some(true) => Ok(0),
            Some(false) => Ok(rustix::io::read(&self.input, buf)?),
            None if wait => Err(io::ErrorKind::Interrupted.into()),
            None => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    fn send(&self, buf: &[u8], wait: bool) -> io::Result<usize> {
        match self.ready(self.output.as_fd(), PollFlags::OUT, &self.closed, wait)? {
            Some(true) => Err(io::ErrorKind::BrokenPipe.into()),
            Some(false) => Ok(rustix::io::write(&self.output, &buf[..buf.len().min(PIPE_BUF)])?),
            None if wait => Err(io::ErrorKind::Interrupted.into()),
            None => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    fn wait(&self, interest: Interest<'_>, timeout: Option<Duration>) -> io::Result<Ready> {
        let nothing = PollFlags::empty();
        let input = if interest.read { PollFlags::IN } else { nothing };
        let mut fds = vec![PollFd::new(&self.closed, PollFlags::IN)];
        if interest.write {
            fds.push(PollFd::new(&self.output, PollFlags::OUT));
        }
        if interest.read || interest.hangup {
            fds.push(PollFd::new(&self.input, input));
            fds.push(PollFd::new(&self.no_input, input));
        }
        if let Some(wake) = interest.wake {
            fds.push(PollFd::from_borrowed_fd(wake, PollFlags::IN));
        }
        poll_for(&mut fds, timeout)?;
        let got = |fd: BorrowedFd<'_>| {
            fds.iter()
                .filter(|p| p.as_fd().as_raw_fd() == fd.as_raw_fd())
                .fold(nothing, |a, p| a | p.revents())
        };
        let (input, output) = (got(self.input.as_fd()), got(self.output.as_fd()));
        Ok(Ready {
            woken: interest.wake.is_some_and(|wake| !got(wake).is_empty()),
            read: input.intersects(PollFlags::IN | PollFlags::HUP) || !got(self.no_input.as_fd()).is_empty(),
            write: output.intersects(PollFlags::OUT),
            hangup: (input | output).intersects(GONE) || !got(self.closed.as_fd()).is_empty(),
        })
    }

    fn close_input(&self) {
        raise(&self.no_input);
    }

    fn close(&self) {
        raise(&self.no_input);
        raise(&self.closed);
    }
}
