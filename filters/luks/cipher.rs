//! Ciphers of sectors: AES, in the modes XTS and CBC.
//!
//! AES is RustCrypto's, which uses the instructions of the processor. The modes are here, since what exists
//! for XTS encrypts one block after the other: many blocks at once are several times as fast.

use aes::{Aes128, Aes192, Aes256};
use cipher::{Array, Block, BlockCipherDecrypt, BlockCipherEncrypt, BlockSizeUser, KeyInit, consts::U16};
use nbdkit_core::{Errno, Error, Result};
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

/// What initialization vectors count, in bytes, however large sectors are.
pub(super) const IV_UNIT: u64 = 512;
/// Length of a cipher's block in bytes.
const BLOCK: usize = 16;
/// Blocks that are dealt with at once: as many as the fastest backend takes, several times.
const BATCH: usize = 64;

/// Encrypts and decrypts sectors.
pub(super) trait SectorCipher: Send + Sync {
    /// Decrypts sectors of `size` bytes, the first of which has the vector `iv`.
    fn decrypt(&self, data: &mut [u8], size: usize, iv: u64);

    /// Encrypts them.
    fn encrypt(&self, data: &mut [u8], size: usize, iv: u64);
}

/// The cipher of that name, such as `aes-xts-plain64`, with a key.
///
/// # Errors
/// `EINVAL`: it is not known, or the key is not of a length that it takes.
pub(super) fn make(name: &str, key: &[u8]) -> Result<Box<dyn SectorCipher>> {
    let unknown = || Error::new(Errno::EINVAL, format!("the cipher {name} is not supported"));
    let (cipher, mode) = name.split_once('-').ok_or_else(unknown)?;
    let (mode, iv) = mode.split_once('-').ok_or_else(unknown)?;
    let iv = match iv {
        "plain" => Iv::Plain,
        "plain64" => Iv::Plain64,
        "plain64be" => Iv::Plain64Be,
        "essiv:sha256" => Iv::Essiv,
        _ => return Err(unknown()),
    };
    let length = if mode == "xts" { key.len() / 2 } else { key.len() };
    match (cipher, length) {
        ("aes", 16) => with::<Aes128>(mode, iv, key),
        ("aes", 24) => with::<Aes192>(mode, iv, key),
        ("aes", 32) => with::<Aes256>(mode, iv, key),
        ("aes", _) => {
            let bits = key.len() * 8;
            return Err(Error::new(Errno::EINVAL, format!("a key of {bits} bits is wrong for {name}")));
        }
        _ => None,
    }
    .ok_or_else(unknown)
}

fn with<C: Cipher>(mode: &str, iv: Iv, key: &[u8]) -> Option<Box<dyn SectorCipher>> {
    Some(match mode {
        "xts" if !matches!(iv, Iv::Essiv) => {
            let (data, tweak) = key.split_at(key.len() / 2);
            let (data, tweak) = (C::new_from_slice(data).ok()?, C::new_from_slice(tweak).ok()?);
            Box::new(Xts { data, tweak, iv })
        }
        "cbc" => {
            let essiv = match iv {
                Iv::Essiv => Some(Aes256::new(&Sha256::digest(key).0.into())),
                _ => None,
            };
            Box::new(Cbc { data: C::new_from_slice(key).ok()?, iv, essiv })
        }
        _ => return None,
    })
}

trait Cipher:
    BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser<BlockSize = U16> + KeyInit + Send + Sync + 'static
{
}

impl<C> Cipher for C where
    C: BlockCipherEncrypt
        + BlockCipherDecrypt
        + BlockSizeUser<BlockSize = U16>
        + KeyInit
        + Send
        + Sync
        + 'static
{
}

/// How the vector of a sector follows from its number.
#[derive(Clone, Copy, Debug)]
enum Iv {
    /// 32 bits of it.
    Plain,
    Plain64,
    Plain64Be,
    /// Encrypted by the hash of the key.
    Essiv,
}

impl Iv {
    fn bytes(self, number: u64) -> [u8; BLOCK] {
        match self {
            Iv::Plain => u128::from(number as u32).to_le_bytes(),
            Iv::Plain64 | Iv::Essiv => u128::from(number).to_le_bytes(),
            Iv::Plain64Be => u128::from(number).to_be_bytes(),
        }
    }
}

struct Xts<C> {
    data: C,
    tweak: C,
    iv: Iv,
}

impl<C: Cipher> Xts<C> {
    /// Runs `each` on batches of blocks, masked before and after by the tweaks of their places.
    fn run(&self, data: &mut [u8], size: usize, iv: u64, each: impl Fn(&C, &mut [Block<C>])) {
        let mut masks = [0_u128; BATCH];
        for (i, sector) in data.chunks_exact_mut(size).enumerate() {
            let number = iv.wrapping_add((i * size) as u64 / IV_UNIT);
            let mut tweak = Block::<C>::from(self.iv.bytes(number));
            self.tweak.encrypt_block(&mut tweak);
            let mut tweak = u128::from_le_bytes(tweak.into());
            for batch in sector.chunks_mut(BATCH * BLOCK) {
                let (blocks, _) = Array::<u8, U16>::slice_as_chunks_mut(batch);
                for (block, mask) in blocks.iter_mut().zip(&mut masks) {
                    *mask = tweak;
                    mix(block, tweak);
                    tweak = tweak << 1 ^ if tweak >> 127 == 1 { 0x87 } else { 0 };
                }
                each(&self.data, blocks);
                for (block, mask) in blocks.iter_mut().zip(&masks) {
                    mix(block, *mask);
                }
            }
        }
    }
}

fn mix(block: &mut Array<u8, U16>, mask: u128) {
    *block = (u128::from_le_bytes((*block).into()) ^ mask).to_le_bytes().into();
}

impl<C: Cipher> SectorCipher for Xts<C> {
    fn decrypt(&self, data: &mut [u8], size: usize, iv: u64) {
        self.run(data, size, iv, |cipher, blocks| cipher.decrypt_blocks(blocks));
    }

    fn encrypt(&self, data: &mut [u8], size: usize, iv: u64) {
        self.run(data, size, iv, |cipher, blocks| cipher.encrypt_blocks(blocks));
    }
}

struct Cbc<C> {
    data: C,
    iv: Iv,
    essiv: Option<Aes256>,
}

impl<C> Cbc<C> {
    fn vector(&self, number: u64) -> u128 {
        let mut vector = Array::from(self.iv.bytes(number));
        if let Some(essiv) = &self.essiv {
            essiv.encrypt_block(&mut vector);
        }
        u128::from_le_bytes(vector.into())
    }
}

impl<C: Cipher> SectorCipher for Cbc<C> {
    fn decrypt(&self, data: &mut [u8], size: usize, iv: u64) {
        let mut before = Zeroizing::new([0_u128; BATCH]);
        for (i, sector) in data.chunks_exact_mut(size).enumerate() {
            let mut last = self.vector(iv.wrapping_add((i * size) as u64 / IV_UNIT));
            for batch in sector.chunks_mut(BATCH * BLOCK) {
                let (blocks, _) = Array::<u8, U16>::slice_as_chunks_mut(batch);
                for (block, before) in blocks.iter().zip(before.iter_mut()) {
                    *before = last;
                    last = u128::from_le_bytes((*block).into());
                }
                self.data.decrypt_blocks(blocks);
                for (block, before) in blocks.iter_mut().zip(before.iter()) {
                    mix(block, *before);
                }
            }
        }
    }

    fn encrypt(&self, data: &mut [u8], size: usize, iv: u64) {
        for (i, sector) in data.chunks_exact_mut(size).enumerate() {
            let mut last = self.vector(iv.wrapping_add((i * size) as u64 / IV_UNIT));
            let (blocks, _) = Array::<u8, U16>::slice_as_chunks_mut(sector);
            for block in blocks {
                mix(block, last);
                self.data.encrypt_block(block);
                last = u128::from_le_bytes((*block).into());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        for (name, bits) in [
            ("aes-xts-plain64", 256),
            ("aes-xts-plain64", 512),
            ("aes-xts-plain", 512),
            ("aes-cbc-essiv:sha256", 256),
            ("aes-cbc-plain64", 128),
            ("aes-cbc-plain64be", 192),
        ] {
            let key: Vec<u8> = (0..bits / 8).map(|i: usize| i as u8).collect();
            let cipher = make(name, &key).unwrap();
            for size in [512, 4096] {
                let plain: Vec<u8> = (0..3 * size).map(|i| (i % 251) as u8).collect();
                let mut data = plain.clone();
                cipher.encrypt(&mut data, size, 1 << 40);
                assert!(data != plain);
                // One sector by itself.
                let mut one = data[size..2 * size].to_vec();
                cipher.decrypt(&mut one, size, (1 << 40) + size as u64 / IV_UNIT);
                assert!(one == plain[size..2 * size], "{name}");
                cipher.decrypt(&mut data, size, 1 << 40);
                assert!(data == plain, "{name}");
            }
        }
    }

    /// IEEE 1619, vector 1.
    #[test]
    fn a_vector_of_the_standard() {
        let mut data = [0; 32];
        make("aes-xts-plain64", &[0; 32]).unwrap().encrypt(&mut data, 32, 0);
        assert_eq!(data[..8], [0x91, 0x7c, 0xf6, 0x9e, 0xbd, 0x68, 0xb2, 0xec]);
        assert_eq!(data[24..], [0x8c, 0x02, 0xc2, 0x65, 0x2f, 0xbf, 0x92, 0x2e]);
    }

    #[test]
    fn others_are_refused() {
        for (name, length) in [
            ("aes-xts-plain64", 48),
            ("aes-lrw-benbi", 48),
            ("aes", 32),
            ("serpent-xts-plain64", 64),
            ("xchacha12,aes-adiantum-plain64", 32),
            ("aes-xts-essiv:sha256", 64),
        ] {
            // 384 bits are two keys of AES-192.
            assert_eq!(make(name, &vec![0; length]).is_ok(), name == "aes-xts-plain64", "{name}");
        }
        assert!(make("aes-xts-plain64", &[0; 40]).is_err());
    }
}
