//! Tries a request again that has failed, on what is open.

use std::{ffi::OsStr, sync::Arc, time::Duration};

use anyhow::Context as _;
use nbdkit_core::{
    Below, Client, Errno, Error, Filter, Flags, Handle, Info, Next, NextConfig, Op, Open, Outcome, Request,
    Result, params,
};
use parking_lot::Mutex;

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
                Err(e) if !is_final(&e, flags) => e,
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

/// Whether no other attempt can succeed: a fast zero that is not fast will not become so.
pub(crate) fn is_final(e: &Error, flags: Flags) -> bool {
    e.is_unsupported() && flags.contains(Flags::FAST_ZERO)
}

/// Makes one attempt at a request, after which it is as it was. None: it would have to wait, and must not.
pub(crate) fn attempt(next: &Next, request: &mut Request<'_>) -> Option<Result<()>> {
    let outcome = if request.op() == Op::Extents {
        // By way of extents of its own: what was told before it failed is forgotten.
        next.shifted(request, request.offset())
    } else {
        next.at_once(request)
    };
    match outcome {
        Outcome::Done(result) => Some(result),
        _ => None,
    }
}

/// First attempts that were made where the request could not wait, and have failed: each is the first attempt of the
/// next request that comes on a thread, so that there are as many as were asked for. It does not matter whose it was.
#[derive(Debug, Default)]
pub(crate) struct FirstAttempts(Mutex<Vec<Error>>);

impl FirstAttempts {
    /// Keeps one.
    pub(crate) fn note(&self, error: Error) {
        self.0.lock().push(error);
    }

    /// Takes one.
    pub(crate) fn take(&self) -> Option<Error> {
        self.0.lock().pop()
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
        let (patience, client) = (self.patience, open.client.clone());
        Ok(Box::new(Patient { patience, client, next, failed: FirstAttempts::default() }))
    }
}

struct Patient {
    patience: Patience,
    client: Arc<Client>,
    next: Next,
    failed: FirstAttempts,
}

// Nothing is started or lent for: a request that ends later cannot be tried again then.
impl Handle for Patient {
    fn next(&self) -> Option<&Next> {
        Some(&self.next)
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        let flags = request.flags();
        if !request.may_wait() {
            return match attempt(&self.next, request) {
                Some(Err(e)) if !is_final(&e, flags) => {
                    self.failed.note(e);
                    Outcome::NeedsThread
                }
                Some(result) => Outcome::Done(result),
                None => Outcome::NeedsThread,
            };
        }
        let what = format!("{:?}", request.op());
        let mut first = self.failed.take();
        Outcome::Done(self.patience.run(&self.client, &what, flags, || match first.take() {
            Some(failed) => Err(failed),
            None => attempt(&self.next, request).unwrap_or_else(|| Err(Errno::EIO.into())),
        }))
    }
}

#[cfg(test)]
mod tests {
    use nbdkit_core::Call;

    use super::*;
    use crate::{
        flaky::{Flaky, each_request},
        testing::{
            Answer, Spec, View, check_model, client, config_error, inline, lent, needs_thread, session,
            started,
        },
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
    fn a_request_that_may_not_wait_leaves_the_retry_to_a_thread() {
        let flaky = Flaky::default();
        let session = flaky.session(new(), &[QUICK]).unwrap();
        for op in [Op::Read, Op::Write, Op::Flush, Op::Trim, Op::Zero, Op::Cache, Op::Extents] {
            assert!(!needs_thread(&session, op), "{op:?}");
            flaky.fail(1);
            assert!(needs_thread(&session, op), "{op:?}");
            assert_eq!((flaky.opens(), needs_thread(&session, op)), (1, false), "{op:?}");
        }
        let fast = Call::new(Op::Zero, 0, 512).with_flags(Flags::FAST_ZERO);
        let error = inline(&session, fast, &[]).ended().unwrap().unwrap_err();
        assert_eq!(error.errno(), Errno::EOPNOTSUPP);
        let disk = Spec { later: true, ..Spec::default() }.disk();
        let session = crate::testing::session(&disk, "retry-request", &[]);
        let answer = started(&session, Call::new(Op::Read, 0, 512), &[]);
        assert!(matches!(answer, Answer::Done(Ok(_))), "{answer:?}");
        assert!(lent(&session, Op::Read, 0, 512).is_none());
    }

    #[test]
    fn values_that_cannot_be_are_refused() {
        assert!(config_error("retry-request", &[("retry-request-retries", "-1")]).contains("out of range"));
        assert!(config_error("retry-request", &[("retry-request-delay", "x")]).contains("'x'"));
        let _ = session(&Spec::default().disk(), "retry-request", &[("retry-request-delay", "1.5")]);
    }
}
