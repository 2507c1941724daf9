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
    Below, Errno, Error, Extents, Filter, Flags, Handle, Info, Loan, Next, NextConfig, Op, Open, Result,
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
        Info::bundled("error", "nbdkit error injection filter", HELP)
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
        Ok(Box::new(Faulty { rules: self.rules.clone(), dice: self.dice.clone(), next }))
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
    next: Next,
}

impl Faulty {
    fn rule(&self, op: Op) -> Option<(&'static str, &Rule)> {
        KINDS.iter().zip(&self.rules).find_map(|((name, of), rule)| (*of == op).then_some((*name, rule)))
    }

    /// Whether a request of this kind can fail at all.
    fn is_faulty(&self, op: Op) -> bool {
        self.rule(op).is_some_and(|(_, rule)| rule.rate > 0.0)
    }

    fn inject(&self, op: Op) -> Result<()> {
        let Some((kind, rule)) = self.rule(op) else { return Ok(()) };
        if rule.rate <= 0.0
            || self.dice.throw() >= rule.rate
            || rule.file.as_ref().is_some_and(|file| !file.exists())
        {
            return Ok(());
        }
        Err(Error::new(rule.errno, format!("injecting {} error into {kind}", rule.name)))
    }
}

impl Handle for Faulty {
    fn next(&self) -> Option<&Next> {
        Some(&self.next)
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.inject(Op::Read)?;
        self.next.pread(buf, offset)
    }

    /// The dice must be thrown once for each request, so a read that might come back as a `pread` is not tried.
    fn pread_nowait(&self, buf: &mut [u8], offset: u64) -> Result<bool> {
        if !self.is_faulty(Op::Read) {
            return self.next.pread_nowait(buf, offset);
        }
        if self.next.may_block(Op::Read) {
            return Ok(false);
        }
        self.pread(buf, offset).map(|()| true)
    }

    fn pwrite(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
        self.inject(Op::Write)?;
        self.next.pwrite(buf, offset, flags)
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.inject(Op::Trim)?;
        self.next.trim(length, offset, flags)
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.inject(Op::Zero)?;
        self.next.zero(length, offset, flags)
    }

    fn extents(&self, length: u64, offset: u64, flags: Flags, extents: &mut Extents) -> Result<()> {
        self.inject(Op::Extents)?;
        self.next.extents(length, offset, flags, extents)
    }

    fn cache(&self, length: u64, offset: u64) -> Result<()> {
        self.inject(Op::Cache)?;
        self.next.cache(length, offset)
    }

    /// What is lent is used without asking: it could not fail.
    fn loan(&self, offset: u64, length: u64) -> Option<Loan<'_>> {
        if self.is_faulty(Op::Read) {
            return None;
        }
        let loan = self.next.loan(offset, length)?;
        Some(Loan { writable: loan.writable && !self.is_faulty(Op::Write), ..loan })
    }
}

#[cfg(test)]
mod tests {
    use nbdkit_core::Session;

    use super::*;
    use crate::testing::{Spec, View, check_model, config_error, session};

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
        assert!(session.pread_nowait(&mut [0; 16], 0).is_err());
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
    fn a_read_that_may_wait_is_not_drawn_twice() {
        let spec = Spec { may_block: true, ..Spec::default() };
        let session = session(&spec.disk(), "error", &[("error-rate", "1")]);
        assert!(!session.pread_nowait(&mut [0; 16], 0).unwrap());
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
