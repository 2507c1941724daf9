//! Protects ranges of the disk: a request that would change one fails, one that writes what is there already passes.
//!
//! A request is checked as a whole before any of it is done.

use std::{ffi::OsStr, ops::Range, sync::Arc};

use anyhow::{Context as _, bail};
use nbdkit_core::{
    Below, Caps, Errno, Error, Filter, Flags, Handle, Info, Next, NextConfig, Op, Open, Outcome, Request,
    Result, params,
};

use crate::{
    compare::{equals, holds, is_zero},
    passthrough::Passthrough,
};

const HELP: &str = "\
protect=[~]<START>-<END>   Bytes that cannot be changed, END included; with ~ all others. Can be repeated.";

pub(crate) fn new() -> Box<dyn Filter> {
    Box::new(Protect::default())
}

#[derive(Default)]
struct Protect {
    ranges: Vec<Range<u64>>,
}

/// The bytes that a value names.
fn parse(value: &str) -> anyhow::Result<Vec<Range<u64>>> {
    let (complement, range) = value.strip_prefix('~').map_or((false, value), |range| (true, range));
    let (start, end) = range
        .split_once('-')
        .with_context(|| format!("protect='{value}' lacks a '-': use START-END, such as 0-511"))?;
    let number = |text: &str, default| match text {
        "" => Ok(default),
        text => params::integer("protect", OsStr::new(text)),
    };
    let (start, last): (u64, u64) = (number(start, 0)?, number(end, u64::MAX)?);
    if last < start {
        bail!("protect='{value}' ends before it starts");
    }
    // The last byte of 64 bits is on no disk.
    let end = last.saturating_add(1);
    Ok(if complement { vec![0..start, end..u64::MAX] } else { vec![Range { start, end }] })
}

/// The same bytes in ascending ranges that do not touch.
fn merged(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

impl Filter for Protect {
    fn info(&self) -> Info {
        Info::bundled("protect", "nbdkit protect filter", HELP)
    }

    fn config(&mut self, key: &str, value: &OsStr, next: &mut NextConfig<'_>) -> anyhow::Result<()> {
        match key {
            "protect" => self.ranges.extend(parse(params::text(value)?)?),
            _ => return next(key, value),
        }
        Ok(())
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        let next = next.open(open)?;
        let ranges = merged(self.ranges.clone());
        Ok(if ranges.is_empty() {
            Box::new(Passthrough(next))
        } else {
            Box::new(Protected { ranges: ranges.into(), next })
        })
    }
}

struct Protected {
    ranges: Arc<[Range<u64>]>,
    next: Next,
}

impl Protected {
    /// The protected parts of a range.
    fn parts(&self, length: u64, offset: u64) -> impl Iterator<Item = Range<u64>> {
        let end = offset + length;
        let first = self.ranges.partition_point(|range| range.end <= offset);
        self.ranges[first..]
            .iter()
            .take_while(move |range| range.start < end)
            .map(move |range| range.start.max(offset)..range.end.min(end))
    }

    fn touches(&self, length: u64, offset: u64) -> bool {
        self.parts(length, offset).next().is_some()
    }

    /// Fails unless the protected parts of the range hold what `same` is content with.
    fn check(&self, length: u64, offset: u64, mut same: impl FnMut(u64, &[u8]) -> bool) -> Result<()> {
        for part in self.parts(length, offset) {
            if !holds(&self.next, part.end - part.start, part.start, &mut same)? {
                let Range { start, end } = part;
                return Err(Error::new(
                    Errno::EPERM,
                    format!("the request would change bytes {start}-{}, which protect= forbids", end - 1),
                ));
            }
        }
        Ok(())
    }
}

impl Handle for Protected {
    fn next(&self) -> Option<&Next> {
        Some(&self.next)
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        let changes = matches!(request.op(), Op::Write | Op::Trim | Op::Zero);
        if !changes || !self.touches(request.length(), request.offset()) {
            return self.next.pass(request);
        }
        // What is there has to be read first.
        if request.may_wait() { request.run(self) } else { Outcome::NeedsThread }
    }

    fn pwrite(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
        self.check(buf.len() as u64, offset, equals(buf, offset))?;
        self.next.pwrite(buf, offset, flags)
    }

    /// What a trimmed range holds is not defined, so a protected part is checked for zeroes and then left alone.
    fn trim(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.check(length, offset, is_zero)?;
        let mut at = offset;
        let end = offset + length;
        for part in self.parts(length, offset).chain(std::iter::once(end..end)) {
            if at < part.start {
                self.next.trim(part.start - at, at, flags)?;
            }
            at = part.end;
        }
        Ok(())
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        if flags.contains(Flags::FAST_ZERO) {
            return Err(Error::new(
                Errno::EOPNOTSUPP,
                "a protected range must be read first, which is not fast",
            ));
        }
        self.check(length, offset, is_zero)?;
        self.next.zero(length, offset, flags)
    }

    fn capabilities(&self) -> Result<Caps> {
        Ok(self.next.capabilities().with_skip_holes(self.next.caps().skip_holes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{
        Answer, Call, Disk, Spec, View, check_model, config_error, lent, pattern, read_inline, session,
        started,
    };

    /// Start and end of each protected range.
    fn protected(value: &str) -> Vec<(u64, u64)> {
        merged(parse(value).unwrap()).iter().map(|range| (range.start, range.end)).collect()
    }

    /// A session over 64 KiB of data in which bytes 1000 to 2999 and 5000 to 5999 are protected.
    fn guarded() -> (Disk, nbdkit_core::Session) {
        let disk = Spec::default().disk();
        let params = [("protect", "1000-1999"), ("protect", "5000-5999"), ("protect", "2000-2999")];
        let session = session(&disk, "protect", &params);
        (disk, session)
    }

    #[test]
    fn model() {
        check_model(&["protect"], &[], 20_000, &View::same(20_000));
        check_model(&["protect"], &[("protect", "20000-")], 20_000, &View::same(20_000));
    }

    #[test]
    fn values() {
        assert_eq!(protected("0-511"), [(0, 512)]);
        assert_eq!(protected("0x10-020"), [(16, 17)]);
        assert_eq!(protected("-9"), [(0, 10)]);
        assert_eq!(protected("9-"), [(9, u64::MAX)]);
        assert_eq!(protected("-"), [(0, u64::MAX)]);
        assert_eq!(protected("~10-19"), [(0, 10), (20, u64::MAX)]);
        assert_eq!(protected("~0-19"), [(20, u64::MAX)]);
        assert_eq!(protected("~-"), []);
        let ranges = ["5-9", "20-29", "0-4", "25-26", "28-31"].map(|v| parse(v).unwrap());
        assert_eq!(merged(ranges.concat()), [0..10, 20..32]);
    }

    #[test]
    fn a_write_that_changes_a_protected_byte_does_nothing() {
        let (disk, session) = guarded();
        let before = disk.contents();
        for (offset, length) in [(999, 2), (2999, 2), (1500, 1), (0, 10_000), (5999, 1), (4999, 2)] {
            let mut buf = before[offset..offset + length].to_vec();
            // The first protected byte and the first free one differ.
            let at = (offset..).find(|at| (1000..3000).contains(at) || (5000..6000).contains(at)).unwrap();
            buf[at - offset] ^= 1;
            if let Some(free) = (offset..offset + length).find(|at| !(1000..6000).contains(at)) {
                buf[free - offset] ^= 1;
            }
            let error = session.pwrite(&buf, offset as u64, Flags::empty()).unwrap_err();
            assert_eq!(error.errno(), Errno::EPERM, "{offset}+{length}");
            assert_eq!(disk.contents(), before, "{offset}+{length}");
        }
    }

    #[test]
    fn what_is_there_already_can_be_written() {
        let (disk, session) = guarded();
        let mut new = pattern(10_000);
        for free in [0, 999, 3000, 4999, 6000, 9999] {
            new[free] = 0xee;
        }
        session.pwrite(&new, 0, Flags::FUA).unwrap();
        assert_eq!(disk.contents()[..10_000], new);
        session.pwrite(&[1; 1000], 0, Flags::empty()).unwrap();
        assert_eq!(disk.contents()[..1000], [1; 1000]);
    }

    #[test]
    fn zero_and_trim_need_zeroes_there() {
        let disk = Spec { data: [vec![1; 1000], vec![0; 1000], vec![1; 8000]].concat(), ..Spec::default() };
        let disk = disk.disk();
        let params = [("protect", "1000-1999"), ("protect", "5000-5000")];
        let session = session(&disk, "protect", &params);
        for error in [
            session.zero(10_000, 0, Flags::empty()).unwrap_err(),
            session.trim(10_000, 0, Flags::empty()).unwrap_err(),
            session.zero(1, 5000, Flags::MAY_TRIM).unwrap_err(),
        ] {
            assert_eq!(error.errno(), Errno::EPERM);
        }
        assert_eq!(disk.count(Op::Zero) + disk.count(Op::Trim), 0);
        session.zero(5000, 0, Flags::empty()).unwrap();
        disk.take_calls();
        session.trim(3000, 500, Flags::FUA).unwrap();
        let trims: Vec<_> =
            disk.calls().iter().filter(|c| c.op == Op::Trim).map(|c| (c.offset, c.length)).collect();
        assert_eq!(trims, [(500, 500), (2000, 1500)]);
        assert_eq!(disk.contents(), [vec![0; 5000], vec![1; 5000]].concat());
    }

    #[test]
    fn a_fast_zero_of_a_protected_range_is_refused() {
        let (disk, session) = guarded();
        let error = session.zero(512, 900, Flags::FAST_ZERO).unwrap_err();
        assert_eq!(error.errno(), Errno::EOPNOTSUPP);
        session.zero(512, 3000, Flags::FAST_ZERO).unwrap();
        assert_eq!(disk.count(Op::Read), 0);
    }

    #[test]
    fn only_free_ranges_are_lent_for_writing() {
        let (_, session) = guarded();
        for (offset, length, writable) in
            [(0, 1000, true), (999, 2, false), (3000, 2000, true), (0, 65536, false)]
        {
            assert_eq!(lent(&session, Op::Write, offset, length).is_some(), writable, "{offset}+{length}");
            assert!(lent(&session, Op::Read, offset, length).is_some());
        }
        assert!(read_inline(&session, &mut [0], 1000).unwrap());
    }

    #[test]
    fn what_changes_only_free_bytes_is_started() {
        let disk = Spec { later: true, ..Spec::default() }.disk();
        let session = session(&disk, "protect", &[("protect", "1000-1999")]);
        for op in [Op::Read, Op::Write, Op::Trim, Op::Zero, Op::Cache] {
            let free = started(&session, Call::new(op, 0, 1000), &[1; 1000]);
            assert!(matches!(free, Answer::Started(Ok(_))), "{op:?}: {free:?}");
            let touches = started(&session, Call::new(op, 1, 1000), &[1; 1000]);
            let checked = matches!(op, Op::Write | Op::Trim | Op::Zero);
            assert_eq!(matches!(touches, Answer::NeedsThread), checked, "{op:?}: {touches:?}");
        }
    }

    #[test]
    fn a_failed_check_fails_the_write() {
        let disk = Spec { fail_after: Some(0), ..Spec::default() }.disk();
        let session = session(&disk, "protect", &[("protect", "0-9")]);
        assert_eq!(session.pwrite(&[0], 0, Flags::empty()).unwrap_err().errno(), Errno::EIO);
        assert_eq!(disk.count(Op::Write), 0);
    }

    #[test]
    fn values_that_are_no_ranges_are_refused() {
        for (value, message) in
            [("9", "lacks a '-'"), ("9-3", "ends before it starts"), ("a-9", "could not parse number 'a'")]
        {
            assert!(config_error("protect", &[("protect", value)]).contains(message), "{value}");
        }
    }
}
