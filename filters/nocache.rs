//! Takes the work out of cache requests: not offered, done by reading, or ignored.

use std::ffi::OsStr;

use anyhow::bail;
use nbdkit_core::{
    Below, Caps, Filter, Handle, Info, Next, NextConfig, Op, Open, Outcome, Request, Result, Support,
    emulate, params,
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
            "nop" | "no-op" => Mode::Nop,
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

impl Uncached {
    fn read_ahead(&self, length: u64, offset: u64) -> Result<()> {
        let block = self.next.caps().block_size;
        emulate::cache(length, offset, block, |buf, at| self.next.pread(buf, at))
    }
}

impl Handle for Uncached {
    fn next(&self) -> Option<&Next> {
        Some(&self.next)
    }

    fn capabilities(&self) -> Result<Caps> {
        let cache = match self.mode {
            Mode::None => Support::None,
            Mode::Emulate => Support::Emulate,
            Mode::Nop => Support::Native,
        };
        Ok(self.next.capabilities().with_cache(cache).with_skip_holes(self.next.caps().skip_holes))
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        match (request.op(), self.mode) {
            (Op::Cache, Mode::Nop) => Outcome::Done(Ok(())),
            (Op::Cache, _) if !request.may_wait() => Outcome::NeedsThread,
            (Op::Cache, _) => Outcome::Done(self.read_ahead(request.length(), request.offset())),
            _ => self.next.pass(request),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Spec, View, check_model, config_error, lent, needs_thread, session};

    #[test]
    fn model() {
        for mode in ["none", "emulate", "nop", "no-op"] {
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
    fn emulation_needs_a_thread_and_nothing_else_does() {
        let disk = Spec::default().disk();
        assert!(needs_thread(&session(&disk, "nocache", &[("cachemode", "emulate")]), Op::Cache));
        let nop = session(
            &Spec { blocks: |op| op != Op::Read, ..Spec::default() }.disk(),
            "nocache",
            &[("cachemode", "nop")],
        );
        assert!(!needs_thread(&nop, Op::Cache) && needs_thread(&nop, Op::Write));
        assert!(!needs_thread(&nop, Op::Read) && lent(&nop, Op::Write, 0, 512).is_some());
    }

    #[test]
    fn an_unknown_mode_is_refused() {
        assert!(config_error("nocache", &[("cachemode", "x")]).contains("use none, emulate or nop"));
    }
}
