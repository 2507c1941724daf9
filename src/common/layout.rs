//! Where partitions of given sizes come to lie on a new disk, and the sectors of the table that says so.

use crate::{Guid, guid, table::SECTOR};

mod gpt;
mod mbr;

/// A partition to be made.
#[derive(Clone, Debug)]
pub struct NewPartition {
    /// Length in bytes, rounded up to sectors; not 0.
    pub length: u64,
    /// Alignment of its start in bytes, rounded up to sectors.
    pub alignment: u64,
    /// Its type in an MBR.
    pub mbr_type: u8,
    /// Its type in a GPT.
    pub gpt_type: Guid,
    /// Its own GUID in a GPT.
    pub guid: Guid,
    /// Its name in a GPT; what passes 36 UTF-16 units is cut off.
    pub name: String,
}

impl NewPartition {
    /// A Linux partition of `length` bytes, aligned to 1 MiB.
    pub fn new(length: u64) -> Self {
        NewPartition {
            length,
            alignment: 1 << 20,
            mbr_type: 0x83,
            gpt_type: guid::LINUX,
            guid: Guid::NIL,
            name: String::new(),
        }
    }

    pub(crate) fn sectors(&self) -> u64 {
        self.length.div_ceil(SECTOR)
    }

    /// The first aligned sector from `lba` on.
    pub(crate) fn align(&self, lba: u64) -> Option<u64> {
        lba.checked_next_multiple_of(self.alignment.div_ceil(SECTOR).max(1))
    }
}

/// Where partitions lie on a disk, and the sectors of the table that says so.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// Size of the disk in bytes, a multiple of 512.
    pub size: u64,
    /// Start of each partition in bytes, in the order they were given, ascending.
    pub starts: Vec<u64>,
    /// Parts of the table: offset in bytes and content, ascending. They overlap neither each other nor partitions.
    pub tables: Vec<(u64, Vec<u8>)>,
}

/// Why partitions do not fit into a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayoutError {
    /// The disk is larger than an MBR can describe (2^32−1 sectors, about 2 TiB).
    TooLargeForMbr,
    /// The disk passes 2^63−1 bytes, or has more partitions than can be numbered.
    TooLarge,
}

impl Layout {
    /// Partitions in an MBR. The first is marked as bootable. Of more than 4, the first 3 are primary, and the others
    /// become logical partitions (from number 5) in an extended one.
    ///
    /// # Errors
    /// [`LayoutError`].
    pub fn mbr(partitions: &[NewPartition]) -> Result<Layout, LayoutError> {
        mbr::layout(partitions)
    }

    /// Partitions in a GPT, with a protective MBR, and a second copy of the table at the end.
    ///
    /// # Errors
    /// [`LayoutError::TooLarge`].
    pub fn gpt(partitions: &[NewPartition], disk: Guid) -> Result<Layout, LayoutError> {
        gpt::layout(partitions, disk).ok_or(LayoutError::TooLarge)
    }
}

/// Puts a field of a table to be written in its place.
pub(crate) fn put(buf: &mut [u8], at: usize, field: &[u8]) {
    buf[at..at + field.len()].copy_from_slice(field);
}
