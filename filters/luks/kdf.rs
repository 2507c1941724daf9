//! From a passphrase to a key: PBKDF2 and Argon2; and the anti-forensic stripes that a slot's key is spread over.

use argon2::{Algorithm, Argon2, Params, Version};
use nbdkit_core::{Errno, Error, Result};
use ripemd::Ripemd160;
use sha1::Sha1;
use sha2::{Digest, Sha224, Sha256, Sha384, Sha512};
use zeroize::Zeroizing;

/// What Argon2 may take, in KiB: as much as cryptsetup ever asks for.
const MOST_MEMORY: u32 = 4 << 20;

/// A hash function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hash {
    Sha1,
    Sha224,
    Sha256,
    Sha384,
    Sha512,
    Ripemd160,
}

impl Hash {
    /// The one of that name.
    ///
    /// # Errors
    /// `EINVAL`: it is not known.
    pub(super) fn named(name: &str) -> Result<Self> {
        Ok(match name {
            "sha1" => Hash::Sha1,
            "sha224" => Hash::Sha224,
            "sha256" => Hash::Sha256,
            "sha384" => Hash::Sha384,
            "sha512" => Hash::Sha512,
            "ripemd160" => Hash::Ripemd160,
            _ => return Err(Error::new(Errno::EINVAL, format!("the hash {name} is not supported"))),
        })
    }

    /// The hash of two parts.
    pub(super) fn of(self, first: &[u8], second: &[u8]) -> Vec<u8> {
        fn hash<D: Digest>(first: &[u8], second: &[u8]) -> Vec<u8> {
            D::new().chain_update(first).chain_update(second).finalize().to_vec()
        }
        match self {
            Hash::Sha1 => hash::<Sha1>(first, second),
            Hash::Sha224 => hash::<Sha224>(first, second),
            Hash::Sha256 => hash::<Sha256>(first, second),
            Hash::Sha384 => hash::<Sha384>(first, second),
            Hash::Sha512 => hash::<Sha512>(first, second),
            Hash::Ripemd160 => hash::<Ripemd160>(first, second),
        }
    }

    /// PBKDF2 with HMAC of the hash.
    pub(super) fn pbkdf2(
        self,
        secret: &[u8],
        salt: &[u8],
        iterations: u32,
        length: usize,
    ) -> Zeroizing<Vec<u8>> {
        let mut key = Zeroizing::new(vec![0; length]);
        match self {
            Hash::Sha1 => pbkdf2::pbkdf2_hmac::<Sha1>(secret, salt, iterations, &mut key),
            Hash::Sha224 => pbkdf2::pbkdf2_hmac::<Sha224>(secret, salt, iterations, &mut key),
            Hash::Sha256 => pbkdf2::pbkdf2_hmac::<Sha256>(secret, salt, iterations, &mut key),
            Hash::Sha384 => pbkdf2::pbkdf2_hmac::<Sha384>(secret, salt, iterations, &mut key),
            Hash::Sha512 => pbkdf2::pbkdf2_hmac::<Sha512>(secret, salt, iterations, &mut key),
            Hash::Ripemd160 => pbkdf2::pbkdf2_hmac::<Ripemd160>(secret, salt, iterations, &mut key),
        }
        key
    }

    /// Puts the stripes of a key together.
    ///
    /// # Errors
    /// `EINVAL`: there is not as much material.
    pub(super) fn merge(self, material: &[u8], length: usize, stripes: usize) -> Result<Zeroizing<Vec<u8>>> {
        let all = material.get(..length * stripes).filter(|all| !all.is_empty());
        let all = all.ok_or_else(|| Error::new(Errno::EINVAL, "a key slot is too short for its key"))?;
        let mut key = Zeroizing::new(vec![0; length]);
        for (i, stripe) in all.chunks_exact(length).enumerate() {
            key.iter_mut().zip(stripe).for_each(|(key, stripe)| *key ^= stripe);
            if i + 1 < stripes {
                self.diffuse(&mut key);
            }
        }
        Ok(key)
    }

    fn diffuse(self, key: &mut [u8]) {
        let size = self.of(&[], &[]).len();
        for (i, part) in key.chunks_mut(size).enumerate() {
            let hash = Zeroizing::new(self.of(&(i as u32).to_be_bytes(), part));
            part.copy_from_slice(&hash[..part.len()]);
        }
    }
}

/// How a slot's key follows from the passphrase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kdf {
    Pbkdf2 { hash: Hash, iterations: u32, salt: Vec<u8> },
    Argon2 { id: bool, time: u32, memory: u32, lanes: u32, salt: Vec<u8> },
}

impl Kdf {
    /// The key of that length in bytes.
    ///
    /// # Errors
    /// `EINVAL`: the parameters are not legal; `ENOMEM`.
    pub(super) fn derive(&self, passphrase: &[u8], length: usize) -> Result<Zeroizing<Vec<u8>>> {
        match self {
            Kdf::Pbkdf2 { hash, iterations, salt } => Ok(hash.pbkdf2(passphrase, salt, *iterations, length)),
            Kdf::Argon2 { id, time, memory, lanes, salt } => {
                let wrong = |e: argon2::Error| Error::new(Errno::EINVAL, format!("a key slot's Argon2: {e}"));
                if *memory > MOST_MEMORY {
                    let what = format!("a key slot wants {memory} KiB of memory, more than {MOST_MEMORY}");
                    return Err(Error::new(Errno::ENOMEM, what));
                }
                let params = Params::new(*memory, *time, *lanes, Some(length)).map_err(wrong)?;
                let mut blocks = Vec::new();
                let count = params.block_count();
                blocks.try_reserve_exact(count).map_err(|_| {
                    Error::new(
                        Errno::ENOMEM,
                        format!("there is no memory for a key slot, which wants {memory} KiB"),
                    )
                })?;
                blocks.resize(count, argon2::Block::default());
                let algorithm = if *id { Algorithm::Argon2id } else { Algorithm::Argon2i };
                let argon2 = Argon2::new(algorithm, Version::V0x13, params);
                let mut key = Zeroizing::new(vec![0; length]);
                argon2
                    .hash_password_into_with_memory(passphrase, salt, &mut key, &mut blocks[..])
                    .map_err(wrong)?;
                Ok(key)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_stripe_is_the_key() {
        assert_eq!(**Hash::Sha256.merge(&[7; 64], 64, 1).unwrap(), [7; 64]);
        assert!(Hash::Sha256.merge(&[7; 64], 64, 2).is_err());
    }

    #[test]
    fn too_much_memory_is_refused() {
        let kdf = Kdf::Argon2 { id: true, time: 1, memory: u32::MAX, lanes: 1, salt: vec![0; 32] };
        assert_eq!(kdf.derive(b"x", 32).unwrap_err().errno(), Errno::ENOMEM);
    }
}
