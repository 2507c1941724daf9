//! Large reads and writes that need no copy of ours, where the chain lends a file and the stream is a socket.

use std::{io, os::fd::BorrowedFd};

use nbdkit_core::{Call, Data, Errno, Error, Flags, Loan, Session};
use nbdkit_dispatch::Lent;

use super::{End, Reader};
use crate::{
    output::Flushed,
    proto::{Request, cmd_flag},
    splice::{Pipe, WORTH_SPLICING, Written},
};

impl<'a> Reader<'a> {
    /// Asks the chain for a file to move the data by, if the stream is a socket.
    fn borrow<'s>(&mut self, session: &'s Session, call: Call) -> Option<(Loan<'s>, Lent)> {
        if self.no_pipe || self.pending {
            return None;
        }
        self.stream.socket()?;
        self.started.borrow(session, nbdkit_core::Request::new(call, Data::None))
    }

    /// The socket, if there is an empty pipe for large data, too.
    fn pipe(&mut self) -> Option<BorrowedFd<'a>> {
        let socket = self.stream.socket().filter(|_| !self.no_pipe && !self.pending)?;
        if self.pipe.is_none() {
            match Pipe::new(socket) {
                Ok(pipe) => self.pipe = Some(pipe),
                Err(e) => {
                    log::debug!("large data will be copied: {e}");
                    self.no_pipe = true;
                }
            }
        }
        self.pipe.is_some().then_some(socket)
    }

    /// Answers a READ from the file that the chain lends, if all is in memory; false: from `request.offset` on it is
    /// still to be answered.
    pub(super) fn splice_read(&mut self, request: &mut Request) -> Result<bool, End> {
        if request.length < WORTH_SPLICING as u64 {
            return Ok(false);
        }
        let shared = self.shared.clone();
        let (requests, session) = (&shared.requests, &shared.requests.session);
        while request.length >= WORTH_SPLICING as u64 {
            if requests.may_have_holes(request) {
                return Ok(false);
            }
            let mut call = requests.call(request);
            let Some((mut loan, mut lent)) = self.borrow(session, call) else { return Ok(false) };
            let Some(socket) = self.pipe() else {
                self.started.return_unused(lent);
                return Ok(false);
            };
            let Reader { out, pipe: Some(pipe), started, .. } = self else { return Ok(false) };
            let length = pipe.fits(loan.offset, request.length);
            let last = length == request.length;
            if !last {
                // The layers are to know what was read, and no more.
                started.return_unused(lent);
                call.length = length;
                let part = started.borrow(session, nbdkit_core::Request::new(call, Data::None));
                let Some(part) = part else { return Ok(false) };
                (loan, lent) = part;
            }
            if !(last || requests.may_split(request))
                || !pipe.load(&loan, length as usize).map_err(io::Error::other)?
            {
                started.return_unused(lent);
                return Ok(false);
            }
            if requests.head(request, request.offset, length, last, out).is_err() {
                started.return_unused(lent);
                pipe.drop_held().map_err(io::Error::other)?;
                return Ok(false);
            }
            // Nothing in the pipe can fail any more but the way to the client.
            if started.finish_lent(session, lent, Ok(())).is_err() {
                return Ok(false);
            }
            self.pending = shared.outbox.flush_with(out, pipe, socket)? == Flushed::Pending;
            if last {
                return Ok(true);
            }
            request.offset += length;
            request.length -= length;
        }
        Ok(false)
    }

    /// Receives the data of a WRITE into the file that the chain lends; false: nothing was done.
    pub(super) fn splice_write(&mut self, request: &Request) -> Result<bool, End> {
        let shared = self.shared.clone();
        let session = &shared.requests.session;
        if request.has(cmd_flag::FUA) {
            return Ok(false);
        }
        let call = shared.requests.call(request);
        let Some((loan, lent)) = self.borrow(session, call) else { return Ok(false) };
        // The client may wait for these replies before it goes on.
        self.flush()?;
        let Some(socket) = self.pipe() else {
            self.started.return_unused(lent);
            return Ok(false);
        };
        let Reader { pipe: Some(pipe), input, start, end, busy_poll, at_once, drained, started, .. } = self
        else {
            return Ok(false);
        };
        let head = &input[*start..*end];
        if !pipe.takes(head) {
            started.return_unused(lent);
            return Ok(false);
        }
        let written = pipe.receive(socket, head, &loan, request.length, |call| busy_poll.sleep(call));
        (*start, *end) = (0, 0);
        // The next payload shall not be received here.
        *at_once = if self.extended { Request::EXTENDED_LEN } else { Request::LEN };
        *drained = false;
        let (result, end) = match written {
            Written::Whole => (Ok(()), None),
            Written::From(at) => self.copy_rest(request, at).map_or_else(vanished, |result| (result, None)),
            Written::Failed(e, missing) => {
                let emptied = self.empty_pipe().and_then(|()| self.skip(missing));
                (Err(e.into()), emptied.err())
            }
            Written::Gone => vanished(End::Eof),
        };
        let result = self.started.finish_lent(session, lent, result);
        if let Some(end) = end {
            return Err(end);
        }
        shared.requests.done(request, result, &mut self.out);
        Ok(true)
    }

    /// Receives the rest of a WRITE, of which the pipe holds the start, and writes it from `at` in the request on.
    fn copy_rest(&mut self, request: &Request, at: u64) -> Result<nbdkit_core::Result<()>, End> {
        let held = self.pipe.as_ref().map_or(0, Pipe::held);
        let length = (request.length - at) as usize;
        let mut payload = match self.shared.payloads.take(length) {
            Ok(payload) => payload,
            Err(e) => {
                self.empty_pipe()?;
                self.skip((length - held) as u64)?;
                return Ok(Err(e));
            }
        };
        if let Some(pipe) = &mut self.pipe {
            pipe.read(&mut payload[..held]).map_err(io::Error::other)?;
        }
        self.receive_into(&mut payload[held..])?;
        let result = self.shared.requests.session.pwrite(&payload, request.offset + at, Flags::empty());
        self.shared.payloads.recycle(payload);
        Ok(result)
    }

    fn empty_pipe(&mut self) -> Result<(), End> {
        self.pipe.as_mut().map_or(Ok(()), Pipe::drop_held).map_err(|e| io::Error::other(e).into())
    }
}

/// The client is gone while its data was received.
fn vanished(end: End) -> (nbdkit_core::Result<()>, Option<End>) {
    (Err(Error::new(Errno::EIO, "the client left in the middle of its data").logged()), Some(end))
}
