//! The file systems of optical discs, which have nothing in the first 32 KiB: that is where partition tables fit.

use super::{Content, Found, Probe};
use crate::disk::{bytes, text_at, u16_at, u32_at};

/// Where volume descriptors begin, and how many are looked at.
const DESCRIPTORS: u64 = 32 << 10;
const MAX_DESCRIPTORS: u64 = 32;

pub(super) fn probe<E>(probe: &mut Probe<'_, '_, E>) -> Found<E> {
    if let Some(content) = udf(probe)? {
        return Ok(Some(content));
    }
    let Some(block) = probe.array::<2048>(DESCRIPTORS)? else { return Ok(None) };
    if &block[1..6] != b"CD001" {
        return Ok(None);
    }
    let label = text_at(&block, 40, 32);
    let id = date(&block[830..847]).or_else(|| date(&block[813..830]));
    Ok(Some(Content::file_system("iso9660").label(label).uuid(id)))
}

/// A date as it stands there, its parts with hyphens between them.
fn date(field: &[u8]) -> Option<String> {
    let digits = std::str::from_utf8(field.get(..16)?).ok()?;
    let is_set = digits.bytes().all(|b| b.is_ascii_digit()) && digits.bytes().any(|b| b != b'0');
    is_set.then(|| {
        let parts = [0..4, 4..6, 6..8, 8..10, 10..12, 12..14, 14..16].map(|range| &digits[range]);
        parts.join("-")
    })
}

fn udf<E>(probe: &mut Probe<'_, '_, E>) -> Found<E> {
    if !is_udf(probe)? {
        return Ok(None);
    }
    let content = Content::file_system("udf");
    for sector in [2048, 512, 4096, 1024] {
        let Some(anchor) = probe.array::<32>(256 * sector)? else { continue };
        // The tag is that of an anchor, and has its own place in it.
        if u16_at(&anchor, 0) != 2 || u32_at(&anchor, 12) != 256 {
            continue;
        }
        let (length, start) = (u64::from(u32_at(&anchor, 16)) / sector, u64::from(u32_at(&anchor, 20)));
        let (mut label, mut id) = (None, None);
        for block in start..start + length.min(MAX_DESCRIPTORS) {
            let Some(descriptor) = probe.array::<256>(block * sector)? else { break };
            match u16_at(&descriptor, 0) {
                1 => id = udf_id(&descriptor[72..200]),
                6 => label = dstring(&descriptor[84..212]),
                8 => break,
                _ => {}
            }
        }
        return Ok(Some(content.label(label.unwrap_or_default()).uuid(id)));
    }
    Ok(Some(content))
}

/// Whether a descriptor of the standard is among those of the volume.
fn is_udf<E>(probe: &mut Probe<'_, '_, E>) -> Result<bool, E> {
    for sector in [2048, 4096] {
        for number in 0..16 {
            let Some(head) = probe.array::<6>(DESCRIPTORS + number * sector)? else { break };
            match &head[1..6] {
                b"NSR02" | b"NSR03" => return Ok(true),
                b"BEA01" | b"CD001" | b"CDW02" | b"BOOT2" | b"TEA01" => {}
                _ => break,
            }
        }
    }
    Ok(false)
}

/// Characters of 8 or 16 bits, as the first byte says; the last byte is the length.
fn dstring(field: &[u8]) -> Option<String> {
    let (length, field) = field.split_last()?;
    let text = field.get(1..usize::from(*length).max(1))?;
    match field.first()? {
        8 => Some(text.iter().map(|b| char::from(*b)).collect()),
        16 => {
            let units = text.chunks_exact(2).map(|unit| u16::from_be_bytes(bytes(unit, 0)));
            Some(char::decode_utf16(units).map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER)).collect())
        }
        _ => None,
    }
}

/// The first characters of the identifier of the volume set are a number, in hexadecimal digits or as it is.
fn udf_id(field: &[u8]) -> Option<String> {
    let text = dstring(field)?;
    let text = text.as_bytes();
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let digits = text.iter().take_while(|b| b.is_ascii_hexdigit()).count();
    let id = match digits {
        16.. => String::from_utf8_lossy(&text[..16]).to_ascii_lowercase(),
        8.. => String::from_utf8_lossy(&text[..8]).to_ascii_lowercase() + &hex(text.get(8..12)?),
        _ => hex(text.get(..8)?),
    };
    Some(id)
}
