//! The way out, shared by the connection's thread and its workers.
//!
//! One thread at a time sends; others that come meanwhile leave their replies to it, and it sends them too before it
//! is done. So no thread waits for a lock while a reply is sent, and many small replies leave in one system call.

use std::{io, os::fd::BorrowedFd, sync::Arc};

use nbdkit_core::sync::Mutex;
use parking_lot::Condvar;

use crate::{buffer::Buffer, splice::Pipe, stream::Stream};

/// A worker waits while this much is left to others to send.
const WORKERS_MAX: usize = 1 << 20;
/// So does the connection's thread, which would rather go on receiving.
const READER_MAX: usize = 64 << 20;

/// See the module.
pub(crate) struct Outbox {
    stream: Arc<dyn Stream>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Replies left to the one who sends.
    left: Buffer,
    sending: bool,
    dead: bool,
}

/// What [`Outbox::flush`] achieved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flushed {
    /// All is sent or left to another thread.
    Done,
    /// The client does not take more now. The caller stays the one who sends and must flush again.
    Pending,
}

impl Outbox {
    pub(crate) fn new(stream: Arc<dyn Stream>) -> Self {
        Outbox { stream, state: Mutex::default(), changed: Condvar::new() }
    }

    /// The client takes no more replies.
    pub(crate) fn is_dead(&self) -> bool {
        self.state.lock().dead
    }

    /// Gives memory back that holds nothing.
    pub(crate) fn give_back(&self) {
        self.state.lock().left.give_back();
    }

    /// Becomes the one who sends: true; or leaves `out` to that one, or drops it for a dead client: false.
    fn begin(&self, out: &mut Buffer, most: usize) -> bool {
        let mut state = self.state.lock();
        loop {
            if state.dead {
                out.clear();
                return false;
            }
            if !state.sending {
                state.sending = true;
                return true;
            }
            if state.left.is_empty() {
                std::mem::swap(&mut state.left, out);
                return false;
            }
            // Without memory for that it waits, too.
            if state.left.len() + out.len() <= most && state.left.put(out.as_slice()).is_ok() {
                out.clear();
                return false;
            }
            self.changed.wait(&mut state);
        }
    }

    /// Becomes the one who sends, if nobody else is.
    fn try_begin(&self) -> bool {
        let mut state = self.state.lock();
        let free = !state.dead && !state.sending;
        state.sending |= free;
        free
    }

    /// Takes what was left meanwhile into the empty `out`; ends the sending if that is nothing.
    fn next(&self, out: &mut Buffer) -> bool {
        let mut state = self.state.lock();
        if state.left.is_empty() {
            state.sending = false;
            self.changed.notify_all();
            return false;
        }
        std::mem::swap(&mut state.left, out);
        self.changed.notify_all();
        true
    }

    /// The client is gone: replies may be dropped.
    fn fail(&self, out: &mut Buffer) {
        out.clear();
        let mut state = self.state.lock();
        state.dead = true;
        state.sending = false;
        state.left.clear();
        self.changed.notify_all();
        drop(state);
        self.stream.close();
    }

    /// Sends `out` and leaves it empty. May wait for the client. Not for one who has a flush pending.
    pub(crate) fn send(&self, out: &mut Buffer) {
        if out.is_spoilt() {
            return self.fail(out);
        }
        if out.is_empty() || !self.begin(out, WORKERS_MAX) {
            return;
        }
        self.finish(out);
    }

    fn finish(&self, out: &mut Buffer) {
        loop {
            if self.stream.send_all(out.as_slice()).is_err() {
                return self.fail(out);
            }
            out.clear();
            if !self.next(out) {
                return;
            }
        }
    }

    /// Sends of `out` what the client takes now, without waiting for it. `pending` says that the last call
    /// ended so.
    pub(crate) fn flush(&self, out: &mut Buffer, pending: bool) -> io::Result<Flushed> {
        if out.is_spoilt() {
            self.fail(out);
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        if !pending && (out.is_empty() || !self.begin(out, READER_MAX)) {
            return Ok(Flushed::Done);
        }
        loop {
            if !self.send_now(out)? {
                return Ok(Flushed::Pending);
            }
            if !self.next(out) {
                return Ok(Flushed::Done);
            }
        }
    }

    /// Sends of `out` what the client takes now; whether that was all.
    fn send_now(&self, out: &mut Buffer) -> io::Result<bool> {
        while !out.is_empty() {
            match self.stream.send(out.as_slice(), false) {
                Ok(n) => out.consume(n),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    self.fail(out);
                    return Err(e);
                }
            }
        }
        Ok(true)
    }

    /// As [`flush`](Self::flush), with what `pipe` holds behind `out`. Not for one who has a flush pending.
    pub(crate) fn flush_with(
        &self,
        out: &mut Buffer,
        pipe: &mut Pipe,
        socket: BorrowedFd<'_>,
    ) -> io::Result<Flushed> {
        let sender = self.try_begin();
        if sender
            && self.send_now(out)?
            && let Err(e) = pipe.send(socket)
        {
            self.fail(out);
            return Err(e);
        }
        if pipe.copy_to(out).is_err() {
            out.spoil();
        }
        self.flush(out, sender)
    }

    /// As [`flush`](Self::flush), but waits for the client until all is sent.
    pub(crate) fn drain(&self, out: &mut Buffer, pending: bool) {
        if out.is_spoilt() {
            return self.fail(out);
        }
        if pending || (!out.is_empty() && self.begin(out, READER_MAX)) {
            self.finish(out);
        }
    }
}

impl std::fmt::Debug for Outbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Outbox")
    }
}
