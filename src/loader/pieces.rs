//! Ranges of 64 bits in pieces of 32 bits: all that the C interface can count. And reads in such pieces, whose memory
//! has held the data of other requests.

use std::{
    ffi::{c_int, c_void},
    sync::atomic::{AtomicBool, Ordering},
};

use nbdkit_core::Result;

/// What a longer range is cut into: a multiple of every legal block size.
const PIECE: u64 = 1 << 31;

/// The part of a range that one call can take.
pub(crate) fn first(length: u64) -> u32 {
    u32::try_from(length).unwrap_or(PIECE as u32)
}

/// Calls `each(count, offset)` for the pieces of a range, in order, until one fails.
pub(crate) fn each(
    mut length: u64,
    mut offset: u64,
    mut each: impl FnMut(u32, u64) -> Result<()>,
) -> Result<()> {
    while length > 0 {
        let count = first(length);
        each(count, offset)?;
        length -= u64::from(count);
        offset += u64::from(count);
    }
    Ok(())
}

/// What is known of how a layer reads. 0 says that it has filled the buffer. One that returns anything else but -1 may
/// have filled it, and C servers take it so; since it may as well not have, it is asked again with zeroes in the buffer,
/// and gets zeroes from then on.
#[derive(Default)]
pub(crate) struct Reads {
    unclear: AtomicBool,
}

impl Reads {
    /// Fills `buf` by calls of `read(address, count, offset in the buffer)`.
    pub(crate) fn fill(
        &self,
        buf: &mut [u8],
        read: impl Fn(*mut c_void, u32, u64) -> Result<c_int>,
    ) -> Result<()> {
        each(buf.len() as u64, 0, |count, done| {
            let piece = &mut buf[done as usize..][..count as usize];
            if !self.unclear.load(Ordering::Relaxed) {
                if read(piece.as_mut_ptr().cast(), count, done)? == 0 {
                    return Ok(());
                }
                self.unclear.store(true, Ordering::Relaxed);
            }
            piece.fill(0);
            read(piece.as_mut_ptr().cast(), count, done).map(drop)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(length: u64, offset: u64) -> Vec<(u32, u64)> {
        let mut list = Vec::new();
        each(length, offset, |count, at| {
            list.push((count, at));
            Ok(())
        })
        .unwrap();
        list
    }

    #[test]
    fn what_fits_is_left_whole() {
        assert_eq!(pieces(0, 5), []);
        assert_eq!(pieces(u64::from(u32::MAX), 5), [(u32::MAX, 5)]);
    }

    #[test]
    fn longer_ones_are_covered_in_order() {
        let list = pieces((5 << 30) + 3, 7);
        assert_eq!(list, [(1 << 31, 7), ((1 << 30) * 3 + 3, 7 + (1 << 31))]);
    }
}
