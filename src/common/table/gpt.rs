//! The GPT: a header in the second sector, an array of entries, and a copy of both at the end of the disk.
//!
//! Each copy has checksums. The first that is right counts; when that is the one at the end, or when the two say different
//! things, a warning tells.

use super::{Kind, Partition, SECTOR, Scheme, Table, TableError};
use crate::{
    Guid,
    disk::{Disk, bytes, u32_at, u64_at},
};

pub(crate) const SIGNATURE: &[u8; 8] = b"EFI PART";
/// Size of the fields of a header that mean something.
pub(crate) const HEADER: usize = 92;
pub(crate) const ENTRY: u32 = 128;
/// The largest array that is read: 32768 entries of the usual size.
const MAX_ARRAY: u64 = 4 << 20;
const MAX_ENTRY: u32 = 4096;
/// The array is read in pieces of this many bytes, which are whole entries and whole sectors.
const PIECE: usize = 16 << 10;

/// What there is of a GPT.
pub(super) enum Found {
    Table(Table),
    /// There is one, but no copy of it is right; the text says how the first is damaged.
    Damaged(String),
    Nothing,
}

/// One copy of the table.
struct Copy {
    table: Table,
    guid: Guid,
    /// Where the other copy is, by sector.
    other: u64,
    array_checksum: u32,
    /// Sectors that the table says that there are.
    sectors: u64,
}

/// Why a copy cannot be used.
enum Fault {
    /// There is none.
    Absent,
    /// The text says how it is damaged. Where the other copy should be, if that is to be trusted.
    Damaged(String, Option<u64>),
}

/// Looks for a table in sectors of each of `sizes`. Only where the MBR has `announced` one, or a signature is left of the
/// first copy, the second counts alone.
pub(super) fn parse<E>(
    disk: &mut Disk<'_, E>,
    sizes: &[u64],
    announced: bool,
) -> Result<Found, TableError<E>> {
    let mut faults = Vec::new();
    for &size in sizes {
        match parse_copy(disk, size, 1)? {
            Ok(mut primary) => {
                compare(disk, &mut primary)?;
                return Ok(Found::Table(primary.table));
            }
            Err(Fault::Damaged(how, other)) => faults.push((size, how, other)),
            Err(Fault::Absent) => {}
        }
    }
    let how = match faults.first() {
        Some((_, how, _)) => format!("the primary GPT is damaged ({how})"),
        None if announced => "the MBR announces a GPT, but there is none at the start of the disk".into(),
        None => return Ok(Found::Nothing),
    };
    // The sizes for which there was something first.
    let likely = faults.iter().map(|(size, ..)| *size);
    let others = sizes.iter().copied().filter(|size| !faults.iter().any(|(faulty, ..)| faulty == size));
    for size in likely.chain(others) {
        let last = (disk.size / size).checked_sub(1);
        let named = faults.iter().find(|(faulty, ..)| *faulty == size).and_then(|(.., other)| *other);
        for lba in [last, named.filter(|lba| Some(*lba) != last)].into_iter().flatten() {
            if let Ok(mut backup) = parse_copy(disk, size, lba)? {
                backup.table.warn(format!("{how}: the backup at the end of the disk is used"));
                return Ok(Found::Table(backup.table));
            }
        }
    }
    Ok(Found::Damaged(how + ", and so is its backup"))
}

/// Warns when the second copy is not as good as the first.
fn compare<E>(disk: &mut Disk<'_, E>, primary: &mut Copy) -> Result<(), TableError<E>> {
    let size = primary.table.sector_size;
    let there = disk.size / size;
    let warning = match parse_copy(disk, size, primary.other)? {
        Ok(backup) => {
            if backup.array_checksum == primary.array_checksum && backup.guid == primary.guid {
                return Ok(());
            }
            "the primary GPT and its backup say different things: the primary is used".into()
        }
        Err(_) if primary.other >= there => format!(
            "the disk has {} bytes, but {} when the GPT was made: its end, with the backup of the GPT, is missing",
            disk.size,
            primary.sectors.saturating_mul(size)
        ),
        Err(Fault::Absent) => "there is no backup of the GPT where it should be".into(),
        Err(Fault::Damaged(how, _)) => format!("the backup of the GPT is damaged ({how})"),
    };
    primary.table.warn(warning);
    Ok(())
}

/// Reads the copy the header of which is in sector `lba`.
fn parse_copy<E>(
    disk: &mut Disk<'_, E>,
    sector_size: u64,
    lba: u64,
) -> Result<Result<Copy, Fault>, TableError<E>> {
    let Some(header) = disk.sector::<{ SECTOR as usize }>(lba, sector_size)? else {
        return Ok(Err(Fault::Absent));
    };
    if !header.starts_with(SIGNATURE) {
        return Ok(Err(Fault::Absent));
    }
    let damaged = |how: &str, other| Ok(Err(Fault::Damaged(how.into(), other)));
    let header_size = u32_at(&header, 12) as usize;
    if !(HEADER..=header.len()).contains(&header_size) {
        return damaged("the size of the header is wrong", None);
    }
    let mut sealed = header;
    sealed[16..20].fill(0);
    let other = u64_at(&header, 32);
    if crc32fast::hash(&sealed[..header_size]) != u32_at(&header, 16) {
        return damaged("the checksum of the header is wrong", Some(other));
    }
    if u64_at(&header, 24) != lba {
        return damaged("the header belongs to another place", None);
    }
    let (array, entries, entry_size) = (u64_at(&header, 72), u32_at(&header, 80), u32_at(&header, 84));
    let array_size = u64::from(entries) * u64::from(entry_size);
    if !(ENTRY..=MAX_ENTRY).contains(&entry_size) || !entry_size.is_power_of_two() || array_size > MAX_ARRAY {
        return damaged("it has too many or wrongly sized entries", Some(other));
    }
    if array < 2 && array_size > 0 {
        return damaged("the entries are not where they can be", Some(other));
    }
    let guid = Guid(bytes(&header, 56));
    let mut table = Table::new(Scheme::Gpt, sector_size);
    table.uuid = Some(guid.to_string().to_ascii_lowercase());
    let mut crc = crc32fast::Hasher::new();
    let mut buf = vec![0; PIECE];
    for done in (0..array_size).step_by(PIECE) {
        let start = array.checked_mul(sector_size).and_then(|start| start.checked_add(done));
        let piece = &mut buf[..(array_size - done).min(PIECE as u64) as usize];
        let filled = match start {
            Some(start) => disk.fill(piece, start)?,
            None => false,
        };
        if !filled {
            return damaged("the entries are past the end of the disk", Some(other));
        }
        crc.update(piece);
        for (i, entry) in piece.chunks_exact(entry_size as usize).enumerate() {
            let number = done / u64::from(entry_size) + i as u64 + 1;
            parse_entry(&mut table, entry, number as u32);
        }
    }
    let array_checksum = u32_at(&header, 88);
    if crc.finalize() != array_checksum {
        return damaged("the checksum of the entries is wrong", Some(other));
    }
    let sectors = lba.max(other).saturating_add(1);
    Ok(Ok(Copy { table, guid, other, array_checksum, sectors }))
}

fn parse_entry(table: &mut Table, entry: &[u8], number: u32) {
    let kind = Guid(bytes(entry, 0));
    if kind == Guid::NIL {
        return;
    }
    let (first, last) = (u64_at(entry, 32), u64_at(entry, 40));
    let sectors = last.checked_sub(first).and_then(|sectors| sectors.checked_add(1));
    let partition = sectors.and_then(|sectors| {
        Partition::from_sectors(number, first, sectors, table.sector_size, Kind::Gpt(kind))
    });
    let units = entry[56..128].chunks_exact(2).map(|unit| u16::from_le_bytes(bytes(unit, 0)));
    let name = char::decode_utf16(units.take_while(|unit| *unit != 0));
    let name = name.map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER)).collect();
    let uuid = Guid(bytes(entry, 16)).to_string().to_ascii_lowercase();
    table.add(number, partition.map(|partition| Partition { name, uuid: Some(uuid), ..partition }));
}
