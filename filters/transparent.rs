//! The open handle of filters that change how the server runs, and no request.

use nbdkit_core::{Handle, Loan, Next, Result};

/// Passes everything on, also what saves copies and waits.
pub(crate) struct Transparent(pub(crate) Next);

impl Handle for Transparent {
    fn next(&self) -> Option<&Next> {
        Some(&self.0)
    }

    fn pread_nowait(&self, buf: &mut [u8], offset: u64) -> Result<bool> {
        self.0.pread_nowait(buf, offset)
    }

    fn may_skip_holes(&self) -> bool {
        self.0.may_skip_holes()
    }

    fn loan(&self, offset: u64, length: u64) -> Option<Loan<'_>> {
        self.0.loan(offset, length)
    }
}
