//! The label of SunOS, Solaris and Linux on SPARC: geometry and 8 slices in the first sector, counted in cylinders.

use super::{Kind, Partition, SECTOR, Scheme, Table, TableError};
use crate::disk::{Disk, be16_at, be32_at};

const MAGIC: u16 = 0xdabe;
/// What says that there are tags.
const SANITY: u32 = 0x600d_deee;
const VERSION: u32 = 1;
const SLICES: usize = 8;
/// The tag of the slice that is the whole disk.
const WHOLE_DISK: u16 = 5;

pub(super) fn parse<E>(
    _: &mut Disk<'_, E>,
    first: &[u8; 512],
    sizes: &[u64],
) -> Result<Option<Table>, TableError<E>> {
    let checksum = (0..512).step_by(2).fold(0, |sum, at| sum ^ be16_at(first, at));
    if be16_at(first, 508) != MAGIC || !sizes.contains(&SECTOR) {
        return Ok(None);
    }
    if checksum != 0 {
        return Err(TableError::Damaged("the checksum of the Sun label is wrong".into()));
    }
    let mut table = Table::new(Scheme::Sun, SECTOR);
    let cylinder = u64::from(be16_at(first, 436)) * u64::from(be16_at(first, 438));
    let has_tags = be32_at(first, 188) == SANITY && be32_at(first, 128) == VERSION;
    for (number, slice) in (1..).zip(0..SLICES) {
        let tag = if has_tags { be16_at(first, 142 + 4 * slice) } else { 0 };
        let start = u64::from(be32_at(first, 444 + 8 * slice));
        let length = u64::from(be32_at(first, 448 + 8 * slice));
        // Without tags, the third is by custom the whole disk.
        if length == 0 || tag == WHOLE_DISK || (!has_tags && slice == 2 && start == 0) {
            continue;
        }
        let partition = Partition::from_sectors(number, start * cylinder, length, SECTOR, Kind::Sun(tag));
        table.add(number, partition);
    }
    Ok(Some(table))
}
