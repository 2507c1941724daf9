//! A bitmap over the blocks of a disk, shared by all connections without a lock.
//!
//! The disk may be 8 EiB and nearly untouched, so memory follows what is set: a radix tree whose pages of bits, and
//! the tables over them, are made by the first `set` in them. What was never made is skipped as a whole, so walks
//! over an empty disk are short.

use std::sync::{
    OnceLock,
    atomic::{AtomicU64, Ordering},
};

/// Words in a page: 4 KiB.
const WORDS: usize = 512;
/// Entries of a table.
const FANOUT: usize = 2048;
/// Bits under a page, and under a table of the lower and of the upper level.
const PAGE_BITS: u64 = WORDS as u64 * 64;
const LOWER_BITS: u64 = PAGE_BITS * FANOUT as u64;
const UPPER_BITS: u64 = LOWER_BITS * FANOUT as u64;

/// What is missing is all clear.
type Table<T> = Box<[OnceLock<T>]>;
type Page = Box<[AtomicU64; WORDS]>;

/// A fixed number of bits, all clear at first. Every method may be called by several threads at once.
///
/// Changes of one bit are atomic and ordered: who sees a bit set also sees what its setter wrote before. Ranges
/// are changed word by word, so a reader may meet one half done. Bits past the end read as clear and cannot be set.
pub struct Bitmap {
    bits: u64,
    root: Table<Table<Table<Page>>>,
}

impl Bitmap {
    /// The most bits.
    pub const MAX: u64 = UPPER_BITS * FANOUT as u64;

    /// A bitmap of `bits` bits. None when that is over [`MAX`](Self::MAX).
    pub fn new(bits: u64) -> Option<Self> {
        if bits > Self::MAX {
            return None;
        }
        let root = table(bits.div_ceil(UPPER_BITS) as usize);
        Some(Bitmap { bits, root })
    }

    /// Number of bits.
    pub fn len(&self) -> u64 {
        self.bits
    }

    /// Whether there are no bits at all.
    pub fn is_empty(&self) -> bool {
        self.bits == 0
    }

    /// Whether a bit is set.
    pub fn get(&self, bit: u64) -> bool {
        bit < self.bits
            && self.page(bit).is_some_and(|page| {
                let (word, mask) = place(bit);
                page[word].load(Ordering::Acquire) & mask != 0
            })
    }

    /// Sets a bit and tells whether it was set before.
    pub fn set(&self, bit: u64) -> bool {
        if bit >= self.bits {
            return false;
        }
        let (word, mask) = place(bit);
        self.make_page(bit)[word].fetch_or(mask, Ordering::AcqRel) & mask != 0
    }

    /// Clears a bit and tells whether it was set before.
    pub fn clear(&self, bit: u64) -> bool {
        if bit >= self.bits {
            return false;
        }
        let (word, mask) = place(bit);
        self.page(bit).is_some_and(|page| page[word].fetch_and(!mask, Ordering::AcqRel) & mask != 0)
    }

    /// The 64 bits from `64 * index` on, the lowest first.
    pub fn word(&self, index: u64) -> u64 {
        let Some(bit) = index.checked_mul(64).filter(|bit| *bit < self.bits) else { return 0 };
        self.page(bit).map_or(0, |page| page[place(bit).0].load(Ordering::Acquire))
    }

    /// Sets those of the 64 bits from `64 * index` on that are set in `bits`.
    pub fn set_word(&self, index: u64, bits: u64) {
        let Some(bit) = index.checked_mul(64).filter(|bit| *bit < self.bits) else { return };
        let bits = bits & word_mask(bit, self.bits.min(bit + 64));
        if bits != 0 {
            self.make_page(bit)[place(bit).0].fetch_or(bits, Ordering::AcqRel);
        }
    }

    /// Sets or clears `count` bits from `first`, as far as they exist.
    pub fn set_range(&self, first: u64, count: u64, value: bool) {
        let end = first.saturating_add(count).min(self.bits);
        let mut bit = first;
        while bit < end {
            if !value && self.page(bit).is_none() {
                bit = self.after_missing(bit);
                continue;
            }
            let page = self.make_page(bit);
            let stop = end.min((bit / PAGE_BITS + 1) * PAGE_BITS);
            while bit < stop {
                let (word, _) = place(bit);
                let next = stop.min((bit / 64 + 1) * 64);
                let mask = word_mask(bit, next);
                if value {
                    page[word].fetch_or(mask, Ordering::AcqRel);
                } else {
                    page[word].fetch_and(!mask, Ordering::AcqRel);
                }
                bit = next;
            }
        }
    }

    /// Number of bits set.
    pub fn count(&self) -> u64 {
        made(&self.root)
            .flat_map(made)
            .flat_map(made)
            .flat_map(|page| &page[..])
            .map(|word| u64::from(word.load(Ordering::Relaxed).count_ones()))
            .sum()
    }

    /// The value of bit `from` and how many bits from there on have it, at most `limit`.
    ///
    /// The length is at least 1 when `limit` is and `from` exists, and never passes the end of the bitmap.
    pub fn run(&self, from: u64, limit: u64) -> (bool, u64) {
        let end = from.saturating_add(limit).min(self.bits);
        let value = self.get(from);
        let mut bit = from;
        while bit < end {
            let Some(page) = self.page(bit) else {
                if value {
                    break;
                }
                bit = self.after_missing(bit);
                continue;
            };
            let (word, _) = place(bit);
            let bits = page[word].load(Ordering::Acquire);
            // The bits that end the run, from `bit` on.
            let other = (if value { !bits } else { bits }) & (u64::MAX << (bit % 64));
            if other != 0 {
                bit = bit / 64 * 64 + u64::from(other.trailing_zeros());
                break;
            }
            bit = (bit / 64 + 1) * 64;
        }
        // A bit that changed meanwhile must not make the run empty.
        let shortest = u64::from(from < end);
        (value, bit.min(end).saturating_sub(from).max(shortest))
    }

    /// The first set bit from `from` on.
    pub fn next_set(&self, from: u64) -> Option<u64> {
        self.next(from, true)
    }

    /// The first clear bit from `from` on.
    pub fn next_clear(&self, from: u64) -> Option<u64> {
        self.next(from, false)
    }

    fn next(&self, from: u64, wanted: bool) -> Option<u64> {
        if from >= self.bits {
            return None;
        }
        match self.run(from, u64::MAX) {
            (value, _) if value == wanted => Some(from),
            (_, length) => Some(from + length).filter(|bit| *bit < self.bits),
        }
    }

    fn page(&self, bit: u64) -> Option<&Page> {
        self.lower(bit)?[index(bit, PAGE_BITS)].get()
    }

    fn lower(&self, bit: u64) -> Option<&Table<Page>> {
        self.upper(bit)?[index(bit, LOWER_BITS)].get()
    }

    fn upper(&self, bit: u64) -> Option<&Table<Table<Page>>> {
        self.root.get(index(bit, UPPER_BITS))?.get()
    }

    /// The page of a bit that exists, made if need be.
    fn make_page(&self, bit: u64) -> &Page {
        let upper = self.root[index(bit, UPPER_BITS)].get_or_init(|| table(FANOUT));
        let lower = upper[index(bit, LOWER_BITS)].get_or_init(|| table(FANOUT));
        lower[index(bit, PAGE_BITS)].get_or_init(|| Box::new([const { AtomicU64::new(0) }; WORDS]))
    }

    /// The first bit after the largest missing part that `bit` is in.
    fn after_missing(&self, bit: u64) -> u64 {
        let unit = match self.upper(bit) {
            None => UPPER_BITS,
            Some(_) if self.lower(bit).is_none() => LOWER_BITS,
            Some(_) => PAGE_BITS,
        };
        (bit / unit + 1) * unit
    }
}

impl std::fmt::Debug for Bitmap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bitmap({} of {} set)", self.count(), self.bits)
    }
}

fn table<T>(entries: usize) -> Table<T> {
    (0..entries).map(|_| OnceLock::new()).collect()
}

fn made<T>(table: &Table<T>) -> impl Iterator<Item = &T> {
    table.iter().filter_map(OnceLock::get)
}

/// Where a bit is in a table whose entries stand for `unit` bits each.
fn index(bit: u64, unit: u64) -> usize {
    (bit / unit) as usize % FANOUT
}

/// Where a bit is in its page: in which word, and its mask.
fn place(bit: u64) -> (usize, u64) {
    ((bit / 64) as usize % WORDS, 1 << (bit % 64))
}

/// The mask of the bits from `bit` up to `end`, which are in one word.
fn word_mask(bit: u64, end: u64) -> u64 {
    u64::MAX >> (64 - (end - bit)) << (bit % 64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_huge_one_costs_what_is_set() {
        let map = Bitmap::new(1 << 47).unwrap();
        assert_eq!(map.run(0, u64::MAX), (false, 1 << 47));
        let last = (1 << 47) - 1;
        assert!(!map.set(last));
        assert!(map.set(last));
        assert_eq!(map.run(0, u64::MAX), (false, last));
        assert_eq!(map.next_set(5), Some(last));
        assert_eq!(map.next_clear(last), None);
        map.set_range(0, u64::MAX, false);
        assert_eq!(map.count(), 0);
        let pages = made(&map.root).flat_map(made).flat_map(made).count();
        assert_eq!(pages, 1);
    }

    #[test]
    fn bits_past_the_end_do_not_exist() {
        let map = Bitmap::new(100).unwrap();
        assert!(!map.set(100));
        assert!(!map.get(100));
        map.set_range(90, u64::MAX, true);
        assert_eq!(map.count(), 10);
        assert_eq!(map.run(90, 1000), (true, 10));
        assert_eq!(map.run(100, 5), (false, 0));
        assert!(Bitmap::new(Bitmap::MAX + 1).is_none());
        assert!(!Bitmap::new(Bitmap::MAX).unwrap().set(Bitmap::MAX - 1));
        assert!(Bitmap::new(0).unwrap().is_empty());
    }

    #[test]
    fn words_are_64_bits() {
        let map = Bitmap::new(100).unwrap();
        map.set_word(1, u64::MAX);
        map.set_word(2, u64::MAX);
        map.set(1);
        assert_eq!((map.word(0), map.word(1), map.word(2)), (2, (1 << 36) - 1, 0));
        assert_eq!(map.count(), 37);
    }

    #[test]
    fn setters_in_parallel_lose_nothing() {
        let map = Bitmap::new(200_000).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let map = &map;
                scope.spawn(move || (thread..map.len()).step_by(4).for_each(|bit| assert!(!map.set(bit))));
            }
        });
        assert_eq!(map.count(), map.len());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn behaves_like_a_vector(
            bits in 1u64..100_000,
            changes in prop::collection::vec((any::<u64>(), 0u64..70_000, any::<bool>()), 0..12),
            probes in prop::collection::vec((any::<u64>(), 1u64..100_000), 20),
        ) {
            let map = Bitmap::new(bits).unwrap();
            let mut model = vec![false; bits as usize];
            for (first, count, value) in changes {
                let first = first % bits;
                map.set_range(first, count, value);
                model.iter_mut().skip(first as usize).take(count as usize).for_each(|bit| *bit = value);
            }
            prop_assert_eq!(map.count(), model.iter().filter(|bit| **bit).count() as u64);
            for (from, limit) in probes {
                let from = from % bits;
                let tail = &model[from as usize..];
                let length = tail.iter().take(limit as usize).take_while(|bit| **bit == tail[0]).count() as u64;
                prop_assert_eq!(map.run(from, limit), (tail[0], length));
                let found = |value| tail.iter().position(|bit| *bit == value).map(|at| from + at as u64);
                prop_assert_eq!(map.next_set(from), found(true));
                prop_assert_eq!(map.next_clear(from), found(false));
            }
        }
    }
}
