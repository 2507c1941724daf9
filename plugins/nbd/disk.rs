//! An open export as a disk: requests are started, and cut into pieces only where the server wants that.

use std::sync::Arc;

use nbdkit_core::{
    Caps, Client, Data, Errno, Error, Extents, Flags, Handle, Op, Outcome, Request, Result, Status, Support,
};
use nbdkit_proto::{self as proto, BASE_ALLOCATION, cmd, cmd_flag, export_flag};

use super::remote::Remote;

/// See the module.
#[derive(Debug)]
pub(super) struct Disk {
    remote: Arc<Remote>,
    owner: u64,
    /// Other clients use the same connections.
    shared: bool,
}

impl Disk {
    /// For a client, which may share the connections with others.
    pub(super) fn new(remote: Arc<Remote>, client: &Client, shared: bool) -> Self {
        let owner = remote.owner();
        let weak = Arc::downgrade(&remote);
        client.gone.on_raise(move || {
            if let Some(remote) = weak.upgrade() {
                remote.leave(owner);
            }
        });
        Disk { remote, owner, shared }
    }

    /// The largest range of a request.
    fn most(&self, op: Op) -> u64 {
        match op {
            Op::Read | Op::Write => self.remote.max_payload(),
            _ => self.remote.max_range(),
        }
    }

    /// Starts a request; None: it needs a thread.
    fn start(&self, request: &mut Request<'_>) -> Option<Outcome<'_>> {
        let call = *request.call();
        if !request.may_start() || call.length > self.most(call.op) {
            return None;
        }
        let lane = self.remote.free_lane()?;
        let asked = encoded(call.op, call.offset, call.length, call.flags);
        let payload = match request.data() {
            Data::Write(data) => *data,
            Data::Read(_) | Data::None => &[],
            Data::Extents(_) | Data::Status(..) => return None,
        };
        let ready = match self.remote.prepare(&asked, payload) {
            Ok(ready) => ready,
            Err(e) => return Some(Outcome::Done(Err(e))),
        };
        let (pending, started) = request.start()?;
        self.remote.start(lane, asked, self.owner, pending, ready);
        Some(Outcome::Started(started))
    }

    /// Makes a request without data, in as many pieces as it takes.
    fn run(&self, op: Op, length: u64, offset: u64, flags: Flags) -> Result<()> {
        let most = self.most(op);
        let mut done = 0;
        loop {
            let piece = (length - done).min(most);
            self.remote.call(encoded(op, offset + done, piece, flags), self.owner, &[])?;
            done += piece;
            if done == length {
                return Ok(());
            }
        }
    }

    /// The status of a range in a context.
    fn status(&self, context: &str, length: u64, offset: u64, flags: Flags) -> Result<Vec<Status>> {
        let length = length.min(self.remote.max_range());
        let mut answer = self.remote.call(encoded(Op::Extents, offset, length, flags), self.owner, &[])?;
        let at = answer.status.iter().position(|(name, _)| **name == *context);
        let at = at.ok_or_else(|| {
            Error::new(Errno::EIO, format!("the server told no status of the context {context}"))
        })?;
        let mut list = answer.status.swap_remove(at).1;
        // Nothing is told past the end of the disk, whatever the server says.
        let mut left = self.remote.agreed().size.saturating_sub(offset);
        list.retain_mut(|status| {
            status.length = status.length.min(left);
            left -= status.length;
            status.length > 0
        });
        Ok(list)
    }
}

/// A request on the wire.
fn encoded(op: Op, offset: u64, length: u64, flags: Flags) -> proto::Request {
    let command = match op {
        Op::Read => cmd::READ,
        Op::Write => cmd::WRITE,
        Op::Flush => cmd::FLUSH,
        Op::Trim => cmd::TRIM,
        Op::Zero => cmd::WRITE_ZEROES,
        Op::Cache => cmd::CACHE,
        Op::Extents => cmd::BLOCK_STATUS,
    };
    let mut bits = 0;
    for (flag, bit) in [
        (Flags::FUA, cmd_flag::FUA),
        (Flags::REQ_ONE, cmd_flag::REQ_ONE),
        (Flags::FAST_ZERO, cmd_flag::FAST_ZERO),
    ] {
        bits |= if flags.contains(flag) { bit } else { 0 };
    }
    if op == Op::Zero && !flags.contains(Flags::MAY_TRIM) {
        bits |= cmd_flag::NO_HOLE;
    }
    proto::Request { flags: bits, command, cookie: 0, offset, length, payload: op == Op::Write }
}

impl Handle for Disk {
    fn capabilities(&self) -> Result<Caps> {
        let agreed = self.remote.agreed();
        let zero = agreed.has(export_flag::SEND_WRITE_ZEROES);
        let fua = match () {
            () if agreed.has(export_flag::SEND_FUA) => Support::Native,
            () if agreed.has(export_flag::SEND_FLUSH) => Support::Emulate,
            () => Support::None,
        };
        let alone = self.shared && self.remote.has_one_connection();
        Ok(Caps::of_size(agreed.size)
            .with_block_size(agreed.block_size)
            .with_write(!agreed.has(export_flag::READ_ONLY))
            .with_flush(agreed.has(export_flag::SEND_FLUSH))
            .with_trim(agreed.has(export_flag::SEND_TRIM))
            .with_zero(if zero { Support::Native } else { Support::Emulate })
            .with_fast_zero(!zero || agreed.has(export_flag::SEND_FAST_ZERO))
            .with_fua(fua)
            .with_multi_conn(agreed.has(export_flag::CAN_MULTI_CONN) || alone)
            .with_cache(if agreed.has(export_flag::SEND_CACHE) { Support::Native } else { Support::None })
            .with_extents(agreed.has_extents())
            .with_rotational(agreed.has(export_flag::ROTATIONAL)))
    }

    fn export_description(&self) -> Result<Option<String>> {
        Ok(self.remote.agreed().description.clone())
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        match self.start(request) {
            Some(outcome) => outcome,
            None if request.may_wait() => request.run(self),
            None => Outcome::NeedsThread,
        }
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut offset = offset;
        for piece in buf.chunks_mut(self.most(Op::Read) as usize) {
            let length = piece.len();
            let request = encoded(Op::Read, offset, length as u64, Flags::empty());
            let answer = self.remote.call(request, self.owner, &[])?;
            piece.copy_from_slice(&answer.memory[..length]);
            offset += length as u64;
        }
        Ok(())
    }

    fn pwrite(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
        let mut offset = offset;
        for piece in buf.chunks(self.most(Op::Write) as usize) {
            let request = encoded(Op::Write, offset, piece.len() as u64, flags);
            self.remote.call(request, self.owner, piece)?;
            offset += piece.len() as u64;
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.run(Op::Flush, 0, 0, Flags::empty())
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.run(Op::Trim, length, offset, flags)
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.run(Op::Zero, length, offset, flags)
    }

    fn cache(&self, length: u64, offset: u64) -> Result<()> {
        self.run(Op::Cache, length, offset, Flags::empty())
    }

    fn extents(&self, length: u64, offset: u64, flags: Flags, extents: &mut Extents) -> Result<()> {
        let mut at = offset;
        for Status { length, flags } in self.status(BASE_ALLOCATION, length, offset, flags)? {
            extents.add(at, length, flags & 1 != 0, flags & 2 != 0)?;
            at += length;
        }
        Ok(())
    }

    fn context_status(&self, context: &str, length: u64, offset: u64, flags: Flags) -> Result<Vec<Status>> {
        self.status(context, length, offset, flags)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.remote.left(self.owner);
    }
}
