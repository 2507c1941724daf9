//! Says whether the disk behaves like a spinning one.

use std::ffi::OsStr;

use nbdkit_core::{
    Below, Completion, Filter, Handle, Info, Io, Loan, Next, NextConfig, Open, Result, params,
};

const HELP: &str = "rotational=<BOOL>   Whether the disk counts as a spinning one (default true).";

pub(crate) fn new() -> Box<dyn Filter> {
    Box::new(Rotational { rotational: true })
}

struct Rotational {
    rotational: bool,
}

impl Filter for Rotational {
    fn info(&self) -> Info {
        Info::bundled("rotational", "nbdkit rotational filter", HELP)
    }

    fn config(&mut self, key: &str, value: &OsStr, next: &mut NextConfig<'_>) -> anyhow::Result<()> {
        match key {
            "rotational" => self.rotational = params::boolean(value)?,
            _ => return next(key, value),
        }
        Ok(())
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        Ok(Box::new(Labelled { rotational: self.rotational, next: next.open(open)? }))
    }
}

struct Labelled {
    rotational: bool,
    next: Next,
}

impl Handle for Labelled {
    fn next(&self) -> Option<&Next> {
        Some(&self.next)
    }

    fn is_rotational(&self) -> Result<bool> {
        Ok(self.rotational)
    }

    fn pread_nowait(&self, buf: &mut [u8], offset: u64) -> Result<bool> {
        self.next.pread_nowait(buf, offset)
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
    use crate::testing::{Spec, View, chain, check_model, client, config_error, open, session};

    #[test]
    fn model() {
        check_model(&["rotational"], &[], 20_000, &View::same(20_000));
    }

    #[test]
    fn the_answer_is_that_of_the_parameter() {
        let rotational =
            |params: &[_]| session(&Spec::default().disk(), "rotational", params).caps().rotational;
        assert!(rotational(&[]));
        assert!(rotational(&[("rotational", "true")]));
        assert!(!rotational(&[("rotational", "false")]));
    }

    #[test]
    fn a_spinning_disk_can_be_hidden() {
        // The upper one takes the parameter, so the lower one says yes.
        let chain = chain(&Spec::default().disk(), &["rotational", "rotational"], &[("rotational", "no")]);
        assert!(!open(&chain.unwrap(), client(), false).unwrap().caps().rotational);
    }

    #[test]
    fn reads_and_loans_pass() {
        let session = session(&Spec::default().disk(), "rotational", &[]);
        assert!(session.pread_nowait(&mut [0], 0).unwrap() && session.loan(0, 512).unwrap().writable);
    }

    #[test]
    fn a_value_that_is_no_boolean_is_refused() {
        assert!(config_error("rotational", &[("rotational", "x")]).contains("'x'"));
    }
}
