//! Says whether the disk behaves like a spinning one.

use std::ffi::OsStr;

use nbdkit_core::{
    Below, Caps, Filter, Handle, Info, Next, NextConfig, Open, Outcome, Request, Result, params,
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

    fn capabilities(&self) -> Result<Caps> {
        Ok(self.next.capabilities().with_rotational(self.rotational))
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        self.next.pass(request)
    }
}

#[cfg(test)]
mod tests {
    use nbdkit_core::Op;

    use crate::testing::{
        Spec, View, chain, check_model, client, config_error, lent, needs_thread, open, session,
    };

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
        let spec = Spec { blocks: |op| op != Op::Read, ..Spec::default() };
        let session = session(&spec.disk(), "rotational", &[]);
        assert_eq!(lent(&session, Op::Write, 512, 512), Some(512));
        assert!(!needs_thread(&session, Op::Read) && needs_thread(&session, Op::Write));
    }

    #[test]
    fn a_value_that_is_no_boolean_is_refused() {
        assert!(config_error("rotational", &[("rotational", "x")]).contains("'x'"));
    }
}
