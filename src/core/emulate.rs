//! Operations made from other operations.
//!
//! The glue uses them for what the plugin lacks; a filter that chooses to emulate (nozero, fua) calls them too.

use crate::{BlockSize, Result};

/// How much is written or read at a time. A multiple of every legal minimum block size.
const PIECE: u64 = 1 << 20;

/// Zeroes to write from, which lie in memory as their target does in a file: a process that is killed while the kernel
/// copies them, and has to fetch a page of theirs first, leaves whole sectors.
#[repr(align(4096))]
struct Zeroes([u8; PIECE as usize]);

static ZEROES: Zeroes = Zeroes([0; PIECE as usize]);

/// The largest piece that the layer takes.
fn piece(block: BlockSize) -> u64 {
    match u64::from(block.maximum) {
        0 => PIECE,
        maximum => maximum.min(PIECE),
    }
}

/// Cuts a range into pieces and calls `each(length, offset)` for them in order, until one fails.
fn for_pieces(
    length: u64,
    offset: u64,
    block: BlockSize,
    mut each: impl FnMut(usize, u64) -> Result<()>,
) -> Result<()> {
    let mut done = 0;
    while done < length {
        let n = piece(block).min(length - done);
        each(n as usize, offset + done)?;
        done += n;
    }
    Ok(())
}

/// Zeroes a range by writing: `write` is called for each piece, in order, to the end.
///
/// # Errors
/// The first one of `write`.
pub fn zero(
    length: u64,
    offset: u64,
    block: BlockSize,
    mut write: impl FnMut(&[u8], u64) -> Result<()>,
) -> Result<()> {
    for_pieces(length, offset, block, |n, at| write(&ZEROES.0[..n], at))
}

/// Caches a range by reading it and throwing the data away.
///
/// # Errors
/// The first one of `read`.
pub fn cache(
    length: u64,
    offset: u64,
    block: BlockSize,
    mut read: impl FnMut(&mut [u8], u64) -> Result<()>,
) -> Result<()> {
    let mut buf = vec![0; piece(block).min(length) as usize];
    for_pieces(length, offset, block, |n, at| read(&mut buf[..n], at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_covers_the_whole_range_in_order() {
        let mut at = 7;
        zero(70 << 20, 7, BlockSize::default(), |buf, offset| {
            assert_eq!(offset, at);
            assert!(buf.iter().all(|b| *b == 0));
            assert_eq!(buf.as_ptr() as usize % 4096, 0, "a page of them could end within a sector");
            at += buf.len() as u64;
            Ok(())
        })
        .unwrap();
        assert_eq!(at, 7 + (70 << 20));
    }

    #[test]
    fn pieces_keep_to_the_maximum() {
        let block = BlockSize { minimum: 512, preferred: 4096, maximum: 65536 };
        let mut total = 0;
        cache(200_000, 0, block, |buf, _| {
            assert!(buf.len() <= 65536);
            total += buf.len();
            Ok(())
        })
        .unwrap();
        assert_eq!(total, 200_000);
    }
}
