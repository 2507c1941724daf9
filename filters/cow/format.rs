//! How a persistent overlay lies in its file: the header and the pages of the block map.
//!
//! ```text
//! 0          header, 4 KiB, written once
//! 4 KiB      the base (see `base`): two slots of 4 KiB, written in turn; absent in version 1
//! 12 KiB     block map: for each page of the map two slots of 4 KiB, written in turn; at 4 KiB in version 1
//! data_start blocks, each at data_start plus its offset on the disk
//! ```
//!
//! Version 1 knows neither its base nor its export. It is read and written as it is, and never made anew.
//!
//! Numbers are little-endian. A slot that was torn by a crash fails its checksum, and then the other one, which was
//! durable before, counts. A page that was never written is a hole and says that nothing has changed. Sequence numbers
//! may wrap around.

use super::BLOCK_SIZES;

/// What the file starts with.
const MAGIC: [u8; 8] = *b"NBDKCOW\x1a";
/// The version of new overlays.
const VERSION: u32 = 2;
/// The version that knows neither its base nor its export.
const NAMELESS: u32 = 1;

/// What to do about a damaged file.
pub(super) const REMEDY: &str =
    "Restore it from a copy, or give another file and lose the changes that it holds";

/// Bytes of the header.
pub(super) const HEADER: u64 = 4096;
/// Bytes of a slot.
pub(super) const SLOT: usize = 4096;
/// Words of one bitmap in a page.
const WORDS: usize = (SLOT - SLOT_HEADER) / 8 / 2;
const SLOT_HEADER: usize = 32;
/// Blocks whose state is in one page.
pub(super) const PAGE_BLOCKS: u64 = WORDS as u64 * 64;
/// The data start at a multiple of this, so that holes in them can be punched whole.
const DATA_ALIGNMENT: u64 = 1 << 20;

/// Where the checksums lie: after what they cover in the header, in the middle of a slot.
const HEADER_CHECKSUM: usize = 48;
const SLOT_CHECKSUM: usize = 24;
/// Where the export's name lies in the header, after its length in bytes at [`NAME_LENGTH`].
const NAME: usize = 64;
const NAME_LENGTH: usize = 12;
/// Where it says that the file has its full length. In the first sector, as all that may change.
const FULL_LENGTH: usize = 52;
/// The longest name of an export that a header has room for, in bytes.
pub(super) const LONGEST_NAME: usize = HEADER as usize - NAME;

/// What the header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// [`VERSION`] or [`NAMELESS`].
    version: u32,
    /// The name of the export whose changes these are; None in version 1.
    pub(super) export: Option<Vec<u8>>,
    /// Size in bytes of the disk below.
    pub(super) size: u64,
    /// Unit of the overlay in bytes.
    pub(super) block_size: u64,
    /// Where the data start in the file.
    pub(super) data_start: u64,
    /// A random number, which the slots repeat.
    pub(super) id: u64,
    /// The file is never shorter than up to the data, so that one that is was cut off. Older ones may be.
    pub(super) full_length: bool,
}

impl Header {
    /// The header of a new overlay. None: no file can be that large, or no header holds a name that long.
    pub(super) fn new(export: &[u8], size: u64, block_size: u64, id: u64) -> Option<Self> {
        let export = (export.len() <= LONGEST_NAME).then(|| export.to_vec())?;
        Self::lay_out(VERSION, Some(export), size, block_size, id)
    }

    fn lay_out(version: u32, export: Option<Vec<u8>>, size: u64, block_size: u64, id: u64) -> Option<Self> {
        let mut header = Header { version, export, size, block_size, data_start: 0, id, full_length: false };
        let map = header.pages().checked_mul(2 * SLOT as u64)?;
        header.data_start = header.map_start().checked_add(map)?.checked_next_multiple_of(DATA_ALIGNMENT)?;
        let end = header.data_start.checked_add(size)?;
        (end <= i64::MAX as u64).then_some(header)
    }

    /// The same for a file that has its full length.
    pub(super) fn with_full_length(self) -> Self {
        Header { full_length: true, ..self }
    }

    /// One as the versions before 2 made it.
    #[cfg(test)]
    pub(super) fn nameless(size: u64, block_size: u64, id: u64) -> Self {
        Self::lay_out(NAMELESS, None, size, block_size, id).unwrap()
    }

    /// Number of pages of the map.
    pub(super) fn pages(&self) -> u64 {
        self.size.div_ceil(self.block_size).div_ceil(PAGE_BLOCKS)
    }

    /// Whether there is a place for the base.
    pub(super) fn has_base(&self) -> bool {
        self.version > NAMELESS
    }

    /// Where the block map starts in the file.
    pub(super) fn map_start(&self) -> u64 {
        if self.has_base() { base_slot_offset(2) + 2 * SLOT as u64 } else { HEADER }
    }

    /// Where a slot of a page is in the file. Writes with even and odd sequence numbers take turns.
    pub(super) fn slot_offset(&self, page: u64, sequence: u64) -> u64 {
        self.map_start() + (2 * page + sequence % 2) * SLOT as u64
    }

    /// The checksum, and how many bytes of the header it covers.
    fn checksum(version: u32, bytes: &[u8]) -> u32 {
        let mut sum = crc32fast::Hasher::new();
        sum.update(&bytes[..HEADER_CHECKSUM]);
        if version > NAMELESS {
            sum.update(&bytes[HEADER_CHECKSUM + 4..]);
        }
        sum.finalize()
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; HEADER as usize];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&self.version.to_le_bytes());
        for (at, number) in [(16, self.size), (24, self.block_size), (32, self.data_start), (40, self.id)] {
            bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
        }
        bytes[FULL_LENGTH] = self.full_length.into();
        if let Some(name) = &self.export {
            bytes[NAME_LENGTH..NAME_LENGTH + 4].copy_from_slice(&(name.len() as u32).to_le_bytes());
            bytes[NAME..NAME + name.len()].copy_from_slice(name);
        }
        let checksum = Self::checksum(self.version, &bytes);
        bytes[HEADER_CHECKSUM..HEADER_CHECKSUM + 4].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Reads the first bytes of a file. The error completes the sentence "FILE …".
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() < HEADER as usize || bytes[..8] != MAGIC {
            return Err(
                "is not an overlay of the cow filter: give another file, or one that does not exist".into()
            );
        }
        let bytes = &bytes[..HEADER as usize];
        let version = number32(bytes, 8);
        if version > VERSION {
            return Err(format!(
                "has version {version}, which needs a newer nbdkit: this one reads up to {VERSION}"
            ));
        }
        if number32(bytes, HEADER_CHECKSUM) != Self::checksum(version, bytes) {
            return Err(format!("has a damaged header: its checksum is wrong. {REMEDY}"));
        }
        let number = |at| number64(bytes, at);
        let (size, block_size) = (number(16), number(24));
        let sane = BLOCK_SIZES.contains(&block_size) && block_size.is_power_of_two();
        let export = || {
            let length = number32(bytes, NAME_LENGTH) as usize;
            (version > NAMELESS).then(|| bytes.get(NAME..NAME.checked_add(length)?)).flatten()
        };
        let lay_out = || Header::lay_out(version, export().map(<[u8]>::to_vec), size, block_size, number(40));
        match sane.then(lay_out).flatten() {
            Some(header)
                if header.data_start == number(32)
                    && (version == NAMELESS || (version == VERSION && header.export.is_some())) =>
            {
                Ok(Header { full_length: version > NAMELESS && bytes[FULL_LENGTH] != 0, ..header })
            }
            _ => Err(format!("has a header that makes no sense. {REMEDY}")),
        }
    }
}

/// Where a record of the base is in the file, in a version that has one.
pub(super) fn base_slot_offset(sequence: u64) -> u64 {
    HEADER + sequence % 2 * SLOT as u64
}

/// The states of [`PAGE_BLOCKS`] blocks: the words of the two bitmaps.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Page {
    pub(super) changed: [u64; WORDS],
    pub(super) discarded: [u64; WORDS],
}

impl Page {
    pub(super) const EMPTY: Page = Page { changed: [0; WORDS], discarded: [0; WORDS] };

    /// The last block whose data are in the file, counted from the first of the page.
    pub(super) fn last_stored(&self) -> Option<u64> {
        let words = self.changed.iter().zip(&self.discarded).map(|(changed, discarded)| changed & !discarded);
        let (index, word) = (0..).zip(words).filter(|(_, word)| *word != 0).last()?;
        Some(index * 64 + u64::from(word.ilog2()))
    }

    pub(super) fn encode(&self, header: &Header, page: u64, sequence: u64) -> Vec<u8> {
        let mut bytes = vec![0; SLOT];
        for (at, number) in [(0, sequence), (8, page), (16, header.id)] {
            bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
        }
        let words = self.changed.iter().chain(&self.discarded);
        for (place, word) in bytes[SLOT_HEADER..].chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        let checksum = crc32fast::hash(&bytes);
        bytes[SLOT_CHECKSUM..SLOT_CHECKSUM + 4].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }
}

/// What a slot holds.
pub(super) enum Slot {
    /// Nothing was ever written there.
    Empty,
    /// The end of a write is missing, or worse.
    Damaged,
    Valid(u64, Box<Page>),
}

impl Slot {
    /// Reads the slot that is written when the sequence number is even, or odd.
    fn decode(bytes: &[u8], header: &Header, page: u64, parity: u64) -> Self {
        if bytes.iter().all(|b| *b == 0) {
            return Slot::Empty;
        }
        let mut sum = crc32fast::Hasher::new();
        sum.update(&bytes[..SLOT_CHECKSUM]);
        sum.update(&[0; 4]);
        sum.update(&bytes[SLOT_CHECKSUM + 4..]);
        let sequence = number64(bytes, 0);
        if sum.finalize() != number32(bytes, SLOT_CHECKSUM)
            || sequence % 2 != parity
            || number64(bytes, 8) != page
            || number64(bytes, 16) != header.id
        {
            return Slot::Damaged;
        }
        let mut contents = Box::new(Page::EMPTY);
        let words = contents.changed.iter_mut().chain(&mut contents.discarded);
        for (word, place) in words.zip((SLOT_HEADER..SLOT).step_by(8)) {
            *word = number64(bytes, place);
        }
        Slot::Valid(sequence, contents)
    }

    /// Whether the newer slot may be one of a page's two that is damaged, by a crash or otherwise.
    pub(super) fn has_damage(bytes: &[u8], header: &Header, page: u64) -> bool {
        let slots = bytes.chunks_exact(SLOT).zip(0..);
        slots
            .map(|(slot, parity)| Slot::decode(slot, header, page, parity))
            .any(|s| matches!(s, Slot::Damaged))
    }

    /// The newer of a page's two slots, which lie in `bytes` one after the other. None: damaged beyond what a crash
    /// can do.
    pub(super) fn newest(bytes: &[u8], header: &Header, page: u64) -> Option<Self> {
        let (even, odd) = bytes.split_at_checked(SLOT)?;
        match (Slot::decode(even, header, page, 0), Slot::decode(odd, header, page, 1)) {
            (Slot::Valid(a, even), Slot::Valid(b, odd)) => {
                Some(if is_newer(a, b) { Slot::Valid(a, even) } else { Slot::Valid(b, odd) })
            }
            (valid @ Slot::Valid(..), _) | (_, valid @ Slot::Valid(..)) => Some(valid),
            (Slot::Damaged, Slot::Damaged) => None,
            // The very first write of the page was torn.
            _ => Some(Slot::Empty),
        }
    }
}

/// Whether a slot with sequence number `a` was written after one with `b`.
pub(super) fn is_newer(a: u64, b: u64) -> bool {
    a.wrapping_sub(b).cast_signed() > 0
}

pub(super) fn number32(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].try_into().map_or(0, u32::from_le_bytes)
}

pub(super) fn number64(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].try_into().map_or(0, u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header::new(b"disk0", 100 << 30, 65536, 7).unwrap()
    }

    #[test]
    fn headers_come_back_and_damage_is_seen() {
        let bytes = header().encode();
        assert_eq!(Header::decode(&bytes), Ok(header()));
        let full = Header { full_length: true, ..header() };
        assert_eq!(full.encode()[512..], bytes[512..], "only the first sector changes");
        assert_eq!(Header::decode(&full.encode()), Ok(full));
        for at in 0..HEADER as usize {
            let mut bytes = bytes.clone();
            bytes[at] ^= 0x10;
            assert!(Header::decode(&bytes).is_err(), "{at}");
        }
        let old = Header::nameless(100 << 30, 65536, 7);
        assert_eq!(Header::decode(&old.encode()), Ok(old));
        assert!(Header::decode(&bytes[..100]).unwrap_err().contains("not an overlay"));
        assert!(Header::decode(&[0; 4096]).unwrap_err().contains("not an overlay"));
        let mut newer = bytes;
        newer[8] = 3;
        assert!(Header::decode(&newer).unwrap_err().contains("newer nbdkit"));
    }

    #[test]
    fn a_file_has_an_end() {
        assert!(Header::new(b"", i64::MAX as u64, 2 << 30, 0).is_none());
        assert!(Header::new(b"", 1 << 62, 4096, 0).is_some());
        assert_eq!(Header::new(b"", 0, 4096, 0).unwrap().pages(), 0);
        assert!(Header::new(&[b'x'; LONGEST_NAME], 0, 4096, 0).is_some());
        assert!(Header::new(&[b'x'; LONGEST_NAME + 1], 0, 4096, 0).is_none());
    }

    fn page(n: u64) -> Page {
        let mut page = Page::EMPTY;
        (page.changed[3], page.discarded[WORDS - 1]) = (n, n + 1);
        page
    }

    fn newest(even: &[u8], odd: &[u8]) -> Option<(u64, Page)> {
        match Slot::newest(&[even, odd].concat(), &header(), 5)? {
            Slot::Valid(sequence, page) => Some((sequence, *page)),
            _ => Some((0, Page::EMPTY)),
        }
    }

    #[test]
    fn the_newer_slot_counts_unless_it_is_torn() {
        let (old, new) = (page(1).encode(&header(), 5, 6), page(2).encode(&header(), 5, 7));
        assert!(newest(&old, &new).unwrap() == (7, page(2)));
        // Every sector of the new one may be missing.
        for sector in 0..8 {
            let mut torn = new.clone();
            torn[sector * 512..][..512]
                .copy_from_slice(&page(0).encode(&header(), 5, 5)[sector * 512..][..512]);
            let (sequence, found) = newest(&old, &torn).unwrap();
            assert!((sequence, found) == (6, page(1)) || torn == new, "{sector}");
        }
        let zeroes = [0; SLOT];
        let (old, last) =
            (page(1).encode(&header(), 5, u64::MAX), page(2).encode(&header(), 5, u64::MAX - 1));
        assert!(newest(&last, &old).unwrap() == (u64::MAX, page(1)));
        let wrapped = page(3).encode(&header(), 5, 0);
        assert!(newest(&wrapped, &old).unwrap() == (0, page(3)), "the number wraps around");
        assert!(newest(&zeroes, &new[..]).unwrap() == (7, page(2)));
        assert!(newest(&zeroes, &zeroes).unwrap() == (0, Page::EMPTY));
        let torn = [&new[..512], &zeroes[512..]].concat();
        assert!(newest(&zeroes, &torn).unwrap() == (0, Page::EMPTY), "a torn first write");
        assert!(newest(&torn, &torn).is_none());
    }

    #[test]
    fn a_slot_belongs_to_its_page_and_overlay() {
        let zeroes = [0; SLOT];
        for stray in [
            page(1).encode(&header(), 4, 6),
            page(1).encode(&header(), 5, 7),
            page(1).encode(&Header { id: 8, ..header() }, 5, 6),
        ] {
            assert!(newest(&stray, &zeroes).unwrap().0 == 0);
        }
    }
}
