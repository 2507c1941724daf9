//! The disklabel of the BSD systems, on a disk of its own or inside a slice, which is what they call a partition of an MBR.

use super::{Kind, Partition, SECTOR, Scheme, Table, TableError};
use crate::disk::{Disk, u16_at, u32_at};

const MAGIC: u32 = 0x8256_4557;
/// Where labels are, in bytes: on most machines, and on those that boot from the first sector.
const PLACES: [u64; 3] = [512, 64, 0];
/// Where the entries begin, and the size of one.
const ENTRIES: usize = 148;
const ENTRY: usize = 16;
/// As many as the largest labels have.
const MAX_ENTRIES: usize = 22;
const UNUSED: u8 = 0;
/// By custom this entry is the whole disk, or the slice.
const WHOLE: usize = 2;

/// A label with all entries there may be.
const LABEL: usize = ENTRIES + MAX_ENTRIES * ENTRY;

/// Types of slices that may have a label in them: FreeBSD, OpenBSD and NetBSD.
const SLICES: [(u8, &str); 3] = [(0xa5, "FreeBSD"), (0xa6, "OpenBSD"), (0xa9, "NetBSD")];

struct Label {
    bytes: [u8; LABEL],
    entries: usize,
    /// It says that there are more.
    cut: bool,
}

impl Label {
    /// The used entries: index, start and length in sectors, type.
    fn used(&self) -> impl Iterator<Item = (usize, u64, u64, u8)> + '_ {
        (0..self.entries)
            .map(|index| (index, &self.bytes[ENTRIES + index * ENTRY..]))
            .map(|(index, entry)| (index, u32_at(entry, 4).into(), u32_at(entry, 0).into(), entry[12]))
            .filter(|(_, _, length, kind)| *length > 0 && *kind != UNUSED)
    }
}

/// The label of the part of the disk that starts at a byte.
fn find<E>(disk: &mut Disk<'_, E>, start: u64) -> Result<Option<Label>, TableError<E>> {
    for place in PLACES {
        let Some(at) = start.checked_add(place) else { continue };
        let Some(bytes) = disk.array::<LABEL>(at)? else { continue };
        if u32_at(&bytes, 0) != MAGIC || u32_at(&bytes, 132) != MAGIC {
            continue;
        }
        let claimed = usize::from(u16_at(&bytes, 138));
        let entries = claimed.min(MAX_ENTRIES);
        // The checksum does not count: that of parted(8) is wrong. The magic number stands there twice.
        return Ok(Some(Label { bytes, entries, cut: claimed > entries }));
    }
    Ok(None)
}

/// A disk that has a label and no MBR. `a` is partition 1.
pub(super) fn parse<E>(
    disk: &mut Disk<'_, E>,
    _: &[u8; 512],
    sizes: &[u64],
) -> Result<Option<Table>, TableError<E>> {
    let Some(label) = find(disk, 0)? else { return Ok(None) };
    let named = u64::from(u32_at(&label.bytes, 40));
    let size = sizes.iter().copied().find(|size| *size == named).or(sizes.first().copied()).unwrap_or(SECTOR);
    let mut table = Table::new(Scheme::Bsd, size);
    if label.cut {
        table.warn(format!("the BSD disklabel claims more than {MAX_ENTRIES} entries: those are ignored"));
    }
    for (index, start, length, kind) in label.used() {
        let whole = start == 0 && length.saturating_mul(size) >= disk.size / size * size;
        if index == WHOLE && whole {
            continue;
        }
        let number = index as u32 + 1;
        table.add(number, Partition::from_sectors(number, start, length, size, Kind::Bsd(kind)));
    }
    Ok(Some(table))
}

/// Adds the partitions of the labels in the slices of an MBR, numbered as Linux does, after all others.
pub(super) fn parse_slices<E>(disk: &mut Disk<'_, E>, table: &mut Table) -> Result<(), TableError<E>> {
    let mut number = table.partitions.iter().map(|partition| partition.number + 1).max().unwrap_or(1).max(5);
    let slices: Vec<_> = table.partitions.iter().filter(|slice| slice.number <= 4).cloned().collect();
    for slice in slices {
        let Some((_, system)) = SLICES.iter().find(|(kind, _)| slice.kind == Kind::Mbr(*kind)) else {
            continue;
        };
        let Some(label) = find(disk, slice.start)? else { continue };
        if label.cut {
            table.warn(format!(
                "the BSD disklabel in partition {} claims more than {MAX_ENTRIES} entries: those are ignored",
                slice.number
            ));
        }
        // Newer versions of FreeBSD count from the start of the slice; the entry for all of it shows that.
        let relative = *system == "FreeBSD" && u32_at(&label.bytes, ENTRIES + WHOLE * ENTRY + 4) == 0;
        let base = if relative { slice.start } else { 0 };
        for (index, start, length, kind) in label.used() {
            let found = Partition::from_sectors(number, start, length, table.sector_size, Kind::Bsd(kind))
                .and_then(|found| {
                    let start = base.checked_add(found.start)?;
                    start.checked_add(found.length)?;
                    Some(Partition { start, slice: Some(slice.number), ..found })
                });
            let end = slice.start + slice.length;
            match found {
                Some(found) if found.start == slice.start && found.length == slice.length => {}
                Some(found) if found.start >= slice.start && found.start + found.length <= end => {
                    table.partitions.push(found);
                    number += 1;
                }
                // What is outside of the slice is not the label's to give, but for the whole disk by custom.
                _ if index == WHOLE || index == WHOLE + 1 => {}
                _ => table.warn(format!(
                    "partition {} of the BSD disklabel in partition {} is not within that and is ignored",
                    char::from(b'a' + index as u8),
                    slice.number
                )),
            }
        }
    }
    Ok(())
}
