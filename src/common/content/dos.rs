//! The file systems of DOS and Windows.

use super::{Content, Found, Probe, utf16};
use crate::disk::{text_at, u16_at, u32_at, u64_at};

/// How much of a root directory is searched for a label.
const DIRECTORY: u64 = 64 << 10;

pub(super) fn probe<E>(probe: &mut Probe<'_, '_, E>) -> Found<E> {
    let Some(boot) = probe.array::<512>(0)? else { return Ok(None) };
    match &boot[3..11] {
        b"NTFS    " => ntfs(probe, &boot),
        b"EXFAT   " => exfat(probe, &boot),
        b"ReFS\0\0\0\0" => Ok(Some(Content::file_system("ReFS"))),
        _ => fat(probe, &boot),
    }
}

fn serial(number: u32) -> Option<String> {
    (number != 0).then(|| format!("{:04X}-{:04X}", number >> 16, number & 0xffff))
}

fn fat<E>(probe: &mut Probe<'_, '_, E>, boot: &[u8; 512]) -> Found<E> {
    let (sector, cluster) = (u16_at(boot, 11), boot[13]);
    let (reserved, fats, media) = (u16_at(boot, 14), boot[16], boot[21]);
    let is_32 = &boot[0x52..0x57] == b"FAT32";
    let named = is_32 || (&boot[0x36..0x39] == b"FAT" && boot[0x39..0x3b] != *b"32");
    // Without a name, only with all other signs: DOS before version 4.
    let jumps = matches!(boot[0], 0xeb | 0xe9) && boot[510..512] == [0x55, 0xaa];
    let sane = matches!(sector, 512 | 1024 | 2048 | 4096)
        && cluster.is_power_of_two()
        && reserved != 0
        && (1..=4).contains(&fats)
        && (media >= 0xf8 || media == 0xf0);
    if !sane || !(named || (jumps && u16_at(boot, 22) != 0 && u16_at(boot, 17) != 0)) {
        return Ok(None);
    }
    let sector = u64::from(sector);
    let long = u16_at(boot, 22) == 0;
    let fat_sectors = if long { u64::from(u32_at(boot, 36)) } else { u64::from(u16_at(boot, 22)) };
    let data = (u64::from(reserved) + u64::from(fats) * fat_sectors) * sector;
    let (root, length) = if long {
        let cluster_size = u64::from(cluster) * sector;
        let first = u64::from(u32_at(boot, 44)).saturating_sub(2);
        (data + first * cluster_size, cluster_size)
    } else {
        (data, u64::from(u16_at(boot, 17)) * 32)
    };
    let (has_serial, number) = if long {
        (matches!(boot[66], 0x28 | 0x29), u32_at(boot, 67))
    } else {
        (matches!(boot[38], 0x28 | 0x29), u32_at(boot, 39))
    };
    let label = fat_label(&probe.some(root, length.min(DIRECTORY))?);
    let content = Content::file_system("vfat").uuid(serial(number).filter(|_| has_serial));
    Ok(Some(content.label(label)))
}

/// The volume label in a root directory.
fn fat_label(directory: &[u8]) -> String {
    let entries = directory.chunks_exact(32).take_while(|entry| entry[0] != 0);
    let is_label = |entry: &&[u8]| {
        let attributes = entry[11];
        entry[0] != 0xe5 && attributes & 0x3f != 0x0f && attributes & 0x18 == 0x08 && u16_at(entry, 26) == 0
    };
    entries.filter(is_label).map(|entry| text_at(entry, 0, 11)).next().unwrap_or_default()
}

fn exfat<E>(probe: &mut Probe<'_, '_, E>, boot: &[u8; 512]) -> Found<E> {
    let (sector_shift, cluster_shift) = (u32::from(boot[108]), u32::from(boot[109]));
    if !(9..=12).contains(&sector_shift) || sector_shift + cluster_shift > 25 {
        return Ok(None);
    }
    let cluster = 1 << (sector_shift + cluster_shift);
    let root = u64::from(u32_at(boot, 96)).saturating_sub(2) * cluster
        + (u64::from(u32_at(boot, 88)) << sector_shift);
    let directory = probe.some(root, cluster.min(DIRECTORY))?;
    let entries = directory.chunks_exact(32).take_while(|entry| entry[0] != 0);
    let label = entries.filter(|entry| entry[0] == 0x83).map(|entry| {
        let units = usize::from(entry[1]).min(11);
        utf16(&entry[2..2 + 2 * units])
    });
    let label = label.map(|label| label.trim_end().to_owned()).next().unwrap_or_default();
    Ok(Some(Content::file_system("exfat").uuid(serial(u32_at(boot, 100))).label(label)))
}

fn ntfs<E>(probe: &mut Probe<'_, '_, E>, boot: &[u8; 512]) -> Found<E> {
    let sector = u64::from(u16_at(boot, 11));
    if !matches!(sector, 256 | 512 | 1024 | 2048 | 4096) {
        return Ok(None);
    }
    // From 128 up, the exponent of a power of 2, negative.
    let cluster = match boot[13] {
        n @ 0..=128 => sector * u64::from(n),
        n => sector << u32::from(n).abs_diff(256).min(20),
    };
    let record = match boot[64] as i8 {
        n @ 1.. => cluster * n.unsigned_abs() as u64,
        n => 1 << n.unsigned_abs().min(16),
    };
    // The fourth file is the volume; its name is an attribute.
    let at = u64_at(boot, 48).saturating_mul(cluster).saturating_add(3 * record);
    let record = probe.some(at, record.clamp(512, 4096))?;
    let id = format!("{:016X}", u64_at(boot, 72));
    let content = Content::file_system("ntfs").uuid(Some(id));
    Ok(Some(content.label(ntfs_label(&record).unwrap_or_default())))
}

fn ntfs_label(record: &[u8]) -> Option<String> {
    const VOLUME_NAME: u32 = 0x60;
    if !record.starts_with(b"FILE") {
        return None;
    }
    let mut at = usize::from(u16_at(record, 20));
    // Each has at least 24 bytes, so that it ends.
    while let Some(attribute) = record.get(at..).filter(|rest| rest.len() >= 24) {
        let (kind, length) = (u32_at(attribute, 0), u32_at(attribute, 4) as usize);
        if kind == u32::MAX || length < 24 {
            return None;
        }
        if kind == VOLUME_NAME {
            let (size, start) = (u32_at(attribute, 16) as usize, usize::from(u16_at(attribute, 20)));
            return attribute.get(start..start.checked_add(size)?).map(utf16);
        }
        at = at.checked_add(length)?;
    }
    None
}
