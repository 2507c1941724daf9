//! How tests offer requests that must not wait.

use std::sync::{
    Arc,
    mpsc::{Receiver, Sender, channel},
};

use nbdkit_core::{Call, Completed, Completions, Data, Outcome, Request, Result, Session, Task};

/// Where the ends of started requests go.
struct Ends(Sender<Completed>);

impl Completions for Ends {
    fn post(&self, completed: Completed) -> bool {
        // The test may have given up on it.
        let _ = self.0.send(completed);
        false
    }

    fn wake(&self) {}
}

/// A request that was started.
pub(crate) struct Waiting(Receiver<Completed>);

impl Waiting {
    /// Waits for its end, and takes it back through the layers: what was read.
    pub(crate) fn finish(self, session: &Session) -> Result<Vec<u8>> {
        let mut completed = self.0.recv().expect("a request is always answered");
        session.finish(&mut completed);
        completed.result.map(|()| completed.payload.bytes().to_vec())
    }

    /// Waits for its end, which the layers are not told of, for they are closed.
    pub(crate) fn end(self) -> Result<Vec<u8>> {
        let completed = self.0.recv().expect("a request is always answered");
        completed.result.map(|()| completed.payload.bytes().to_vec())
    }
}

/// How a chain answers a request that must not wait, but may be started.
pub(crate) enum Offered {
    Done,
    Started(Waiting),
    NeedsThread,
}

/// Offers a request.
pub(crate) fn offer(session: &Session, call: Call, data: Data<'_>) -> Offered {
    let (tell, told) = channel();
    let mut task = Task::new(Arc::new(Ends(tell)));
    task.arm(0);
    let mut request = Request::new(call, data).startable(task);
    match session.submit(&mut request) {
        Outcome::Done(_) => Offered::Done,
        Outcome::Started(_) => Offered::Started(Waiting(told)),
        Outcome::NeedsThread | Outcome::Lent(_) => Offered::NeedsThread,
    }
}
