//! The two copies of a GPT that is made.

use super::{Layout, NewPartition, put};
use crate::{
    Guid,
    layout::mbr,
    table::{
        SECTOR,
        gpt::{ENTRY, HEADER, SIGNATURE},
    },
};

const REVISION: u32 = 0x10000;
/// The least number of entries that other programs expect.
const MIN_ENTRIES: u32 = 128;
/// Attribute of an entry: old boot loaders may start it.
const BOOTABLE: u64 = 1 << 2;

/// None when a number passes what a disk can have.
pub(super) fn layout(partitions: &[NewPartition], guid: Guid) -> Option<Layout> {
    let per_sector = (SECTOR / u64::from(ENTRY)) as u32;
    let entries =
        u32::try_from(partitions.len()).ok()?.max(MIN_ENTRIES).checked_next_multiple_of(per_sector)?;
    let array_sectors = u64::from(entries / per_sector);
    let mut array = vec![0; (array_sectors * SECTOR) as usize];
    let first_usable = 2 + array_sectors;

    let mut starts = Vec::new();
    let mut end = first_usable;
    for (i, partition) in partitions.iter().enumerate() {
        let start = partition.align(end)?;
        end = start.checked_add(partition.sectors())?;
        starts.push(start.checked_mul(SECTOR)?);
        let entry = &mut array[i * ENTRY as usize..][..ENTRY as usize];
        put(entry, 0, &partition.gpt_type.0);
        put(entry, 16, &partition.guid.0);
        put(entry, 32, &start.to_le_bytes());
        put(entry, 40, &(end - 1).to_le_bytes());
        put(entry, 48, &if i == 0 { BOOTABLE } else { 0 }.to_le_bytes());
        for (place, unit) in entry[56..].chunks_exact_mut(2).zip(partition.name.encode_utf16()) {
            place.copy_from_slice(&unit.to_le_bytes());
        }
    }

    let sectors = end.checked_add(array_sectors + 1)?;
    let size = sectors.checked_mul(SECTOR).filter(|size| i64::try_from(*size).is_ok())?;
    let (backup_array, backup) = (end, sectors - 1);
    let array_crc = crc32fast::hash(&array);
    let header = |own: u64, other: u64, array: u64| {
        let mut header = vec![0; SECTOR as usize];
        put(&mut header, 0, SIGNATURE);
        put(&mut header, 8, &REVISION.to_le_bytes());
        put(&mut header, 12, &(HEADER as u32).to_le_bytes());
        put(&mut header, 24, &own.to_le_bytes());
        put(&mut header, 32, &other.to_le_bytes());
        put(&mut header, 40, &first_usable.to_le_bytes());
        put(&mut header, 48, &(end - 1).to_le_bytes());
        put(&mut header, 56, &guid.0);
        put(&mut header, 72, &array.to_le_bytes());
        put(&mut header, 80, &entries.to_le_bytes());
        put(&mut header, 84, &ENTRY.to_le_bytes());
        put(&mut header, 88, &array_crc.to_le_bytes());
        let crc = crc32fast::hash(&header[..HEADER]);
        put(&mut header, 16, &crc.to_le_bytes());
        header
    };
    let primary = [mbr::protective(sectors), header(1, backup, 2), array.clone()].concat();
    let secondary = [array, header(backup, 1, backup_array)].concat();
    Some(Layout { size, starts, tables: vec![(0, primary), (backup_array * SECTOR, secondary)] })
}
