//! The layers below for a filter that opens them when it likes, not when its own handle is opened.

use std::ops::Deref;

use nbdkit_core::Next;

/// Open layers that are finalized when the last who uses them is done.
pub(crate) struct Opened(Next);

impl From<Next> for Opened {
    fn from(next: Next) -> Self {
        Opened(next)
    }
}

impl Deref for Opened {
    type Target = Next;

    fn deref(&self) -> &Next {
        &self.0
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        self.0.finalize();
    }
}
