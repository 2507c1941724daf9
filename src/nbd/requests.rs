//! What a request means: checks of what the wire alone can get wrong, the call into the chain, the reply.

use std::{borrow::Cow, sync::Arc};

use nbdkit_core::{Call, Errno, Error, Extent, Flags, Op, Result, Session, Status, Support};

use crate::{
    buffer::Buffer,
    proto::{BASE_ALLOCATION, MAX_PAYLOAD, Replies, Request, cmd, cmd_flag, error_number},
    sparse::{Map, Part, WORTH_ASKING},
};

/// Most block status descriptors in one reply: an answer may be shorter than the question.
const MAX_DESCRIPTORS: usize = 1 << 16;
/// How exactly the place is found from where on a read fails, in bytes.
const UNIT: usize = 512;

/// A metadata context.
pub(crate) struct Context {
    pub(crate) id: u32,
    pub(crate) name: String,
}

impl Context {
    /// Whether it is meant by one of `queries`. Only to list them, no query means all, and one that ends with the
    /// colon all of a namespace (proto.md, "Metadata querying").
    pub(crate) fn matches(&self, queries: &[&[u8]], set: bool) -> bool {
        let name = self.name.as_bytes();
        let space = name.split_inclusive(|b| *b == b':').next();
        queries.contains(&name)
            || (!set && (queries.is_empty() || space.is_some_and(|s| queries.contains(&s))))
    }
}

/// The export that a client has opened, and how to answer it.
pub(crate) struct Requests {
    pub(crate) session: Arc<Session>,
    pub(crate) replies: Replies,
    /// Those that were negotiated.
    contexts: Vec<Context>,
    /// Holes need not be sent, and the chain tells them cheaply.
    sparse: bool,
    map: Map,
}

impl Requests {
    pub(crate) fn new(session: Session, replies: Replies, contexts: Vec<Context>) -> Self {
        let sparse = replies != Replies::Simple && session.caps().skip_holes;
        Requests { session: Arc::new(session), replies, contexts, sparse, map: Map::default() }
    }

    /// Checks flags and negotiation, which the chain knows nothing of; ranges and capabilities are the session's.
    pub(crate) fn check(&self, request: &Request) -> Result<()> {
        if self.session.client().leave.is_raised() {
            return Err(Error::new(Errno::ESHUTDOWN, "the server wants the client to disconnect"));
        }
        let caps = self.session.caps();
        let own = match request.command {
            cmd::READ if self.replies != Replies::Simple => cmd_flag::DF,
            cmd::WRITE_ZEROES => cmd_flag::NO_HOLE | cmd_flag::FAST_ZERO,
            cmd::BLOCK_STATUS => cmd_flag::REQ_ONE,
            _ => 0,
        };
        // The specification has FUA accepted, and ignored, on commands that do not write.
        let fua = if caps.fua == Support::None { 0 } else { cmd_flag::FUA };
        if request.flags & !(own | fua) != 0 {
            return Err(Error::new(
                Errno::EINVAL,
                format!("command {} with flags {:#x} that do not apply", request.command, request.flags),
            ));
        }
        if request.payload && request.command != cmd::WRITE {
            return Err(Error::new(Errno::EINVAL, format!("command {} with a payload", request.command)));
        }
        match request.command {
            cmd::READ | cmd::WRITE if request.length > MAX_PAYLOAD.into() => Err(Error::new(
                Errno::EINVAL,
                format!("{} bytes in one request are too many", request.length),
            )),
            // Checked here, for a buffer is made before the session is asked.
            cmd::READ if !self.in_range(request) => Err(Error::new(
                Errno::EINVAL,
                format!(
                    "reading {} bytes at {} is not within the export's {} bytes",
                    request.length, request.offset, caps.size
                ),
            )),
            cmd::WRITE if !caps.write => Err(Error::new(Errno::EPERM, "the export is read-only")),
            cmd::WRITE if !self.in_range(request) => Err(Error::new(
                Errno::ENOSPC,
                format!(
                    "writing {} bytes at {} is not within the export's {} bytes",
                    request.length, request.offset, caps.size
                ),
            )),
            cmd::FLUSH if request.offset != 0 || request.length != 0 => {
                Err(Error::new(Errno::EINVAL, "a flush with a range"))
            }
            cmd::BLOCK_STATUS if self.contexts.is_empty() => {
                Err(Error::new(Errno::EINVAL, "no meta context was negotiated"))
            }
            cmd::READ..=cmd::WRITE | cmd::FLUSH..=cmd::BLOCK_STATUS => Ok(()),
            other => Err(Error::new(Errno::EINVAL, format!("unknown command {other}"))),
        }
    }

    fn in_range(&self, request: &Request) -> bool {
        let end = request.offset.checked_add(request.length);
        request.length > 0 && end.is_some_and(|end| end <= self.session.size())
    }

    /// The request as the chain knows it.
    pub(crate) fn call(&self, request: &Request) -> Call {
        let (op, mut flags) = match request.command {
            cmd::READ => (Op::Read, Flags::empty()),
            cmd::WRITE => (Op::Write, fua(request)),
            cmd::FLUSH => (Op::Flush, Flags::empty()),
            cmd::TRIM => (Op::Trim, fua(request)),
            cmd::WRITE_ZEROES => (Op::Zero, fua(request)),
            cmd::CACHE => (Op::Cache, Flags::empty()),
            _ => (Op::Extents, Flags::empty()),
        };
        if op == Op::Zero {
            flags.set(Flags::MAY_TRIM, !request.has(cmd_flag::NO_HOLE));
            flags.set(Flags::FAST_ZERO, request.has(cmd_flag::FAST_ZERO));
        }
        Call::new(op, request.offset, request.length).with_flags(flags)
    }

    /// A request has succeeded: what was known of holes may have changed.
    pub(crate) fn succeeded(&self, request: &Request) {
        if matches!(request.command, cmd::TRIM | cmd::WRITE_ZEROES) {
            self.map.freed(request.offset, request.length);
        }
    }

    /// Whether the holes of a READ are worth a question.
    pub(crate) fn may_have_holes(&self, request: &Request) -> bool {
        self.sparse
            && request.length >= WORTH_ASKING
            && !request.has(cmd_flag::DF)
            && !self.map.is_data(request.offset, request.length)
    }

    /// Runs a READ that [may have holes](Self::may_have_holes) if that needs no wait; false: nothing was appended.
    pub(crate) fn read_now(&self, request: &Request, out: &mut Buffer) -> bool {
        let parts = self.map.parts(&self.session, request.offset, request.length, false);
        parts.is_some_and(|parts| self.read_parts_now(request, &parts, out))
    }

    /// Reads the parts that are no holes. An error is left to the thread that then runs the request, and meets it again.
    fn read_parts_now(&self, request: &Request, parts: &[Part], out: &mut Buffer) -> bool {
        let mark = out.mark();
        let end = request.offset + request.length;
        let done = parts.iter().all(|part| {
            let last = part.offset + part.length == end;
            let read = |buf: &mut [u8]| self.session.pread_nowait(buf, part.offset);
            matches!(self.read_part(request, part, last, out, read), Ok(true))
        });
        if !done {
            out.rewind(mark);
        }
        done
    }

    /// Appends the reply of a request that was started; `result` is the data of a READ.
    pub(crate) fn reply(&self, request: &Request, result: Result<&[u8]>, out: &mut Buffer) {
        if request.command != cmd::READ {
            if result.is_ok() {
                self.succeeded(request);
            }
            return self.done(request, result.map(drop), out);
        }
        let mark = out.mark();
        let put = result.and_then(|data| {
            if data.len() as u64 != request.length {
                return Err(Error::new(Errno::EIO, "a layer read another length than it was asked for"));
            }
            out.put(self.replies.data(request).as_slice())?;
            out.put(data)
        });
        if let Err(e) = put {
            let whole = Part { offset: request.offset, length: request.length, hole: false };
            let good = self.salvage(request, &whole, mark, out);
            self.fail(request, &e, (good > 0).then_some(request.offset + good), out);
        }
    }

    /// Reads in parts, without the holes. What was read before an error counts.
    fn read(&self, request: &Request, out: &mut Buffer) {
        let Request { offset, length, .. } = *request;
        let parts = if self.may_have_holes(request) {
            self.map.parts(&self.session, offset, length, true)
        } else {
            None
        };
        let whole = [Part { offset, length, hole: false }];
        let end = offset + length;
        for part in parts.as_deref().unwrap_or(&whole) {
            let last = part.offset + part.length == end;
            let mark = out.mark();
            let read = |buf: &mut [u8]| self.session.pread(buf, part.offset).map(|()| true);
            let Err(e) = self.read_part(request, part, last, out, read) else { continue };
            let good = self.salvage(request, part, mark, out);
            let failed = part.offset + good;
            self.fail(request, &e, (failed > offset).then_some(failed), out);
            return;
        }
    }

    /// Appends a part, whose data `read` reads.
    fn read_part(
        &self,
        request: &Request,
        part: &Part,
        last: bool,
        out: &mut Buffer,
        read: impl FnOnce(&mut [u8]) -> Result<bool>,
    ) -> Result<bool> {
        if part.hole {
            out.put(self.replies.hole(request, part.offset, part.length, last).as_slice())?;
            return Ok(true);
        }
        self.head(request, part.offset, part.length, last, out)?;
        read(out.space(part.length as usize)?)
    }

    /// Whether the data of a READ may be sent in parts.
    pub(crate) fn may_split(&self, request: &Request) -> bool {
        self.replies != Replies::Simple && !request.has(cmd_flag::DF)
    }

    /// Appends what comes before the data of a part, which is all if it [cannot be split](Self::may_split).
    ///
    /// # Errors
    /// `ENOMEM`: nothing was appended.
    pub(crate) fn head(
        &self,
        request: &Request,
        offset: u64,
        length: u64,
        last: bool,
        out: &mut Buffer,
    ) -> Result<()> {
        let head = match self.replies {
            Replies::Simple => self.replies.data(request),
            _ => self.replies.part(request, offset, length, last),
        };
        out.put(head.as_slice())
    }

    /// Appends the reply of a request that ended so, without data.
    pub(crate) fn done(&self, request: &Request, result: Result<()>, out: &mut Buffer) {
        if let Err(e) = result.and_then(|()| out.put(self.replies.done(request).as_slice())) {
            self.fail(request, &e, None, out);
        }
    }

    /// Takes a part back that could not be read, but for the start that can be had without waiting: what came before
    /// a bad block is in a cache by now. Returns its length in bytes.
    #[cold]
    fn salvage(&self, request: &Request, part: &Part, mark: usize, out: &mut Buffer) -> u64 {
        out.rewind(mark);
        if part.hole || !self.may_split(request) {
            return 0;
        }
        let length = part.length as usize;
        let mut good = 0;
        let found = (|| -> Result<()> {
            // As long as any head of this kind.
            out.put(self.replies.part(request, part.offset, part.length, false).as_slice())?;
            let buf = out.space(length)?;
            let mut step = 1 << length.ilog2();
            while step >= UNIT {
                let end = good + step;
                // An error ends the search: it is not to be logged over and over.
                if end < length
                    && self.session.pread_nowait(&mut buf[good..end], part.offset + good as u64)?
                {
                    good = end;
                }
                step /= 2;
            }
            Ok(())
        })();
        if let Err(e) = found {
            log::debug!("after a failed read: {e}");
        }
        out.rewind(mark);
        let kept = good > 0 && {
            let head = self.replies.part(request, part.offset, good as u64, false);
            // The data is where it was read to.
            out.put(head.as_slice()).is_ok() && out.space(good).is_ok()
        };
        if kept { good as u64 } else { 0 }
    }

    /// Runs a request that passed [`check`](Self::check) and appends its reply. `payload` is the data of a WRITE.
    pub(crate) fn run(&self, request: &Request, payload: &[u8], out: &mut Buffer) {
        if request.command == cmd::READ {
            return self.read(request, out);
        }
        let mark = out.mark();
        if let Err(e) = self.call_chain(request, payload, out) {
            out.rewind(mark);
            self.fail(request, &e, None, out);
        }
    }

    fn call_chain(&self, request: &Request, payload: &[u8], out: &mut Buffer) -> Result<()> {
        if request.command == cmd::BLOCK_STATUS {
            return self.block_status(request, out);
        }
        let call = self.call(request);
        self.session.run(call, payload)?;
        self.succeeded(request);
        out.put(self.replies.done(request).as_slice())
    }

    /// Runs a BLOCK_STATUS if that needs no wait; false: nothing was appended.
    pub(crate) fn block_status_now(&self, request: &Request, out: &mut Buffer) -> bool {
        let [context] = &*self.contexts else { return false };
        if context.name != BASE_ALLOCATION {
            return false;
        }
        let one = if request.has(cmd_flag::REQ_ONE) { Flags::REQ_ONE } else { Flags::empty() };
        let Some(found) = self.session.extents_nowait(request.length, request.offset, one) else {
            return false;
        };
        let mark = out.mark();
        if let Err(e) = found.and_then(|list| self.put_status(request, context, statuses(list), true, out)) {
            out.rewind(mark);
            self.fail(request, &e, None, out);
        }
        true
    }

    fn block_status(&self, request: &Request, out: &mut Buffer) -> Result<()> {
        let one = request.has(cmd_flag::REQ_ONE);
        let flags = if one { Flags::REQ_ONE } else { Flags::empty() };
        let Request { offset, length, .. } = *request;
        for (i, context) in self.contexts.iter().enumerate() {
            let list = if context.name == BASE_ALLOCATION {
                statuses(self.session.extents(length, offset, flags)?)
            } else {
                self.session.context_status(&context.name, length, offset, flags)?
            };
            self.put_status(request, context, list, i + 1 == self.contexts.len(), out)?;
        }
        Ok(())
    }

    fn put_status(
        &self,
        request: &Request,
        context: &Context,
        list: Vec<Status>,
        last: bool,
        out: &mut Buffer,
    ) -> Result<()> {
        let list = self.fitting(list);
        if list.is_empty() {
            return Err(Error::new(Errno::EIO, "the chain told no extent"));
        }
        out.put(self.replies.block_status(request, context.id, list.len(), last).as_slice())?;
        for status in &list {
            out.put(self.replies.descriptor(status.length, status.flags).as_slice())?;
        }
        Ok(())
    }

    /// As much of a block status as one reply can tell.
    fn fitting(&self, mut list: Vec<Status>) -> Vec<Status> {
        list.truncate(MAX_DESCRIPTORS);
        if self.replies == Replies::Extended {
            return list;
        }
        // In whole blocks, for a client asks on where one ends.
        let block = u64::from(self.session.caps().block_size.minimum.max(1));
        let longest = u64::from(u32::MAX) - u64::from(u32::MAX) % block;
        if let Some(i) = list.iter().position(|status| status.length > longest) {
            list[i].length = longest;
            list.truncate(i + 1);
        }
        list
    }

    /// Appends the reply of a request that failed, `from` on if that is not all of it.
    #[cold]
    pub(crate) fn fail(&self, request: &Request, error: &Error, from: Option<u64>, out: &mut Buffer) {
        let message: Cow<'_, str> = match self.replies {
            Replies::Simple => Cow::Borrowed(""),
            _ => Cow::Owned(error.to_string()),
        };
        let number = error_number(error.errno(), request.flags);
        let (head, text, tail) = self.replies.error(request, number, &message, from);
        let parts = [head.as_slice(), text.as_bytes(), tail.as_slice()];
        if parts.into_iter().try_for_each(|part| out.put(part)).is_err() {
            out.spoil();
        }
        log::debug!(
            "request refused: command {} flags {:#x} offset {} length {}: {error}",
            request.command,
            request.flags,
            request.offset,
            request.length
        );
    }
}

fn statuses(list: Vec<Extent>) -> Vec<Status> {
    list.into_iter().map(|e| Status { length: e.length, flags: e.kind() }).collect()
}

/// FUA, if the request asks for it.
fn fua(request: &Request) -> Flags {
    if request.has(cmd_flag::FUA) { Flags::FUA } else { Flags::empty() }
}

/// Whether a command may change data, so that it is worth running for a client who is gone.
pub(crate) fn changes_data(command: u16) -> bool {
    !matches!(command, cmd::READ | cmd::CACHE | cmd::BLOCK_STATUS)
}
