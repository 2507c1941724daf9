//! LVM2: what is written on the physical volumes of a volume group.

use crate::disk::{bytes, u64_at};

const SECTOR: u64 = 512;
/// The label is in one of the first sectors.
const PLACES: u64 = 4;

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
    let offset = u32::from_le_bytes(bytes(block, 20)) as usize;
    let is_label = block.starts_with(b"LABELONE") && &block[24..32] == b"LVM2 001";
    (is_label && u64_at(block, 8) == sector && (32..=480).contains(&offset)).then_some(offset)
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
