//! Large data on a shorter way: between the socket and the file that the chain lends, without a copy of ours.
//!
//! A pipe stands between the two, for only a pipe holds pages. What is read gets into it before a byte of the reply
//! leaves, so an error is still an error of the request; what the client does not take soon is copied out of it, and
//! waits among the other replies. What is written leaves it in whole sectors: a client that vanishes may have written
//! part of its request, as with any disk that loses power, but never part of a sector. Either way the pipe is empty
//! between two requests.

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
    time::Duration,
};

use nbdkit_core::{Loan, Result};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno as Sys,
    net::sockopt::{Timeout, set_socket_timeout},
    pipe::{PipeFlags, SpliceFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with, splice},
};

use crate::{buffer::Buffer, cachestat::is_resident};

/// Below this a copy is cheaper than two more system calls, in bytes.
pub(crate) const WORTH_SPLICING: usize = 64 << 10;
/// What a pipe is asked to hold: as much as the kernel gives to anyone (`/proc/sys/fs/pipe-max-size`), in bytes.
const CAPACITY: usize = 1 << 20;
/// No disk tears what is smaller, in bytes.
const SECTOR: u64 = 4096;
/// How long to wait for a client that takes nothing.
const PATIENCE: Duration = Duration::from_millis(20);

/// See the module.
#[derive(Debug)]
pub(crate) struct Pipe {
    output: OwnedFd,
    input: OwnedFd,
    /// In bytes, if every page of them is full.
    capacity: usize,
    held: usize,
}

/// How the data of a write got to the file.
pub(crate) enum Written {
    /// All of it is there.
    Whole,
    /// The rest of it is still to be received, behind what the pipe holds: from this offset on.
    From(u64),
    /// The file did not take it. So many bytes are still to be received.
    Failed(io::Error, u64),
    /// The client is gone.
    Gone,
}

impl Pipe {
    /// A pipe for the client at the other end of `socket`.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub(crate) fn new(socket: BorrowedFd<'_>) -> io::Result<Self> {
        let (output, input) = pipe_with(PipeFlags::CLOEXEC)?;
        // Users have only so much memory in pipes; a smaller one will do for smaller requests.
        let _ = fcntl_setpipe_size(&input, CAPACITY);
        let capacity = fcntl_getpipe_size(&input)?;
        set_socket_timeout(socket, Timeout::Send, Some(PATIENCE))?;
        Ok(Pipe { output, input, capacity, held: 0 })
    }

    /// How much of a range the pipe holds, whole pages as far as it is not all.
    pub(crate) fn fits(&self, offset: u64, length: u64) -> u64 {
        let page = rustix::param::page_size() as u64;
        let end = (offset / page * page + self.capacity as u64).min(offset + length);
        end - offset
    }

    /// Takes what the file has there, if that needs no wait. False: the pipe is empty.
    ///
    /// # Errors
    /// `EIO`: the pipe cannot be emptied.
    pub(crate) fn load(&mut self, loan: &Loan<'_>, length: usize) -> Result<bool> {
        if !is_resident(loan.fd, loan.offset, length as u64) {
            return Ok(false);
        }
        let mut at = loan.offset;
        while self.held < length {
            let left = length - self.held;
            // What fails here fails again where it is read, and is told there.
            match splice(loan.fd, Some(&mut at), &self.input, None, left, SpliceFlags::NONBLOCK) {
                Ok(n @ 1..) => self.held += n,
                Err(Sys::INTR) => {}
                Ok(0) | Err(_) => {
                    self.drop_held()?;
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Sends what the pipe holds, as far as the client takes it soon.
    ///
    /// # Errors
    /// Those of send(2).
    pub(crate) fn send(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        while self.held > 0 {
            match splice(&self.output, None, socket, None, self.held, SpliceFlags::empty()) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => self.held -= n,
                Err(Sys::INTR) => {}
                Err(Sys::AGAIN) => break,
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Copies what the pipe holds to the end of `out`, and is empty.
    ///
    /// # Errors
    /// `ENOMEM`, `EIO`.
    pub(crate) fn copy_to(&mut self, out: &mut Buffer) -> Result<()> {
        let held = self.held;
        self.read(out.space(held)?)
    }

    /// Fills `buf` from what the pipe holds.
    ///
    /// # Errors
    /// `EIO`: the pipe holds less.
    pub(crate) fn read(&mut self, mut buf: &mut [u8]) -> Result<()> {
        while !buf.is_empty() {
            let n = match rustix::io::read(&self.output, &mut *buf) {
                Ok(n @ 1..) => n,
                Err(Sys::INTR) => continue,
                Ok(0) => return Err(nbdkit_core::Errno::EIO.into()),
                Err(e) => return Err(io::Error::from(e).into()),
            };
            self.held -= n;
            buf = &mut buf[n..];
        }
        Ok(())
    }

    /// Forgets what the pipe holds.
    ///
    /// # Errors
    /// `EIO`.
    pub(crate) fn drop_held(&mut self) -> Result<()> {
        let mut page = [0; 4096];
        while self.held > 0 {
            let n = self.held.min(page.len());
            self.read(&mut page[..n])?;
        }
        Ok(())
    }

    /// Bytes that the pipe holds.
    pub(crate) fn held(&self) -> usize {
        self.held
    }

    /// Whether `head` fits, with room for what comes behind it.
    pub(crate) fn takes(&self, head: &[u8]) -> bool {
        head.len() <= self.capacity / 4
    }

    /// Moves `length` bytes to the file as they arrive, after the `head` of them that is here already and that the
    /// pipe [takes](Self::takes). `wait` runs a call that waits for the client.
    pub(crate) fn receive(
        &mut self,
        socket: BorrowedFd<'_>,
        head: &[u8],
        loan: &Loan<'_>,
        length: u64,
        mut wait: impl FnMut(&mut dyn FnMut() -> rustix::io::Result<usize>) -> rustix::io::Result<usize>,
    ) -> Written {
        match rustix::io::write(&self.input, head) {
            Ok(n) if n == head.len() => self.held = n,
            _ if head.is_empty() => {}
            // An empty pipe takes all.
            _ => return Written::Failed(Sys::IO.into(), length - head.len() as u64),
        }
        let mut at = loan.offset;
        let end = loan.offset + length;
        while at < end {
            let missing = (end - at) as usize - self.held;
            if missing > 0 {
                if self.held > 0 && !self.has_room() {
                    return Written::From(at - loan.offset);
                }
                let mut call = || splice(socket, None, &self.input, None, missing, SpliceFlags::empty());
                match wait(&mut call) {
                    Ok(0) => return Written::Gone,
                    Ok(n) => self.held += n,
                    Err(Sys::INTR | Sys::AGAIN) => continue,
                    Err(Sys::INVAL | Sys::OPNOTSUPP) => return Written::From(at - loan.offset),
                    Err(_) => return Written::Gone,
                }
            }
            let here = at + self.held as u64;
            let whole = if here == end { end } else { here / SECTOR * SECTOR };
            while at < whole {
                let left = (whole - at) as usize;
                let failure =
                    match splice(&self.output, None, loan.fd, Some(&mut at), left, SpliceFlags::empty()) {
                        Ok(n @ 1..) => {
                            self.held -= n;
                            continue;
                        }
                        Ok(0) => Sys::IO,
                        Err(Sys::INTR) => continue,
                        Err(Sys::INVAL | Sys::OPNOTSUPP) => return Written::From(at - loan.offset),
                        Err(e) => e,
                    };
                return Written::Failed(failure.into(), end - here);
            }
        }
        Written::Whole
    }

    /// Whether the pipe takes more. A client may send so small pieces that a part of a sector fills it.
    fn has_room(&self) -> bool {
        let mut fds = [PollFd::new(&self.input, PollFlags::OUT)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
    }
}
