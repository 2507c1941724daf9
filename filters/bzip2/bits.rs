//! Bits of .bz2 files, of which each byte's highest comes first: marks, and blocks that are moved to the start of a byte.

/// The length of a mark, in bits.
pub(super) const MARK: u64 = 48;
/// What a block begins with.
const BLOCK: u64 = 0x3141_5926_5359;
/// What follows the last block of a stream.
const END: u64 = 0x1772_4538_5090;

/// What a mark begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    Block,
    End,
}

/// Finds marks in bytes that come one after the other.
#[derive(Debug, Default)]
pub(super) struct Finder {
    last: u64,
    bytes: u64,
}

impl Finder {
    /// Takes the next byte. A mark that ends in it, and the offset of its first bit.
    pub(super) fn push(&mut self, byte: u8) -> Option<(u64, Mark)> {
        self.last = self.last << 8 | u64::from(byte);
        self.bytes += 1;
        (0..8).rev().find_map(|shift| {
            let mark = match self.last >> shift & ((1 << MARK) - 1) {
                BLOCK => Mark::Block,
                END => Mark::End,
                _ => return None,
            };
            Some(((self.bytes * 8 - shift).checked_sub(MARK)?, mark))
        })
    }
}

/// `count` bits from bit `first` on.
pub(super) fn number(bytes: &[u8], first: usize, count: usize) -> Option<u64> {
    (first..first + count)
        .try_fold(0, |number, bit| Some(number << 1 | u64::from(bytes.get(bit / 8)? >> (7 - bit % 8) & 1)))
}

/// Makes a stream of one block: `count` bits from bit `first` of `bytes` on. None: there are not as many.
pub(super) fn stream_of(bytes: &[u8], first: usize, count: usize) -> Option<Vec<u8>> {
    number(bytes, (first + count).checked_sub(1)?, 1)?;
    let checksum = number(bytes, first + MARK as usize, 32)?;
    let mut stream = Vec::with_capacity(count / 8 + 20);
    stream.extend(b"BZh9");
    let (skip, shift) = (first / 8, first % 8);
    let moved = |i: usize| {
        let low = bytes.get(skip + i + 1).copied().unwrap_or(0);
        bytes.get(skip + i).map(|byte| (u16::from_be_bytes([*byte, low]) >> (8 - shift)) as u8)
    };
    for i in 0..count.div_ceil(8) {
        stream.push(moved(i)?);
    }
    // What follows goes to where the block ends, within its last byte.
    let used = count % 8;
    let tail = (u128::from(END) << 32 | u128::from(checksum)) << (128 - 80);
    let partial = if used > 0 { stream.pop().unwrap_or_default() & !(0xff >> used) } else { 0 };
    let mut tail = (tail >> used).to_be_bytes();
    tail[0] |= partial;
    stream.extend(&tail[..(used + 80).div_ceil(8)]);
    Some(stream)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_at_any_bit() {
        for shift in 0..8 {
            let bits = u128::from(BLOCK) << (128 - 48 - 16 - shift);
            let mut finder = Finder::default();
            let found: Vec<_> = bits.to_be_bytes().into_iter().filter_map(|byte| finder.push(byte)).collect();
            assert_eq!(found, [(16 + shift, Mark::Block)]);
        }
    }

    #[test]
    fn blocks_are_moved() {
        // 48 bits of a mark, a checksum, and three bits, from bit 5 on.
        let bits = (u128::from(BLOCK) << 32 | 0xdead_beef) << 3 | 0b101;
        let bytes = (bits << (128 - 83 - 5)).to_be_bytes();
        let stream = stream_of(&bytes, 5, 83).unwrap();
        assert_eq!(&stream[..10], b"BZh9\x31\x41\x59\x26\x53\x59");
        assert_eq!(number(&stream, 32 + 48, 35), Some(0xdead_beef << 3 | 0b101));
        assert_eq!(number(&stream, 32 + 83, 48), Some(END));
        assert_eq!(number(&stream, 32 + 83 + 48, 32), Some(0xdead_beef));
        assert_eq!(stream_of(&bytes, 5, 124), None);
    }
}
