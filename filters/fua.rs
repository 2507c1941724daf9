//! Changes how durable writes are asked for: "forced unit access" (FUA) on single requests, and flush.

use std::ffi::OsStr;

use anyhow::bail;
use nbdkit_core::{
    Below, Caps, Data, Errno, Error, Filter, Flags, Handle, Info, Next, NextConfig, Op, Open, Outcome,
    Request, Result, Support, params,
};

const HELP: &str = "\
fuamode=<MODE>           'none' (default), 'emulate', 'native', 'force', 'pass' or 'discard' (unsafe).
flush-on-close=<BOOL>    Flush when a client closes its connection (default false).";

pub(crate) fn new() -> Box<dyn Filter> {
    Box::new(Fua { mode: Mode::None, flush_on_close: false })
}

/// What becomes of FUA and flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// FUA is not offered.
    None,
    /// FUA is a flush after the request.
    Emulate,
    /// FUA is offered as if the layers below did it themselves.
    Native,
    /// Every request that writes has FUA, so a flush has nothing to do.
    Force,
    /// Nothing changes.
    Pass,
    /// FUA and flush do nothing.
    Discard,
}

struct Fua {
    mode: Mode,
    flush_on_close: bool,
}

impl Filter for Fua {
    fn info(&self) -> Info {
        Info::bundled("fua", "nbdkit fua filter", HELP)
    }

    fn config(&mut self, key: &str, value: &OsStr, next: &mut NextConfig<'_>) -> anyhow::Result<()> {
        match key {
            "fuamode" => {}
            "flush-on-close" | "flush_on_close" => {
                self.flush_on_close = params::boolean(value)?;
                return Ok(());
            }
            _ => return next(key, value),
        }
        self.mode = match params::text(value)? {
            "none" => Mode::None,
            "emulate" => Mode::Emulate,
            "native" => Mode::Native,
            "force" => Mode::Force,
            "pass" => Mode::Pass,
            "discard" => Mode::Discard,
            other => bail!("unknown fuamode '{other}': use none, emulate, native, force, pass or discard"),
        };
        Ok(())
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        let next = next.open(open)?;
        let caps = next.caps();
        let lacks = match self.mode {
            _ if !caps.write => None,
            _ if self.flush_on_close && !caps.flush => Some(("flush-on-close=true", "flush")),
            Mode::Emulate if !caps.flush => Some(("fuamode=emulate", "flush")),
            Mode::Native if caps.fua == Support::None => Some(("fuamode=native", "FUA")),
            Mode::Force if caps.fua == Support::None => Some(("fuamode=force", "FUA")),
            _ => None,
        };
        if let Some((parameter, what)) = lacks {
            return Err(Error::new(
                Errno::EINVAL,
                format!("{parameter} needs {what}, and {} does not offer it", next.name()),
            ));
        }
        let flush_on_close = self.flush_on_close && caps.flush;
        Ok(Box::new(Durable { mode: self.mode, flush_on_close, next }))
    }
}

struct Durable {
    mode: Mode,
    flush_on_close: bool,
    next: Next,
}

impl Durable {
    /// Runs a request without its FUA, and then a flush.
    fn flushed(&self, request: &mut Request<'_>) -> Outcome<'_> {
        if !request.may_wait() {
            return Outcome::NeedsThread;
        }
        let call = request.call().with_flags(request.flags() - Flags::FUA);
        let data = if let Data::Write(data) = request.data() { Data::Write(data) } else { Data::None };
        match self.next.piece(call, data, true) {
            Outcome::Done(Ok(())) => Outcome::Done(self.next.flush()),
            outcome => outcome,
        }
    }
}

impl Handle for Durable {
    fn next(&self) -> Option<&Next> {
        Some(&self.next)
    }

    fn finalize(&self) -> Result<()> {
        if self.flush_on_close { self.next.flush() } else { Ok(()) }
    }

    fn capabilities(&self) -> Result<Caps> {
        let caps = self.next.capabilities().with_skip_holes(self.next.caps().skip_holes);
        Ok(match self.mode {
            Mode::Pass => caps,
            Mode::None => caps.with_fua(Support::None),
            Mode::Emulate => caps.with_fua(Support::Emulate),
            Mode::Native => caps.with_fua(Support::Native),
            Mode::Force | Mode::Discard => caps.with_flush(true).with_fua(Support::Native),
        })
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        let flags = request.flags();
        match (request.op(), self.mode) {
            (Op::Flush, Mode::Force | Mode::Discard) => Outcome::Done(Ok(())),
            // What is written to a loan is synced, or not, as these two modes exist to change.
            (Op::Write, Mode::Force | Mode::Discard) if request.may_lend() => Outcome::NeedsThread,
            (Op::Write | Op::Trim | Op::Zero, Mode::Force) => self.next.flagged(request, flags | Flags::FUA),
            (Op::Write | Op::Trim | Op::Zero, Mode::Discard) => {
                self.next.flagged(request, flags - Flags::FUA)
            }
            (_, Mode::Emulate) if flags.contains(Flags::FUA) => self.flushed(request),
            _ => self.next.pass(request),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{
        Answer, Call, Disk, Spec, View, chain, check_model, check_model_over, client, config_error, lent,
        needs_thread, open, read_inline, session, started,
    };

    const FUA: Flags = Flags::FUA;
    const MODES: [&str; 6] = ["none", "emulate", "native", "force", "pass", "discard"];

    /// The operations that reached the disk, with FUA or without.
    fn seen(disk: &Disk) -> Vec<(Op, bool)> {
        disk.take_calls().iter().map(|call| (call.op, call.flags.contains(FUA))).collect()
    }

    /// What a write, a trim, a zero (all with `flags`) and a flush become.
    fn run(mode: &str, flags: Flags) -> Vec<(Op, bool)> {
        let disk = Spec::default().disk();
        let session = session(&disk, "fua", &[("fuamode", mode)]);
        session.pwrite(&[1; 8], 0, flags).unwrap();
        session.trim(8, 8, flags).unwrap();
        session.zero(8, 16, flags).unwrap();
        session.flush().unwrap();
        seen(&disk)
    }

    fn open_error(mode: &str, spec: Spec) -> String {
        let chain = chain(&spec.disk(), &["fua"], &[("fuamode", mode)]).unwrap();
        open(&chain, client(), false).unwrap_err().to_string()
    }

    #[test]
    fn a_connection_that_closes_is_flushed_when_asked() {
        for mode in MODES {
            let disk = Spec::default().disk();
            let on = [("fuamode", mode), ("flush-on-close", "true")];
            drop(session(&disk, "fua", &on));
            assert_eq!(seen(&disk), [(Op::Flush, false)], "{mode}");
            drop(session(&disk, "fua", &on[..1]));
            assert_eq!(seen(&disk), [], "{mode}");
        }
        let disk = Spec { flush: false, fua: Support::None, ..Spec::default() }.disk();
        let chain = chain(&disk, &["fua"], &[("flush_on_close", "1")]).unwrap();
        let error = open(&chain, client(), false).unwrap_err().to_string();
        assert!(error.contains("flush-on-close=true needs flush"), "{error}");
        drop(open(&chain, client(), true).unwrap());
    }

    #[test]
    fn model() {
        check_model(&["fua"], &[], 20_000, &View::same(20_000));
        for mode in ["none", "pass"] {
            check_model(&["fua"], &[("fuamode", mode)], 20_000, &View::same(20_000));
        }
        for mode in ["emulate", "native", "force"] {
            for spec in [Spec::sized(20_000), Spec::emulated(20_000)] {
                check_model_over(&spec, &["fua"], &[("fuamode", mode)], &View::same(20_000));
            }
        }
    }

    #[test]
    fn what_is_offered() {
        let caps = |mode, spec: Spec| {
            let session = session(&spec.disk(), "fua", &[("fuamode", mode)]);
            (session.caps().flush, session.caps().fua)
        };
        let full = MODES.map(|mode| caps(mode, Spec::default()));
        use Support::{Emulate, Native, None};
        let all = [None, Emulate, Native, Native, Native, Native];
        assert_eq!(full, all.map(|fua| (true, fua)));
        assert_eq!(caps("pass", Spec::emulated(1000)), (true, Emulate));
        assert_eq!(caps("pass", Spec::minimal(1000)), (false, None));
        assert_eq!(caps("none", Spec::minimal(1000)), (false, None));
        assert_eq!(caps("discard", Spec::minimal(1000)), (true, Native));
    }

    #[test]
    fn requests_with_fua() {
        use Op::{Flush, Trim, Write, Zero};
        let native = [(Write, true), (Trim, true), (Zero, true)];
        let plain = [(Write, false), (Trim, false), (Zero, false)];
        let flush = [(Flush, false)];
        assert_eq!(run("native", FUA), [&native[..], &flush].concat());
        assert_eq!(run("pass", FUA), [&native[..], &flush].concat());
        assert_eq!(run("force", FUA), native);
        assert_eq!(run("discard", FUA), plain);
        let flushed = [
            (Write, false),
            (Flush, false),
            (Trim, false),
            (Flush, false),
            (Zero, false),
            (Flush, false),
            (Flush, false),
        ];
        assert_eq!(run("emulate", FUA), flushed);
    }

    #[test]
    fn requests_without_fua() {
        use Op::{Flush, Trim, Write, Zero};
        let plain = [(Write, false), (Trim, false), (Zero, false), (Flush, false)];
        for mode in ["none", "emulate", "native", "pass"] {
            assert_eq!(run(mode, Flags::empty()), plain, "{mode}");
        }
        assert_eq!(run("force", Flags::empty()), [(Write, true), (Trim, true), (Zero, true)]);
        assert_eq!(run("discard", Flags::empty()), plain[..3]);
    }

    #[test]
    fn forced_writes_are_durable_even_where_fua_is_emulated() {
        let disk = Spec::emulated(1000).disk();
        let session = session(&disk, "fua", &[("fuamode", "force")]);
        session.pwrite(&[7; 10], 90, Flags::empty()).unwrap();
        assert_eq!(disk.stable()[90..100], [7; 10]);
    }

    #[test]
    fn a_mode_without_its_means_does_not_open() {
        assert_eq!(
            open_error("emulate", Spec::minimal(1000)),
            "fuamode=emulate needs flush, and testdisk does not offer it"
        );
        for mode in ["native", "force"] {
            let error = open_error(mode, Spec::minimal(1000));
            assert_eq!(error, format!("fuamode={mode} needs FUA, and testdisk does not offer it"));
        }
    }

    #[test]
    fn a_read_only_disk_opens_in_every_mode() {
        for mode in MODES {
            let disk = Spec { write: false, ..Spec::minimal(1000) }.disk();
            assert_eq!(session(&disk, "fua", &[("fuamode", mode)]).caps().fua, Support::None, "{mode}");
        }
    }

    #[test]
    fn a_failed_request_is_not_followed_by_a_flush() {
        let disk = Spec { fail_after: Some(0), ..Spec::default() }.disk();
        session(&disk, "fua", &[("fuamode", "emulate")]).pwrite(&[1], 0, FUA).unwrap_err();
        assert_eq!(seen(&disk), [(Op::Write, false)]);
    }

    #[test]
    fn loans_are_writable_unless_the_mode_would_be_lost() {
        let writable = MODES.map(|mode| {
            let disk = Spec::default().disk();
            let session = session(&disk, "fua", &[("fuamode", mode)]);
            assert_eq!(lent(&session, Op::Read, 0, 512), Some(0));
            lent(&session, Op::Write, 0, 512).is_some()
        });
        assert_eq!(writable, [true, true, true, false, true, false]);
    }

    #[test]
    fn reads_without_a_wait_pass() {
        let spec = Spec { blocks: |op| op != Op::Read, ..Spec::default() };
        let session = session(&spec.disk(), "fua", &[("fuamode", "discard")]);
        assert!(read_inline(&session, &mut [0; 8], 0).unwrap());
        assert!(needs_thread(&session, Op::Write) && !needs_thread(&session, Op::Flush));
    }

    #[test]
    fn writes_may_be_started_unless_a_flush_follows() {
        for mode in MODES {
            let disk = Spec { later: true, ..Spec::default() }.disk();
            let session = session(&disk, "fua", &[("fuamode", mode)]);
            let write = |flags| started(&session, Call::new(Op::Write, 0, 8).with_flags(flags), &[1; 8]);
            assert!(matches!(write(Flags::empty()), Answer::Started(Ok(_))), "{mode}");
            assert_eq!(seen(&disk), [(Op::Write, mode == "force")], "{mode}");
            match (mode, write(FUA)) {
                ("none", Answer::Done(Err(_))) | ("emulate", Answer::NeedsThread) => {}
                (_, Answer::Started(Ok(_))) => {
                    assert_eq!(seen(&disk), [(Op::Write, mode != "discard")], "{mode}")
                }
                (_, answer) => panic!("{mode}: {answer:?}"),
            }
        }
    }

    #[test]
    fn an_unknown_mode_is_refused() {
        assert!(config_error("fua", &[("fuamode", "x")]).contains("unknown fuamode 'x'"));
    }
}
