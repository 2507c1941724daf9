//! Decoded pieces, as many as fit: those that were not used for longest make room.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

/// What an entry costs beside its data, in bytes.
const OVERHEAD: u64 = 256;

/// A decoded piece.
#[derive(Debug)]
pub(super) struct Piece {
    /// Its first byte's offset in the disk.
    pub(super) start: u64,
    length: u64,
    /// Empty: all of it is zero.
    bytes: Vec<u8>,
}

impl Piece {
    pub(super) fn new(start: u64, bytes: Vec<u8>) -> Self {
        let length = bytes.len() as u64;
        let bytes = if is_zero(&bytes) { Vec::new() } else { bytes };
        Piece { start, length, bytes }
    }

    pub(super) fn end(&self) -> u64 {
        self.start + self.length
    }

    /// Copies into `buf`, which begins at `offset` of the disk, what the piece has of it.
    pub(super) fn copy_to(&self, buf: &mut [u8], offset: u64) {
        let from = self.start.max(offset);
        let to = self.end().min(offset + buf.len() as u64);
        if from >= to {
            return;
        }
        let target = &mut buf[(from - offset) as usize..(to - offset) as usize];
        match self.bytes.get((from - self.start) as usize..(to - self.start) as usize) {
            Some(bytes) => target.copy_from_slice(bytes),
            None => target.fill(0),
        }
    }

    /// Its data; None: zeroes.
    pub(super) fn bytes(&self) -> Option<&[u8]> {
        (!self.bytes.is_empty()).then_some(&self.bytes)
    }
}

pub(super) fn is_zero(bytes: &[u8]) -> bool {
    const ZEROES: [u8; 4096] = [0; 4096];
    bytes.chunks(ZEROES.len()).all(|chunk| chunk == &ZEROES[..chunk.len()])
}

/// See the module.
#[derive(Debug)]
pub(super) struct Cache {
    pieces: HashMap<u64, (Arc<Piece>, u64)>,
    /// By when they were last used.
    by_use: BTreeMap<u64, u64>,
    clock: u64,
    bytes: u64,
    capacity: u64,
}

impl Cache {
    /// One for `capacity` bytes.
    pub(super) fn new(capacity: u64) -> Self {
        Cache { pieces: HashMap::new(), by_use: BTreeMap::new(), clock: 0, bytes: 0, capacity }
    }

    pub(super) fn capacity(&self) -> u64 {
        self.capacity
    }

    pub(super) fn contains(&self, start: u64) -> bool {
        self.pieces.contains_key(&start)
    }

    /// The piece that starts there, which is then the last one used.
    pub(super) fn get(&mut self, start: u64) -> Option<Arc<Piece>> {
        let (piece, used) = self.pieces.get_mut(&start)?;
        // The order among the last few does not matter, and most requests go on in the same piece.
        if *used != self.clock {
            self.by_use.remove(used);
            self.clock += 1;
            *used = self.clock;
            self.by_use.insert(self.clock, start);
        }
        Some(piece.clone())
    }

    pub(super) fn insert(&mut self, piece: Arc<Piece>) {
        let start = piece.start;
        self.remove(start);
        self.clock += 1;
        self.bytes += cost(&piece);
        self.by_use.insert(self.clock, start);
        self.pieces.insert(start, (piece, self.clock));
        while self.bytes > self.capacity && self.pieces.len() > 1 {
            let Some((_, oldest)) = self.by_use.first_key_value() else { break };
            self.remove(*oldest);
        }
    }

    fn remove(&mut self, start: u64) {
        if let Some((piece, used)) = self.pieces.remove(&start) {
            self.by_use.remove(&used);
            self.bytes -= cost(&piece);
        }
    }
}

fn cost(piece: &Piece) -> u64 {
    piece.bytes.len() as u64 + OVERHEAD
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(start: u64) -> Arc<Piece> {
        Arc::new(Piece::new(start, vec![1; 100]))
    }

    #[test]
    fn the_longest_unused_makes_room() {
        let mut cache = Cache::new(3 * (100 + OVERHEAD));
        for start in [0, 100, 200] {
            cache.insert(piece(start));
        }
        assert!(cache.get(0).is_some());
        cache.insert(piece(300));
        assert!(cache.contains(0) && !cache.contains(100) && cache.contains(200) && cache.contains(300));
        cache.insert(piece(300));
        assert_eq!((cache.pieces.len(), cache.bytes), (3, cache.capacity));
    }

    #[test]
    fn one_piece_stays_whatever_its_size() {
        let mut cache = Cache::new(10);
        cache.insert(piece(0));
        cache.insert(piece(100));
        assert!(cache.contains(100) && !cache.contains(0));
    }

    #[test]
    fn zeroes_take_no_memory() {
        let piece = Piece::new(10, vec![0; 5000]);
        assert!(piece.bytes().is_none() && piece.end() == 5010);
        let mut buf = [7; 20];
        piece.copy_to(&mut buf, 0);
        assert!(buf[..10] == [7; 10] && buf[10..] == [0; 10]);
    }
}
