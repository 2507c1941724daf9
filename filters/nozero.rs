//! Changes how efficient zeroing is offered: not at all, by writing, without trimming, or not fast.

use std::ffi::OsStr;

use anyhow::bail;
use nbdkit_core::{
    Below, Caps, Errno, Error, Filter, Flags, Handle, Info, Next, NextConfig, Op, Open, Outcome, Request,
    Result, Support, emulate, params,
};

const HELP: &str = "\
zeromode=<MODE>       'none' (default), 'emulate', 'notrim' or 'plugin'.
fastzeromode=<MODE>   'default', 'none', 'slow' or 'ignore' (unsafe).";

pub(crate) fn new() -> Box<dyn Filter> {
    Box::new(NoZero { modes: Modes { zero: ZeroMode::None, fast: FastMode::Default } })
}

/// What becomes of zero requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ZeroMode {
    /// Not offered.
    None,
    /// Zeroes are written.
    Emulate,
    /// Passed on, but the range must stay allocated.
    NoTrim,
    /// Passed on.
    Plugin,
}

/// What becomes of the fast zero flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FastMode {
    /// As is true: what is written is not fast, what is passed on is as fast as the layers below say.
    Default,
    /// Not offered.
    None,
    /// Offered, and every such request is refused.
    Slow,
    /// Offered, and the request is done however long it takes.
    Ignore,
}

#[derive(Clone, Copy)]
struct Modes {
    zero: ZeroMode,
    fast: FastMode,
}

impl Modes {
    /// Every fast zero request is refused.
    fn is_slow(self) -> bool {
        match self.fast {
            FastMode::Slow => true,
            FastMode::Default => self.zero == ZeroMode::Emulate,
            FastMode::None | FastMode::Ignore => false,
        }
    }
}

struct NoZero {
    modes: Modes,
}

impl Filter for NoZero {
    fn info(&self) -> Info {
        Info::bundled("nozero", "nbdkit nozero filter", HELP)
    }

    fn config(&mut self, key: &str, value: &OsStr, next: &mut NextConfig<'_>) -> anyhow::Result<()> {
        match key {
            "zeromode" => {
                self.modes.zero = match params::text(value)? {
                    "none" => ZeroMode::None,
                    "emulate" => ZeroMode::Emulate,
                    "notrim" => ZeroMode::NoTrim,
                    "plugin" => ZeroMode::Plugin,
                    other => bail!("unknown zeromode '{other}': use none, emulate, notrim or plugin"),
                };
            }
            "fastzeromode" => {
                self.modes.fast = match params::text(value)? {
                    "default" => FastMode::Default,
                    "none" => FastMode::None,
                    "slow" => FastMode::Slow,
                    "ignore" => FastMode::Ignore,
                    other => bail!("unknown fastzeromode '{other}': use default, none, slow or ignore"),
                };
            }
            _ => return next(key, value),
        }
        Ok(())
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        let next = next.open(open)?;
        let caps = next.caps();
        let passes = matches!(self.modes.zero, ZeroMode::NoTrim | ZeroMode::Plugin);
        if passes && caps.write && caps.zero == Support::None {
            return Err(Error::new(
                Errno::EINVAL,
                format!("this zeromode needs zero support, and {} does not offer it", next.name()),
            ));
        }
        Ok(Box::new(Zeroing { modes: self.modes, next }))
    }
}

struct Zeroing {
    modes: Modes,
    next: Next,
}

impl Zeroing {
    fn write_zeroes(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        let caps = self.next.caps();
        // One flush at the end serves all pieces; native FUA is needed on each.
        let flush = flags.contains(Flags::FUA) && caps.fua == Support::Emulate;
        let flags = if flush { Flags::empty() } else { flags & Flags::FUA };
        emulate::zero(length, offset, caps.block_size, |zeroes, at| self.next.pwrite(zeroes, at, flags))?;
        if flush { self.next.flush() } else { Ok(()) }
    }
}

impl Handle for Zeroing {
    fn next(&self) -> Option<&Next> {
        Some(&self.next)
    }

    fn capabilities(&self) -> Result<Caps> {
        let mut caps = self.next.capabilities().with_skip_holes(self.next.caps().skip_holes);
        caps = match self.modes.zero {
            ZeroMode::None => caps.with_zero(Support::None),
            ZeroMode::Emulate => caps.with_zero(Support::Emulate),
            ZeroMode::NoTrim | ZeroMode::Plugin => caps,
        };
        Ok(match self.modes.fast {
            FastMode::None => caps.with_fast_zero(false),
            FastMode::Slow | FastMode::Ignore => caps.with_fast_zero(true),
            FastMode::Default if self.modes.is_slow() => caps.with_fast_zero(true),
            FastMode::Default => caps,
        })
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        if request.op() != Op::Zero {
            return self.next.pass(request);
        }
        let mut flags = request.flags();
        if flags.contains(Flags::FAST_ZERO) && self.modes.is_slow() {
            return Outcome::Done(Err(Errno::EOPNOTSUPP.into()));
        }
        if self.modes.fast == FastMode::Ignore {
            flags -= Flags::FAST_ZERO;
        }
        match self.modes.zero {
            ZeroMode::Emulate if !request.may_wait() => Outcome::NeedsThread,
            ZeroMode::Emulate => Outcome::Done(self.write_zeroes(request.length(), request.offset(), flags)),
            ZeroMode::NoTrim => self.next.flagged(request, flags - Flags::MAY_TRIM),
            ZeroMode::None | ZeroMode::Plugin => self.next.flagged(request, flags),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{
        Answer, Call, Disk, Spec, View, chain, check_model, client, config_error, lent, needs_thread, open,
        session, started,
    };

    const ALL: Flags = Flags::MAY_TRIM.union(Flags::FUA);

    fn modes<'a>(zero: &'a str, fast: &'a str) -> [(&'a str, &'a str); 2] {
        [("zeromode", zero), ("fastzeromode", fast)]
    }

    /// What a zero request of 1000 bytes at 24 becomes.
    fn run(disk: &Disk, zero: &str, fast: &str, flags: Flags) -> Result<Vec<(Op, Flags)>> {
        session(disk, "nozero", &modes(zero, fast)).zero(1000, 24, flags)?;
        let calls = disk.take_calls();
        for Call { op, offset, length, .. } in &calls {
            assert!(*op == Op::Flush || (*offset, *length) == (24, 1000), "{op:?} of {length} at {offset}");
        }
        Ok(calls.iter().map(|call| (call.op, call.flags)).collect())
    }

    #[test]
    fn model() {
        for zero in ["none", "emulate", "notrim", "plugin"] {
            for fast in ["default", "none", "slow", "ignore"] {
                check_model(&["nozero"], &modes(zero, fast), 20_000, &View::same(20_000));
            }
        }
    }

    #[test]
    fn what_is_offered() {
        use Support::{Emulate, Native, None};
        let caps = |zero, fast, spec: Spec| {
            let session = session(&spec.disk(), "nozero", &modes(zero, fast));
            (session.caps().zero, session.caps().fast_zero)
        };
        let slow = || Spec { fast_zero: Some(false), ..Spec::default() };
        for fast in ["default", "none", "slow", "ignore"] {
            assert_eq!(caps("none", fast, Spec::default()), (None, false));
        }
        for (fast, offered) in [("default", true), ("none", false), ("slow", true), ("ignore", true)] {
            assert_eq!(caps("emulate", fast, slow()), (Emulate, offered), "{fast}");
            assert_eq!(caps("notrim", fast, Spec::default()), (Native, offered), "{fast}");
            assert_eq!(caps("plugin", fast, Spec::emulated(1000)), (Emulate, offered), "{fast}");
        }
        assert_eq!(caps("notrim", "default", slow()), (Native, false));
        assert_eq!(caps("plugin", "default", slow()), (Native, false));
    }

    #[test]
    fn no_parameter_means_none() {
        assert_eq!(session(&Spec::default().disk(), "nozero", &[]).caps().zero, Support::None);
    }

    #[test]
    fn emulation_writes_and_never_zeroes() {
        let disk = Spec::default().disk();
        assert_eq!(run(&disk, "emulate", "default", ALL).unwrap(), [(Op::Write, Flags::FUA)]);
        assert_eq!(run(&disk, "emulate", "default", Flags::MAY_TRIM).unwrap(), [(Op::Write, Flags::empty())]);
        assert!(disk.contents()[24..1024].iter().all(|b| *b == 0));
    }

    #[test]
    fn emulation_flushes_once_where_fua_is_emulated() {
        let size = 3 << 20;
        let disk = Spec::emulated(size).disk();
        let session = session(&disk, "nozero", &[("zeromode", "emulate")]);
        session.zero(size, 0, Flags::FUA).unwrap();
        assert_eq!((disk.count(Op::Zero), disk.count(Op::Flush)), (0, 1));
        assert_eq!(disk.calls().last().unwrap().op, Op::Flush);
        assert!(disk.stable().iter().all(|b| *b == 0));
    }

    #[test]
    fn notrim_takes_only_that_flag() {
        let disk = Spec::default().disk();
        let fast = ALL | Flags::FAST_ZERO;
        assert_eq!(
            run(&disk, "notrim", "default", fast).unwrap(),
            [(Op::Zero, Flags::FUA | Flags::FAST_ZERO)]
        );
        assert_eq!(run(&disk, "plugin", "default", fast).unwrap(), [(Op::Zero, fast)]);
    }

    #[test]
    fn fast_zeroes() {
        let disk = Spec::default().disk();
        let fast = Flags::FAST_ZERO;
        for (zero, mode) in
            [("emulate", "default"), ("emulate", "slow"), ("notrim", "slow"), ("plugin", "slow")]
        {
            let error = run(&disk, zero, mode, fast).unwrap_err();
            assert_eq!(error.errno(), Errno::EOPNOTSUPP, "{zero} {mode}");
            assert!(disk.take_calls().is_empty());
            assert_eq!(run(&disk, zero, mode, Flags::empty()).unwrap().len(), 1, "{zero} {mode}");
        }
        assert_eq!(run(&disk, "emulate", "ignore", fast).unwrap(), [(Op::Write, Flags::empty())]);
        assert_eq!(run(&disk, "plugin", "ignore", fast).unwrap(), [(Op::Zero, Flags::empty())]);
    }

    #[test]
    fn passing_on_needs_zero_below() {
        for zero in ["notrim", "plugin"] {
            let disk = Spec { zero: Support::None, ..Spec::default() }.disk();
            let chain = chain(&disk, &["nozero"], &[("zeromode", zero)]).unwrap();
            let error = open(&chain, client(), false).unwrap_err();
            assert!(error.to_string().contains("testdisk does not offer it"), "{error}");
            open(&chain, client(), true).unwrap();
        }
    }

    #[test]
    fn unknown_modes_are_refused() {
        assert!(config_error("nozero", &[("zeromode", "x")]).contains("unknown zeromode 'x'"));
        assert!(config_error("nozero", &[("fastzeromode", "x")]).contains("unknown fastzeromode 'x'"));
    }

    #[test]
    fn loans_and_reads_without_a_wait_pass() {
        let spec = Spec { blocks: |op| op != Op::Read, ..Spec::default() };
        let session = session(&spec.disk(), "nozero", &[]);
        assert_eq!(lent(&session, Op::Write, 512, 512), Some(512));
        assert!(!needs_thread(&session, Op::Read) && needs_thread(&session, Op::Write));
    }

    #[test]
    fn zeroes_that_are_passed_on_are_started() {
        let disk = Spec { later: true, ..Spec::default() }.disk();
        let zero = |mode| {
            let session = session(&disk, "nozero", &[("zeromode", mode)]);
            started(&session, Call::new(Op::Zero, 24, 1000).with_flags(ALL), &[])
        };
        assert!(matches!(zero("plugin"), Answer::Started(Ok(_))));
        assert!(matches!(zero("notrim"), Answer::Started(Ok(_))));
        let flags: Vec<_> = disk.take_calls().iter().map(|call| call.flags).collect();
        assert_eq!(flags, [ALL, Flags::FUA]);
        assert!(matches!(zero("emulate"), Answer::NeedsThread));
        assert!(disk.calls().is_empty());
    }
}
