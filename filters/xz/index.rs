//! The index of an .xz file: where its blocks are, read from the end.
//!
//! A file is one or more streams, with padding after each. A stream is a header, blocks, an index with two lengths for each
//! block, and a footer that says how long the index is. All numbers are little-endian; those of the index have seven bits
//! to a byte.

use std::ops::Range;

use nbdkit_core::{Errno, Error, Result};

use crate::decompress::{Segments, Source, damaged};

const HEADER_MAGIC: &[u8] = b"\xfd7zXZ\0";
const FOOTER_MAGIC: &[u8] = b"YZ";
/// Length of a stream's header, and of its footer, in bytes.
const EDGE: u64 = 12;
/// Blocks that are remembered, at most.
const MOST_BLOCKS: usize = 4 << 20;
/// Length of an index, at most, in bytes.
const MOST_INDEX: u64 = 64 << 20;

/// A block of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Block {
    /// Where it begins in the file.
    file: u64,
    length: u64,
    /// Without the padding at its end.
    unpadded: u64,
    flags: [u8; 2],
}

impl Block {
    /// Its place in the file.
    pub(super) fn compressed(&self) -> Range<u64> {
        self.file..self.file + self.unpadded.next_multiple_of(4)
    }

    /// What makes a stream of it: what comes before, and after.
    pub(super) fn surroundings(&self) -> (Vec<u8>, Vec<u8>) {
        let sum = |bytes: &[u8]| crc32fast::hash(bytes).to_le_bytes();
        let mut head = HEADER_MAGIC.to_vec();
        head.extend(self.flags);
        head.extend(sum(&self.flags));
        let mut tail = vec![0, 1];
        write_number(&mut tail, self.unpadded);
        write_number(&mut tail, self.length);
        tail.resize(tail.len().next_multiple_of(4), 0);
        tail.extend(sum(&tail));
        let mut fields = (tail.len() as u32 / 4 - 1).to_le_bytes().to_vec();
        fields.extend(self.flags);
        tail.extend(sum(&fields));
        tail.extend(fields);
        tail.extend(FOOTER_MAGIC);
        (head, tail)
    }
}

/// The blocks of a file.
///
/// # Errors
/// `EINVAL`: not an .xz file; `EIO`: cut off or damaged; `E2BIG`: too many blocks.
pub(super) fn read(source: &Source) -> Result<Segments<Block>> {
    let size = source.size();
    if size < HEADER_MAGIC.len() as u64 || source.bytes(0..HEADER_MAGIC.len() as u64)? != HEADER_MAGIC {
        return Err(Error::new(Errno::EINVAL, "this is not an .xz file"));
    }
    // From the last stream to the first.
    let (mut streams, mut end, mut count) = (Vec::new(), size, 0);
    while end > 0 {
        let (start, stream) = read_stream(source, end)?;
        count += stream.len() + 1;
        if count > MOST_BLOCKS {
            return Err(Error::new(
                Errno::E2BIG,
                format!("the file has over {MOST_BLOCKS} blocks and streams: compress it in larger ones"),
            ));
        }
        streams.push(stream);
        end = start;
    }
    Segments::new(streams.into_iter().rev().flatten().map(|block| (block.length, block)))
}

/// The blocks of the stream that ends at `end`, after padding, and where it begins.
fn read_stream(source: &Source, mut end: u64) -> Result<(u64, Vec<Block>)> {
    let cut =
        || damaged("the file does not end as an .xz file does: it is cut off, or something follows its end");
    let footer: [u8; EDGE as usize] = loop {
        if end < 2 * EDGE {
            return Err(cut());
        }
        let footer: [u8; EDGE as usize] = source.array(end - EDGE)?;
        if footer[8..] != [0; 4] {
            break footer;
        }
        end -= 4;
    };
    let [c0, c1, c2, c3, b0, b1, b2, b3, f0, f1, y, z] = footer;
    let flags = [f0, f1];
    if [y, z] != FOOTER_MAGIC || crc32fast::hash(&footer[4..10]) != u32::from_le_bytes([c0, c1, c2, c3]) {
        return Err(cut());
    }
    let length = (u64::from(u32::from_le_bytes([b0, b1, b2, b3])) + 1) * 4;
    if length > MOST_INDEX {
        return Err(Error::new(
            Errno::E2BIG,
            "the index of the file is too long: compress it in larger blocks",
        ));
    }
    let index =
        (end - EDGE).checked_sub(length).ok_or_else(|| damaged("the index is longer than the file"))?;
    let bytes = source.bytes(index..index + length)?;
    let mut blocks = parse(&bytes, flags)?;

    let mut total = 0_u64;
    for block in &mut blocks {
        block.file = total;
        total = block
            .unpadded
            .checked_next_multiple_of(4)
            .and_then(|n| total.checked_add(n))
            .ok_or_else(overflow)?;
    }
    let first = index.checked_sub(total).ok_or_else(|| damaged("the blocks are longer than the file"))?;
    let start = first.checked_sub(EDGE).ok_or_else(|| damaged("a stream has no header"))?;
    let header: [u8; EDGE as usize] = source.array(start)?;
    let sum = crc32fast::hash(&flags).to_le_bytes();
    if header[..6] != *HEADER_MAGIC || header[6..8] != flags || header[8..] != sum {
        return Err(damaged("a stream's header does not fit its footer"));
    }
    blocks.iter_mut().for_each(|block| block.file += first);
    Ok((start, blocks))
}

/// The lengths of the blocks; they begin nowhere yet.
fn parse(bytes: &[u8], flags: [u8; 2]) -> Result<Vec<Block>> {
    let wrong = || damaged("the index of the file is damaged");
    let (fields, sum) = bytes.split_last_chunk::<4>().ok_or_else(wrong)?;
    if crc32fast::hash(fields).to_le_bytes() != *sum {
        return Err(wrong());
    }
    let mut fields = fields.strip_prefix(&[0]).ok_or_else(wrong)?;
    let count = read_number(&mut fields).ok_or_else(wrong)?;
    // Each takes two bytes at least.
    let count = usize::try_from(count).ok().filter(|count| *count <= fields.len() / 2).ok_or_else(wrong)?;
    let mut blocks = Vec::with_capacity(count);
    for _ in 0..count {
        let unpadded = read_number(&mut fields).filter(|length| *length >= 5).ok_or_else(wrong)?;
        let length = read_number(&mut fields).ok_or_else(wrong)?;
        blocks.push(Block { file: 0, length, unpadded, flags });
    }
    if fields.len() > 3 || fields.iter().any(|byte| *byte != 0) {
        return Err(wrong());
    }
    Ok(blocks)
}

fn overflow() -> Error {
    damaged("the lengths in the index do not fit 64 bits")
}

/// A number of up to 63 bits, the lowest seven first.
fn read_number(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..63).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            // One way to write it only.
            return (shift == 0 || *byte != 0).then_some(number);
        }
    }
    None
}

fn write_number(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        for number in [0, 1, 127, 128, 300, 1 << 40, (1 << 63) - 1] {
            let mut bytes = Vec::new();
            write_number(&mut bytes, number);
            let mut rest = &bytes[..];
            assert_eq!((read_number(&mut rest), rest), (Some(number), &[][..]));
        }
        for mut bad in [&[][..], &[0x80], &[0x80, 0], &[0xff; 10]] {
            assert_eq!(read_number(&mut bad), None);
        }
    }

    #[test]
    fn any_index_is_parsed_or_refused() {
        let mut fields = vec![0, 0xff, 0xff, 0xff, 0xff, 0x7f, 5, 5];
        fields.extend(crc32fast::hash(&fields).to_le_bytes());
        assert!(parse(&fields, [0, 4]).is_err());
        assert!(parse(&[], [0, 4]).is_err());
        let mut fields = vec![0, 1, 5, 9];
        fields.extend(crc32fast::hash(&fields).to_le_bytes());
        assert_eq!(parse(&fields, [0, 4]).unwrap()[0].length, 9);
    }
}
