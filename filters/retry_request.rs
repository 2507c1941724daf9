//! Tries a request again that has failed, on what is open.

use std::{ffi::OsStr, sync::Arc, time::Duration};

use anyhow::Context as _;
use nbdkit_core::{
    Below, Client, Extents, Filter, Flags, Handle, Info, Next, NextConfig, Op, Open, Result, params,
};

const HELP: &str = "\
retry-request-retries=<N>    How often a request is tried again (default 2).
retry-request-delay=<SECS>   How long to wait before (default 2).
retry-request-open=<BOOL>    Whether a failed open is tried again too (default true).";

pub(crate) fn new() -> Box<dyn Filter> {
    Box::new(RetryRequest { patience: Patience { retries: 2, delay: Duration::from_secs(2) }, open: true })
}

struct RetryRequest {
    patience: Patience,
    open: bool,
}

#[derive(Clone, Copy)]
struct Patience {
    retries: u32,
    delay: Duration,
}

impl Patience {
    /// Runs a request until it succeeds or patience ends. The error is the last one.
    fn run<T>(
        &self,
        client: &Client,
        what: &str,
        flags: Flags,
        mut request: impl FnMut() -> Result<T>,
    ) -> Result<T> {
        let mut retry = 0;
        loop {
            let error = match request() {
                // A fast zero that is not fast will not become so.
                Err(e) if !(e.is_unsupported() && flags.contains(Flags::FAST_ZERO)) => e,
                done => return done,
            };
            if retry == self.retries || client.sleep(self.delay).is_err() {
                return Err(error);
            }
            retry += 1;
            log::debug!("retry-request: {what} failed: {error}; retry {retry} of {}", self.retries);
        }
    }
}

impl Filter for RetryRequest {
    fn info(&self) -> Info {
        Info::bundled("retry-request", "nbdkit retry request filter", HELP)
    }

    fn config(&mut self, key: &str, value: &OsStr, next: &mut NextConfig<'_>) -> anyhow::Result<()> {
        match key {
            "retry-request-retries" => self.patience.retries = params::integer(key, value)?,
            "retry-request-delay" => {
                self.patience.delay = params::delay(value).with_context(|| key.to_owned())?;
            }
            "retry-request-open" => self.open = params::boolean(value)?,
            _ => return next(key, value),
        }
        Ok(())
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        let next = if self.open {
            self.patience.run(&open.client, "open", Flags::empty(), || next.open(open))?
        } else {
            next.open(open)?
        };
        Ok(Box::new(Patient { patience: self.patience, client: open.client.clone(), next }))
    }
}

struct Patient {
    patience: Patience,
    client: Arc<Client>,
    next: Next,
}

impl Patient {
    fn run(&self, what: &str, flags: Flags, request: impl FnMut() -> Result<()>) -> Result<()> {
        self.patience.run(&self.client, what, flags, request)
    }
}

// Nothing is lent: who uses a loan does not retry.
impl Handle for Patient {
    fn next(&self) -> Option<&Next> {
        Some(&self.next)
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.run("pread", Flags::empty(), || self.next.pread(buf, offset))
    }

    /// One that fails is tried again where waiting is allowed.
    fn pread_nowait(&self, buf: &mut [u8], offset: u64) -> Result<bool> {
        Ok(self.next.pread_nowait(buf, offset).unwrap_or(false))
    }

    fn pwrite(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
        self.run("pwrite", flags, || self.next.pwrite(buf, offset, flags))
    }

    fn flush(&self) -> Result<()> {
        self.run("flush", Flags::empty(), || self.next.flush())
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.run("trim", flags, || self.next.trim(length, offset, flags))
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.run("zero", flags, || self.next.zero(length, offset, flags))
    }

    fn extents(&self, length: u64, offset: u64, flags: Flags, extents: &mut Extents) -> Result<()> {
        self.run("extents", flags, || {
            // What a request has told before it failed is forgotten.
            let mut fresh = Extents::new(extents.start(), extents.end());
            self.next.extents(length, offset, flags, &mut fresh)?;
            *extents = fresh;
            Ok(())
        })
    }

    fn cache(&self, length: u64, offset: u64) -> Result<()> {
        self.run("cache", Flags::empty(), || self.next.cache(length, offset))
    }

    fn may_block(&self, _: Op) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use nbdkit_core::Errno;

    use super::*;
    use crate::{
        flaky::{Flaky, each_request},
        testing::{Spec, View, check_model, client, config_error, session},
    };

    const QUICK: (&str, &str) = ("retry-request-delay", "0");

    #[test]
    fn model() {
        check_model(&["retry-request"], &[], 20_000, &View::same(20_000));
    }

    #[test]
    fn a_request_is_tried_until_it_succeeds() {
        for (name, request) in each_request() {
            for (retries, failures, succeeds) in [(2, 2, true), (2, 3, false), (0, 1, false), (5, 5, true)] {
                let flaky = Flaky::default();
                let retries = retries.to_string();
                let session = flaky.session(new(), &[QUICK, ("retry-request-retries", &retries)]).unwrap();
                flaky.fail(failures);
                let result = request(&session);
                assert_eq!(result.is_ok(), succeeds, "{name} with {retries} retries of {failures} failures");
                assert_eq!(flaky.opens(), 1);
            }
        }
    }

    #[test]
    fn an_open_is_tried_again_unless_it_should_not() {
        let flaky = Flaky::default();
        flaky.fail_open(2);
        flaky.session(new(), &[QUICK]).unwrap();
        assert_eq!(flaky.opens(), 3);
        flaky.fail_open(1);
        flaky.session(new(), &[QUICK, ("retry-request-open", "false")]).unwrap_err();
        assert_eq!(flaky.opens(), 4);
    }

    #[test]
    fn a_fast_zero_that_is_slow_is_not_tried_again() {
        let flaky = Flaky::default();
        let session = flaky.session(new(), &[]).unwrap();
        let error = session.zero(512, 0, Flags::FAST_ZERO).unwrap_err();
        assert_eq!(error.errno(), Errno::EOPNOTSUPP);
    }

    #[test]
    fn a_client_that_goes_away_ends_the_wait() {
        let flaky = Flaky::default();
        let session = flaky.session(new(), &[("retry-request-delay", "1000000")]).unwrap();
        flaky.fail(1);
        session.client().gone.raise();
        assert_eq!(session.pread(&mut [0], 0).unwrap_err().errno(), Errno::EIO);
        let client = client();
        client.gone.raise();
        flaky.fail_open(1);
        flaky.open(new(), &[("retry-request-delay", "1000000")], client).unwrap_err();
    }

    #[test]
    fn a_read_without_a_wait_leaves_the_retry_to_another() {
        let flaky = Flaky::default();
        let session = flaky.session(new(), &[QUICK]).unwrap();
        assert!(session.pread_nowait(&mut [0], 0).unwrap());
        flaky.fail(1);
        assert!(!session.pread_nowait(&mut [0], 0).unwrap());
        let session = crate::testing::session(&Spec::default().disk(), "retry-request", &[]);
        assert!(session.may_block(Op::Read) && session.loan(0, 512).is_none());
    }

    #[test]
    fn values_that_cannot_be_are_refused() {
        assert!(config_error("retry-request", &[("retry-request-retries", "-1")]).contains("out of range"));
        assert!(config_error("retry-request", &[("retry-request-delay", "x")]).contains("'x'"));
        let _ = session(&Spec::default().disk(), "retry-request", &[("retry-request-delay", "1.5")]);
    }
}
