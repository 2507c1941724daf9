//! Makes the disk below smaller or larger. What is added reads as zeroes and takes nothing else.

use std::ffi::OsStr;

use anyhow::ensure;
use nbdkit_core::{
    Below, Errno, Error, Extents, Filter, Flags, Handle, Info, Loan, Next, NextConfig, Op, Open, Result,
    params,
};

const HELP: &str = "\
truncate=<SIZE>   The new size.
round-up=<N>      Round the size up to a multiple of N, a power of 2.
round-down=<N>    Round the size down to a multiple of N, a power of 2.";

pub(crate) fn new() -> Box<dyn Filter> {
    Box::new(Truncate::default())
}

#[derive(Clone, Copy, Default)]
struct Truncate {
    size: Option<u64>,
    round_up: Option<u64>,
    round_down: Option<u64>,
}

impl Truncate {
    /// The size for a disk of `real` bytes.
    fn apply(self, real: u64) -> Result<u64> {
        let mut size = self.size.unwrap_or(real);
        if let Some(n) = self.round_up {
            size = size.checked_next_multiple_of(n).filter(|s| *s <= i64::MAX as u64).ok_or_else(|| {
                Error::new(Errno::EINVAL, format!("cannot round size {size} up to next boundary of {n}"))
            })?;
        }
        if let Some(n) = self.round_down {
            size -= size % n;
        }
        Ok(size)
    }
}

fn boundary(key: &str, value: &OsStr) -> anyhow::Result<Option<u64>> {
    let n = params::size(value)?;
    ensure!(n > 0, "if set, the {key} parameter must be > 0");
    ensure!(n.is_power_of_two(), "the {key} parameter must be a power of 2");
    Ok(Some(n))
}

impl Filter for Truncate {
    fn info(&self) -> Info {
        Info::bundled("truncate", "nbdkit truncate filter", HELP)
    }

    fn config(&mut self, key: &str, value: &OsStr, next: &mut NextConfig<'_>) -> anyhow::Result<()> {
        match key {
            "truncate" => self.size = Some(params::size(value)?),
            "round-up" => self.round_up = boundary(key, value)?,
            "round-down" => self.round_down = boundary(key, value)?,
            _ => return next(key, value),
        }
        Ok(())
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        let next = next.open(open)?;
        let real = next.caps().size;
        Ok(Box::new(Resized { size: self.apply(real)?, real, next }))
    }
}

struct Resized {
    size: u64,
    /// Size of the disk below.
    real: u64,
    next: Next,
}

impl Resized {
    /// How much of a range is on the disk below.
    fn on_disk(&self, length: u64, offset: u64) -> u64 {
        self.real.saturating_sub(offset).min(length)
    }
}

impl Handle for Resized {
    fn next(&self) -> Option<&Next> {
        Some(&self.next)
    }

    fn get_size(&self) -> Result<u64> {
        Ok(self.size)
    }

    fn can_extents(&self) -> Result<bool> {
        // What is added is known to be a hole, whatever is below.
        Ok(self.next.caps().extents || self.size > self.real)
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let (disk, added) = buf.split_at_mut(self.on_disk(buf.len() as u64, offset) as usize);
        if !disk.is_empty() {
            self.next.pread(disk, offset)?;
        }
        added.fill(0);
        Ok(())
    }

    fn pread_nowait(&self, buf: &mut [u8], offset: u64) -> Result<bool> {
        let (disk, added) = buf.split_at_mut(self.on_disk(buf.len() as u64, offset) as usize);
        added.fill(0);
        if disk.is_empty() { Ok(true) } else { self.next.pread_nowait(disk, offset) }
    }

    fn pwrite(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
        let (disk, added) = buf.split_at(self.on_disk(buf.len() as u64, offset) as usize);
        if added.iter().any(|byte| *byte != 0) {
            return Err(Error::new(
                Errno::ENOSPC,
                format!(
                    "write of data after the {} bytes of the disk below: only zeroes fit there",
                    self.real
                ),
            ));
        }
        if disk.is_empty() { Ok(()) } else { self.next.pwrite(disk, offset, flags) }
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        match self.on_disk(length, offset) {
            0 => Ok(()),
            length => self.next.trim(length, offset, flags),
        }
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        match self.on_disk(length, offset) {
            0 => Ok(()),
            length => self.next.zero(length, offset, flags),
        }
    }

    fn extents(&self, length: u64, offset: u64, flags: Flags, extents: &mut Extents) -> Result<()> {
        let disk = self.on_disk(length, offset);
        if disk > 0 {
            self.next.extents(disk, offset, flags, extents)?;
        }
        // The answer for the disk may have been a short one, and may have gone on to its end.
        let added = extents.covered_to().max(offset);
        if added < self.real {
            return Ok(());
        }
        extents.add(added, self.size.saturating_sub(added), true, true)
    }

    fn cache(&self, length: u64, offset: u64) -> Result<()> {
        match self.on_disk(length, offset) {
            0 => Ok(()),
            length => self.next.cache(length, offset),
        }
    }

    fn may_block(&self, op: Op) -> bool {
        self.next.may_block(op)
    }

    fn may_skip_holes(&self) -> bool {
        self.next.may_skip_holes()
    }

    fn loan(&self, offset: u64, length: u64) -> Option<Loan<'_>> {
        self.next.loan(offset, length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Spec, View, chain, check_model, client, config_error, open, session};

    #[test]
    fn model() {
        check_model(&["truncate"], &[("truncate", "9999")], 20_000, &View::same(9999));
        check_model(&["truncate"], &[("truncate", "30001")], 20_000, &View::padded(20_000, 30_001));
        check_model(&["truncate"], &[("round-up", "4096")], 20_001, &View::padded(20_001, 20_480));
        check_model(&["truncate"], &[("round-down", "4096")], 20_001, &View::same(16_384));
    }

    #[test]
    fn sizes() {
        let size =
            |real, params: &[(&str, &str)]| session(&Spec::sized(real).disk(), "truncate", params).size();
        assert_eq!(size(1000, &[]), 1000);
        assert_eq!(size(1024, &[("round-up", "512")]), 1024);
        assert_eq!(size(1000, &[("truncate", "100"), ("round-up", "512")]), 512);
        assert_eq!(size(1000, &[("round-down", "1k")]), 0);
        assert_eq!(size(0, &[("truncate", "8191P")]), 8191 << 50);
    }

    #[test]
    fn a_size_that_cannot_be_rounded_up_does_not_open() {
        let params = [("truncate", "9223372036854775807"), ("round-up", "512")];
        let chain = chain(&Spec::default().disk(), &["truncate"], &params).unwrap();
        assert!(open(&chain, client(), false).unwrap_err().to_string().contains("cannot round size"));
    }

    #[test]
    fn boundaries_are_powers_of_two() {
        assert!(config_error("truncate", &[("round-up", "3")]).contains("power of 2"));
        assert!(config_error("truncate", &[("round-down", "0")]).contains("> 0"));
    }

    #[test]
    fn a_write_over_the_real_end_changes_nothing_when_it_fails() {
        let disk = Spec::sized(1000).disk();
        let before = disk.contents();
        let session = session(&disk, "truncate", &[("truncate", "2000")]);
        let error = session.pwrite(&[1; 100], 950, Flags::empty()).unwrap_err();
        assert_eq!(error.errno(), Errno::ENOSPC);
        assert_eq!(disk.contents(), before);
        session.pwrite(&[0; 100], 950, Flags::empty()).unwrap();
        assert_eq!(disk.take_calls().last().map(|call| (call.offset, call.length)), Some((950, 50)));
    }

    #[test]
    fn what_is_added_is_one_hole() {
        let data = Spec { data: vec![1; 1000], ..Spec::default() };
        for spec in [data.clone(), Spec { extents: false, ..data }] {
            let session = session(&spec.disk(), "truncate", &[("truncate", "1T")]);
            let extents = session.extents(1 << 40, 0, Flags::empty()).unwrap();
            let found: Vec<_> = extents.iter().map(|e| (e.offset, e.length, e.kind())).collect();
            assert_eq!(found, [(0, 1000, 0), (1000, (1 << 40) - 1000, 3)]);
        }
    }
}
