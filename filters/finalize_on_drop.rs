//! The layers below for a filter that opens them when it likes, not when its own handle is opened.

use std::ops::Deref;

use nbdkit_core::Next;

/// Open layers that are finalized when the last who uses them is done.
pub(crate) struct FinalizeOnDrop(Next);

impl From<Next> for FinalizeOnDrop {
    fn from(next: Next) -> Self {
        FinalizeOnDrop(next)
    }
}

impl Deref for FinalizeOnDrop {
    type Target = Next;

    fn deref(&self) -> &Next {
        &self.0
    }
}

impl Drop for FinalizeOnDrop {
    fn drop(&mut self) {
        self.0.finalize();
    }
}
