//! The layer that sees the requests of one connection.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use nbdkit_core::{Completion, Extents, Flags, Handle, Io, Loan, Next, Op, Open, Result};

use super::{
    count,
    entry::{List, Quoted},
    journal::Journal,
};

/// An open layer; it logs that it is opened and that it is dropped.
pub(super) struct Logged {
    journal: Arc<Journal>,
    /// Number of the connection in the log.
    connection: u64,
    /// How many requests were logged.
    transactions: AtomicU64,
    next: Next,
}

impl Logged {
    pub(super) fn new(journal: Arc<Journal>, connection: u64, open: &Open, next: Next) -> Self {
        if journal.is_on() {
            let caps = next.caps();
            journal.print(
                Some(connection),
                "Connect",
                format_args!(
                    " export={} tls={} size={:#x} minsize={:#x} prefsize={:#x} maxsize={:#x} write={} flush={} \
                     rotational={} trim={} zero={} fua={} extents={} cache={} fast_zero={}",
                    Quoted(&open.export_name),
                    i32::from(open.tls),
                    caps.size,
                    caps.block_size.minimum,
                    caps.block_size.preferred,
                    caps.block_size.maximum,
                    i32::from(caps.write),
                    i32::from(caps.flush),
                    i32::from(caps.rotational),
                    i32::from(caps.trim),
                    caps.zero as i32,
                    caps.fua as i32,
                    i32::from(caps.extents),
                    caps.cache as i32,
                    i32::from(caps.fast_zero),
                ),
            );
        }
        Logged { journal, connection, transactions: AtomicU64::new(0), next }
    }

    /// Logs a request before and after it runs.
    fn logged(
        &self,
        action: &str,
        params: fmt::Arguments<'_>,
        request: impl FnOnce(&Next) -> Result<()>,
    ) -> Result<()> {
        if !self.journal.is_on() {
            return request(&self.next);
        }
        let id = count(&self.transactions);
        self.journal.enter(Some(self.connection), action, id, params);
        let result = request(&self.next);
        self.journal.leave(Some(self.connection), action, id, format_args!(""), &result);
        result
    }
}

impl Drop for Logged {
    fn drop(&mut self) {
        let transactions = self.transactions.load(Ordering::Relaxed);
        let params = format_args!(" transactions={transactions}");
        self.journal.print(Some(self.connection), "Disconnect", params);
    }
}

/// A flag as the log shows it.
fn bit(flags: Flags, flag: Flags) -> i32 {
    i32::from(flags.contains(flag))
}

impl Handle for Logged {
    fn next(&self) -> Option<&Next> {
        Some(&self.next)
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let count = buf.len();
        let params = format_args!(" offset={offset:#x} count={count:#x}");
        self.logged("Read", params, |next| next.pread(buf, offset))
    }

    /// A read that would have to wait comes again as `pread`, so nothing is logged before it is known.
    fn pread_nowait(&self, buf: &mut [u8], offset: u64) -> Result<bool> {
        if !self.journal.is_on() {
            return self.next.pread_nowait(buf, offset);
        }
        if self.journal.has_script() {
            return Ok(false);
        }
        let time = SystemTime::now();
        let result = self.next.pread_nowait(buf, offset);
        if !matches!(result, Ok(false)) {
            let (connection, id) = (Some(self.connection), count(&self.transactions));
            let params = format_args!(" offset={offset:#x} count={:#x}", buf.len());
            self.journal.entered(time, connection, "Read", id, params);
            self.journal.leave(connection, "Read", id, format_args!(""), &result);
        }
        result
    }

    fn pwrite(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
        let (count, fua) = (buf.len(), bit(flags, Flags::FUA));
        let params = format_args!(" offset={offset:#x} count={count:#x} fua={fua}");
        self.logged("Write", params, |next| next.pwrite(buf, offset, flags))
    }

    fn flush(&self) -> Result<()> {
        self.logged("Flush", format_args!(""), Next::flush)
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        let fua = bit(flags, Flags::FUA);
        let params = format_args!(" offset={offset:#x} count={length:#x} fua={fua}");
        self.logged("Trim", params, |next| next.trim(length, offset, flags))
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        let (trim, fua) = (bit(flags, Flags::MAY_TRIM), bit(flags, Flags::FUA));
        let fast = bit(flags, Flags::FAST_ZERO);
        let params = format_args!(" offset={offset:#x} count={length:#x} trim={trim} fua={fua} fast={fast}");
        self.logged("Zero", params, |next| next.zero(length, offset, flags))
    }

    fn extents(&self, length: u64, offset: u64, flags: Flags, extents: &mut Extents) -> Result<()> {
        if !self.journal.is_on() {
            return self.next.extents(length, offset, flags, extents);
        }
        let (connection, id) = (Some(self.connection), count(&self.transactions));
        let one = bit(flags, Flags::REQ_ONE);
        let params = format_args!(" offset={offset:#x} count={length:#x} req_one={one}");
        self.journal.enter(connection, "Extents", id, params);
        let result = self.next.extents(length, offset, flags, extents);
        match &result {
            Ok(()) => {
                let params = format_args!(" extents={}", List(extents));
                self.journal.leave(connection, "Extents", id, params, &result);
            }
            Err(_) => self.journal.leave(connection, "Extents", id, format_args!(""), &result),
        }
        result
    }

    fn cache(&self, length: u64, offset: u64) -> Result<()> {
        let params = format_args!(" offset={offset:#x} count={length:#x}");
        self.logged("Cache", params, |next| next.cache(length, offset))
    }

    fn may_block(&self, op: Op) -> bool {
        self.journal.has_script() || self.next.may_block(op)
    }

    fn submit(&self, io: Io<'_>, offset: u64, done: Completion) -> Option<Completion> {
        if self.journal.is_on() { Some(done) } else { self.next.submit(io, offset, done) }
    }

    fn loan(&self, offset: u64, length: u64) -> Option<Loan<'_>> {
        // What is read from a loan is not seen here.
        if self.journal.is_on() { None } else { self.next.loan(offset, length) }
    }
}
