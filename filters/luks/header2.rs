//! The header of LUKS version 2: two copies, each of 4096 bytes with a checksum and JSON that follows.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use nbdkit_core::{Errno, Error, Result};
use serde_json::Value;

use super::{
    kdf::{Hash, Kdf},
    keyslot::{Header, KeyDigest, Keyslot, MAGIC, Read, Segment},
};

/// What the second copy begins with, and where it may be.
const SECOND_MAGIC: &[u8; 6] = b"SKUL\xba\xbe";
const SECOND: [u64; 9] =
    [0x4000, 0x8000, 0x1_0000, 0x2_0000, 0x4_0000, 0x8_0000, 0x10_0000, 0x20_0000, 0x40_0000];
/// Length of the fixed part in bytes, and of all of it at most.
const FIXED: usize = 4096;
const MOST: u64 = 4 << 20;
/// Where the checksum is in the fixed part.
const CHECKSUM: std::ops::Range<usize> = 448..512;

/// Reads it, from the copy that is newer if both are intact.
///
/// # Errors
/// `EINVAL`: damaged, or something that is not supported; those of `read`.
pub(super) fn read(read: &mut Read<'_>) -> Result<Header> {
    let first = copy(read, 0, MAGIC);
    let second = match &first {
        // The second is right behind the first.
        Ok(first) => copy(read, first.length, SECOND_MAGIC).ok(),
        Err(_) => SECOND.iter().find_map(|at| copy(read, *at, SECOND_MAGIC).ok()),
    };
    let json = match (first, second) {
        (Ok(first), Some(second)) if second.sequence > first.sequence => second.json,
        (Ok(first), _) => first.json,
        (Err(_), Some(second)) => second.json,
        (Err(e), None) => return Err(e),
    };
    parse(&json)
}

struct Copy {
    length: u64,
    sequence: u64,
    json: Value,
}

fn damaged(what: &str) -> Error {
    Error::new(Errno::EINVAL, format!("the LUKS header is damaged: {what}"))
}

fn copy(read: &mut Read<'_>, at: u64, magic: &[u8; 6]) -> Result<Copy> {
    let mut bytes = vec![0; FIXED];
    read(&mut bytes, at)?;
    let number = |at: usize| (0..8).fold(0, |n, i| n << 8 | u64::from(bytes[at + i]));
    let (length, sequence) = (number(8), number(16));
    if bytes[..6] != *magic || bytes[6..8] != [0, 2] || number(256) != at {
        return Err(damaged("it does not begin as it should"));
    }
    if !(FIXED as u64 + 512..=MOST).contains(&length) {
        return Err(damaged("its length is wrong"));
    }
    let name = &bytes[72..104];
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    let hash = Hash::named(std::str::from_utf8(name).unwrap_or("?"))?;
    let stored = bytes[CHECKSUM].to_vec();
    bytes[CHECKSUM].fill(0);
    let mut text = vec![0; length as usize - FIXED];
    read(&mut text, at + FIXED as u64)?;
    let sum = hash.of(&bytes, &text);
    if stored[..sum.len()] != sum {
        return Err(damaged("its checksum is wrong"));
    }
    let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
    let json = serde_json::from_slice(text).map_err(|e| damaged(&format!("its JSON: {e}")))?;
    Ok(Copy { length, sequence, json })
}

/// A value of the JSON, by its path.
fn field<'a>(json: &'a Value, path: &str) -> Result<&'a Value> {
    json.pointer(path).ok_or_else(|| damaged(&format!("there is no {path}")))
}

fn text<'a>(json: &'a Value, path: &str) -> Result<&'a str> {
    field(json, path)?.as_str().ok_or_else(|| damaged(&format!("{path} is no text")))
}

/// A number, which is written as text where it may have 64 bits.
fn number(json: &Value, path: &str) -> Result<u64> {
    let value = field(json, path)?;
    let number = value.as_u64().or_else(|| value.as_str()?.parse().ok());
    number.ok_or_else(|| damaged(&format!("{path} is no number")))
}

fn small(json: &Value, path: &str) -> Result<u32> {
    u32::try_from(number(json, path)?).map_err(|_| damaged(&format!("{path} is too large")))
}

fn bytes(json: &Value, path: &str) -> Result<Vec<u8>> {
    STANDARD.decode(text(json, path)?).map_err(|_| damaged(&format!("{path} is no base64")))
}

fn names<'a>(json: &'a Value, path: &str) -> impl Iterator<Item = &'a str> {
    json.pointer(path).and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str)
}

fn parse(json: &Value) -> Result<Header> {
    let unsupported = |what: &str| Error::new(Errno::EINVAL, format!("{what} is not supported"));
    if let Some(requirement) = names(json, "/config/requirements/mandatory").next() {
        return Err(unsupported(&format!("a LUKS volume with the requirement {requirement}")));
    }
    let objects = |path| {
        let list = field(json, path).map(|list| list.as_object().into_iter().flatten());
        list.map(|list| list.collect::<Vec<_>>())
    };
    let segments = objects("/segments")?;
    let [(segment_name, segment)] = segments[..] else {
        return Err(unsupported("a LUKS volume of several segments"));
    };
    if text(segment, "/type")? != "crypt" {
        return Err(unsupported("a LUKS segment of another type than crypt"));
    }
    if segment.get("integrity").is_some() {
        return Err(unsupported("a LUKS volume with integrity protection (dm-integrity)"));
    }
    let digests = objects("/digests")?;
    let for_segment = |digest: &&Value| names(digest, "/segments").any(|name| name == segment_name);
    let digest = digests.iter().map(|(_, digest)| *digest).find(for_segment);
    let digest = digest.ok_or_else(|| damaged("the segment has no digest"))?;
    let mut slots = Vec::new();
    for (name, slot) in objects("/keyslots")? {
        // Slots of priority 0 are for those who name them.
        let priority = slot.get("priority").and_then(Value::as_u64).unwrap_or(1);
        if priority > 0 && text(slot, "/type")? == "luks2" && names(digest, "/keyslots").any(|n| n == name) {
            slots.push((
                std::cmp::Reverse(priority),
                name.parse::<u32>().unwrap_or(u32::MAX),
                keyslot(slot)?,
            ));
        }
    }
    slots.sort_by_key(|(priority, number, _)| (*priority, *number));
    let size = match text(segment, "/size")? {
        "dynamic" => None,
        _ => Some(number(segment, "/size")?),
    };
    Ok(Header {
        keyslots: slots.into_iter().map(|(_, _, slot)| slot).collect(),
        digest: KeyDigest {
            hash: Hash::named(text(digest, "/hash")?)?,
            iterations: small(digest, "/iterations")?,
            salt: bytes(digest, "/salt")?,
            digest: bytes(digest, "/digest")?,
        },
        segment: Segment {
            offset: number(segment, "/offset")?,
            size,
            cipher: text(segment, "/encryption")?.to_owned(),
            sector_size: small(segment, "/sector_size")?,
            iv: number(segment, "/iv_tweak")?,
        },
    })
}

fn keyslot(slot: &Value) -> Result<Keyslot> {
    let salt = bytes(slot, "/kdf/salt")?;
    let kdf = match text(slot, "/kdf/type")? {
        "pbkdf2" => Kdf::Pbkdf2 {
            hash: Hash::named(text(slot, "/kdf/hash")?)?,
            iterations: small(slot, "/kdf/iterations")?,
            salt,
        },
        kind @ ("argon2i" | "argon2id") => Kdf::Argon2 {
            id: kind == "argon2id",
            time: small(slot, "/kdf/time")?,
            memory: small(slot, "/kdf/memory")?,
            lanes: small(slot, "/kdf/cpus")?,
            salt,
        },
        other => {
            return Err(Error::new(Errno::EINVAL, format!("the key derivation {other} is not supported")));
        }
    };
    Ok(Keyslot {
        kdf,
        cipher: text(slot, "/area/encryption")?.to_owned(),
        cipher_key: small(slot, "/area/key_size")? as usize,
        offset: number(slot, "/area/offset")?,
        stripes: small(slot, "/af/stripes")? as usize,
        hash: Hash::named(text(slot, "/af/hash")?)?,
        key: small(slot, "/key_size")? as usize,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_json_is_parsed_or_refused(text in "[{}\\[\\]\":,a-z0-9/]{0,200}") {
            if let Ok(json) = serde_json::from_str(&text) {
                let _ = parse(&json);
            }
        }
    }
}
