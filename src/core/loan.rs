//! Loans: what a chain may lend to a door instead of copying.

use std::os::fd::BorrowedFd;

/// A file descriptor that holds the bytes of a range of the disk, 1:1 from `offset` on.
///
/// The NBD door sends from it (sendfile), the FUSE door hands it to the kernel (passthrough). A layer lends only
/// what reads exactly as its own `pread` would.
#[derive(Clone, Copy, Debug)]
pub struct Loan<'a> {
    /// The file.
    pub fd: BorrowedFd<'a>,
    /// Where in the file the range starts, in bytes.
    pub offset: u64,
    /// Writing to the file is the same as writing through the layer.
    pub writable: bool,
}
