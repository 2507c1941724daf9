//! Requests as a front end submits them: inline, started or with a loan, where the calls of [`Session`] itself are for a
//! thread that may wait.
//!
//! While a request that must not wait is in the chain, the test disk panics at one that may: a layer would wait where it
//! must not.

use std::{
    cell::Cell,
    sync::{
        Arc,
        mpsc::{Sender, channel},
    },
};

use nbdkit_core::{
    Call, Completed, Completions, Data, Extent, Extents, Flags, Op, Outcome, Request, Result, Session, Task,
};
use parking_lot::Mutex;

/// How a chain answered.
#[derive(Debug)]
pub(crate) enum Answer {
    /// At once; a read with its data.
    Done(Result<Vec<u8>>),
    /// It was started, and ended like this.
    Started(Result<Vec<u8>>),
    /// With a file, from that offset on; the front end has moved the data.
    Lent(u64),
    /// It needs a thread.
    NeedsThread,
}

impl Answer {
    /// How it ended; None: it did not.
    pub(crate) fn ended(self) -> Option<Result<Vec<u8>>> {
        match self {
            Answer::Done(result) | Answer::Started(result) => Some(result),
            Answer::Lent(_) | Answer::NeedsThread => None,
        }
    }
}

/// What a request may do.
#[derive(Clone, Copy, Default)]
pub(crate) struct May {
    pub(crate) wait: bool,
    pub(crate) start: bool,
    pub(crate) lend: bool,
}

/// A request that must run where it is; `data` is what a write writes.
pub(crate) fn inline(session: &Session, call: Call, data: &[u8]) -> Answer {
    submit(session, call, data, May::default())
}

/// A request that may be started, and whose end is waited for.
pub(crate) fn started(session: &Session, call: Call, data: &[u8]) -> Answer {
    submit(session, call, data, May { start: true, ..May::default() })
}

/// Reads without a wait; false: that needs a thread.
///
/// # Errors
/// Those of the chain.
pub(crate) fn read_inline(session: &Session, buf: &mut [u8], offset: u64) -> Result<bool> {
    match inline(session, Call::new(Op::Read, offset, buf.len() as u64), &[]) {
        Answer::Done(read) => {
            buf.copy_from_slice(&read?);
            Ok(true)
        }
        _ => Ok(false),
    }
}

/// Whether a request of that kind, for the first 512 bytes, needs a thread. If not, it has run: a write writes zeroes.
pub(crate) fn needs_thread(session: &Session, op: Op) -> bool {
    let length = if op == Op::Flush { 0 } else { 512 };
    match inline(session, Call::new(op, 0, length), &[0; 512]) {
        Answer::Done(result) => {
            result.unwrap();
            false
        }
        _ => true,
    }
}

/// Where in a file a range may be read from or written to instead; None: nowhere.
pub(crate) fn lent(session: &Session, op: Op, offset: u64, length: u64) -> Option<u64> {
    match submit(session, Call::new(op, offset, length), &[], May { lend: true, ..May::default() }) {
        Answer::Lent(at) => Some(at),
        _ => None,
    }
}

/// Whether some layer has to know of each such request, so that a loan is for one request only. Panics without a loan.
pub(crate) fn is_watched(session: &Session, op: Op) -> bool {
    let mut task = Task::new(Arc::new(Ends(Mutex::new(channel().0))));
    task.arm(0);
    let mut request = Request::new(Call::new(op, 0, 512), Data::None).lendable(task);
    assert!(matches!(session.submit(&mut request), Outcome::Lent(_)));
    let watched = request.is_watched();
    session.finish_lent(request.into_task().expect("the task is the front end's"), Ok(())).1.unwrap();
    watched
}

/// Submits a request and takes it to its end.
pub(crate) fn submit(session: &Session, call: Call, data: &[u8], may: May) -> Answer {
    let (ends, ended) = channel();
    let mut buf = vec![0xaa; if call.op == Op::Read && !may.lend { call.length as usize } else { 0 }];
    let mut extents = Extents::new(call.offset, call.end());
    let memory = match call.op {
        _ if may.lend => Data::None,
        Op::Read => Data::Read(&mut buf),
        Op::Write => Data::Write(data),
        Op::Extents => Data::Extents(&mut extents),
        _ => Data::None,
    };
    let mut request = Request::new(call, memory);
    let task = || {
        let mut task = Task::new(Arc::new(Ends(Mutex::new(ends))));
        task.arm(call.offset);
        task
    };
    if may.lend {
        request = request.lendable(task());
    } else if may.start {
        request = request.startable(task());
    }
    if may.wait {
        request = request.on_thread();
    }
    let outcome = {
        let _inline = (!may.wait).then(MustNotWait::here);
        session.submit(&mut request)
    };
    match outcome {
        Outcome::Done(result) => Answer::Done(result.map(|()| buf)),
        Outcome::Started(_) => {
            let mut completed = ended.recv().expect("each request ends");
            session.finish(&mut completed);
            assert!(ended.try_recv().is_err(), "each request ends once");
            let Completed { result, payload, .. } = completed;
            Answer::Started(result.map(|()| payload.bytes().to_vec()))
        }
        Outcome::Lent(loan) => {
            let task = request.into_task().expect("the task is the front end's");
            let (_, result) = session.finish_lent(task, Ok(()));
            result.unwrap();
            Answer::Lent(loan.offset)
        }
        Outcome::NeedsThread => Answer::NeedsThread,
    }
}

/// The extents of a range: inline, or else on a thread.
///
/// # Errors
/// Those of the chain.
pub(crate) fn extents(session: &Session, length: u64, offset: u64, flags: Flags) -> Result<Vec<Extent>> {
    let inline = {
        let _inline = MustNotWait::here();
        session.extents_nowait(length, offset, flags)
    };
    inline.unwrap_or_else(|| session.extents(length, offset, flags))
}

/// A front end that waits for each request.
struct Ends(Mutex<Sender<Completed>>);

impl Completions for Ends {
    fn post(&self, completed: Completed) -> bool {
        let _ = self.0.lock().send(completed);
        false
    }

    fn wake(&self) {}
}

thread_local! {
    static MUST_NOT_WAIT: Cell<bool> = const { Cell::new(false) };
}

/// While it lives, this thread is one that must not wait.
struct MustNotWait(());

impl MustNotWait {
    fn here() -> Self {
        MUST_NOT_WAIT.set(true);
        MustNotWait(())
    }
}

impl Drop for MustNotWait {
    fn drop(&mut self) {
        MUST_NOT_WAIT.set(false);
    }
}

/// Whether this thread must not wait.
pub(super) fn must_not_wait() -> bool {
    MUST_NOT_WAIT.get()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Spec, chain, client, open};

    #[test]
    fn the_disk_answers_for_each_kind() {
        let session = |spec: Spec| open(&chain(&spec.disk(), &[], &[]).unwrap(), client(), false).unwrap();
        let read = Call::new(Op::Read, 512, 512);
        let write = Call::new(Op::Write, 512, 512).with_flags(Flags::FUA);
        let quick = session(Spec::default());
        assert!(matches!(inline(&quick, read, &[]), Answer::Done(Ok(data)) if data.len() == 512));
        assert!(matches!(started(&quick, write, &[1; 512]), Answer::Done(Ok(_))));
        assert_eq!(lent(&quick, Op::Read, 512, 512), Some(512));

        let slow = session(Spec { blocks: |op| op != Op::Read, ..Spec::default() });
        assert!(matches!(inline(&slow, read, &[]), Answer::Done(Ok(_))));
        assert!(matches!(inline(&slow, write, &[1; 512]), Answer::NeedsThread));
        assert!(!needs_thread(&slow, Op::Read) && needs_thread(&slow, Op::Flush));

        let later = session(Spec { later: true, blocks: |_| true, ..Spec::default() });
        assert!(matches!(started(&later, write, &[1; 512]), Answer::Started(Ok(_))));
        let Answer::Started(Ok(data)) = started(&later, read, &[]) else { panic!("it was not started") };
        assert_eq!(data, [1; 512]);
        assert!(matches!(inline(&later, read, &[]), Answer::NeedsThread));
    }
}
