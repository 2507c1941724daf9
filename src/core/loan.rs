//! Loans: what a chain may lend to a front end instead of copying.

use std::os::fd::BorrowedFd;

/// A file descriptor that holds the bytes of a range of the disk, 1:1 from `offset` on.
///
/// The NBD front end splices from and to it, the FUSE front end hands it to the kernel (passthrough). A plugin lends only
/// what reads exactly as its own `pread` would, and for a write only what its `pwrite` would do no more to.
#[derive(Clone, Copy, Debug)]
pub struct Loan<'a> {
    /// The file.
    pub fd: BorrowedFd<'a>,
    /// Where in the file the range starts, in bytes.
    pub offset: u64,
}
