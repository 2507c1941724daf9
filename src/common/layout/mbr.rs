//! The sectors of an MBR that is made.

use super::{Layout, LayoutError, NewPartition, put};
use crate::table::{
    SECTOR,
    mbr::{ENTRIES, ENTRY, EXTENDED, PROTECTIVE, SIGNATURE},
};

struct Entry {
    kind: u8,
    /// In sectors; in an EBR relative to it, or to the extended partition.
    start: u32,
    sectors: u32,
}

impl Entry {
    fn write(&self, sector: &mut [u8], index: usize, bootable: bool) {
        let at = ENTRIES + index * ENTRY;
        // Cylinders, heads and sectors cannot say where anything is on a disk of today: "use the number".
        put(sector, at, &[if bootable { 0x80 } else { 0 }, 0xfe, 0xff, 0xff, self.kind, 0xfe, 0xff, 0xff]);
        put(sector, at + 8, &self.start.to_le_bytes());
        put(sector, at + 12, &self.sectors.to_le_bytes());
    }
}

/// The first sector of a disk with a GPT: one partition that covers it, so that old programs keep off.
pub(super) fn protective(sectors: u64) -> Vec<u8> {
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

pub(super) fn layout(partitions: &[NewPartition]) -> Result<Layout, LayoutError> {
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
