//! Partition tables: the common part of MBR and GPT.
//!
//! [`read_table`] finds out what a disk holds; what it reads may be hostile, so every number is checked, every walk
//! is bounded and memory does not depend on what the table claims. [`Layout`] is the other way round: where
//! partitions of given sizes come to lie, and the sectors that say so.

use std::fmt;

use crate::{Guid, gpt, guid, mbr};

/// The size of a sector in bytes when nothing else is known, and in all tables that are written.
pub const SECTOR: u64 = 512;

/// Which table a disk has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// The DOS table: 4 primary partitions, logical ones in an extended partition.
    Mbr,
    /// The table of UEFI.
    Gpt,
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Scheme::Mbr => "MBR",
            Scheme::Gpt => "GPT",
        })
    }
}

/// The type of a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The type byte.
    Mbr(u8),
    /// The type GUID.
    Gpt(Guid),
}

/// A partition that a table names. It need not be within the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Its number, from 1; logical partitions of an MBR from 5.
    pub number: u32,
    /// Start in bytes.
    pub start: u64,
    /// Length in bytes, never 0. `start + length` does not overflow.
    pub length: u64,
    /// Its type.
    pub kind: Kind,
}

/// What a table says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Which kind of table it is.
    pub scheme: Scheme,
    /// Bytes in a sector: 512 or 4096.
    pub sector_size: u64,
    /// The partitions by ascending number. An extended partition is none.
    pub partitions: Vec<Partition>,
    /// An MBR with an extended partition.
    pub extended: bool,
}

/// Why there is no table to be had.
#[derive(Debug, PartialEq, Eq)]
pub enum TableError<E> {
    /// The disk could not be read.
    Read(E),
    /// The disk is smaller than any table.
    TooSmall,
    /// There is no signature of a table.
    NoTable,
    /// There is a table, but it contradicts itself; the text says how.
    Damaged(&'static str),
}

impl<E> From<E> for TableError<E> {
    fn from(e: E) -> Self {
        TableError::Read(e)
    }
}

/// Fills a buffer from an offset in bytes.
type Read<'a, E> = dyn FnMut(&mut [u8], u64) -> Result<(), E> + 'a;

/// Reads whole sectors of a disk for the parsers, never past its end.
pub(crate) struct Disk<'a, E> {
    pub(crate) size: u64,
    pub(crate) sector_size: u64,
    pub(crate) read: &'a mut Read<'a, E>,
}

impl<E> Disk<'_, E> {
    /// Fills `buf` from the start of sector `lba`; false where that is not within the disk.
    pub(crate) fn sectors(&mut self, buf: &mut [u8], lba: u64) -> Result<bool, E> {
        let Some(start) = lba.checked_mul(self.sector_size) else { return Ok(false) };
        if start.checked_add(buf.len() as u64).is_none_or(|end| end > self.size) {
            return Ok(false);
        }
        (self.read)(buf, start).map(|()| true)
    }
}

/// Reads the partition table of a disk of `size` bytes through `read`, which fills a buffer from an offset in bytes
/// that is within the disk.
///
/// `sector_size` is 512 or 4096; with None it is 512, unless there is a GPT that can only be found with 4096. A GPT
/// counts where the MBR announces one or has no signature. Memory and the number of calls of `read` are bounded
/// whatever the disk holds.
///
/// # Errors
/// See [`TableError`].
pub fn read_table<E>(
    size: u64,
    sector_size: Option<u64>,
    mut read: impl FnMut(&mut [u8], u64) -> Result<(), E>,
) -> Result<Table, TableError<E>> {
    if size < SECTOR {
        return Err(TableError::TooSmall);
    }
    let mut first = [0; SECTOR as usize];
    read(&mut first, 0)?;
    let signature = mbr::has_signature(&first);
    let sizes: &[u64] = match sector_size {
        None => &[512, 4096],
        Some(4096) => &[4096],
        Some(_) => &[512],
    };
    if !signature || mbr::announces_gpt(&first) {
        for &sector_size in sizes {
            let mut disk = Disk { size, sector_size, read: &mut read };
            if let Some(partitions) = gpt::parse(&mut disk)? {
                return Ok(Table { scheme: Scheme::Gpt, sector_size, partitions, extended: false });
            }
        }
    }
    if !signature {
        return Err(TableError::NoTable);
    }
    let sector_size = sizes[0];
    let (partitions, extended) = mbr::parse(&first, &mut Disk { size, sector_size, read: &mut read })?;
    Ok(Table { scheme: Scheme::Mbr, sector_size, partitions, extended })
}

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

/// The bytes at a fixed place that is within the buffer.
pub(crate) fn bytes<const N: usize>(buf: &[u8], at: usize) -> [u8; N] {
    buf.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}

pub(crate) fn u32_at(buf: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes(buf, at))
}

pub(crate) fn u64_at(buf: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes(buf, at))
}

/// Puts a field of a table to be written in its place.
pub(crate) fn put(buf: &mut [u8], at: usize, field: &[u8]) {
    buf[at..at + field.len()].copy_from_slice(field);
}

#[cfg(test)]
#[path = "partition_tests.rs"]
mod tests;
