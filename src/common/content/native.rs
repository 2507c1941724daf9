//! The file systems of Linux, and swap space.

use super::{Content, Found, Probe, Usage, utf16, uuid};
use crate::disk::{bytes, text_at, u16_at, u32_at};

/// Sizes of pages, at the end of the first of which swap space has its signature.
const PAGES: [u64; 5] = [4096, 8192, 16384, 32768, 65536];
const BCACHEFS: [u8; 16] =
    [0xc6, 0x85, 0x73, 0xf6, 0x66, 0xce, 0x90, 0xa9, 0xd9, 0x6a, 0x60, 0xcf, 0x80, 0x3d, 0xf7, 0xef];

pub(super) fn probe<E>(probe: &mut Probe<'_, '_, E>) -> Found<E> {
    if let Some(swap) = swap(probe)? {
        return Ok(Some(swap));
    }
    if let Some(block) = probe.array::<512>(0)?
        && let Some(content) = at_the_start(&block)
    {
        return Ok(Some(content));
    }
    if let Some(block) = probe.array::<1024>(1024)?
        && let Some(content) = after_the_boot_block(&block)
    {
        return Ok(Some(content));
    }
    if let Some(block) = probe.array::<256>(4096)?
        && block[24..40] == BCACHEFS
    {
        let content = Content::file_system("bcachefs").uuid(uuid(bytes(&block, 56)));
        return Ok(Some(content.label(text_at(&block, 72, 32))));
    }
    if let Some(block) = probe.array::<256>(32768)?
        && block.starts_with(b"JFS1")
    {
        let content = Content::file_system("jfs").uuid(uuid(bytes(&block, 136)));
        return Ok(Some(content.label(text_at(&block, 152, 16))));
    }
    let Some(block) = probe.array::<1024>(65536)? else { return Ok(None) };
    if &block[64..72] == b"_BHRfS_M" {
        let mut content = Content::file_system("btrfs").uuid(uuid(bytes(&block, 32)));
        // Where its log is, if it has one.
        content.needs_recovery = block[96..104] != [0; 8];
        return Ok(Some(content.label(text_at(&block, 299, 256))));
    }
    if [&b"ReIsErFs"[..], b"ReIsEr2Fs", b"ReIsEr3Fs"].iter().any(|magic| block[52..].starts_with(magic)) {
        let content = Content::file_system("reiserfs").uuid(uuid(bytes(&block, 84)));
        return Ok(Some(content.label(text_at(&block, 100, 16))));
    }
    if block.starts_with(&[0x01, 0x16, 0x19, 0x70]) && block[4..8] == [0, 0, 0, 1] {
        return Ok(Some(Content::file_system("gfs2")));
    }
    Ok(None)
}

fn swap<E>(probe: &mut Probe<'_, '_, E>) -> Found<E> {
    for page in PAGES {
        let Some(signature) = probe.array::<10>(page - 10)? else { break };
        match &signature {
            b"SWAPSPACE2" | b"SWAP-SPACE" => {
                let header = probe.array::<64>(1024)?.unwrap_or([0; 64]);
                let content = Content::new("swap", Usage::Other).uuid(uuid(bytes(&header, 12)));
                return Ok(Some(content.label(text_at(&header, 28, 16))));
            }
            b"S1SUSPEND\0" | b"S2SUSPEND\0" | b"ULSUSPEND\0" => {
                return Ok(Some(Content::new("swsuspend", Usage::Other)));
            }
            _ => {}
        }
    }
    Ok(None)
}

fn at_the_start(block: &[u8; 512]) -> Option<Content> {
    if block.starts_with(b"XFSB") {
        let content = Content::file_system("xfs").uuid(uuid(bytes(block, 32)));
        return Some(content.label(text_at(block, 108, 12)));
    }
    if block.starts_with(b"hsqs") || block.starts_with(b"sqsh") {
        let kind = if u16_at(block, 28) >= 4 { "squashfs" } else { "squashfs3" };
        return Some(Content::file_system(kind));
    }
    if block.starts_with(b"-rom1fs-") {
        return Some(Content::file_system("romfs").label(text_at(block, 16, 16)));
    }
    if block.starts_with(&[0xce, 0xfa, 0xad, 0x1b]) {
        return Some(Content::file_system("bfs"));
    }
    if block.starts_with(&[0x45, 0x3d, 0xcd, 0x28]) {
        return Some(Content::file_system("cramfs").label(text_at(block, 48, 16)));
    }
    None
}

/// What has its superblock 1024 bytes from the start.
fn after_the_boot_block(block: &[u8; 1024]) -> Option<Content> {
    if u16_at(block, 56) == 0xef53 {
        return ext(block);
    }
    match u32_at(block, 0) {
        0xf2f5_2010 => {
            let content = Content::file_system("f2fs").uuid(uuid(bytes(block, 108)));
            return Some(content.label(utf16(&block[124..])));
        }
        0xe0f5_e1e2 => {
            let content = Content::file_system("erofs").uuid(uuid(bytes(block, 48)));
            return Some(content.label(text_at(block, 64, 16)));
        }
        _ => {}
    }
    if u16_at(block, 6) == 0x3434 && u16_at(block, 8) >= 240 {
        let content = Content::file_system("nilfs2").uuid(uuid(bytes(block, 152)));
        return Some(content.label(text_at(block, 168, 80)));
    }
    is_minix(block).then(|| Content::file_system("minix"))
}

fn ext(block: &[u8; 1024]) -> Option<Content> {
    const JOURNAL: u32 = 0x4;
    const RECOVER: u32 = 0x4;
    const JOURNAL_DEVICE: u32 = 0x8;
    let (compatible, incompatible, read_only) = (u32_at(block, 92), u32_at(block, 96), u32_at(block, 100));
    let is_journal = incompatible & JOURNAL_DEVICE != 0;
    if (u32_at(block, 0) == 0 && !is_journal) || u32_at(block, 24) > 6 {
        return None;
    }
    // What ext3 knows: file types, recovery, meta block groups; sparse superblocks, large files, trees.
    let old = incompatible & !0x16 == 0 && read_only & !0x7 == 0;
    let mut content = match (is_journal, compatible & JOURNAL != 0) {
        (true, _) => Content::new("jbd", Usage::Other),
        (_, true) if old => Content::file_system("ext3"),
        (_, false) if old && incompatible & RECOVER == 0 => Content::file_system("ext2"),
        _ => Content::file_system("ext4"),
    };
    content.needs_recovery = incompatible & RECOVER != 0;
    Some(content.uuid(uuid(bytes(block, 104))).label(text_at(block, 120, 16)))
}

/// A magic number of 16 bits is not enough: the bitmaps have to fit what they are of.
fn is_minix(block: &[u8; 1024]) -> bool {
    let small = match u16_at(block, 16) {
        0x137f | 0x138f => Some(u32::from(u16_at(block, 2))),
        0x2468 | 0x2478 => Some(u32_at(block, 20)),
        _ => None,
    };
    let (inodes, zones, inode_map, zone_map, first, bits) = match small {
        Some(zones) => (
            u32::from(u16_at(block, 0)),
            zones,
            u16_at(block, 4),
            u16_at(block, 6),
            u16_at(block, 8),
            u64::from(8 * 1024_u32),
        ),
        None if u16_at(block, 24) == 0x4d5a => (
            u32_at(block, 0),
            u32_at(block, 20),
            u16_at(block, 6),
            u16_at(block, 8),
            u16_at(block, 10),
            8 * u64::from(u16_at(block, 28)),
        ),
        None => return false,
    };
    inodes > 0
        && zones > u32::from(first)
        && first > 0
        && u64::from(inode_map) * bits > u64::from(inodes)
        && u64::from(zone_map) * bits >= u64::from(zones - u32::from(first))
}
