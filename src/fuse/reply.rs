//! The right to answer a request of the kernel's. It is used once: by the thread that ran the request or, when that
//! takes too long, by its [timeout](crate::request_timeout).

use std::sync::Arc;

use fuser::{Errno, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyWrite};
use nbdkit_core::sync::Mutex;

/// A reply that can fail.
pub(crate) trait Reply: Send + 'static {
    fn fail(self, errno: Errno);
}

macro_rules! replies {
    ($($reply:ty),*) => {
        $(impl Reply for $reply {
            fn fail(self, errno: Errno) {
                self.error(errno);
            }
        })*
    };
}
replies!(ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyWrite);

/// The right to answer a request.
pub(crate) enum Answer<R> {
    /// Nobody else has it.
    Own(R),
    /// Shared with the timeout; the first of the two takes it.
    Shared(Arc<Mutex<Option<R>>>),
}

impl<R: Reply> Answer<R> {
    /// Whether there still is somebody to answer.
    pub(crate) fn is_open(&self) -> bool {
        match self {
            Answer::Own(_) => true,
            Answer::Shared(reply) => reply.lock().is_some(),
        }
    }

    /// Takes the reply; None: too late.
    pub(crate) fn take(self) -> Option<R> {
        match self {
            Answer::Own(reply) => Some(reply),
            Answer::Shared(reply) => reply.lock().take(),
        }
    }

    /// Answers with a result, unless it is too late: `send` with what it holds.
    pub(crate) fn give<T>(self, result: Result<T, Errno>, send: impl FnOnce(R, T)) {
        match (self.take(), result) {
            (None, _) => {}
            (Some(reply), Ok(value)) => send(reply, value),
            (Some(reply), Err(errno)) => reply.fail(errno),
        }
    }
}
