//! Shows a byte range of the disk below as a disk of its own.

use std::ffi::OsStr;

use nbdkit_core::{
    Below, Errno, Error, Extents, Filter, Flags, Handle, Info, Loan, Next, NextConfig, Op, Open, Result,
    params,
};

const HELP: &str = "\
offset=<OFFSET>   Start of the range to show (default 0).
range=<LENGTH>    Length of the range (default: the rest of the disk).";

pub(crate) fn new() -> Box<dyn Filter> {
    Box::new(Offset { offset: 0, range: None })
}

struct Offset {
    offset: u64,
    range: Option<u64>,
}

impl Filter for Offset {
    fn info(&self) -> Info {
        Info::bundled("offset", "nbdkit offset filter", HELP)
    }

    fn config(&mut self, key: &str, value: &OsStr, next: &mut NextConfig<'_>) -> anyhow::Result<()> {
        match key {
            "offset" => self.offset = params::size(value)?,
            "range" => self.range = Some(params::size(value)?),
            _ => return next(key, value),
        }
        Ok(())
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        let next = next.open(open)?;
        let (offset, size) = (self.offset, next.caps().size);
        let past = |what| Err(Error::new(Errno::EINVAL, format!("{what} of the {size} byte disk below")));
        let Some(rest) = size.checked_sub(offset) else {
            return past(format!("offset {offset} is past the end"));
        };
        let range = self.range.unwrap_or(rest);
        if range > rest {
            return past(format!("offset+range ({offset}+{range}) is past the end"));
        }
        Ok(Box::new(Part { offset, range, next }))
    }
}

struct Part {
    offset: u64,
    range: u64,
    next: Next,
}

// No sum here can overflow: the glue keeps requests within the range, and the range is within the disk below.
impl Handle for Part {
    fn next(&self) -> Option<&Next> {
        Some(&self.next)
    }

    fn get_size(&self) -> Result<u64> {
        Ok(self.range)
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.next.pread(buf, self.offset + offset)
    }

    fn pread_nowait(&self, buf: &mut [u8], offset: u64) -> Result<bool> {
        self.next.pread_nowait(buf, self.offset + offset)
    }

    fn pwrite(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
        self.next.pwrite(buf, self.offset + offset, flags)
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.next.trim(length, self.offset + offset, flags)
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.next.zero(length, self.offset + offset, flags)
    }

    fn extents(&self, length: u64, offset: u64, flags: Flags, extents: &mut Extents) -> Result<()> {
        let start = self.offset + offset;
        let mut below = Extents::new(start, start + length);
        self.next.extents(length, start, flags, &mut below)?;
        for extent in below.as_slice() {
            // The last one may go on past the range, where this disk has nothing.
            let end = extent.end().min(self.offset + self.range);
            extents.add(extent.offset - self.offset, end - extent.offset, extent.hole, extent.zero)?;
        }
        Ok(())
    }

    fn cache(&self, length: u64, offset: u64) -> Result<()> {
        self.next.cache(length, self.offset + offset)
    }

    fn may_block(&self, op: Op) -> bool {
        self.next.may_block(op)
    }

    fn loan(&self, offset: u64, length: u64) -> Option<Loan<'_>> {
        self.next.loan(self.offset + offset, length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Spec, View, chain, check_model, client, config_error, open, session};

    fn open_error(params: &[(&str, &str)]) -> Error {
        let chain = chain(&Spec::sized(1000).disk(), &["offset"], params).unwrap();
        open(&chain, client(), false).unwrap_err()
    }

    #[test]
    fn model() {
        check_model(&["offset"], &[], 20_000, &View::same(20_000));
        check_model(&["offset"], &[("offset", "513")], 20_000, &View::part(513, 19_487));
        check_model(&["offset"], &[("offset", "1k"), ("range", "10001")], 20_000, &View::part(1024, 10_001));
    }

    #[test]
    fn a_range_past_the_end_does_not_open() {
        assert_eq!(
            open_error(&[("offset", "1"), ("range", "1000")]).to_string(),
            "offset+range (1+1000) is past the end of the 1000 byte disk below"
        );
        assert_eq!(
            open_error(&[("offset", "1001")]).to_string(),
            "offset 1001 is past the end of the 1000 byte disk below"
        );
        open_error(&[("offset", "1"), ("range", "9223372036854775807")]);
    }

    #[test]
    fn an_empty_range_at_the_end_opens() {
        assert_eq!(session(&Spec::sized(1000).disk(), "offset", &[("offset", "1000")]).size(), 0);
    }

    #[test]
    fn values_that_are_no_sizes_are_refused() {
        assert!(config_error("offset", &[("offset", "-1")]).contains("negative"));
        assert!(config_error("offset", &[("range", "big")]).contains("'big'"));
    }

    #[test]
    fn extents_are_shifted_and_end_with_the_range() {
        let spec = Spec { data: [vec![0; 1024], vec![1; 2048]].concat(), ..Spec::default() };
        let session = session(&spec.disk(), "offset", &[("offset", "512"), ("range", "1k")]);
        let extents = session.extents(1000, 10, Flags::empty()).unwrap();
        let found: Vec<_> = extents.iter().map(|e| (e.offset, e.length, e.kind())).collect();
        assert_eq!(found, [(10, 502, 3), (512, 498, 0)]);
    }
}
