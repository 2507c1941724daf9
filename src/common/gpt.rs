//! The GPT: a header in the second sector, an array of entries, and a copy of both at the end of the disk.

use crate::{
    Guid, mbr,
    partition::{
        Disk, Kind, Layout, NewPartition, Partition, SECTOR, TableError, bytes, put, u32_at, u64_at,
    },
};

const SIGNATURE: &[u8; 8] = b"EFI PART";
const REVISION: u32 = 0x10000;
/// Size of the fields of a header that mean something.
const HEADER: usize = 92;
const ENTRY: u32 = 128;
/// The least number of entries that other programs expect.
const MIN_ENTRIES: u32 = 128;
/// The largest array that is read: 32768 entries of the usual size.
const MAX_ARRAY: u64 = 4 << 20;
const MAX_ENTRY: u32 = 4096;
/// Attribute of an entry: old boot loaders may start it.
const BOOTABLE: u64 = 1 << 2;

/// The partitions of the table, or None where there is no signature of one.
pub(crate) fn parse<E>(disk: &mut Disk<'_, E>) -> Result<Option<Vec<Partition>>, TableError<E>> {
    let mut header = [0; SECTOR as usize];
    if !disk.sectors(&mut header, 1)? || !header.starts_with(SIGNATURE) {
        return Ok(None);
    }
    let header_size = u32_at(&header, 12) as usize;
    if !(HEADER..=header.len()).contains(&header_size) {
        return Err(TableError::Damaged("the size of the GPT header is wrong"));
    }
    let checksum = u32_at(&header, 16);
    put(&mut header, 16, &[0; 4]);
    if crc32fast::hash(&header[..header_size]) != checksum {
        return Err(TableError::Damaged("the checksum of the GPT header is wrong"));
    }
    let (array, entries, entry_size) = (u64_at(&header, 72), u32_at(&header, 80), u32_at(&header, 84));
    let array_size = u64::from(entries) * u64::from(entry_size);
    if !(ENTRY..=MAX_ENTRY).contains(&entry_size) || !entry_size.is_power_of_two() || array_size > MAX_ARRAY {
        return Err(TableError::Damaged("the GPT has too many or wrongly sized entries"));
    }
    let mut partitions = Vec::new();
    let mut crc = crc32fast::Hasher::new();
    // A sector at a time, whole entries or whole sectors: both are powers of 2.
    let step = disk.sector_size.max(u64::from(entry_size));
    let mut buf = vec![0; step as usize];
    for (number, done) in (0..).zip((0..array_size).step_by(buf.len())) {
        let lba = array.checked_add(number * (step / disk.sector_size));
        let Some(lba) = lba.filter(|lba| *lba > 1) else {
            return Err(TableError::Damaged("the GPT entries are not where they can be"));
        };
        if !disk.sectors(&mut buf, lba)? {
            return Err(TableError::Damaged("the GPT entries are past the end of the disk"));
        }
        let used = &buf[..(array_size - done).min(step) as usize];
        crc.update(used);
        for (i, entry) in used.chunks_exact(entry_size as usize).enumerate() {
            let number = done / u64::from(entry_size) + i as u64 + 1;
            partitions.extend(parse_entry(entry, number as u32, disk.sector_size));
        }
    }
    if crc.finalize() != u32_at(&header, 88) {
        return Err(TableError::Damaged("the checksum of the GPT entries is wrong"));
    }
    Ok(Some(partitions))
}

fn parse_entry(entry: &[u8], number: u32, sector_size: u64) -> Option<Partition> {
    let kind = Guid(bytes(entry, 0));
    let (first, last) = (u64_at(entry, 32), u64_at(entry, 40));
    let sectors = last.checked_sub(first)?.checked_add(1)?;
    let start = first.checked_mul(sector_size)?;
    let length = sectors.checked_mul(sector_size)?;
    start.checked_add(length)?;
    (kind != Guid::NIL).then_some(Partition { number, start, length, kind: Kind::Gpt(kind) })
}

/// None when a number passes what a disk can have.
pub(crate) fn layout(partitions: &[NewPartition], guid: Guid) -> Option<Layout> {
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
