//! The MBR: 4 entries in the first sector, and a linked list of further such sectors (EBRs) in an extended partition,
//! each with one logical partition and a link.

use super::{Kind, Partition, SECTOR, Scheme, Table, TableError, bsd};
use crate::disk::{Disk, u32_at};

pub(crate) const SIGNATURE: [u8; 2] = [0x55, 0xaa];
pub(crate) const ENTRIES: usize = 446;
pub(crate) const ENTRY: usize = 16;
/// The type of the entry that covers a disk with a GPT.
pub(crate) const PROTECTIVE: u8 = 0xee;
/// The type of an extended partition that is addressed by sector number.
pub(crate) const EXTENDED: u8 = 0x0f;
/// Links followed before a list of logical partitions is cut off: more than any system uses.
const MAX_LINKS: usize = 1024;

#[derive(Clone, Copy)]
struct Entry {
    /// 0x80: bootable. Other bits mean that it is none.
    flags: u8,
    kind: u8,
    /// In sectors; in an EBR relative to it, or to the extended partition.
    start: u32,
    sectors: u32,
}

impl Entry {
    fn is_extended(self) -> bool {
        matches!(self.kind, 0x05 | EXTENDED | 0x85) && self.sectors > 0
    }

    fn is_data(self) -> bool {
        self.kind != 0 && self.kind != PROTECTIVE && self.sectors > 0 && !self.is_extended()
    }

    /// As a partition. No product overflows: 33 bits of sectors of at most 4096 bytes.
    fn partition(self, number: u32, base: u64, table: &Table) -> Option<Partition> {
        let start = base + u64::from(self.start);
        let kind = Kind::Mbr(self.kind);
        let found = Partition::from_sectors(number, start, u64::from(self.sectors), table.sector_size, kind)?;
        let uuid = table.uuid.as_deref().map(|disk| format!("{disk}-{number:02x}"));
        Some(Partition { uuid, ..found })
    }
}

fn entries(sector: &[u8]) -> [Entry; 4] {
    std::array::from_fn(|i| {
        let at = ENTRIES + i * ENTRY;
        Entry {
            flags: sector.get(at).copied().unwrap_or(0),
            kind: sector.get(at + 4).copied().unwrap_or(0),
            start: u32_at(sector, at + 8),
            sectors: u32_at(sector, at + 12),
        }
    })
}

fn has_signature(sector: &[u8]) -> bool {
    sector.get(510..512) == Some(&SIGNATURE)
}

/// Whether the first sector of a disk is an MBR, not the boot sector of a file system, which has the same signature and
/// code or text where the entries are.
pub(super) fn is_table(first: &[u8]) -> bool {
    has_signature(first) && entries(first).iter().all(|entry| entry.flags & 0x7f == 0)
}

pub(super) fn announces_gpt(sector: &[u8]) -> bool {
    entries(sector).iter().any(|entry| entry.kind == PROTECTIVE)
}

/// The partitions that the first sector of a disk leads to.
pub(super) fn parse<E>(disk: &mut Disk<'_, E>, first: &[u8], sizes: &[u64]) -> Result<Table, TableError<E>> {
    let mut table = Table::new(Scheme::Mbr, sector_size(disk, first, sizes)?);
    table.uuid = Some(u32_at(first, 440)).filter(|id| *id != 0).map(|id| format!("{id:08x}"));
    let mut extended = None;
    for (number, entry) in (1..).zip(entries(first)) {
        if entry.is_data() {
            let partition = entry.partition(number, 0, &table);
            table.add(number, partition);
        } else if entry.is_extended() && extended.is_none() {
            extended = Some(u64::from(entry.start));
        }
    }
    table.extended = extended.is_some();
    if let Some(start) = extended {
        parse_logical(start, disk, &mut table)?;
    }
    bsd::parse_slices(disk, &mut table)?;
    Ok(table)
}

/// Follows the list of EBRs as far as it makes sense: what comes before a broken link is still there.
fn parse_logical<E>(extended: u64, disk: &mut Disk<'_, E>, table: &mut Table) -> Result<(), TableError<E>> {
    let mut visited = Vec::new();
    let mut number = 5;
    let mut link = Some(extended);
    while let Some(lba) = link {
        let broken = "the list of logical partitions is broken";
        // A link to sector 0 would read the MBR itself as an EBR.
        if lba == 0 || visited.contains(&lba) || visited.len() >= MAX_LINKS {
            table.warn(format!("{broken}: it runs in a circle after partition {}", number - 1));
            break;
        }
        visited.push(lba);
        let sector = disk.sector::<{ SECTOR as usize }>(lba, table.sector_size)?;
        let Some(sector) = sector.filter(|sector| has_signature(sector)) else {
            table.warn(format!("{broken}: there is nothing at sector {lba}, where its next part should be"));
            break;
        };
        for entry in entries(&sector).into_iter().filter(|entry| entry.is_data()) {
            let partition = entry.partition(number, lba, table);
            table.add(number, partition);
            number += 1;
        }
        link = entries(&sector)
            .into_iter()
            .find(|entry| entry.is_extended())
            .map(|entry| extended + u64::from(entry.start));
    }
    Ok(())
}

/// What the table counts in. Nothing in it says so: the size counts with which it leads to a list of logical partitions
/// and to file systems that are there, the first of `sizes` if none does.
fn sector_size<E>(disk: &mut Disk<'_, E>, first: &[u8], sizes: &[u64]) -> Result<u64, TableError<E>> {
    let usual = sizes.first().copied().unwrap_or(SECTOR);
    let used: Vec<_> = entries(first).into_iter().filter(|e| e.is_data() || e.is_extended()).collect();
    let end = used.iter().map(|entry| u64::from(entry.start) + u64::from(entry.sectors)).max().unwrap_or(0);
    let possible: Vec<_> =
        sizes.iter().copied().filter(|size| *size == usual || end * size <= disk.size).collect();
    if possible.len() < 2 {
        return Ok(usual);
    }
    let mut best = (0, usual);
    for size in possible {
        let mut found = 0;
        for entry in &used {
            found += u32::from(leads_somewhere(disk, *entry, size)?);
        }
        if found > best.0 {
            best = (found, size);
        }
        // That is as good as it gets.
        if found as usize == used.len() {
            break;
        }
    }
    Ok(best.1)
}

fn leads_somewhere<E>(disk: &mut Disk<'_, E>, entry: Entry, sector_size: u64) -> Result<bool, TableError<E>> {
    let start = u64::from(entry.start) * sector_size;
    if entry.is_extended() {
        return Ok(disk.array::<512>(start)?.is_some_and(|sector| has_signature(&sector)));
    }
    // One that starts with the disk is there whatever the sectors.
    if start == 0 || start >= disk.size {
        return Ok(false);
    }
    let length = (u64::from(entry.sectors) * sector_size).min(disk.size - start);
    let read = &mut *disk.read;
    let mut part = Disk { size: length, read: &mut |buf: &mut [u8], at: u64| read(buf, start + at) };
    Ok(crate::content::probe(&mut part)?.is_some())
}
