//! What a chain lends.

use std::{os::fd::OwnedFd, sync::Arc};

use nbdkit_core::{Call, Completed, Completions, Data, Op, Outcome, Request, Session, Task};

/// Nothing is started for them.
struct Nobody;

impl Completions for Nobody {
    fn post(&self, completed: Completed) -> bool {
        panic!("a request for a loan was started: {completed:?}");
    }

    fn wake(&self) {}
}

/// The file that a chain lends for a read or a write, and where the range is in it.
pub(crate) fn lend(session: &Session, op: Op, offset: u64, length: u64) -> Option<(OwnedFd, u64)> {
    let mut task = Task::new(Arc::new(Nobody));
    task.arm(0);
    match session.submit(&mut Request::new(Call::new(op, offset, length), Data::None).lendable(task)) {
        Outcome::Lent(loan) => Some((loan.fd.try_clone_to_owned().unwrap(), loan.offset)),
        _ => None,
    }
}
