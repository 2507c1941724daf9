//! Shows a byte range of the disk below as a disk of its own.

use std::ffi::OsStr;

use nbdkit_core::{Below, Errno, Error, Filter, Handle, Info, NextConfig, Open, Result, params};

use crate::subrange::Subrange;

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
        match Subrange::new(next, offset, range) {
            Some(part) => Ok(Box::new(part)),
            None => past(format!("offset+range ({offset}+{range}) is past the end")),
        }
    }
}

#[cfg(test)]
mod tests {
    use nbdkit_core::Flags;

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
        assert_eq!(found, [(10, 502, 3), (512, 512, 0)]);
    }
}
