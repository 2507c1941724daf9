//! A range of the disk below as a disk of its own: the handle of the filters that choose one.

use nbdkit_core::{Caps, Handle, Next, Outcome, Request, Result};

/// The `length` bytes from `start` on of the disk below.
pub(crate) struct Subrange {
    start: u64,
    length: u64,
    next: Next,
}

impl Subrange {
    /// None when the range is not within the disk below.
    pub(crate) fn new(next: Next, start: u64, length: u64) -> Option<Self> {
        let end = start.checked_add(length)?;
        (end <= next.caps().size).then_some(Subrange { start, length, next })
    }
}

impl Handle for Subrange {
    fn next(&self) -> Option<&Next> {
        Some(&self.next)
    }

    fn capabilities(&self) -> Result<Caps> {
        Ok(self.next.capabilities().with_size(self.length).with_skip_holes(self.next.caps().skip_holes))
    }

    /// The sum cannot overflow: the glue keeps requests within the range, and the range is within the disk below.
    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        let offset = self.start + request.offset();
        self.next.shifted(request, offset)
    }
}
