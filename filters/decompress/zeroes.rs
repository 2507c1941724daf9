//! Which parts of a disk were found to be zero when they were decoded: what is told as holes.

use std::collections::HashMap;

use nbdkit_core::{Extents, Result};
use parking_lot::RwLock;

use super::cache::{Piece, is_zero};

/// What is looked at as one, in bytes.
const UNIT: u64 = 64 << 10;
/// Units that share an entry.
const UNITS: u64 = u64::BITS as u64;
/// Entries at most, 4 MiB of disk each: what is found later is not kept.
const MOST: usize = 1 << 20;

/// See the module.
#[derive(Default)]
pub(super) struct Zeroes {
    /// One bit for each unit that is zero.
    found: RwLock<HashMap<u64, u64>>,
}

impl Zeroes {
    /// Looks through a piece that was decoded; a unit at the end of the disk may be short.
    pub(super) fn learn(&self, piece: &Piece, size: u64) {
        let first = piece.start.div_ceil(UNIT);
        let end = if piece.end() == size { piece.end().div_ceil(UNIT) } else { piece.end() / UNIT };
        let zero = |unit: u64| match piece.bytes() {
            None => true,
            Some(bytes) => {
                let from = unit * UNIT - piece.start;
                is_zero(&bytes[from as usize..(from + UNIT).min(bytes.len() as u64) as usize])
            }
        };
        let mut found = None;
        for unit in (first..end).filter(|unit| zero(*unit)) {
            let found = found.get_or_insert_with(|| self.found.write());
            let key = unit / UNITS;
            if found.len() < MOST || found.contains_key(&key) {
                *found.entry(key).or_default() |= 1 << (unit % UNITS);
            }
        }
    }

    /// Tells the extents of a range of a disk of `size` bytes.
    pub(super) fn extents(&self, offset: u64, length: u64, size: u64, extents: &mut Extents) -> Result<()> {
        let found = self.found.read();
        if found.is_empty() {
            return extents.add_data(offset, length);
        }
        let (mut unit, end) = (offset / UNIT, (offset + length).div_ceil(UNIT));
        while unit < end && !extents.is_complete() {
            let bits = found.get(&(unit / UNITS)).copied().unwrap_or(0) >> (unit % UNITS);
            let zero = bits & 1 == 1;
            let same = if zero { bits.trailing_ones() } else { bits.trailing_zeros() };
            let count = u64::from(same).min(UNITS - unit % UNITS);
            let start = (unit * UNIT).max(offset);
            extents.add(start, ((unit + count) * UNIT).min(size) - start, zero, zero)?;
            unit += count;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(zeroes: &Zeroes, offset: u64, length: u64, size: u64) -> Vec<(u64, u64, bool)> {
        let mut extents = Extents::new(offset, offset + length);
        zeroes.extents(offset, length, size, &mut extents).unwrap();
        extents.as_slice().iter().map(|e| (e.offset, e.length, e.zero && e.hole)).collect()
    }

    #[test]
    fn whole_units_that_are_zero() {
        let size = 10 * UNIT + 10;
        let zeroes = Zeroes::default();
        assert_eq!(told(&zeroes, 5, 100, size), [(5, 100, false)]);
        let mut bytes = vec![0; 4 * UNIT as usize];
        bytes[2 * UNIT as usize] = 1;
        // It begins within a unit and ends within one.
        zeroes.learn(&Piece::new(UNIT / 2, bytes), size);
        assert_eq!(
            told(&zeroes, 0, size, size),
            [
                (0, UNIT, false),
                (UNIT, UNIT, true),
                (2 * UNIT, UNIT, false),
                (3 * UNIT, UNIT, true),
                (4 * UNIT, size - 4 * UNIT, false)
            ]
        );
        zeroes.learn(&Piece::new(9 * UNIT, vec![0; UNIT as usize + 10]), size);
        assert_eq!(
            told(&zeroes, 8 * UNIT + 1, 2 * UNIT, size),
            [(8 * UNIT + 1, UNIT - 1, false), (9 * UNIT, UNIT + 10, true)]
        );
    }
}
