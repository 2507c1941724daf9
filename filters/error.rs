//! Makes requests fail at random, to see what clients do about it.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use anyhow::{Context as _, bail};
use nbdkit_core::{
    Below, Errno, Error, Filter, Handle, Info, Next, NextConfig, Op, Open, Outcome, Request, Result,
    ThreadModel, params,
};

const HELP: &str = "\
error=EPERM|EIO|ENOMEM|EINVAL|ENOSPC|EOVERFLOW|ESHUTDOWN
                            The error to inject (default EIO).
error-rate=0%..100%|0..1    How many of the requests fail (default none).
error-file=<TRIGGER>        Inject only while this file exists.
error-pread=, error-pread-rate=, error-pread-file=       The same three for reads alone,
error-pwrite=, error-pwrite-rate=, error-pwrite-file=    for writes,
error-trim=, error-trim-rate=, error-trim-file=          trims,
error-zero=, error-zero-rate=, error-zero-file=          zeroes,
error-extents=, error-extents-rate=, error-extents-file=
                            extents requests,
error-cache=, error-cache-rate=, error-cache-file=       and cache requests.";

/// The errors that the protocol can carry, by name.
const ERRORS: [(&str, Errno); 7] = [
    ("EPERM", Errno::EPERM),
    ("EIO", Errno::EIO),
    ("ENOMEM", Errno::ENOMEM),
    ("EINVAL", Errno::EINVAL),
    ("ENOSPC", Errno::ENOSPC),
    ("EOVERFLOW", Errno::EOVERFLOW),
    ("ESHUTDOWN", Errno::ESHUTDOWN),
];

/// The kinds of requests that can be made to fail, as parameters and messages call them.
const KINDS: [(&str, Op); 6] = [
    ("pread", Op::Read),
    ("pwrite", Op::Write),
    ("trim", Op::Trim),
    ("zero", Op::Zero),
    ("extents", Op::Extents),
    ("cache", Op::Cache),
];

pub(crate) fn new() -> Box<dyn Filter> {
    let rule = Rule { name: "EIO", errno: Errno::EIO, rate: 0.0, file: None };
    Box::new(ErrorFilter { rules: std::array::from_fn(|_| rule.clone()), dice: Arc::default() })
}

/// When a kind of request fails, and how.
#[derive(Clone)]
struct Rule {
    name: &'static str,
    errno: Errno,
    rate: f64,
    file: Option<PathBuf>,
}

impl Rule {
    fn set(&mut self, setting: Setting<'_>, value: &OsStr) -> anyhow::Result<()> {
        match setting {
            Setting::Error => {
                let known = ERRORS.iter().find(|(name, _)| value == *name);
                let Some((name, errno)) = known else {
                    let names: Vec<_> = ERRORS.iter().map(|(name, _)| *name).collect();
                    bail!("unknown error name '{}': use one of {}", value.display(), names.join(" "));
                };
                (self.name, self.errno) = (name, *errno);
            }
            Setting::Rate => self.rate = params::probability(value)?,
            Setting::File(path) => self.file = Some(path.to_owned()),
        }
        Ok(())
    }
}

#[derive(Clone, Copy)]
enum Setting<'a> {
    Error,
    Rate,
    File(&'a Path),
}

struct ErrorFilter {
    /// By index in `KINDS`.
    rules: [Rule; KINDS.len()],
    dice: Arc<Dice>,
}

impl Filter for ErrorFilter {
    fn info(&self) -> Info {
        // The name in messages and of `-D` is not that on the command line: scripts look for it.
        Info::bundled("error-inject", "nbdkit error injection filter", HELP)
    }

    fn config(&mut self, key: &str, value: &OsStr, next: &mut NextConfig<'_>) -> anyhow::Result<()> {
        let Some(rest) = key.strip_prefix("error") else { return next(key, value) };
        let path;
        let (kind, setting) = if let Some(kind) = rest.strip_suffix("-rate") {
            (kind, Setting::Rate)
        } else if let Some(kind) = rest.strip_suffix("-file") {
            // Daemons change their directory.
            path = std::path::absolute(value).with_context(|| format!("{key}: no such path"))?;
            (kind, Setting::File(&path))
        } else {
            (rest, Setting::Error)
        };
        let of_kind = |name: &str| kind.is_empty() || kind.strip_prefix('-') == Some(name);
        if !KINDS.iter().any(|(name, _)| of_kind(name)) {
            return next(key, value);
        }
        for (rule, _) in self.rules.iter_mut().zip(KINDS).filter(|(_, (name, _))| of_kind(name)) {
            rule.set(setting, value).with_context(|| key.to_owned())?;
        }
        Ok(())
    }

    fn get_ready(&mut self, _: ThreadModel) -> anyhow::Result<()> {
        self.dice = Arc::new(Dice(getrandom::u64().context("no random numbers")?.into()));
        Ok(())
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        let next = next.open(open)?;
        Ok(Box::new(Faulty {
            rules: self.rules.clone(),
            dice: self.dice.clone(),
            passed: Default::default(),
            next,
        }))
    }
}

/// Random numbers for all connections, without a lock.
#[derive(Default)]
struct Dice(AtomicU64);

impl Dice {
    /// A number from 0 up to, but not including, 1.
    fn throw(&self) -> f64 {
        // SplitMix64: a counter, well mixed.
        const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
        let mut z = self.0.fetch_add(STEP, Ordering::Relaxed).wrapping_add(STEP);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

struct Faulty {
    rules: [Rule; KINDS.len()],
    dice: Arc<Dice>,
    /// How many requests of each kind were drawn for already and come again, on a thread: the dice are thrown once for each
    /// request, and of one kind it is all the same which.
    passed: [AtomicU64; KINDS.len()],
    next: Next,
}

impl Faulty {
    /// Which kind of request it is, if such a one can fail at all.
    fn faulty(&self, op: Op) -> Option<usize> {
        let kind = KINDS.iter().position(|(_, of)| *of == op)?;
        (self.rules[kind].rate > 0.0).then_some(kind)
    }

    fn inject(&self, kind: usize) -> Result<()> {
        let (rule, (name, _)) = (&self.rules[kind], KINDS[kind]);
        if self.dice.throw() >= rule.rate || rule.file.as_ref().is_some_and(|file| !file.exists()) {
            return Ok(());
        }
        Err(Error::new(rule.errno, format!("injecting {} error into {name}", rule.name)))
    }
}

impl Handle for Faulty {
    fn next(&self) -> Option<&Next> {
        Some(&self.next)
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        let Some(kind) = self.faulty(request.op()) else { return self.next.pass(request) };
        if request.may_lend() {
            // What is lent can be used again without asking.
            return Outcome::NeedsThread;
        }
        let passed = &self.passed[kind];
        let drawn = request.may_wait()
            && passed.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok();
        if !drawn && let Err(e) = self.inject(kind) {
            return Outcome::Done(Err(e));
        }
        let outcome = self.next.pass(request);
        if matches!(outcome, Outcome::NeedsThread) {
            passed.fetch_add(1, Ordering::Relaxed);
        }
        outcome
    }
}

#[cfg(test)]
mod tests {
    use nbdkit_core::{Flags, Session};

    use super::*;
    use crate::testing::{
        Answer, Call, Spec, View, check_model, config_error, lent, read_inline, session, started,
    };

    fn of(params: &[(&str, &str)]) -> Session {
        session(&Spec::default().disk(), "error", params)
    }

    fn read(session: &Session) -> Result<()> {
        session.pread(&mut [0; 16], 0)
    }

    #[test]
    fn model() {
        check_model(&["error"], &[("error", "ENOSPC")], 20_000, &View::same(20_000));
    }

    #[test]
    fn a_rate_of_one_fails_everything_but_flush() {
        let session = of(&[("error-rate", "100%"), ("error", "ENOMEM")]);
        for (error, kind) in [
            (read(&session), "pread"),
            (session.pwrite(&[1], 0, Flags::empty()), "pwrite"),
            (session.trim(1, 0, Flags::empty()), "trim"),
            (session.zero(1, 0, Flags::empty()), "zero"),
            (session.extents(1, 0, Flags::empty()).map(drop), "extents"),
            (session.cache(1, 0), "cache"),
        ] {
            let error = error.unwrap_err();
            assert_eq!(error.errno(), Errno::ENOMEM);
            assert_eq!(error.to_string(), format!("injecting ENOMEM error into {kind}"));
        }
        session.flush().unwrap();
        assert!(read_inline(&session, &mut [0; 16], 0).is_err());
    }

    #[test]
    fn one_kind_can_fail_alone() {
        let session = of(&[("error-pwrite-rate", "1"), ("error-pwrite", "ENOSPC")]);
        read(&session).unwrap();
        assert_eq!(session.pwrite(&[1], 0, Flags::empty()).unwrap_err().errno(), Errno::ENOSPC);
    }

    #[test]
    fn the_trigger_file_is_looked_at_for_each_request() {
        let dir = tempfile::tempdir().unwrap();
        let trigger = dir.path().join("trigger");
        let session = of(&[("error-rate", "1"), ("error-file", trigger.to_str().unwrap())]);
        read(&session).unwrap();
        std::fs::write(&trigger, "").unwrap();
        assert_eq!(read(&session).unwrap_err().errno(), Errno::EIO);
        std::fs::remove_file(&trigger).unwrap();
        read(&session).unwrap();
    }

    #[test]
    fn about_as_many_fail_as_asked() {
        let dice = Dice::default();
        let hits = (0..100_000).filter(|_| dice.throw() < 0.3).count();
        assert!((29_000..31_000).contains(&hits), "{hits}");
    }

    #[test]
    fn a_read_that_comes_again_is_not_drawn_twice() {
        let disk = Spec { blocks: |_| true, ..Spec::default() }.disk();
        let session = session(&disk, "error", &[("error-rate", "50%")]);
        let failed = (0..4000).filter(|_| match read_inline(&session, &mut [0; 16], 0) {
            Ok(done) => {
                assert!(!done);
                read(&session).is_err()
            }
            Err(_) => true,
        });
        let failed = failed.count();
        assert!((1800..2200).contains(&failed), "{failed} of 4000");
    }

    #[test]
    fn what_does_not_fail_may_be_started_and_lent() {
        let disk = Spec { later: true, ..Spec::default() }.disk();
        let session = session(&disk, "error", &[("error-pwrite-rate", "1"), ("error-trim-rate", "1e-9")]);
        let start = |op| started(&session, Call::new(op, 0, 16), &[0; 16]);
        assert!(matches!(start(Op::Read), Answer::Started(Ok(_))));
        assert!(matches!(start(Op::Trim), Answer::Started(Ok(_))));
        assert!(matches!(start(Op::Write), Answer::Done(Err(_))));
        assert_eq!((lent(&session, Op::Read, 0, 16), lent(&session, Op::Write, 0, 16)), (Some(0), None));
    }

    #[test]
    fn bad_values_name_the_parameter_and_the_choice() {
        let message = config_error("error", &[("error", "EFOO")]);
        assert!(message.contains("'EFOO'") && message.contains("ENOSPC"), "{message}");
        let message = config_error("error", &[("error-trim-rate", "2")]);
        assert!(message.contains("error-trim-rate"), "{message}");
        assert!(config_error("error", &[("error-open", "EIO")]).contains("unknown parameter"));
        assert!(config_error("error", &[("errors", "EIO")]).contains("unknown parameter"));
    }
}
