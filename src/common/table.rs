//! Partition tables: what all kinds of them have in common.
//!
//! [`read_table`] finds out what a disk holds; what it reads may be hostile, so every number is checked, every walk
//! is bounded, and memory depends on the partitions there are, not on what a header claims. Nothing that a table says is
//! dropped silently: what does not fit is in [`Table::warnings`].

use std::fmt;

use crate::{
    Guid,
    disk::{Disk, Read},
};

mod apm;
mod bsd;
pub(crate) mod gpt;
pub(crate) mod mbr;
mod names;
mod rdb;
mod sun;

/// The size of a sector in bytes when nothing else is known, and in all tables that are written.
pub const SECTOR: u64 = 512;

/// The sizes of sectors in bytes that a table may count in, the likeliest first.
pub const SECTOR_SIZES: [u64; 4] = [512, 4096, 2048, 1024];

/// The most warnings about one table.
const MAX_WARNINGS: usize = 16;

/// Which table a disk has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// The DOS table: 4 primary partitions, logical ones in an extended partition.
    Mbr,
    /// The table of UEFI.
    Gpt,
    /// The Apple Partition Map.
    Apm,
    /// The disklabel of the BSD systems.
    Bsd,
    /// The label of SunOS and Linux on SPARC.
    Sun,
    /// The Rigid Disk Block of the Amiga.
    Amiga,
}

impl Scheme {
    /// The name that blkid(8) and sfdisk(8) have for it.
    pub fn id(self) -> &'static str {
        match self {
            Scheme::Mbr => "dos",
            Scheme::Gpt => "gpt",
            Scheme::Apm => "mac",
            Scheme::Bsd => "bsd",
            Scheme::Sun => "sun",
            Scheme::Amiga => "amiga",
        }
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Scheme::Mbr => "MBR",
            Scheme::Gpt => "GPT",
            Scheme::Apm => "Apple Partition Map",
            Scheme::Bsd => "BSD disklabel",
            Scheme::Sun => "Sun label",
            Scheme::Amiga => "Amiga RDB",
        })
    }
}

/// The type of a partition, which each kind of table has its own of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The type byte.
    Mbr(u8),
    /// The type GUID.
    Gpt(Guid),
    /// The name of the type, as `Apple_HFS`.
    Apm(String),
    /// The number of a file system.
    Bsd(u8),
    /// The tag.
    Sun(u16),
    /// Three letters and a number.
    Amiga([u8; 4]),
}

impl fmt::Display for Kind {
    /// As blkid(8) writes types.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kind::Mbr(kind) | Kind::Bsd(kind) => write!(f, "0x{kind:x}"),
            Kind::Gpt(guid) => f.write_str(&guid.to_string().to_ascii_lowercase()),
            Kind::Apm(name) => f.write_str(name),
            Kind::Sun(tag) => write!(f, "0x{tag:x}"),
            Kind::Amiga([a, b, c, number]) => {
                let text: String = [*a, *b, *c].map(char::from).iter().collect();
                write!(f, "{}{number}", text.escape_default())
            }
        }
    }
}

/// A partition that a table names. It need not be within the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Its number, from 1, which is the one that Linux has for it: logical partitions of an MBR from 5, those of a BSD
    /// disklabel in a slice after all of the MBR's.
    pub number: u32,
    /// Start in bytes.
    pub start: u64,
    /// Length in bytes as the table has it, never 0. `start + length` does not overflow.
    pub length: u64,
    /// Its type.
    pub kind: Kind,
    /// Its name, empty in tables that have none.
    pub name: String,
    /// Its identifier, as blkid(8) writes PARTUUID.
    pub uuid: Option<String>,
    /// The partition of the MBR in which there is the BSD disklabel that names it.
    pub slice: Option<u32>,
}

impl Partition {
    /// A partition of `length` bytes from `start` on. None: it has no bytes, or passes 2^64.
    fn new(number: u32, start: u64, length: u64, kind: Kind) -> Option<Self> {
        start.checked_add(length)?;
        (length > 0).then_some(Partition {
            number,
            start,
            length,
            kind,
            name: String::new(),
            uuid: None,
            slice: None,
        })
    }

    /// The same, in sectors.
    fn from_sectors(number: u32, start: u64, length: u64, sector_size: u64, kind: Kind) -> Option<Self> {
        Partition::new(number, start.checked_mul(sector_size)?, length.checked_mul(sector_size)?, kind)
    }

    /// How many of its bytes are on a disk of `size` bytes. 0: it starts past the end.
    pub fn length_within(&self, size: u64) -> u64 {
        self.length.min(size.saturating_sub(self.start))
    }
}

/// What a table says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Which kind of table it is.
    pub scheme: Scheme,
    /// Bytes in a sector: 512, 1024, 2048 or 4096.
    pub sector_size: u64,
    /// The partitions by ascending number. An extended partition is none, nor is the one that protects a GPT.
    pub partitions: Vec<Partition>,
    /// An MBR with an extended partition.
    pub extended: bool,
    /// The disk's identifier, as blkid(8) writes PTUUID.
    pub uuid: Option<String>,
    /// What is wrong with the table or its partitions, one line for each.
    pub warnings: Vec<String>,
}

impl Table {
    fn new(scheme: Scheme, sector_size: u64) -> Self {
        Table {
            scheme,
            sector_size,
            partitions: Vec::new(),
            extended: false,
            uuid: None,
            warnings: Vec::new(),
        }
    }

    /// Adds a partition; one whose numbers make no sense becomes a warning.
    fn add(&mut self, number: u32, partition: Option<Partition>) {
        match partition {
            Some(partition) => self.partitions.push(partition),
            None => self.warn(format!("the entry of partition {number} makes no sense and is ignored")),
        }
    }

    /// Adds a warning, unless there are too many.
    fn warn(&mut self, warning: impl Into<String>) {
        match self.warnings.len() {
            n if n < MAX_WARNINGS => self.warnings.push(warning.into()),
            MAX_WARNINGS => self.warnings.push("there is more that is wrong with the table".into()),
            _ => {}
        }
    }

    /// Warns of partitions that are not within the disk.
    fn warn_of_clipped(&mut self, size: u64) {
        for index in 0..self.partitions.len() {
            let Partition { number, start, length, .. } = self.partitions[index];
            match self.partitions[index].length_within(size) {
                0 => self.warn(format!(
                    "partition {number} starts at byte {start}, past the end of the disk of {size} bytes"
                )),
                within if within < length => self.warn(format!(
                    "partition {number} has {length} bytes in the table, but the disk ends after {within} of them"
                )),
                _ => {}
            }
        }
    }
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
    Damaged(String),
}

impl<E> From<E> for TableError<E> {
    fn from(e: E) -> Self {
        TableError::Read(e)
    }
}

/// Reads the partition table of a disk of `size` bytes through `read`, which fills a buffer from an offset in bytes
/// that is within the disk.
///
/// `sector_size` is one of [`SECTOR_SIZES`]; with None it is found from the table: a GPT is where its header is, some
/// tables name it, and of an MBR it is the size with which it leads to something, 512 in doubt. A GPT counts where the MBR
/// announces one or has no signature. Memory and the number of calls of `read` are bounded whatever the disk holds.
///
/// # Errors
/// See [`TableError`].
pub fn read_table<E>(
    size: u64,
    sector_size: Option<u64>,
    mut read: impl FnMut(&mut [u8], u64) -> Result<(), E>,
) -> Result<Table, TableError<E>> {
    let read: &mut Read<'_, E> = &mut read;
    let mut disk = Disk { size, read };
    let Some(first) = disk.array::<{ SECTOR as usize }>(0)? else { return Err(TableError::TooSmall) };
    let one = sector_size.map(|size| [size]);
    let sizes: &[u64] = one.as_ref().map_or(&SECTOR_SIZES, |one| one);
    let mut table = find(&mut disk, &first, sizes)?;
    // Stable, so that those with the same number keep their order.
    table.partitions.sort_by_key(|partition| partition.number);
    table.warn_of_clipped(size);
    Ok(table)
}

fn find<E>(disk: &mut Disk<'_, E>, first: &[u8; 512], sizes: &[u64]) -> Result<Table, TableError<E>> {
    let mbr = mbr::is_table(first);
    let announced = mbr && mbr::announces_gpt(first);
    let mut damage = None;
    if announced || !mbr {
        match gpt::parse(disk, sizes, announced)? {
            gpt::Found::Table(table) => return Ok(table),
            gpt::Found::Damaged(how) => damage = Some(how),
            gpt::Found::Nothing => {}
        }
    }
    if mbr {
        let mut table = mbr::parse(disk, first, sizes)?;
        return match damage {
            // A hybrid MBR has partitions of its own.
            Some(how) if table.partitions.is_empty() => Err(TableError::Damaged(how)),
            Some(how) => {
                table.warn(format!("{how}: the partitions are those of the MBR"));
                Ok(table)
            }
            None => Ok(table),
        };
    }
    if let Some(how) = damage {
        return Err(TableError::Damaged(how));
    }
    for parse in [sun::parse, rdb::parse, apm::parse, bsd::parse] {
        if let Some(table) = parse(disk, first, sizes)? {
            return Ok(table);
        }
    }
    Err(TableError::NoTable)
}

#[cfg(test)]
mod tests;
