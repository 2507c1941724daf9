//! The bytes of a connection: receiving, sending what is ready before that waits, and resting while nothing comes.

use std::{io, time::Duration};

use nbdkit_dispatch::reclaim::{IDLE, give_back};

use super::{End, FLUSH, LARGE, LOOK, OUTPUT_MAX, PATIENCE, Reader};
use crate::{
    output::Flushed,
    proto::{MAX_PAYLOAD, Request},
    stream::Interest,
};

/// How long requests that were started may go on after the client has left, before they are left to themselves.
const LEFT_BEHIND: Duration = Duration::from_secs(60);
/// How often to look for completions where there can be no event descriptor.
const NO_EVENT: Duration = Duration::from_millis(1);

impl Reader<'_> {
    pub(super) fn flush(&mut self) -> Result<(), End> {
        self.coalescing.sent();
        let flushed = self.shared.outbox.flush(&mut self.out, self.pending)?;
        self.pending = flushed == Flushed::Pending;
        Ok(())
    }

    /// Sends when much is there. A client that does not take it is waited for, but not for long, unless it is
    /// too much.
    pub(super) fn relieve(&mut self) -> Result<(), End> {
        let length = self.out.len();
        self.flush()?;
        self.stalled &= self.pending && self.out.len() == length;
        while self.pending && self.out.len() >= FLUSH {
            let patience = match self.out.len() {
                OUTPUT_MAX.. => None,
                _ if self.stalled => return Ok(()),
                _ => Some(PATIENCE),
            };
            let write = Interest { write: true, ..Interest::default() };
            let ready = self.stream.wait(write, patience)?;
            self.stalled = !ready.write && !ready.hangup;
            if !self.stalled {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Receives some more input behind what is there, after the replies were sent.
    pub(super) fn receive(&mut self) -> Result<(), End> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.end == self.input.len()
            || self.input.len() - self.start <= LARGE + Request::EXTENDED_LEN
        {
            self.input.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let mut input = std::mem::take(&mut self.input);
        let most = input.len().min(self.end + self.at_once);
        let received = self.receive_some(&mut input[self.end..most], false);
        self.input = input;
        self.end += received?;
        Ok(())
    }

    /// Fills `payload` from what was received and then from the stream.
    pub(super) fn receive_into(&mut self, payload: &mut [u8]) -> Result<(), End> {
        let (head, mut rest) = payload.split_at_mut((self.end - self.start).min(payload.len()));
        head.copy_from_slice(&self.input[self.start..self.start + head.len()]);
        self.start += head.len();
        while !rest.is_empty() {
            let n = self.receive_some(rest, true)?;
            rest = &mut rest[n..];
        }
        Ok(())
    }

    /// Receives the payload of a WRITE that is refused, and forgets it.
    pub(super) fn skip(&mut self, length: u64) -> Result<(), End> {
        if length > 2 * u64::from(MAX_PAYLOAD) {
            return Err(End::Broken(format!("a payload of {length} bytes")));
        }
        let mut left = length as usize;
        loop {
            let n = left.min(self.end - self.start);
            self.start += n;
            left -= n;
            if left == 0 {
                return Ok(());
            }
            self.receive()?;
        }
    }

    /// Receives at least one byte, or what `buf` takes if that is known to come. Sends the replies before it waits.
    fn receive_some(&mut self, buf: &mut [u8], full: bool) -> Result<usize, End> {
        if !self.drained
            && let Some(n) = self.try_receive(buf)?
        {
            self.coalescing.received(true);
            return Ok(n);
        }
        self.drained = true;
        if !full && self.coalescing.is_worth_a_look() {
            let found = self.try_receive(buf)?;
            self.coalescing.looked(found.is_some());
            if let Some(n) = found {
                self.coalescing.received(true);
                return Ok(n);
            }
        }
        loop {
            self.answer_completed()?;
            self.flush()?;
            while self.pending {
                if let Some(n) = self.receive_while_pending(buf)? {
                    return Ok(n);
                }
            }
            if !self.started.is_empty() {
                if let Some(n) = self.receive_or_complete(buf)? {
                    return Ok(n);
                }
                continue;
            }
            let stream = self.stream;
            if full {
                let result = stream.recv_full(buf);
                if let Some(n) = self.received(buf, result)? {
                    return Ok(n);
                }
                continue;
            }
            if self.shared.executor.is_idle()
                && let Some(result) = self.busy_poll.find(|| match stream.recv(buf, false) {
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => None,
                    result => Some(result),
                })
            {
                if let Some(n) = self.received(buf, result)? {
                    self.coalescing.received(self.busy_poll.was_at_once());
                    return Ok(n);
                }
                continue;
            }
            let result = self.busy_poll.sleep(|| stream.recv(buf, true));
            if let Some(n) = self.received(buf, result)? {
                self.coalescing.received(self.busy_poll.was_at_once());
                return Ok(n);
            }
            self.rest(buf)?;
        }
    }

    /// Nothing was received for some time: does without the memory until something is.
    fn rest(&mut self, buf: &mut [u8]) -> Result<(), End> {
        if !self.shared.executor.is_idle() {
            return Ok(());
        }
        give_back(buf);
        self.out.give_back();
        self.reply.give_back();
        self.shared.outbox.give_back();
        self.started.give_back();
        self.shared.payloads.give_back();
        self.stream.give_back();
        let read = Interest { read: true, ..Interest::default() };
        loop {
            let timeout = (!self.shared.executor.give_back()).then_some(IDLE);
            let ready = self.busy_poll.sleep(|| self.stream.wait(read, timeout))?;
            if timeout.is_none() || ready.read || ready.hangup {
                break;
            }
        }
        Ok(())
    }

    fn try_receive(&mut self, buf: &mut [u8]) -> Result<Option<usize>, End> {
        let result = self.stream.recv(buf, false);
        self.received(buf, result)
    }

    fn received(&mut self, buf: &[u8], result: io::Result<usize>) -> Result<Option<usize>, End> {
        match result {
            Ok(0) => Err(End::Eof),
            Ok(n) => {
                self.drained = n < buf.len();
                Ok(Some(n))
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(None),
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => Err(End::Eof),
            Err(e) => Err(e.into()),
        }
    }

    /// The client does not take its replies: waits for that, then for either that or more requests.
    fn receive_while_pending(&mut self, buf: &mut [u8]) -> Result<Option<usize>, End> {
        let write = Interest { write: true, ..Interest::default() };
        let mut ready = self.stream.wait(write, Some(PATIENCE))?;
        if !ready.write && !ready.hangup {
            let read = self.out.len() < OUTPUT_MAX;
            ready = self.stream.wait(Interest { read, ..write }, None)?;
        }
        if ready.read
            && let Some(n) = self.try_receive(buf)?
        {
            return Ok(Some(n));
        }
        self.flush()?;
        Ok(None)
    }

    /// Lets the requests in flight end and sends their replies.
    pub(super) fn finish_all(&mut self, end: &End) {
        if !matches!(end, End::Disconnect) {
            self.client.gone.raise();
        }
        if matches!(end, End::Broken(_) | End::Io(_)) {
            let _ = self.flush();
            self.stream.close();
        }
        self.shared.outbox.drain(&mut self.out, self.pending);
        self.pending = false;
        let mut left = LEFT_BEHIND;
        loop {
            // To answer a client who is gone is no error.
            let _ = self.answer_completed();
            self.shared.outbox.drain(&mut self.out, std::mem::take(&mut self.pending));
            if !self.shared.executor.wait_for_idle(if self.started.is_empty() {
                LOOK
            } else {
                Duration::ZERO
            }) {
                // An error here is a client who is gone, which is what is looked for.
                if self.watch().is_err() {
                    self.client.gone.raise();
                }
            } else if self.started.is_empty() {
                break;
            } else if left.is_zero() {
                log::error!("{} requests have not ended and are left behind", self.started.len());
                break;
            }
            if !self.started.is_empty() {
                self.started.queue().wait(LOOK);
                if self.client.gone.is_raised() {
                    left = left.saturating_sub(LOOK);
                }
            }
        }
        self.shared.executor.close();
    }

    /// Receives what has come, or sleeps until something has or a started request has ended.
    fn receive_or_complete(&mut self, buf: &mut [u8]) -> Result<Option<usize>, End> {
        if !self.drained
            && let Some(n) = self.try_receive(buf)?
        {
            self.coalescing.received(true);
            return Ok(Some(n));
        }
        let queue = self.started.queue().clone();
        let (wake, timeout) = match queue.fall_asleep() {
            Ok(Some(wake)) => (Some(wake), None),
            Ok(None) => return Ok(None),
            Err(e) => {
                log::debug!("no event descriptor: {e}");
                (None, Some(NO_EVENT))
            }
        };
        let interest = Interest { read: true, wake, ..Interest::default() };
        let ready = self.busy_poll.sleep(|| self.stream.wait(interest, timeout));
        queue.wake_up(ready.as_ref().is_ok_and(|ready| ready.woken));
        let ready = ready?;
        if ready.read || ready.hangup {
            let received = self.try_receive(buf)?;
            if received.is_some() {
                self.coalescing.received(false);
            }
            return Ok(received);
        }
        Ok(None)
    }
}
