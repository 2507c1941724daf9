//! Makes requests slow, to imitate a distant or busy disk.

use std::{ffi::OsStr, sync::Arc, time::Duration};

use nbdkit_core::{
    Below, Caps, Client, Errno, Error, Filter, Flags, Handle, Info, Next, NextConfig, Op, Open, Outcome,
    Request, Result, params,
};

const HELP: &str = "\
rdelay=<NN>[ms]           Delay of reads, in seconds or with a unit (s, ms, us, ns).
wdelay=<NN>[ms]           Delay of writes, zeroes and trims.
delay-read=<NN>[ms]       The same as rdelay.
delay-write=<NN>[ms]      Delay of writes.
delay-zero=<NN>[ms]       Delay of zeroes.
delay-trim=<NN>[ms]       Delay of trims.
delay-extents=<NN>[ms]    Delay of extents requests.
delay-cache=<NN>[ms]      Delay of cache requests.
delay-open=<NN>[ms]       Delay of a client that opens the disk.
delay-close=<NN>[ms]      Delay of a client that closes the disk.
delay-fast-zero=<BOOL>    Whether fast zeroes are delayed too (default true) or fail at once.";

pub(crate) fn new() -> Box<dyn Filter> {
    Box::new(Delay(Delays { zero_fast: true, ..Delays::default() }))
}

struct Delay(Delays);

#[derive(Clone, Default)]
struct Delays {
    read: Duration,
    write: Duration,
    zero: Duration,
    trim: Duration,
    extents: Duration,
    cache: Duration,
    open: Duration,
    close: Duration,
    /// A fast zero waits like any other; else it fails at once.
    zero_fast: bool,
}

impl Delays {
    fn of(&self, op: Op) -> Duration {
        match op {
            Op::Read => self.read,
            Op::Write => self.write,
            Op::Zero => self.zero,
            Op::Trim => self.trim,
            Op::Extents => self.extents,
            Op::Cache => self.cache,
            Op::Flush => Duration::ZERO,
        }
    }

    /// Fast zeroes are refused, for a delayed one would not be fast.
    fn refuses_fast_zero(&self) -> bool {
        !self.zero.is_zero() && !self.zero_fast
    }
}

impl Filter for Delay {
    fn info(&self) -> Info {
        Info::bundled("delay", "nbdkit delay filter", HELP)
    }

    fn config(&mut self, key: &str, value: &OsStr, next: &mut NextConfig<'_>) -> anyhow::Result<()> {
        let delays = &mut self.0;
        let delay = match key {
            "rdelay" | "delay-read" | "delay-reads" => &mut delays.read,
            "wdelay" => {
                let delay = params::delay(value)?;
                (delays.write, delays.zero, delays.trim) = (delay, delay, delay);
                return Ok(());
            }
            "delay-write" | "delay-writes" => &mut delays.write,
            "delay-zero" | "delay-zeroes" => &mut delays.zero,
            "delay-trim" | "delay-trims" | "delay-discard" | "delay-discards" => &mut delays.trim,
            "delay-extent" | "delay-extents" => &mut delays.extents,
            "delay-cache" => &mut delays.cache,
            "delay-open" => &mut delays.open,
            "delay-close" => &mut delays.close,
            "delay-fast-zero" => {
                delays.zero_fast = params::boolean(value)?;
                return Ok(());
            }
            _ => return next(key, value),
        };
        *delay = params::delay(value)?;
        Ok(())
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        open.client.sleep(self.0.open)?;
        let next = next.open(open)?;
        Ok(Box::new(Slow { delays: self.0.clone(), client: open.client.clone(), next }))
    }
}

struct Slow {
    delays: Delays,
    client: Arc<Client>,
    next: Next,
}

impl Handle for Slow {
    fn next(&self) -> Option<&Next> {
        Some(&self.next)
    }

    fn finalize(&self) -> Result<()> {
        self.client.linger(self.delays.close);
        Ok(())
    }

    fn capabilities(&self) -> Result<Caps> {
        let caps = self.next.capabilities();
        // A refusal is fast, so it can be offered whatever is below.
        Ok(if self.delays.refuses_fast_zero() { caps.with_fast_zero(true) } else { caps })
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        if request.flags().contains(Flags::FAST_ZERO) && self.delays.refuses_fast_zero() {
            let error = Error::new(Errno::EOPNOTSUPP, "fast zero is off (delay-fast-zero)");
            return Outcome::Done(Err(error));
        }
        let delay = self.delays.of(request.op());
        if !delay.is_zero() {
            if !request.may_wait() {
                return Outcome::NeedsThread;
            }
            if let Err(e) = self.client.sleep(delay) {
                return Outcome::Done(Err(e));
            }
        }
        self.next.pass(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{
        Answer, Call, Spec, View, chain, check_model, client, config_error, lent, needs_thread, open,
        read_inline, session, started,
    };

    #[test]
    fn model() {
        check_model(&["delay"], &[], 20_000, &View::same(20_000));
        let params = [("rdelay", "1ns"), ("wdelay", "1ns"), ("delay-extents", "1ns"), ("delay-cache", "1ns")];
        check_model(&["delay"], &params, 20_000, &View::same(20_000));
        check_model(
            &["delay"],
            &[("delay-zero", "1ns"), ("delay-fast-zero", "false")],
            20_000,
            &View::same(20_000),
        );
    }

    #[test]
    fn only_what_is_delayed_needs_a_thread() {
        let all = [Op::Read, Op::Write, Op::Flush, Op::Trim, Op::Zero, Op::Cache, Op::Extents];
        for (key, slow) in [
            ("rdelay", vec![Op::Read]),
            ("delay-read", vec![Op::Read]),
            ("wdelay", vec![Op::Write, Op::Trim, Op::Zero]),
            ("delay-write", vec![Op::Write]),
            ("delay-zero", vec![Op::Zero]),
            ("delay-trim", vec![Op::Trim]),
            ("delay-extents", vec![Op::Extents]),
            ("delay-cache", vec![Op::Cache]),
        ] {
            let session = session(&Spec::default().disk(), "delay", &[(key, "1")]);
            let found: Vec<_> = all.into_iter().filter(|op| needs_thread(&session, *op)).collect();
            assert_eq!(found, slow, "{key}");
        }
    }

    #[test]
    fn only_what_is_not_delayed_is_started_or_lent() {
        let disk = Spec { later: true, ..Spec::default() }.disk();
        let reads = session(&disk, "delay", &[("rdelay", "1")]);
        let writes = session(&disk, "delay", &[("wdelay", "1")]);
        assert!(!read_inline(&reads, &mut [0; 4], 0).unwrap());
        assert!(read_inline(&writes, &mut [0; 4], 0).unwrap());
        for (session, delayed, other) in [(reads, Op::Read, Op::Write), (writes, Op::Write, Op::Read)] {
            let start = |op| started(&session, Call::new(op, 0, 4), &[0; 4]);
            assert!(matches!(start(delayed), Answer::NeedsThread));
            assert!(matches!(start(other), Answer::Started(Ok(_))));
            assert_eq!((lent(&session, delayed, 0, 4), lent(&session, other, 0, 4)), (None, Some(0)));
        }
    }

    #[test]
    fn an_emulated_zero_is_delayed_once_and_not_as_a_write() {
        let disk = Spec::emulated(3 << 20).disk();
        // Would each of the writes that the zero becomes be delayed, this would not end.
        let session = session(&disk, "delay", &[("delay-zero", "1ns"), ("delay-write", "1000000")]);
        session.zero(3 << 20, 0, Flags::empty()).unwrap();
        assert!(disk.count(Op::Write) > 1);
    }

    #[test]
    fn a_client_that_goes_away_ends_the_delay() {
        let disk = Spec::default().disk();
        let chain = chain(&disk, &["delay"], &[("rdelay", "1000000")]).unwrap();
        let client = client();
        let session = open(&chain, client.clone(), false).unwrap();
        client.gone.raise();
        let error = session.pread(&mut [0; 4], 0).unwrap_err();
        assert_eq!(error.errno(), Errno::ESHUTDOWN);
        assert!(disk.calls().is_empty());
    }

    #[test]
    fn open_is_delayed_before_the_disk_is_opened() {
        let chain = chain(&Spec::default().disk(), &["delay"], &[("delay-open", "1000000")]).unwrap();
        let client = client();
        client.gone.raise();
        assert_eq!(open(&chain, client, false).unwrap_err().errno(), Errno::ESHUTDOWN);
    }

    #[test]
    fn only_the_end_of_the_server_ends_the_delay_of_a_close() {
        let chain = chain(&Spec::default().disk(), &["delay"], &[("delay-close", "1000000")]).unwrap();
        let client = client();
        let session = open(&chain, client.clone(), false).unwrap();
        client.gone.raise();
        let closing = std::thread::spawn(move || drop(session));
        std::thread::yield_now();
        assert!(!closing.is_finished());
        client.shut_down_server();
        closing.join().unwrap();
    }

    #[test]
    fn a_fast_zero_is_refused_at_once_when_asked() {
        let disk = Spec::default().disk();
        let session = session(&disk, "delay", &[("wdelay", "1000000"), ("delay-fast-zero", "false")]);
        assert!(session.caps().fast_zero);
        let error = session.zero(512, 0, Flags::FAST_ZERO).unwrap_err();
        assert_eq!(error.errno(), Errno::EOPNOTSUPP);
        assert!(disk.calls().is_empty());
    }

    #[test]
    fn a_value_that_is_no_delay_is_refused() {
        assert!(config_error("delay", &[("rdelay", "soon")]).contains("'soon'"));
        assert!(config_error("delay", &[("delay-fast-zero", "2s")]).contains("'2s'"));
    }
}
