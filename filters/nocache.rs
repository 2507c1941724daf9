//! Takes the work out of cache requests: not offered, done by reading, or ignored.

use std::ffi::OsStr;

use anyhow::bail;
use nbdkit_core::{
    Below, Completion, Filter, Handle, Info, Io, Loan, Next, NextConfig, Op, Open, Result, Support, emulate,
    params,
};

const HELP: &str = "cachemode=<MODE>   'none' (default), 'emulate' or 'nop'.";

pub(crate) fn new() -> Box<dyn Filter> {
    Box::new(NoCache { mode: Mode::None })
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Cache requests are not offered.
    None,
    /// The range is read and thrown away.
    Emulate,
    /// Nothing happens.
    Nop,
}

struct NoCache {
    mode: Mode,
}

impl Filter for NoCache {
    fn info(&self) -> Info {
        Info::bundled("nocache", "nbdkit nocache filter", HELP)
    }

    fn config(&mut self, key: &str, value: &OsStr, next: &mut NextConfig<'_>) -> anyhow::Result<()> {
        if key != "cachemode" {
            return next(key, value);
        }
        self.mode = match params::text(value)? {
            "none" => Mode::None,
            "emulate" => Mode::Emulate,
            "nop" => Mode::Nop,
            other => bail!("unknown cachemode '{other}': use none, emulate or nop"),
        };
        Ok(())
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        Ok(Box::new(Uncached { mode: self.mode, next: next.open(open)? }))
    }
}

struct Uncached {
    mode: Mode,
    next: Next,
}

impl Handle for Uncached {
    fn next(&self) -> Option<&Next> {
        Some(&self.next)
    }

    fn can_cache(&self) -> Result<Support> {
        Ok(match self.mode {
            Mode::None => Support::None,
            Mode::Emulate => Support::Emulate,
            Mode::Nop => Support::Native,
        })
    }

    fn cache(&self, length: u64, offset: u64) -> Result<()> {
        if self.mode == Mode::Nop {
            return Ok(());
        }
        let block = self.next.caps().block_size;
        emulate::cache(length, offset, block, |buf, at| self.next.pread(buf, at))
    }

    fn pread_nowait(&self, buf: &mut [u8], offset: u64) -> Result<bool> {
        self.next.pread_nowait(buf, offset)
    }

    fn may_block(&self, op: Op) -> bool {
        match (op, self.mode) {
            (Op::Cache, Mode::Nop) => false,
            (Op::Cache, _) => self.next.may_block(Op::Read),
            _ => self.next.may_block(op),
        }
    }

    fn may_skip_holes(&self) -> bool {
        self.next.may_skip_holes()
    }

    fn submit(&self, io: Io<'_>, offset: u64, done: Completion) -> Option<Completion> {
        self.next.submit(io, offset, done)
    }

    fn loan(&self, offset: u64, length: u64) -> Option<Loan<'_>> {
        self.next.loan(offset, length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Spec, View, check_model, config_error, session};

    #[test]
    fn model() {
        for mode in ["none", "emulate", "nop"] {
            check_model(&["nocache"], &[("cachemode", mode)], 20_000, &View::same(20_000));
        }
    }

    #[test]
    fn what_becomes_of_a_cache_request() {
        for spec in [Spec::sized(4 << 20), Spec::emulated(4 << 20), Spec::minimal(4 << 20)] {
            let disk = spec.disk();
            assert_eq!(session(&disk, "nocache", &[]).caps().cache, Support::None);

            let nop = session(&disk, "nocache", &[("cachemode", "nop")]);
            assert_eq!(nop.caps().cache, Support::Native);
            nop.cache(3 << 20, 7).unwrap();
            assert!(disk.take_calls().is_empty());

            let emulated = session(&disk, "nocache", &[("cachemode", "emulate")]);
            assert_eq!(emulated.caps().cache, Support::Emulate);
            emulated.cache(3 << 20, 7).unwrap();
            let calls = disk.take_calls();
            assert!(calls.iter().all(|call| call.op == Op::Read));
            assert_eq!(calls.iter().map(|call| call.length).sum::<u64>(), 3 << 20);
            assert_eq!(calls[0].offset, 7);
        }
    }

    #[test]
    fn emulation_blocks_as_reading_does() {
        let spec = Spec { may_block: true, cached: true, ..Spec::default() };
        let disk = spec.disk();
        assert!(session(&disk, "nocache", &[("cachemode", "emulate")]).may_block(Op::Cache));
        let nop = session(&disk, "nocache", &[("cachemode", "nop")]);
        assert!(!nop.may_block(Op::Cache) && nop.may_block(Op::Read));
        assert!(nop.pread_nowait(&mut [0], 0).unwrap() && nop.loan(0, 512).is_some());
    }

    #[test]
    fn an_unknown_mode_is_refused() {
        assert!(config_error("nocache", &[("cachemode", "x")]).contains("use none, emulate or nop"));
    }
}
