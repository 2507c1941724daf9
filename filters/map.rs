//! Moves ranges of the disk to other places.

use std::{collections::BTreeMap, ffi::OsStr};

use anyhow::{Context as _, ensure};
use nbdkit_common::Regions;
use nbdkit_core::{
    Below, Call, Caps, Data, Errno, Error, Extents, Filter, Flags, Handle, Info, Next, NextConfig, Op, Open,
    Outcome, Request, Result, params,
};

const HELP: &str = "\
map=<START>-<END>:<DEST>   What is at START to END, END included, is at DEST below. Can be repeated.
map-size=<SIZE>            Size of the disk (default: as below).";

pub(crate) fn new() -> Box<dyn Filter> {
    Box::new(Map { moves: Vec::new(), size: None })
}

struct Map {
    /// The first that fits counts.
    moves: Vec<Move>,
    size: Option<u64>,
}

/// A range of the disk, and where it is below.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Move {
    start: u64,
    /// Exclusive.
    end: u64,
    to: u64,
}

impl Move {
    fn parse(value: &str) -> anyhow::Result<Self> {
        let form = || format!("map='{value}' is not of the form START-END:DEST, such as 0-511:1024");
        let (range, to) = value.split_once(':').with_context(form)?;
        let (start, last) = range.split_once('-').with_context(form)?;
        let number = |text: &str, default: u64| match text {
            "" => Ok(default),
            text => params::integer("map", OsStr::new(text)),
        };
        ensure!(!to.is_empty(), form());
        let most = i64::MAX as u64;
        let (start, to) = (number(start, 0)?, number(to, 0)?);
        let last = number(last, most - 1)?;
        ensure!(start <= last, "map='{value}' ends before it starts");
        ensure!(last < most && to < most, "map='{value}' goes past 2^63-1 bytes");
        Ok(Move { start, end: last + 1, to })
    }
}

/// Where a part of the disk is below; None: nowhere.
type Place = Option<u64>;

/// The disk of `size` bytes over one of `below` bytes, in parts.
fn layout(moves: &[Move], size: u64, below: u64) -> Option<Regions<Place>> {
    // The parts of the moves that no earlier one covers, by their starts.
    let mut parts: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
    for &Move { start, end, to } in moves {
        let mut at = start;
        let end = end.min(size);
        while at < end {
            let before = parts.range(..=at).next_back().map(|(_, (end, _))| *end).filter(|end| *end > at);
            if let Some(covered) = before {
                at = covered;
                continue;
            }
            let next = parts.range(at..).next().map_or(end, |(start, _)| *start).min(end);
            parts.insert(at, (next, to + (at - start)));
            at = next;
        }
    }
    let mut regions = Regions::new();
    let mut push = |length: u64, to: u64| {
        let there = below.saturating_sub(to).min(length);
        regions.push(there, Some(to))?;
        regions.push(length - there, None)
    };
    let mut at = 0;
    for (start, (end, to)) in parts {
        push(start - at, at)?;
        push(end - start, to)?;
        at = end;
    }
    push(size - at, at)?;
    Some(regions)
}

impl Filter for Map {
    fn info(&self) -> Info {
        Info::bundled("map", "nbdkit map filter", HELP)
    }

    fn config(&mut self, key: &str, value: &OsStr, next: &mut NextConfig<'_>) -> anyhow::Result<()> {
        match key {
            "map" => self.moves.push(Move::parse(params::text(value)?)?),
            "map-size" => self.size = Some(params::size(value).context("map-size")?),
            _ => return next(key, value),
        }
        Ok(())
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        let next = next.open(open)?;
        let below = next.caps().size;
        let regions = layout(&self.moves, self.size.unwrap_or(below), below)
            .ok_or_else(|| Error::new(Errno::EOVERFLOW, "the mapped disk is over 2^63-1 bytes"))?;
        Ok(Box::new(Mapped { regions, next }))
    }
}

struct Mapped {
    regions: Regions<Place>,
    next: Next,
}

/// A part of a request.
struct Piece {
    /// Where it is below.
    to: u64,
    /// Where in the request it starts.
    at: u64,
    length: u64,
}

impl Mapped {
    /// The parts of a request, each as large as possible; an error for one that is nowhere.
    fn pieces(&self, length: u64, offset: u64) -> impl Iterator<Item = Result<Piece>> {
        self.regions.pieces(offset, length).map(move |piece| match piece.region.kind {
            Some(to) => Ok(Piece { to: to + piece.within, at: piece.at, length: piece.length }),
            None => Err(Error::new(
                Errno::EIO,
                format!("nothing is mapped at {} (map=, map-size=)", offset + piece.at),
            )),
        })
    }

    /// Where a range is below that is in one piece there.
    fn place(&self, length: u64, offset: u64) -> Option<u64> {
        let piece = self.regions.pieces(offset, length).next()?;
        piece.region.kind.filter(|_| piece.length == length).map(|to| to + piece.within)
    }

    /// Runs a request piece by piece, if all of them are somewhere.
    fn run_pieces(&self, request: &mut Request<'_>) -> Outcome<'_> {
        let (call, may_wait) = (*request.call(), request.may_wait());
        if let Err(e) = self.pieces(call.length, call.offset).try_for_each(|piece| piece.map(drop)) {
            return Outcome::Done(Err(e));
        }
        for piece in self.pieces(call.length, call.offset).flatten() {
            let data = match request.data() {
                Data::Read(buf) => Data::Read(&mut buf[piece.range()]),
                Data::Write(buf) => Data::Write(&buf[piece.range()]),
                _ => Data::None,
            };
            let call = Call { offset: piece.to, length: piece.length, ..call };
            match self.next.piece(call, data, may_wait) {
                Outcome::Done(Ok(())) => {}
                outcome => return outcome,
            }
        }
        Outcome::Done(Ok(()))
    }
}

impl Piece {
    fn range(&self) -> std::ops::Range<usize> {
        self.at as usize..(self.at + self.length) as usize
    }
}

impl Handle for Mapped {
    fn next(&self) -> Option<&Next> {
        Some(&self.next)
    }

    fn capabilities(&self) -> Result<Caps> {
        Ok(self.next.capabilities().with_size(self.regions.size()))
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        let Call { op, offset, length, .. } = *request.call();
        if op == Op::Flush {
            return self.next.pass(request);
        }
        if let Some(to) = self.place(length, offset) {
            return self.next.relocated(request, to);
        }
        match op {
            // Reading the first pieces for nothing is all the harm if a later one needs a thread. Without memory it asks for
            // a loan.
            Op::Read if matches!(request.data(), Data::Read(_)) => self.run_pieces(request),
            _ if !request.may_wait() => Outcome::NeedsThread,
            Op::Extents => request.run(self),
            _ => self.run_pieces(request),
        }
    }

    fn extents(&self, length: u64, offset: u64, flags: Flags, extents: &mut Extents) -> Result<()> {
        for piece in self.regions.pieces(offset, length) {
            let at = offset + piece.at;
            let Some(to) = piece.region.kind.map(|to| to + piece.within) else {
                // A read there reports the error.
                extents.add_data(at, piece.length)?;
                continue;
            };
            let mut below = Extents::new(to, to + piece.length);
            self.next.extents(piece.length, to, flags, &mut below)?;
            for extent in below.as_slice() {
                let end = extent.end().min(to + piece.length);
                extents.add(at + (extent.offset - to), end - extent.offset, extent.hole, extent.zero)?;
            }
            if below.covered_to() < to + piece.length || flags.contains(Flags::REQ_ONE) {
                break;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{
        Answer, Spec, View, check_model, config_error, lent, pattern, read_inline, session, started,
    };

    /// The parts of a disk of `size` bytes over one of `below`: length and place of each.
    fn parts(moves: &[&str], size: u64, below: u64) -> Vec<(u64, Place)> {
        let moves: Vec<_> = moves.iter().map(|value| Move::parse(value).unwrap()).collect();
        let regions = layout(&moves, size, below).unwrap();
        regions.as_slice().iter().map(|region| (region.length, region.kind)).collect()
    }

    #[test]
    fn model() {
        check_model(&["map"], &[], 20_000, &View::same(20_000));
        let swapped = View {
            map: |at, _| {
                Some(match at {
                    0..1000 => at + 5000,
                    5000..6000 => at - 5000,
                    _ => at,
                })
            },
            ..View::same(20_000)
        };
        check_model(&["map"], &[("map", "0-999:5000"), ("map", "5000-5999:0")], 20_000, &swapped);
        let tail = View::part(10_000, 10_000);
        check_model(&["map"], &[("map", "0-9999:10000"), ("map-size", "10000")], 20_000, &tail);
    }

    #[test]
    fn parts_of_a_disk() {
        assert_eq!(parts(&[], 100, 100), [(100, Some(0))]);
        assert_eq!(parts(&["10-19:50"], 100, 100), [(10, Some(0)), (10, Some(50)), (80, Some(20))]);
        assert_eq!(parts(&["0x0-0x9:012"], 100, 100), [(10, Some(10)), (90, Some(10))]);
        assert_eq!(parts(&["-:20"], 100, 100), [(80, Some(20)), (20, None)]);
        assert_eq!(parts(&["90-200:0"], 100, 100), [(90, Some(0)), (10, Some(0))]);
        assert_eq!(parts(&["200-300:0"], 100, 100), [(100, Some(0))]);
        assert_eq!(parts(&[], 150, 100), [(100, Some(0)), (50, None)]);
        assert_eq!(parts(&["0-9:500"], 20, 100), [(10, None), (10, Some(10))]);
        assert_eq!(parts(&[], 0, 100), []);
    }

    #[test]
    fn the_first_of_overlapping_moves_counts() {
        assert_eq!(
            parts(&["10-19:50", "0-29:60"], 40, 100),
            [(10, Some(60)), (10, Some(50)), (10, Some(80)), (10, Some(30))]
        );
        assert_eq!(
            parts(&["10-19:50", "15-24:0", "5-12:70"], 30, 100),
            [(5, Some(0)), (5, Some(70)), (10, Some(50)), (5, Some(5)), (5, Some(25))]
        );
        assert_eq!(parts(&["10-19:50", "10-19:60", "12-13:70"], 20, 100), [(10, Some(0)), (10, Some(50))]);
    }

    #[test]
    fn what_is_nowhere_cannot_be_used() {
        let disk = Spec::sized(1000).disk();
        let session = session(&disk, "map", &[("map-size", "2000"), ("map", "1500-1599:0")]);
        let mut buf = [0; 400];
        for error in [
            session.pread(&mut buf, 900).unwrap_err(),
            read_inline(&session, &mut buf[..1], 1000).unwrap_err(),
            session.pwrite(&buf, 900, Flags::empty()).unwrap_err(),
            session.zero(400, 1550, Flags::empty()).unwrap_err(),
            session.trim(400, 1400, Flags::empty()).unwrap_err(),
            session.cache(2000, 0).unwrap_err(),
        ] {
            assert_eq!(error.errno(), Errno::EIO);
            assert!(error.to_string().contains("nothing is mapped at "), "{error}");
        }
        assert!(disk.calls().is_empty(), "no part of such a request is done");
        session.pread(&mut buf[..100], 1500).unwrap();
        assert_eq!(buf[..100], pattern(1000)[..100]);
        let extents = session.extents(2000, 0, Flags::empty()).unwrap();
        assert_eq!(extents.last().unwrap().end(), 2000);
        assert_eq!(extents.last().unwrap().kind(), 0);
    }

    #[test]
    fn only_what_is_in_one_piece_is_lent() {
        let session = session(&Spec::sized(10_000).disk(), "map", &[("map", "512-1023:4096")]);
        for op in [Op::Read, Op::Write] {
            assert_eq!(lent(&session, op, 512, 512), Some(4096));
            assert_eq!(lent(&session, op, 600, 10), Some(4184));
            assert_eq!(lent(&session, op, 511, 2), None);
        }
        assert!(read_inline(&session, &mut [0; 1024], 256).unwrap());
    }

    #[test]
    fn what_is_in_one_piece_is_started() {
        let disk = Spec { later: true, ..Spec::sized(10_000) }.disk();
        let session = session(&disk, "map", &[("map", "512-1023:4096")]);
        for op in [Op::Read, Op::Write, Op::Trim, Op::Zero, Op::Cache] {
            disk.take_calls();
            let answer = started(&session, Call::new(op, 600, 10), &[1; 10]);
            assert!(matches!(answer, Answer::Started(Ok(_))), "{op:?}: {answer:?}");
            assert_eq!(disk.take_calls(), [Call::new(op, 4184, 10)]);
        }
        let answer = started(&session, Call::new(Op::Write, 511, 2), &[1; 2]);
        assert!(matches!(answer, Answer::NeedsThread), "{answer:?}");
        assert!(disk.calls().is_empty());
    }

    #[test]
    fn values_that_cannot_be_are_refused() {
        for (value, message) in [
            ("0-511", "form START-END:DEST"),
            ("511:0", "form START-END:DEST"),
            ("0-511:", "form START-END:DEST"),
            ("9-3:0", "ends before it starts"),
            ("0-x:0", "could not parse number 'x'"),
            ("0-9:9223372036854775807", "past 2^63-1"),
            ("0-9223372036854775807:0", "past 2^63-1"),
        ] {
            let error = config_error("map", &[("map", value)]);
            assert!(error.contains(message), "{value}: {error}");
        }
        assert!(config_error("map", &[("map-size", "x")]).starts_with("map-size: "));
    }
}
