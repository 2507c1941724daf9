//! LVM2: what is written on the physical volumes of a volume group, and where the bytes of its logical volumes are.
//!
//! Each physical volume has a label, a header, and usually a copy of the group's metadata, which is text with a checksum.
//! Linear and striped volumes are understood. Others are named, and why they are not shown.

use crate::disk::{Disk, Read, bytes, u32_at, u64_at};

mod assemble;
mod group;
mod text;

pub use assemble::{Assembly, assemble};
pub use group::{Group, Member, Segment, Volume};

const SECTOR: u64 = 512;
/// The label is in one of the first sectors.
const PLACES: u64 = 4;
/// What checksums start with.
const INITIAL: u32 = 0xf597_a6cf;
const METADATA: &[u8; 16] = b" LVM2 x[5A%r0N*>";
/// The largest metadata that are read, far more than groups have.
const MAX_METADATA: u64 = 16 << 20;
/// The header of a metadata area.
const AREA: u64 = 512;
/// Areas that a header may list.
const MAX_AREAS: usize = 16;

/// What a disk that is a physical volume says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PhysicalVolume {
    /// Its identifier.
    pub id: String,
    /// The group that it belongs to, by its newest metadata. None: it has none, and others know.
    pub group: Option<Group>,
    /// What is wrong with it.
    pub warning: Option<String>,
}

/// Reads what a disk of `size` bytes says as a physical volume. None: it is none. `read` fills a buffer from an offset in
/// bytes that is within the disk. Memory is bounded.
///
/// # Errors
/// Those of `read`.
pub fn read_physical_volume<E>(
    size: u64,
    mut read: impl FnMut(&mut [u8], u64) -> Result<(), E>,
) -> Result<Option<PhysicalVolume>, E> {
    let read: &mut Read<'_, E> = &mut read;
    let mut disk = Disk { size, read };
    for sector in 0..PLACES {
        let Some(block) = disk.array::<512>(sector * SECTOR)? else { break };
        let Some(at) = header(&block, sector) else { continue };
        let mut volume = PhysicalVolume { id: id(&bytes(&block, at)), group: None, warning: None };
        if checksum(&block[20..]) != u32_at(&block, 16) {
            volume.warning = Some("the checksum of the LVM label is wrong".into());
        }
        // Two lists of offset and size, each with a pair of zeroes at the end: data areas, metadata areas.
        let pair =
            |place: usize| (u64_at(&block, at + 40 + 16 * place), u64_at(&block, at + 48 + 16 * place));
        let end_of_data = (0..MAX_AREAS).find(|place| pair(*place).0 == 0).unwrap_or(MAX_AREAS);
        for place in end_of_data + 1..end_of_data + 1 + MAX_AREAS {
            let (start, length) = pair(place);
            if start == 0 || length == 0 {
                break;
            }
            match read_area(&mut disk, start, length)? {
                Ok(Some(group))
                    if volume.group.as_ref().is_none_or(|known| known.sequence < group.sequence) =>
                {
                    volume.group = Some(group);
                }
                Ok(_) => {}
                Err(warning) => volume.warning = Some(warning),
            }
        }
        return Ok(Some(volume));
    }
    Ok(None)
}

/// The group in a metadata area. Ok(None): it holds none.
fn read_area<E>(disk: &mut Disk<'_, E>, start: u64, length: u64) -> Result<Result<Option<Group>, String>, E> {
    let fail = |what: &str| Ok(Err(format!("the LVM metadata are damaged: {what}")));
    let Some(header) = disk.array::<{ AREA as usize }>(start)? else { return fail("they are past the end") };
    if header[4..20] != *METADATA || checksum(&header[4..]) != u32_at(&header, 0) {
        return fail("the checksum of their header is wrong");
    }
    let (offset, size, sum) = (u64_at(&header, 40), u64_at(&header, 48), u32_at(&header, 56));
    if offset == 0 || size == 0 {
        return Ok(Ok(None));
    }
    if offset < AREA || offset >= length || size > length - AREA || size > MAX_METADATA {
        return fail("they are not where they can be");
    }
    // The area is a ring.
    let first = size.min(length - offset);
    let mut text = vec![0; size as usize];
    let (head, tail) = text.split_at_mut(first as usize);
    let filled = match start.checked_add(offset) {
        Some(at) => disk.fill(head, at)? && (tail.is_empty() || disk.fill(tail, start + AREA)?),
        None => false,
    };
    if !filled {
        return fail("they are past the end");
    }
    if checksum(&text) != sum {
        return fail("their checksum is wrong");
    }
    Ok(match text::parse(&text).and_then(|parsed| Group::from_text(&parsed)) {
        Some(group) => Ok(Some(group)),
        None => Err("the LVM metadata cannot be understood".into()),
    })
}

/// The checksum is the usual one without its inversions.
fn checksum(bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(!INITIAL);
    hasher.update(bytes);
    !hasher.finalize()
}

/// The identifier of the physical volume that a disk is, which `read` reads 512 bytes of at an offset. None: it is none.
pub(crate) fn find_id<E>(
    mut read: impl FnMut(u64) -> Result<Option<[u8; 512]>, E>,
) -> Result<Option<String>, E> {
    for sector in 0..PLACES {
        let Some(block) = read(sector * SECTOR)? else { break };
        if let Some(header) = header(&block, sector) {
            return Ok(Some(id(&bytes(&block, header))));
        }
    }
    Ok(None)
}

/// Where the header of a physical volume is in a sector with a label.
fn header(block: &[u8; 512], sector: u64) -> Option<usize> {
    let offset = u32_at(block, 20) as usize;
    let is_label = block.starts_with(b"LABELONE") && &block[24..32] == b"LVM2 001";
    (is_label && u64_at(block, 8) == sector && (32..=440).contains(&offset)).then_some(offset)
}

/// An identifier as LVM writes it: in groups of 6, 4, 4, 4, 4, 4 and 6 letters and digits.
fn id(bytes: &[u8; 32]) -> String {
    let mut text = String::with_capacity(38);
    for (i, byte) in bytes.iter().enumerate() {
        if matches!(i, 6 | 10 | 14 | 18 | 22 | 26) {
            text.push('-');
        }
        text.push(char::from(*byte));
    }
    text.escape_default().to_string()
}

#[cfg(test)]
mod tests;
