//! The layer that sees the requests of one connection.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use nbdkit_core::{Call, Data, Flags, Handle, Next, Op, Open, Outcome, Request};

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

    /// Logs that a request has begun at some time, and returns its number.
    fn enter(&self, time: SystemTime, call: &Call) -> u64 {
        let id = count(&self.transactions);
        self.journal.entered(
            time,
            Some(self.connection),
            action(call.op),
            id,
            format_args!("{}", Params(call)),
        );
        id
    }
}

impl Drop for Logged {
    fn drop(&mut self) {
        let transactions = self.transactions.load(Ordering::Relaxed);
        let params = format_args!(" transactions={transactions}");
        self.journal.print(Some(self.connection), "Disconnect", params);
    }
}

fn action(op: Op) -> &'static str {
    match op {
        Op::Read => "Read",
        Op::Write => "Write",
        Op::Flush => "Flush",
        Op::Trim => "Trim",
        Op::Zero => "Zero",
        Op::Cache => "Cache",
        Op::Extents => "Extents",
    }
}

/// What is asked for, as the log shows it.
struct Params<'a>(&'a Call);

impl fmt::Display for Params<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Call { op, offset, length, flags } = *self.0;
        let bit = |flag| i32::from(flags.contains(flag));
        if op != Op::Flush {
            write!(f, " offset={offset:#x} count={length:#x}")?;
        }
        let fua = bit(Flags::FUA);
        match op {
            Op::Write | Op::Trim => write!(f, " fua={fua}"),
            Op::Zero => write!(f, " trim={} fua={fua} fast={}", bit(Flags::MAY_TRIM), bit(Flags::FAST_ZERO)),
            Op::Extents => write!(f, " req_one={}", bit(Flags::REQ_ONE)),
            Op::Read | Op::Flush | Op::Cache => Ok(()),
        }
    }
}

impl Handle for Logged {
    fn next(&self) -> Option<&Next> {
        Some(&self.next)
    }

    /// What is logged is seen from its begin to its end, so it is neither started nor lent for.
    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        if !self.journal.is_on() {
            return self.next.pass(request);
        }
        if self.journal.has_script() && !request.may_wait() {
            return Outcome::NeedsThread;
        }
        let (call, time) = (*request.call(), SystemTime::now());
        // One that must not wait may come again, so nothing is logged before that is known.
        let id = request.may_wait().then(|| self.enter(time, &call));
        let result = match self.next.at_once(request) {
            Outcome::Done(result) => result,
            outcome => return outcome,
        };
        let (connection, action) = (Some(self.connection), action(call.op));
        let id = id.unwrap_or_else(|| self.enter(time, &call));
        match (&result, request.data()) {
            (Ok(()), Data::Extents(extents)) => {
                let params = format_args!(" extents={}", List(*extents));
                self.journal.leave(connection, action, id, params, &result);
            }
            _ => self.journal.leave(connection, action, id, format_args!(""), &result),
        }
        Outcome::Done(result)
    }
}
