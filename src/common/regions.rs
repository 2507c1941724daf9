//! A disk put together from parts: regions of different kinds, one after the other without gaps.

/// One part of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region<K> {
    /// Where it starts, in bytes from the start of the disk.
    pub start: u64,
    /// Length in bytes, never 0.
    pub length: u64,
    /// What it is.
    pub kind: K,
}

impl<K> Region<K> {
    /// The first byte after the region.
    pub fn end(&self) -> u64 {
        self.start + self.length
    }
}

/// The part of a request that falls into one region.
#[derive(Debug, PartialEq, Eq)]
pub struct Piece<'a, K> {
    /// The region.
    pub region: &'a Region<K>,
    /// Where in the region the piece starts, in bytes.
    pub within: u64,
    /// Where in the request the piece starts, in bytes.
    pub at: u64,
    /// Length in bytes, never 0.
    pub length: u64,
}

/// Regions that cover `0..size` of a disk in ascending order.
#[derive(Clone, Debug)]
pub struct Regions<K>(Vec<Region<K>>);

impl<K> Default for Regions<K> {
    fn default() -> Self {
        Regions(Vec::new())
    }
}

impl<K> Regions<K> {
    /// No regions: a disk of size 0.
    pub fn new() -> Self {
        Self::default()
    }

    /// The size of the disk: where the last region ends.
    pub fn size(&self) -> u64 {
        self.0.last().map_or(0, Region::end)
    }

    /// Puts a region at the end; one of length 0 is left out. None, and nothing changes, when the disk would pass
    /// 2^63−1 bytes.
    #[must_use = "the disk may be too large"]
    pub fn push(&mut self, length: u64, kind: K) -> Option<()> {
        let start = self.size();
        start.checked_add(length).filter(|end| i64::try_from(*end).is_ok())?;
        if length > 0 {
            self.0.push(Region { start, length, kind });
        }
        Some(())
    }

    /// The regions in ascending order.
    pub fn as_slice(&self) -> &[Region<K>] {
        &self.0
    }

    /// The region that a byte is in. None past the end.
    pub fn find(&self, offset: u64) -> Option<&Region<K>> {
        self.0.get(self.index(offset))
    }

    /// The number of regions that end at or before `offset`: the index of the one it is in.
    fn index(&self, offset: u64) -> usize {
        self.0.partition_point(|region| region.end() <= offset)
    }

    /// Cuts `offset..offset+length` at the borders of regions. What is past the end of the disk is left out.
    pub fn pieces(&self, offset: u64, length: u64) -> impl Iterator<Item = Piece<'_, K>> {
        let end = offset.saturating_add(length);
        self.0[self.index(offset)..].iter().take_while(move |region| region.start.max(offset) < end).map(
            move |region| {
                let start = region.start.max(offset);
                Piece {
                    region,
                    within: start - region.start,
                    at: start - offset,
                    length: region.end().min(end) - start,
                }
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_disk_is_at_most_a_signed_64_bit_number_long() {
        let mut regions = Regions::new();
        regions.push(i64::MAX as u64, 'a').unwrap();
        assert_eq!(regions.push(1, 'b'), None);
        assert_eq!(regions.push(u64::MAX, 'b'), None);
        assert_eq!(regions.size(), i64::MAX as u64);
        assert!(regions.find(i64::MAX as u64).is_none());
    }

    proptest! {
        #[test]
        fn pieces_cover_a_request_byte_by_byte(
            lengths in prop::collection::vec(0u64..20, 0..12),
            offset in 0u64..250,
            length in 0u64..250,
        ) {
            let mut regions = Regions::new();
            let mut model = Vec::new();
            for (kind, length) in lengths.iter().enumerate() {
                regions.push(*length, kind).unwrap();
                model.extend((0..*length).map(|within| (kind, within)));
            }
            prop_assert_eq!(regions.size(), model.len() as u64);
            let at = model.get(offset as usize).map(|(kind, _)| *kind);
            prop_assert_eq!(regions.find(offset).map(|region| region.kind), at);
            let wanted: Vec<_> = model.into_iter().skip(offset as usize).take(length as usize).collect();
            let mut found = Vec::new();
            for piece in regions.pieces(offset, length) {
                prop_assert_eq!(piece.at, found.len() as u64);
                prop_assert!(piece.length > 0);
                found.extend((0..piece.length).map(|i| (piece.region.kind, piece.within + i)));
            }
            prop_assert_eq!(found, wanted);
        }
    }
}
