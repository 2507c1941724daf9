//! The file systems of Apple's and of the BSD systems.

use super::{Content, Found, Probe, uuid};
use crate::disk::{bytes, text_at, u32_at};

/// Where UFS may have its superblock, and where in it the magic number is.
const UFS: [u64; 4] = [8 << 10, 64 << 10, 0, 256 << 10];
const UFS_MAGIC: usize = 1372;

pub(super) fn probe<E>(probe: &mut Probe<'_, '_, E>) -> Found<E> {
    if let Some(block) = probe.array::<128>(0)?
        && &block[32..36] == b"NXSB"
    {
        return Ok(Some(Content::file_system("apfs").uuid(uuid(bytes(&block, 72)))));
    }
    if let Some(block) = probe.array::<512>(1024)? {
        match (&block[..2], &block[124..126]) {
            (b"H+", _) | (b"HX", _) | (b"BD", b"H+") => return Ok(Some(Content::file_system("hfsplus"))),
            // The sizes of blocks are multiples of 512.
            (b"BD", _) if block[20..24] != [0; 4] && block[22] & 1 == 0 && block[23] == 0 => {
                let length = usize::from(block[36]).min(27);
                return Ok(Some(Content::file_system("hfs").label(text_at(&block, 37, length))));
            }
            _ => {}
        }
    }
    for at in UFS {
        let Some(block) = probe.array::<1376>(at)? else { continue };
        if matches!(u32_at(&block, UFS_MAGIC), 0x0001_1954 | 0x1954_0119 | 0x5419_0100 | 0x1901_5419) {
            let (first, second) = (u32_at(&block, 144), u32_at(&block, 148));
            let id = (first != 0 || second != 0).then(|| format!("{first:08x}{second:08x}"));
            return Ok(Some(Content::file_system("ufs").uuid(id).label(text_at(&block, 680, 32))));
        }
    }
    Ok(None)
}
