//! What both versions of the header come to: key slots, the digest of the volume's key, and where the data is.

use nbdkit_core::{Errno, Error, Result};
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

use super::{
    cipher::{self, IV_UNIT},
    header1, header2,
    kdf::{Hash, Kdf},
    volume::Volume,
};

/// What a header begins with.
pub(super) const MAGIC: &[u8; 6] = b"LUKS\xba\xbe";
/// The longest key material of a slot, in bytes.
const MOST_MATERIAL: u64 = 16 << 20;
/// The longest key, in bytes.
const MOST_KEY: usize = 512;

/// Reads from where the header is.
pub(super) type Read<'a> = dyn FnMut(&mut [u8], u64) -> Result<()> + 'a;

/// A slot that a passphrase may open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Keyslot {
    pub(super) kdf: Kdf,
    /// How the key material is encrypted, with a key of that length in bytes.
    pub(super) cipher: String,
    pub(super) cipher_key: usize,
    /// Where that is, in bytes.
    pub(super) offset: u64,
    pub(super) stripes: usize,
    pub(super) hash: Hash,
    /// Length of the volume's key in bytes.
    pub(super) key: usize,
}

/// By which the volume's key is recognized.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct KeyDigest {
    pub(super) hash: Hash,
    pub(super) iterations: u32,
    pub(super) salt: Vec<u8>,
    pub(super) digest: Vec<u8>,
}

/// Where the data is, and how it is encrypted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// In bytes.
    pub(super) offset: u64,
    /// None: up to the end of the disk.
    pub(super) size: Option<u64>,
    pub(super) cipher: String,
    pub(super) sector_size: u32,
    /// The vector of the first sector.
    pub(super) iv: u64,
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// In the order in which they are tried.
    pub(super) keyslots: Vec<Keyslot>,
    pub(super) digest: KeyDigest,
    pub(super) segment: Segment,
}

impl Header {
    /// Reads it.
    ///
    /// # Errors
    /// `EINVAL`: no LUKS header, damaged, or something that is not supported; those of `read`.
    pub(super) fn read(read: &mut Read<'_>) -> Result<Self> {
        let mut start = [0; 8];
        read(&mut start, 0)?;
        let header = match (start.strip_prefix(MAGIC), &start[..6]) {
            (Some([0, 1]), _) => header1::read(read),
            (Some([0, 2]), _) => header2::read(read),
            (Some([high, low]), _) => {
                let version = u16::from_be_bytes([*high, *low]);
                return Err(Error::new(Errno::EINVAL, format!("LUKS version {version} is not supported")));
            }
            // The first copy may be damaged.
            _ => header2::read(read)
                .map_err(|_| Error::new(Errno::EINVAL, "this is not a LUKS volume, nor the header of one")),
        }?;
        let size = header.segment.sector_size;
        if !(512..=4096).contains(&size) || !size.is_power_of_two() {
            return Err(Error::new(Errno::EINVAL, format!("sectors of {size} bytes are not supported")));
        }
        for slot in &header.keyslots {
            let material = (slot.key as u64).checked_mul(slot.stripes as u64);
            let fits = material.is_some_and(|length| (1..=MOST_MATERIAL).contains(&length));
            if !fits || slot.key > MOST_KEY || slot.cipher_key > MOST_KEY {
                return Err(Error::new(Errno::EINVAL, "a key slot of the LUKS header is damaged"));
            }
        }
        Ok(header)
    }

    /// Tries the passphrase on the slots in order, and opens the volume.
    ///
    /// # Errors
    /// `EACCES`: it opens none; `EINVAL`: the volume has a cipher that is not supported; those of `read`.
    pub(super) fn unlock(&self, passphrase: &[u8], read: &mut Read<'_>) -> Result<Volume> {
        let mut failed = None;
        for slot in &self.keyslots {
            match self.try_slot(slot, passphrase, read) {
                Ok(Some(key)) => {
                    let cipher = cipher::make(&self.segment.cipher, &key)?;
                    return Ok(Volume::new(self.segment.clone(), cipher));
                }
                Ok(None) => {}
                Err(e) => failed = Some(e),
            }
        }
        Err(failed.unwrap_or_else(|| {
            let what = match self.keyslots.len() {
                0 => "the LUKS volume has no key slot in use",
                _ => "the passphrase opens none of the LUKS volume's key slots: it is wrong",
            };
            Error::new(Errno::EACCES, what)
        }))
    }

    fn try_slot(
        &self,
        slot: &Keyslot,
        passphrase: &[u8],
        read: &mut Read<'_>,
    ) -> Result<Option<Zeroizing<Vec<u8>>>> {
        let length = (slot.key * slot.stripes).next_multiple_of(IV_UNIT as usize);
        let mut material = Zeroizing::new(vec![0; length]);
        read(&mut material, slot.offset)?;
        let key = slot.kdf.derive(passphrase, slot.cipher_key)?;
        cipher::make(&slot.cipher, &key)?.decrypt(&mut material, IV_UNIT as usize, 0);
        let key = slot.hash.merge(&material, slot.key, slot.stripes)?;
        let KeyDigest { hash, iterations, salt, digest } = &self.digest;
        let found = hash.pbkdf2(&key, salt, *iterations, digest.len());
        Ok(bool::from(found.ct_eq(digest)).then_some(key))
    }
}
