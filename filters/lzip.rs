//! Decompresses an .lz file: each of its members by itself, by the lengths at their ends.

use std::{ffi::OsStr, ops::Range};

use nbdkit_core::{Errno, Error, Filter, Info, Result};

use crate::{
    decompress::{Cursors, Format, Kind, Segments, Sink, Source, Stream, StreamCursor, damaged, filter},
    xz::{Limits, Lzma},
};

const MAGIC: &[u8; 5] = b"LZIP\x01";
const TRAILER: u64 = 20;
/// The shortest member in bytes.
const LEAST_MEMBER: u64 = 36;
/// Members that are remembered, at most.
const MOST_MEMBERS: usize = 4 << 20;
/// What may follow the last member, in bytes.
const MOST_TRAILING: u64 = 1 << 20;

pub(crate) fn new() -> Box<dyn Filter> {
    filter(Lzip(Limits::default()))
}

struct Lzip(Limits);

impl Kind for Lzip {
    fn info(&self) -> Info {
        const HELP: &str = "lzip-max-block=<SIZE>  Largest member that is accepted (default: 512M).
lzip-max-depth=<N>     Members that are kept in memory (default: 8 and more).";
        Info::bundled("lzip", "nbdkit lzip filter", HELP)
    }

    fn config(&mut self, key: &str, value: &OsStr) -> anyhow::Result<bool> {
        self.0.config("lzip", key, value)
    }

    fn open(&self, source: &Source, _: &OsStr) -> Result<Box<dyn Format>> {
        let members = read_members(source)?;
        let largest = members.largest();
        self.0.check("lzip", largest)?;
        let cache_size = self.0.cache_size(largest);
        Ok(Box::new(LzipFile { members, cache_size, cursors: Cursors::default() }))
    }
}

/// Where the members are, from the last to the first.
fn read_members(source: &Source) -> Result<Segments<Range<u64>>> {
    if source.size() < LEAST_MEMBER || source.array::<5>(0)? != *MAGIC {
        return Err(Error::new(Errno::EINVAL, "this is not an .lz file"));
    }
    let (mut end, mut members) = (last_end(source)?, Vec::new());
    while end > 0 {
        let Some((start, length)) = member_before(source, end)? else {
            return Err(damaged(format_args!("there is no member that ends at {end} of the file")));
        };
        if members.len() == MOST_MEMBERS {
            let what = format!("the file has over {MOST_MEMBERS} members: compress it in larger ones");
            return Err(Error::new(Errno::E2BIG, what));
        }
        members.push((length, start..end));
        end = start;
    }
    Segments::new(members.into_iter().rev())
}

/// Where the last member ends: other bytes may follow.
fn last_end(source: &Source) -> Result<u64> {
    let size = source.size();
    if member_before(source, size)?.is_some() {
        return Ok(size);
    }
    let from = size.saturating_sub(MOST_TRAILING);
    let bytes = source.bytes(from..size)?;
    for end in (0..=bytes.len()).rev() {
        // Two of the bytes of a length that can only be zero make most of the others cheap to rule out.
        if bytes[..end].ends_with(&[0, 0]) && member_before(source, from + end as u64)?.is_some() {
            return Ok(from + end as u64);
        }
    }
    Err(damaged("the file does not end as an .lz file does: it is cut off"))
}

/// The start and the length of the data of the member that ends there, if one does.
fn member_before(source: &Source, end: u64) -> Result<Option<(u64, u64)>> {
    if end < LEAST_MEMBER {
        return Ok(None);
    }
    let trailer: [u8; TRAILER as usize] = source.array(end - TRAILER)?;
    let number =
        |at: usize| trailer[at..at + 8].iter().rev().fold(0, |n: u64, byte| n << 8 | u64::from(*byte));
    let (length, member) = (number(4), number(12));
    if !(LEAST_MEMBER..=end).contains(&member) || source.array::<5>(end - member)? != *MAGIC {
        return Ok(None);
    }
    Ok(Some((end - member, length)))
}

struct LzipFile {
    members: Segments<Range<u64>>,
    cache_size: u64,
    cursors: Cursors<StreamCursor<Lzma>>,
}

impl Format for LzipFile {
    fn size(&self) -> u64 {
        self.members.size()
    }

    fn piece(&self, offset: u64) -> Range<u64> {
        self.members.piece(offset)
    }

    fn lane(&self, piece: &Range<u64>) -> Option<u64> {
        self.members.lane(piece)
    }

    fn decode(&self, source: &Source, piece: Range<u64>, sink: &mut Sink<'_>) -> Result<()> {
        let (whole, file) = self.members.at(piece.start);
        let stream = || Lzma::lzip().map(|lzma| Stream::new(lzma, Vec::new(), file.clone(), Vec::new()));
        if whole == piece {
            sink(piece.start, stream()?.whole(source, piece.end - piece.start)?);
            return Ok(());
        }
        let make = || Ok(StreamCursor::new(stream()?, whole.start));
        self.cursors.decode(source, &whole, &piece, (whole.start, make), sink)
    }

    fn cache_size(&self) -> u64 {
        self.cache_size
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decompress::testing::{
        disk, holds, over, pipe, readable, session, survives_damage, try_session,
    };

    const SIZE: usize = 1_200_001;

    #[test]
    fn one_member_or_several() {
        let expected = disk(SIZE);
        holds(&session(over(pipe("lzip -c -0", &expected)), "lzip", &[]), &expected);
        let mut file = pipe("lzip -c -0 -b 100000", &expected);
        holds(&session(over(file.clone()), "lzip", &[]), &expected);
        file.extend(b"something else that follows\0\0");
        holds(&session(over(file), "lzip", &[]), &expected);
        assert_eq!(session(over(pipe("lzip -c", &[])), "lzip", &[]).size(), 0);
    }

    #[test]
    fn damage_is_an_error_for_its_member_alone() {
        let expected = disk(SIZE);
        let mut file = Vec::new();
        for part in expected.chunks(100_000) {
            file.extend(pipe("lzip -c -0", part));
        }
        let middle = file.len() / 2;
        file[middle] ^= 1;
        assert_eq!(readable(&session(over(file), "lzip", &[]), &expected, 100_000), 12);
    }

    #[test]
    fn any_damage() {
        let expected = disk(300_000);
        survives_damage(&pipe("lzip -c -0 -b 100000", &expected), &expected, "lzip", &[]);
    }

    #[test]
    fn other_files_are_refused() {
        let cut = pipe("lzip -c -0", &disk(100_000));
        for file in [Vec::new(), disk(10_000), cut[..cut.len() - 1].to_vec()] {
            let error = try_session(over(file), "lzip", &[]).unwrap_err();
            assert!(matches!(error.errno(), Errno::EINVAL | Errno::EIO), "{error}");
        }
        let file = pipe("lzip -c -0", &disk(200_000));
        let error = try_session(over(file), "lzip", &[("lzip-max-block", "100K")]).unwrap_err();
        assert!(error.to_string().contains("raise lzip-max-block"), "{error}");
    }
}
