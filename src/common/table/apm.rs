//! The Apple Partition Map: a driver descriptor in the first block, and from the second on one entry in each block. The
//! map itself is a partition of its own.

use super::{Kind, Partition, Scheme, Table, TableError};
use crate::disk::{Disk, be16_at, be32_at, text_at};

const DESCRIPTOR: &[u8] = b"ER";
const ENTRY: &[u8] = b"PM";
/// More entries than any map has.
const MAX_ENTRIES: u32 = 1024;

/// Entries of these types are no partitions.
const FREE: [&str; 2] = ["Apple_Free", "Apple_Void"];

pub(super) fn parse<E>(
    disk: &mut Disk<'_, E>,
    first: &[u8; 512],
    sizes: &[u64],
) -> Result<Option<Table>, TableError<E>> {
    if !first.starts_with(DESCRIPTOR) {
        return Ok(None);
    }
    // The size of blocks that the descriptor has, unless the map is elsewhere, as on many CDs.
    let named = u64::from(be16_at(first, 2));
    let likely = sizes.iter().copied().filter(|size| *size == named);
    for size in likely.chain(sizes.iter().copied().filter(|size| *size != named)) {
        let head = disk.sector::<512>(1, size)?;
        let Some(head) = head.filter(|head| head.starts_with(ENTRY)) else { continue };
        let claimed = be32_at(&head, 4);
        let mut table = Table::new(Scheme::Apm, size);
        let entries = claimed.min(MAX_ENTRIES);
        if claimed > MAX_ENTRIES {
            table.warn(format!("the map claims {claimed} entries: only {MAX_ENTRIES} are read"));
        }
        for number in 1..=entries {
            let entry = disk.sector::<512>(number.into(), size)?;
            let Some(entry) = entry.filter(|entry| entry.starts_with(ENTRY)) else {
                table.warn(format!("the map should have {entries} entries, but has {}", number - 1));
                break;
            };
            parse_entry(&mut table, &entry, number);
        }
        return Ok(Some(table));
    }
    Ok(None)
}

fn parse_entry(table: &mut Table, entry: &[u8], number: u32) {
    let (start, length) = (be32_at(entry, 8), be32_at(entry, 12));
    let (name, kind) = (text_at(entry, 16, 32), text_at(entry, 48, 32));
    if FREE.contains(&kind.as_str()) {
        return;
    }
    let partition =
        Partition::from_sectors(number, start.into(), length.into(), table.sector_size, Kind::Apm(kind));
    table.add(number, partition.map(|partition| Partition { name, ..partition }));
}
