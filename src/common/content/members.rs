//! Members of something larger, and what is encrypted.

use super::{Content, Found, Probe, Usage, uuid};
use crate::{
    disk::{be16_at, bytes, text_at, u32_at, u64_at},
    lvm,
};

const MD: u32 = 0xa92b_4efc;
const BCACHE: [u8; 16] =
    [0xc6, 0x85, 0x73, 0xf6, 0x4e, 0x1a, 0x45, 0xca, 0x82, 0x65, 0xf5, 0x7f, 0x48, 0xba, 0x6d, 0x81];

pub(super) fn probe<E>(probe: &mut Probe<'_, '_, E>) -> Found<E> {
    if let Some(content) = md(probe)? {
        return Ok(Some(content));
    }
    if let Some(id) = lvm::find_id(|offset| probe.array(offset))? {
        return Ok(Some(Content::member("LVM2_member").uuid(Some(id))));
    }
    if let Some(block) = probe.array::<512>(0)? {
        if block.starts_with(b"LUKS\xba\xbe") {
            let id = Some(text_at(&block, 168, 40)).filter(|id| !id.is_empty());
            let label = if be16_at(&block, 6) > 1 { text_at(&block, 24, 48) } else { String::new() };
            return Ok(Some(Content::new("crypto_LUKS", Usage::Crypto).uuid(id).label(label)));
        }
        if &block[3..11] == b"-FVE-FS-" {
            return Ok(Some(Content::new("BitLocker", Usage::Crypto)));
        }
        if block.starts_with(b"verity\0\0") && u32_at(&block, 8) == 1 {
            return Ok(Some(Content::new("DM_verity_hash", Usage::Crypto).uuid(uuid(bytes(&block, 16)))));
        }
        if block.starts_with(b"integrt\0") {
            return Ok(Some(Content::new("DM_integrity", Usage::Crypto)));
        }
    }
    if let Some(block) = probe.array::<64>(4096)?
        && block[24..40] == BCACHE
    {
        return Ok(Some(Content::member("bcache").uuid(uuid(bytes(&block, 40)))));
    }
    let end = probe.disk.size & !511;
    if let Some(block) = probe.array::<32>(end.saturating_sub(1024))?
        && block.starts_with(b"Intel Raid ISM Cfg Sig. ")
    {
        return Ok(Some(Content::member("isw_raid_member")));
    }
    Ok(None)
}

/// Linux software RAID: of version 1 at the start, 4 KiB further or near the end; of version 0.90 at the end.
fn md<E>(probe: &mut Probe<'_, '_, E>) -> Found<E> {
    let sectors = probe.disk.size / 512;
    let near_end = (sectors >= 16 + 8).then(|| ((sectors - 16) & !7) * 512);
    for at in [Some(0), Some(4096), near_end].into_iter().flatten() {
        let Some(block) = probe.array::<256>(at)? else { continue };
        if u32_at(&block, 0) == MD
            && u32_at(&block, 4) == 1
            && u64_at(&block, 144).checked_mul(512) == Some(at)
        {
            let content = Content::member("linux_raid_member").uuid(uuid(bytes(&block, 16)));
            return Ok(Some(content.label(text_at(&block, 32, 32))));
        }
    }
    let Some(at) = (probe.disk.size & !0xffff).checked_sub(0x1_0000) else { return Ok(None) };
    let Some(block) = probe.array::<128>(at)? else { return Ok(None) };
    if u32_at(&block, 0) != MD || u32_at(&block, 4) != 0 {
        return Ok(None);
    }
    let mut id = [0; 16];
    id[..4].copy_from_slice(&block[20..24]);
    id[4..].copy_from_slice(&block[52..64]);
    Ok(Some(Content::member("linux_raid_member").uuid(uuid(id))))
}
