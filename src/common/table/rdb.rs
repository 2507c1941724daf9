//! The Rigid Disk Block of the Amiga: somewhere in the first 16 blocks, with a linked list of blocks that have a partition
//! each, counted in cylinders.

use super::{Kind, Partition, SECTOR, Scheme, Table, TableError};
use crate::disk::{Disk, be32_at};

/// Where the first block may be.
const PLACES: u64 = 16;
/// The end of a list.
const NIL: u32 = u32::MAX;
/// More partitions than anybody has.
const MAX_PARTITIONS: u32 = 256;

pub(super) fn parse<E>(
    disk: &mut Disk<'_, E>,
    _: &[u8; 512],
    sizes: &[u64],
) -> Result<Option<Table>, TableError<E>> {
    let mut found = None;
    for lba in 0..PLACES {
        let Some(block) = disk.sector::<512>(lba, SECTOR)? else { break };
        if block.starts_with(b"RDSK") && is_sound(&block) {
            found = Some(block);
            break;
        }
    }
    let Some(head) = found else { return Ok(None) };
    let named = u64::from(be32_at(&head, 16));
    let Some(size) = sizes.iter().copied().find(|size| *size == named) else {
        return Err(TableError::Damaged(format!("the Amiga RDB has blocks of {named} bytes")));
    };
    let mut table = Table::new(Scheme::Amiga, size);
    let mut next = be32_at(&head, 28);
    let mut number = 1;
    while next != NIL {
        let block = disk.sector::<512>(next.into(), size)?;
        let Some(block) = block.filter(|block| block.starts_with(b"PART") && is_sound(block)) else {
            table.warn(format!("the list of partitions is broken: there is none in block {next}"));
            break;
        };
        if number > MAX_PARTITIONS {
            table.warn(format!("the list of partitions has no end after {MAX_PARTITIONS}"));
            break;
        }
        parse_entry(&mut table, &block, number);
        number += 1;
        next = be32_at(&block, 16);
    }
    Ok(Some(table))
}

/// The words of a block, as many as it says, add up to 0.
fn is_sound(block: &[u8; 512]) -> bool {
    let words = be32_at(block, 4) as usize;
    (5..=128).contains(&words)
        && (0..words).fold(0_u32, |sum, i| sum.wrapping_add(be32_at(block, 4 * i))) == 0
}

fn parse_entry(table: &mut Table, block: &[u8], number: u32) {
    let environment = |index: usize| u64::from(be32_at(block, 128 + 4 * index));
    let (surfaces, sectors_per_track) = (environment(3), environment(5));
    let (low, high) = (environment(9), environment(10));
    let partition = || {
        let cylinder = surfaces.checked_mul(sectors_per_track)?;
        let start = low.checked_mul(cylinder)?;
        let length = high.checked_add(1)?.checked_sub(low)?.checked_mul(cylinder)?;
        let kind = Kind::Amiga(be32_at(block, 128 + 4 * 16).to_be_bytes());
        Partition::from_sectors(number, start, length, table.sector_size, kind)
    };
    // Its length, and the letters.
    let length = usize::from(block[36]).min(31);
    let name = String::from_utf8_lossy(&block[37..37 + length]).into_owned();
    let partition = partition().map(|partition| Partition { name, ..partition });
    table.add(number, partition);
}
