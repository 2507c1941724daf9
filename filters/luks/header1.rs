//! The header of LUKS version 1: 592 bytes, whose numbers are big-endian.

use nbdkit_core::{Errno, Error, Result};

use super::{
    cipher::IV_UNIT,
    kdf::{Hash, Kdf},
    keyslot::{Header, KeyDigest, Keyslot, Read, Segment},
};

const LENGTH: usize = 592;
/// Where the slots begin, and how long each is, in bytes.
const SLOTS: usize = 208;
const SLOT: usize = 48;
const IN_USE: u32 = 0x00ac_71f3;

/// Reads it.
///
/// # Errors
/// `EINVAL`: damaged, or something that is not supported; those of `read`.
pub(super) fn read(read: &mut Read<'_>) -> Result<Header> {
    let mut bytes = [0; LENGTH];
    read(&mut bytes, 0)?;
    let text = |at: usize| {
        let field = &bytes[at..at + 32];
        let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
        std::str::from_utf8(&field[..end])
            .map_err(|_| Error::new(Errno::EINVAL, "the LUKS header is damaged: a name in it is no text"))
    };
    let number = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let cipher = format!("{}-{}", text(8)?, text(40)?);
    let hash = Hash::named(text(72)?)?;
    let key = number(108) as usize;
    let keyslots = bytes[SLOTS..].chunks_exact(SLOT).enumerate().filter_map(|(i, slot)| {
        let at = SLOTS + i * SLOT;
        (number(at) == IN_USE).then(|| Keyslot {
            kdf: Kdf::Pbkdf2 { hash, iterations: number(at + 4), salt: slot[8..40].to_vec() },
            cipher: cipher.clone(),
            cipher_key: key,
            offset: u64::from(number(at + 40)) * IV_UNIT,
            stripes: number(at + 44) as usize,
            hash,
            key,
        })
    });
    Ok(Header {
        keyslots: keyslots.collect(),
        digest: KeyDigest {
            hash,
            iterations: number(164),
            salt: bytes[132..164].to_vec(),
            digest: bytes[112..132].to_vec(),
        },
        segment: Segment {
            offset: u64::from(number(104)) * IV_UNIT,
            size: None,
            cipher,
            sector_size: IV_UNIT as u32,
            iv: 0,
        },
    })
}
