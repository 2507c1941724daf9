//! Random bytes that depend on a seed and on their place alone: what the plugins random and sparse-random are made of.
//!
//! They pass for random with clients and compressors; they are no secret.

use anyhow::Context as _;
use nbdkit_core::{Errno, Error, Result};

/// Compared at a time, in bytes.
const CHUNK: usize = 4096;

/// 64 random bits for a place: the finalizer of SplitMix64 over a counter.
pub(crate) fn word(seed: u64, place: u64) -> u64 {
    let mut bits = place.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(seed);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// A seed of its own for each number: neighbouring seeds would give the same bytes at shifted places otherwise.
pub(crate) fn spread(seed: u64) -> u64 {
    word(0x6e62_646b_6974, seed)
}

/// A seed nobody has chosen.
///
/// # Errors
/// Those of the system.
pub(crate) fn any_seed() -> anyhow::Result<u64> {
    getrandom::u64().context("cannot choose a seed")
}

/// Fills `buf` with the bytes of its place.
pub(crate) fn fill(seed: u64, buf: &mut [u8], offset: u64) {
    let skip = (offset % 8) as usize;
    let (head, rest) = buf.split_at_mut(buf.len().min((8 - skip) % 8));
    let mut place = offset / 8;
    if !head.is_empty() {
        head.copy_from_slice(&word(seed, place).to_le_bytes()[skip..][..head.len()]);
        place += 1;
    }
    for bytes in rest.chunks_mut(8) {
        bytes.copy_from_slice(&word(seed, place).to_le_bytes()[..bytes.len()]);
        place += 1;
    }
}

/// Whether what a client writes is what the disk holds, which `expected` gives.
///
/// # Errors
/// `EIO`: it is not.
pub(crate) fn check(data: &[u8], offset: u64, mut expected: impl FnMut(&mut [u8], u64)) -> Result<()> {
    let mut chunk = [0; CHUNK];
    for (index, data) in data.chunks(CHUNK).enumerate() {
        let want = &mut chunk[..data.len()];
        expected(want, offset + (index * CHUNK) as u64);
        if want != data {
            return Err(Error::new(Errno::EIO, "data written does not match expected"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_depend_on_their_place_alone() {
        let mut all = vec![0; 200];
        fill(7, &mut all, 1000);
        for from in 0..40 {
            for to in from..80 {
                let mut part = vec![0; to - from];
                fill(7, &mut part, 1000 + from as u64);
                assert_eq!(part, all[from..to], "{from}..{to}");
            }
        }
        check(&all, 1000, |buf, at| fill(7, buf, at)).unwrap();
        all[199] ^= 1;
        let error = check(&all, 1000, |buf, at| fill(7, buf, at)).unwrap_err();
        assert_eq!(error.errno(), Errno::EIO);
    }

    #[test]
    fn every_byte_is_as_frequent_as_the_others() {
        for seed in [0, 1, 2, u64::MAX].map(spread) {
            let mut bytes = vec![0; 1 << 20];
            fill(seed, &mut bytes, 0);
            let mut counts = [0_u32; 256];
            bytes.iter().for_each(|byte| counts[usize::from(*byte)] += 1);
            assert!(counts.iter().all(|count| (3700..4500).contains(count)), "{counts:?}");
        }
        assert_ne!(spread(1), spread(2));
    }
}
