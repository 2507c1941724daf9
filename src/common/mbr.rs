//! The MBR: 4 entries in the first sector, and a linked list of further such sectors (EBRs) in an extended partition,
//! each with one logical partition and a link.

use crate::partition::{
    Disk, Kind, Layout, LayoutError, NewPartition, Partition, SECTOR, TableError, put, u32_at,
};

const SIGNATURE: [u8; 2] = [0x55, 0xaa];
const ENTRIES: usize = 446;
const ENTRY: usize = 16;
/// The type of the entry that covers a disk with a GPT.
const PROTECTIVE: u8 = 0xee;
/// The type of an extended partition that is addressed by sector number.
const EXTENDED: u8 = 0x0f;
/// Links followed before a list of logical partitions is cut off: more than any system uses.
const MAX_LINKS: usize = 1024;

#[derive(Clone, Copy)]
struct Entry {
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
        self.kind != 0 && self.sectors > 0 && !self.is_extended()
    }

    /// As a partition, if its numbers make sense. No product overflows: 33 bits of sectors of at most 4096 bytes.
    fn partition(self, number: u32, base: u64, sector_size: u64) -> Partition {
        Partition {
            number,
            start: (base + u64::from(self.start)) * sector_size,
            length: u64::from(self.sectors) * sector_size,
            kind: Kind::Mbr(self.kind),
        }
    }

    fn write(self, sector: &mut [u8], index: usize, bootable: bool) {
        let at = ENTRIES + index * ENTRY;
        // Cylinders, heads and sectors cannot say where anything is on a disk of today: "use the number".
        put(sector, at, &[if bootable { 0x80 } else { 0 }, 0xfe, 0xff, 0xff, self.kind, 0xfe, 0xff, 0xff]);
        put(sector, at + 8, &self.start.to_le_bytes());
        put(sector, at + 12, &self.sectors.to_le_bytes());
    }
}

fn entries(sector: &[u8]) -> [Entry; 4] {
    std::array::from_fn(|i| {
        let at = ENTRIES + i * ENTRY;
        Entry {
            kind: sector.get(at + 4).copied().unwrap_or(0),
            start: u32_at(sector, at + 8),
            sectors: u32_at(sector, at + 12),
        }
    })
}

pub(crate) fn has_signature(sector: &[u8]) -> bool {
    sector.get(510..512) == Some(&SIGNATURE)
}

pub(crate) fn announces_gpt(sector: &[u8]) -> bool {
    entries(sector).iter().any(|entry| entry.kind == PROTECTIVE)
}

/// The partitions that the first sector of a disk leads to, and whether there is an extended one.
pub(crate) fn parse<E>(
    first: &[u8],
    disk: &mut Disk<'_, E>,
) -> Result<(Vec<Partition>, bool), TableError<E>> {
    let mut partitions = Vec::new();
    let mut extended = None;
    for (number, entry) in (1..).zip(entries(first)) {
        if entry.is_data() {
            partitions.push(entry.partition(number, 0, disk.sector_size));
        } else if entry.is_extended() && extended.is_none() {
            extended = Some(u64::from(entry.start));
        }
    }
    if let Some(start) = extended {
        parse_logical(start, disk, &mut partitions)?;
    }
    Ok((partitions, extended.is_some()))
}

/// Follows the list of EBRs as far as it makes sense: what comes before a broken link is still there.
fn parse_logical<E>(
    extended: u64,
    disk: &mut Disk<'_, E>,
    partitions: &mut Vec<Partition>,
) -> Result<(), TableError<E>> {
    let mut visited = Vec::new();
    let mut number = 5;
    let mut link = Some(extended);
    // A link to sector 0 would read the MBR itself as an EBR.
    while let Some(lba) = link.filter(|lba| *lba != 0 && !visited.contains(lba)) {
        visited.push(lba);
        let mut sector = [0; SECTOR as usize];
        if visited.len() > MAX_LINKS || !disk.sectors(&mut sector, lba)? || !has_signature(&sector) {
            break;
        }
        for entry in entries(&sector).into_iter().filter(|entry| entry.is_data()) {
            partitions.push(entry.partition(number, lba, disk.sector_size));
            number += 1;
        }
        link = entries(&sector)
            .into_iter()
            .find(|entry| entry.is_extended())
            .map(|entry| extended + u64::from(entry.start));
    }
    Ok(())
}

/// The first sector of a disk with a GPT: one partition that covers it, so that old programs keep off.
pub(crate) fn protective(sectors: u64) -> Vec<u8> {
    let mut sector = empty();
    let sectors = u32::try_from(sectors - 1).unwrap_or(u32::MAX);
    Entry { kind: PROTECTIVE, start: 1, sectors }.write(&mut sector, 0, false);
    sector
}

fn empty() -> Vec<u8> {
    let mut sector = vec![0; SECTOR as usize];
    put(&mut sector, 510, &SIGNATURE);
    sector
}

pub(crate) fn layout(partitions: &[NewPartition]) -> Result<Layout, LayoutError> {
    let primary = if partitions.len() > 4 { 3 } else { partitions.len() };
    let small = |sectors: u64| u32::try_from(sectors).map_err(|_| LayoutError::TooLargeForMbr);
    let mut layout = Layout::default();
    let mut first = empty();
    // EBRs by sector number, with the start and the length of their partitions.
    let mut logical: Vec<(u64, Entry)> = Vec::new();
    let mut end = 1;
    for (index, partition) in partitions.iter().enumerate() {
        let record = end;
        let table = u64::from(index >= primary);
        let start = partition.align(end + table).ok_or(LayoutError::TooLarge)?;
        end = start + partition.sectors();
        small(end)?;
        layout.starts.push(start * SECTOR);
        let base = if table == 1 { record } else { 0 };
        let entry = Entry {
            kind: partition.mbr_type,
            start: small(start - base)?,
            sectors: small(partition.sectors())?,
        };
        if table == 1 {
            logical.push((record, entry));
        } else {
            entry.write(&mut first, index, index == 0);
        }
    }
    if let Some((extended, _)) = logical.first() {
        let entry = Entry { kind: EXTENDED, start: small(*extended)?, sectors: small(end - extended)? };
        entry.write(&mut first, primary, false);
    }
    layout.tables.push((0, first));
    for (i, (record, entry)) in logical.iter().enumerate() {
        let mut sector = empty();
        entry.write(&mut sector, 0, false);
        if let Some((next, following)) = logical.get(i + 1) {
            // A link covers the next EBR and its partition.
            let link = Entry {
                kind: EXTENDED,
                start: small(next - logical[0].0)?,
                sectors: small(u64::from(following.start) + u64::from(following.sectors))?,
            };
            link.write(&mut sector, 1, false);
        }
        layout.tables.push((record * SECTOR, sector));
    }
    layout.size = end * SECTOR;
    Ok(layout)
}
