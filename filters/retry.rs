//! Opens the layers below anew when a request fails, and tries it again.
//!
//! Requests run in parallel, so several may fail at once: the first of them opens the layers anew for all. What has
//! changed below meanwhile (a smaller disk, one that cannot be written to) is another failure.

use std::{
    ffi::OsStr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use nbdkit_core::{
    Below, Call, Caps, Client, Errno, Error, Filter, Flags, Handle, Info, NextConfig, Op, Open, Outcome,
    Request, Result, Support, params,
};
use parking_lot::RwLock;

use crate::{
    finalize_on_drop::FinalizeOnDrop,
    retry_request::{FirstAttempts, attempt, is_final},
};

const HELP: &str = "\
retries=<N>                How often a request is tried again (default 5).
retry-delay=<SECS>         How long to wait before the first time (default 2).
retry-exponential=<BOOL>   Whether each wait is twice as long as the last one (default true).
retry-readonly=<BOOL>      Whether the disk becomes read-only by the first failure (default false).";

pub(crate) fn new() -> Box<dyn Filter> {
    Box::new(Retry(Settings {
        retries: 5,
        delay: Duration::from_secs(2),
        exponential: true,
        readonly: false,
    }))
}

struct Retry(Settings);

#[derive(Clone, Copy)]
struct Settings {
    retries: u32,
    delay: Duration,
    exponential: bool,
    readonly: bool,
}

impl Settings {
    /// How long to wait before each further attempt.
    fn waits(&self) -> impl Iterator<Item = Duration> {
        let factor = if self.exponential { 2 } else { 1 };
        std::iter::successors(Some(self.delay), move |wait| Some(wait.saturating_mul(factor)))
            .take(self.retries as usize)
    }

    /// Runs `attempt` until it succeeds, its error is final, or patience ends.
    fn persist<T>(
        &self,
        client: &Client,
        what: &str,
        mut attempt: impl FnMut() -> std::result::Result<T, Failure>,
    ) -> Result<T> {
        let mut waits = self.waits();
        loop {
            let error = match attempt() {
                Ok(value) => return Ok(value),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Passing(error)) => error,
            };
            let Some(wait) = waits.next() else { return Err(error) };
            log::debug!("retry: {what} failed: {error}; the next attempt is in {wait:?}");
            if client.sleep(wait).is_err() {
                return Err(error);
            }
        }
    }
}

/// Why an attempt failed.
enum Failure {
    /// Another one may succeed.
    Passing(Error),
    /// No other one will.
    Final(Error),
}

impl Filter for Retry {
    fn info(&self) -> Info {
        Info::bundled("retry", "nbdkit retry filter", HELP)
    }

    fn config(&mut self, key: &str, value: &OsStr, next: &mut NextConfig<'_>) -> anyhow::Result<()> {
        let Retry(settings) = self;
        match key {
            "retries" => settings.retries = params::integer(key, value)?,
            "retry-delay" => settings.delay = params::delay(value).with_context(|| key.to_owned())?,
            "retry-exponential" => settings.exponential = params::boolean(value)?,
            "retry-readonly" => settings.readonly = params::boolean(value)?,
            _ => return next(key, value),
        }
        Ok(())
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        let first: FinalizeOnDrop =
            self.0.persist(&open.client, "open", || next.open(open).map_err(Failure::Passing))?.into();
        Ok(Box::new(Persistent {
            settings: self.0,
            caps: first.capabilities(),
            below: next.clone(),
            open: open.clone(),
            reopened: AtomicBool::new(false),
            current: RwLock::new(Current { generation: 0, opened: Some(Arc::new(first)) }),
            failed: FirstAttempts::default(),
        }))
    }
}

struct Persistent {
    settings: Settings,
    /// What the client was told at the start.
    caps: Caps,
    below: Below,
    open: Open,
    /// At least one request has failed.
    reopened: AtomicBool,
    current: RwLock<Current>,
    failed: FirstAttempts,
}

/// The layers that are open now.
struct Current {
    /// Counts the times that they were opened anew.
    generation: u64,
    /// None: that failed.
    opened: Option<Arc<FinalizeOnDrop>>,
}

fn writes(op: Op) -> bool {
    matches!(op, Op::Write | Op::Trim | Op::Zero)
}

/// Whether the layers, opened anew, still have what is asked for.
fn check(call: &Call, caps: &Caps) -> Result<()> {
    let lacks = |errno, what| Err(Error::new(errno, format!("the disk, opened anew, {what}")));
    if call.end() > caps.size {
        return lacks(if writes(call.op) { Errno::ENOSPC } else { Errno::EIO }, "is smaller");
    }
    if writes(call.op) && !caps.write {
        return lacks(Errno::EROFS, "is read-only");
    }
    let able = match call.op {
        Op::Flush => caps.flush,
        Op::Trim => caps.trim,
        Op::Zero => caps.zero != Support::None,
        Op::Cache => caps.cache != Support::None,
        Op::Read | Op::Write | Op::Extents => true,
    };
    if !able || (call.flags.contains(Flags::FUA) && caps.fua == Support::None) {
        return lacks(Errno::EIO, "can do less");
    }
    if call.flags.contains(Flags::FAST_ZERO) && !caps.fast_zero {
        return lacks(Errno::EOPNOTSUPP, "has no fast zero");
    }
    Ok(())
}

impl Persistent {
    fn run(&self, request: &mut Request<'_>) -> Result<()> {
        let (call, mut failed) = (*request.call(), None);
        let mut first = self.failed.take();
        self.settings.persist(&self.open.client, &format!("{:?}", call.op), || {
            if let Some(error) = first.take() {
                failed = Some(self.current.read().generation);
                return Err(Failure::Passing(error));
            }
            if let Some(generation) = failed {
                self.reopen(generation);
            }
            if let Err(e) = self.check_readonly(call.op) {
                return Err(Failure::Final(e));
            }
            let (generation, opened) = {
                let current = self.current.read();
                (current.generation, current.opened.clone())
            };
            failed = Some(generation);
            let opened = opened.ok_or_else(|| {
                Failure::Passing(Error::new(Errno::ESHUTDOWN, "the disk could not be opened anew"))
            })?;
            let mut attempt = || attempt(&opened, request).unwrap_or_else(|| Err(Errno::EIO.into()));
            check(&call, opened.caps())
                .and_then(|()| attempt())
                .map_err(|e| if is_final(&e, call.flags) { Failure::Final(e) } else { Failure::Passing(e) })
        })
    }

    /// Makes one attempt where it may not wait. None: it needs a thread, for that or to try again.
    fn run_nowait(&self, request: &mut Request<'_>) -> Option<Result<()>> {
        let call = *request.call();
        if let Err(e) = self.check_readonly(call.op) {
            return Some(Err(e));
        }
        let opened = self.current.try_read()?.opened.clone()?;
        check(&call, opened.caps()).ok()?;
        match attempt(&opened, request)? {
            Err(e) if !is_final(&e, call.flags) => {
                self.failed.note(e);
                None
            }
            result => Some(result),
        }
    }

    fn check_readonly(&self, op: Op) -> Result<()> {
        if writes(op) && self.settings.readonly && self.reopened.load(Ordering::Acquire) {
            let why = "the disk is read-only since a request has failed (retry-readonly)";
            return Err(Error::new(Errno::EROFS, why));
        }
        Ok(())
    }

    /// Opens the layers anew, unless another request has done so since `generation` failed.
    fn reopen(&self, generation: u64) {
        let mut current = self.current.write();
        if current.generation != generation {
            return;
        }
        current.generation += 1;
        self.reopened.store(true, Ordering::Release);
        // The old ones are closed first: they may hold what the new ones need.
        current.opened = None;
        let readonly = self.open.readonly || self.settings.readonly;
        match self.below.open(&Open { readonly, ..self.open.clone() }) {
            Ok(next) => current.opened = Some(Arc::new(next.into())),
            Err(e) => log::error!("retry: cannot open the disk anew: {e}"),
        }
    }
}

// Nothing is started or lent for, since it could not be tried again, and the layer below has no name, since it may be
// replaced at any time.
impl Handle for Persistent {
    fn is_filter(&self) -> bool {
        true
    }

    fn finalize(&self) -> Result<()> {
        let opened = self.current.write().opened.take();
        drop(opened);
        Ok(())
    }

    fn capabilities(&self) -> Result<Caps> {
        Ok(self.caps.clone())
    }

    fn export_description(&self) -> Result<Option<String>> {
        let opened = self.current.read().opened.clone();
        opened.map_or(Ok(None), |opened| opened.export_description())
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        if request.may_wait() {
            return Outcome::Done(self.run(request));
        }
        self.run_nowait(request).map_or(Outcome::NeedsThread, Outcome::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        flaky::{Flaky, Now, each_request},
        testing::{
            Answer, Spec, View, check_model, config_error, inline, lent, needs_thread, session, started,
        },
    };

    const QUICK: (&str, &str) = ("retry-delay", "0");

    #[test]
    fn model() {
        check_model(&["retry"], &[], 20_000, &View::same(20_000));
    }

    #[test]
    fn a_request_is_tried_on_layers_opened_anew() {
        for (name, request) in each_request() {
            for (retries, failures, succeeds) in [(5, 5, true), (2, 3, false), (0, 1, false)] {
                let flaky = Flaky::default();
                let text = retries.to_string();
                let session = flaky.session(new(), &[QUICK, ("retries", &text)]).unwrap();
                flaky.fail(failures);
                assert_eq!(request(&session).is_ok(), succeeds, "{name}: {failures} failures");
                let reopened = failures.min(retries);
                assert_eq!((flaky.opens(), flaky.open_now()), (1 + reopened, 1), "{name}");
                assert_eq!(flaky.finalized(), reopened, "{name}");
                drop(session);
                assert_eq!((flaky.open_now(), flaky.finalized()), (0, reopened + 1), "{name}");
            }
        }
    }

    #[test]
    fn an_open_that_fails_is_a_failure_like_others() {
        let flaky = Flaky::default();
        flaky.fail_open(5);
        let session = flaky.session(new(), &[QUICK]).unwrap();
        assert_eq!(flaky.opens(), 6);
        flaky.fail(1);
        flaky.fail_open(4);
        session.pread(&mut [0], 0).unwrap();
        assert_eq!(flaky.opens(), 11);
        flaky.fail(1);
        flaky.fail_open(5);
        assert_eq!(session.pread(&mut [0], 0).unwrap_err().errno(), Errno::ESHUTDOWN);
        assert_eq!(flaky.open_now(), 0);
        session.pread(&mut [0], 0).unwrap();
        flaky.fail_open(6);
        flaky.session(new(), &[QUICK]).unwrap_err();
    }

    #[test]
    fn what_has_changed_below_is_a_failure() {
        let usual = Now::default();
        let error = |now: Now, request: fn(&nbdkit_core::Session) -> Result<()>| {
            let flaky = Flaky::default();
            let session = flaky.session(new(), &[QUICK, ("retries", "1")]).unwrap();
            flaky.change(now);
            flaky.fail(1);
            request(&session).unwrap_err().errno()
        };
        let small = Now { size: 512, ..usual };
        assert_eq!(error(small, |s| s.pread(&mut [0; 512], 1)), Errno::EIO);
        assert_eq!(error(small, |s| s.pwrite(&[0; 512], 1, Flags::empty())), Errno::ENOSPC);
        let readonly = Now { write: false, ..usual };
        assert_eq!(error(readonly, |s| s.pwrite(&[0], 0, Flags::empty())), Errno::EROFS);
        assert_eq!(error(readonly, |s| s.trim(1, 0, Flags::empty())), Errno::EROFS);
        let no_fua = Now { fua: Support::None, ..usual };
        assert_eq!(error(no_fua, |s| s.pwrite(&[0], 0, Flags::FUA)), Errno::EIO);
    }

    #[test]
    fn a_change_that_passes_is_survived() {
        let flaky = Flaky::default();
        let session = flaky.session(new(), &[QUICK]).unwrap();
        flaky.change(Now { size: 1024, ..Now::default() });
        flaky.fail(1);
        session.pread(&mut [0; 512], 512).unwrap();
        assert_eq!(session.size(), 64 << 10);
        flaky.change(Now::default());
        session.pread(&mut [0; 512], 32 << 10).unwrap();
        assert_eq!(flaky.opens(), 3);
    }

    #[test]
    fn a_disk_can_become_read_only() {
        let flaky = Flaky::default();
        let session = flaky.session(new(), &[QUICK, ("retry-readonly", "true")]).unwrap();
        session.pwrite(&[0], 0, Flags::empty()).unwrap();
        flaky.fail(1);
        assert_eq!(session.pwrite(&[0], 0, Flags::empty()).unwrap_err().errno(), Errno::EROFS);
        assert_eq!(session.zero(1, 0, Flags::empty()).unwrap_err().errno(), Errno::EROFS);
        assert_eq!(flaky.opens(), 2, "a request that cannot succeed is not tried again");
        session.pread(&mut [0], 0).unwrap();
    }

    #[test]
    fn a_fast_zero_that_is_slow_is_not_tried_again() {
        let flaky = Flaky::default();
        let session = flaky.session(new(), &[]).unwrap();
        assert_eq!(session.zero(512, 0, Flags::FAST_ZERO).unwrap_err().errno(), Errno::EOPNOTSUPP);
        assert_eq!(flaky.opens(), 1);
    }

    #[test]
    fn waits_become_longer_unless_they_should_not() {
        let waits = |exponential| -> Vec<u64> {
            let delay = Duration::from_secs(3);
            let settings = Settings { retries: 4, delay, exponential, readonly: false };
            settings.waits().map(|wait| wait.as_secs()).collect()
        };
        assert_eq!(waits(true), [3, 6, 12, 24]);
        assert_eq!(waits(false), [3, 3, 3, 3]);
    }

    #[test]
    fn a_client_that_goes_away_ends_the_wait() {
        let flaky = Flaky::default();
        let session = flaky.session(new(), &[("retry-delay", "1000000")]).unwrap();
        flaky.fail(1);
        session.client().gone.raise();
        assert_eq!(session.pread(&mut [0], 0).unwrap_err().errno(), Errno::EIO);
        assert_eq!(flaky.opens(), 1);
    }

    #[test]
    fn requests_that_fail_together_open_once() {
        let flaky = Flaky::default();
        let session = flaky.session(new(), &[QUICK]).unwrap();
        flaky.fail_together(4);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| session.pread(&mut [0], 0).unwrap());
            }
        });
        assert_eq!((flaky.opens(), flaky.open_now(), flaky.finalized()), (2, 1, 1));
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
        let session = crate::testing::session(&disk, "retry", &[]);
        let answer = started(&session, Call::new(Op::Read, 0, 512), &[]);
        assert!(matches!(answer, Answer::Done(Ok(_))), "{answer:?}");
        assert!(lent(&session, Op::Read, 0, 512).is_none());
    }

    #[test]
    fn values_that_cannot_be_are_refused() {
        assert!(config_error("retry", &[("retries", "-1")]).contains("retries: number '-1' is out of range"));
        assert!(config_error("retry", &[("retry-delay", "x")]).starts_with("retry-delay: "));
        assert!(config_error("retry", &[("retry-exponential", "x")]).contains("'x'"));
        let _ = session(&Spec::default().disk(), "retry", &[("retry-delay", "1.5")]);
    }
}
