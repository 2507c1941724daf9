//! Decompresses a .bz2 file: each of its blocks by itself.
//!
//! A block begins at any bit, behind a mark of 48 bits, and says nothing of its length. So all blocks are found and decoded
//! once when the file is first opened, on all CPUs, to learn where each one's data lies in the disk.

mod bits;
mod scan;

use std::{ffi::OsStr, ops::Range};

use bzip2::{Decompress, Status};
use nbdkit_core::{Errno, Error, Filter, Info, Result};

use crate::decompress::{Format, Kind, LEAST_CACHE, Segments, Sink, Source, damaged, filter};

/// Longest data of a block in bytes: 900,000, in which runs of 255 take 5.
const LONGEST: usize = 900_000 / 5 * 259 + 1024;

pub(crate) fn new() -> Box<dyn Filter> {
    filter(Bzip2)
}

struct Bzip2;

impl Kind for Bzip2 {
    fn info(&self) -> Info {
        Info::bundled("bzip2", "nbdkit bzip2 filter", "")
    }

    fn open(&self, source: &Source, _: &OsStr) -> Result<Box<dyn Format>> {
        if source.size() < 14 || source.array::<3>(0)? != *b"BZh" {
            return Err(Error::new(Errno::EINVAL, "this is not a .bz2 file"));
        }
        Ok(Box::new(Bzip2File { blocks: Segments::new(scan::scan(source)?.into_iter())? }))
    }
}

struct Bzip2File {
    /// With their places in the file, in bits.
    blocks: Segments<Range<u64>>,
}

impl Format for Bzip2File {
    fn size(&self) -> u64 {
        self.blocks.size()
    }

    fn piece(&self, offset: u64) -> Range<u64> {
        self.blocks.at(offset).0
    }

    fn lane(&self, _: &Range<u64>) -> Option<u64> {
        None
    }

    fn decode(&self, source: &Source, piece: Range<u64>, sink: &mut Sink<'_>) -> Result<()> {
        let bits = self.blocks.at(piece.start).1;
        let bytes = source.bytes(bits.start / 8..bits.end.div_ceil(8))?;
        let data = decode(&bytes, (bits.start % 8) as usize, (bits.end - bits.start) as usize)?;
        if data.len() as u64 != piece.end - piece.start {
            return Err(damaged("a block is not as long as it was when it was first read"));
        }
        sink(piece.start, data);
        Ok(())
    }

    fn cache_size(&self) -> u64 {
        self.blocks.largest().saturating_mul(8).clamp(LEAST_CACHE, 4 * LEAST_CACHE)
    }
}

/// Decodes a block: `count` bits from bit `first` of `bytes` on.
///
/// # Errors
/// `EIO`: it is damaged.
fn decode(bytes: &[u8], first: usize, count: usize) -> Result<Vec<u8>> {
    let wrong = || damaged("a block is damaged");
    let stream = bits::stream_of(bytes, first, count).ok_or_else(wrong)?;
    let mut decoder = Decompress::new(false);
    let mut data = Vec::new();
    loop {
        let used = decoder.total_in() as usize;
        let before = data.len();
        data.reserve(1 << 20);
        let status = decoder.decompress_vec(&stream[used..], &mut data).map_err(|_| wrong())?;
        if status == Status::StreamEnd {
            data.shrink_to_fit();
            return Ok(data);
        }
        let stuck = data.len() == before && decoder.total_in() as usize == used;
        if status == Status::MemNeeded || stuck || data.len() > LONGEST {
            return Err(wrong());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decompress::testing::{disk, holds, over, pipe, session, survives_damage, try_session};

    const SIZE: usize = 1_500_001;

    #[test]
    fn levels_and_streams() {
        let expected = disk(SIZE);
        for options in ["-1", "-9"] {
            holds(&session(over(pipe(&format!("bzip2 -c {options}"), &expected)), "bzip2", &[]), &expected);
        }
        let mut file = pipe("bzip2 -c -2", &expected[..500_000]);
        file.extend(pipe("bzip2 -c", &[]));
        file.extend(pipe("bzip2 -c -1", &expected[500_000..]));
        holds(&session(over(file.clone()), "bzip2", &[]), &expected);
        file.extend(b"something else");
        holds(&session(over(file), "bzip2", &[]), &expected);
        assert_eq!(session(over(pipe("bzip2 -c", &[])), "bzip2", &[]).size(), 0);
    }

    #[test]
    fn blocks_of_zeroes_are_long() {
        let zeroes = vec![0; 60 << 20];
        holds(&session(over(pipe("bzip2 -c", &zeroes)), "bzip2", &[]), &zeroes);
    }

    #[test]
    fn any_damage() {
        let expected = disk(250_000);
        survives_damage(&pipe("bzip2 -c -1", &expected), &expected, "bzip2", &[]);
    }

    #[test]
    fn other_files_are_refused() {
        let cut = pipe("bzip2 -c", &disk(100_000));
        for file in
            [Vec::new(), disk(10_000), cut[..cut.len() - 1].to_vec(), b"BZh9 and nothing else".to_vec()]
        {
            let error = try_session(over(file), "bzip2", &[]).unwrap_err();
            assert!(matches!(error.errno(), Errno::EINVAL | Errno::EIO), "{error}");
        }
    }
}
