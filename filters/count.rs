//! Counts the bytes that clients read and write, and tells the sums in a debug message when the server ends.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use nbdkit_core::{Below, Call, Filter, Handle, Info, Next, Op, Open, Outcome, Request, Result};

pub(crate) fn new() -> Box<dyn Filter> {
    Box::new(Count { bytes: Arc::default() })
}

struct Count {
    bytes: Arc<Bytes>,
}

/// The sums so far.
#[derive(Default)]
struct Bytes {
    read: AtomicU64,
    written: AtomicU64,
    zeroed: AtomicU64,
    trimmed: AtomicU64,
}

impl std::fmt::Display for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [read, written, zeroed, trimmed] =
            [&self.read, &self.written, &self.zeroed, &self.trimmed].map(|n| n.load(Ordering::Relaxed));
        write!(f, "read {read}, written {written}, zeroed {zeroed}, trimmed {trimmed}")
    }
}

impl Filter for Count {
    fn info(&self) -> Info {
        Info::bundled("count", "nbdkit count filter", "")
    }

    fn cleanup(&self, _: &Below) {
        log::debug!("count bytes: {}", self.bytes);
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        Ok(Box::new(Counted { bytes: self.bytes.clone(), next: next.open(open)? }))
    }
}

struct Counted {
    bytes: Arc<Bytes>,
    next: Next,
}

impl Counted {
    /// Where the bytes of such requests are counted.
    fn sum(&self, op: Op) -> Option<&AtomicU64> {
        match op {
            Op::Read => Some(&self.bytes.read),
            Op::Write => Some(&self.bytes.written),
            Op::Zero => Some(&self.bytes.zeroed),
            Op::Trim => Some(&self.bytes.trimmed),
            Op::Flush | Op::Cache | Op::Extents => None,
        }
    }
}

impl Handle for Counted {
    fn next(&self) -> Option<&Next> {
        Some(&self.next)
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        match self.sum(request.op()) {
            Some(_) => self.next.watch(self, request, 0),
            None => self.next.pass(request),
        }
    }

    fn ended(&self, call: &Call, _: u64, result: &mut Result<()>) {
        if let (Some(sum), Ok(())) = (self.sum(call.op), result) {
            sum.fetch_add(call.length, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use nbdkit_core::{Chain, Flags, Session};

    use super::*;
    use crate::testing::{Disk, Spec, View, check_model, client, lent, open, read_inline, started};

    fn counted(disk: &Disk) -> (Session, Arc<Bytes>) {
        let bytes = Arc::<Bytes>::default();
        let filter = Count { bytes: bytes.clone() };
        let chain = Arc::new(Chain::new(Box::new(disk.clone()), vec![Box::new(filter)]));
        (open(&chain, client(), false).unwrap(), bytes)
    }

    /// The sums after one request of each kind.
    fn sums(disk: &Disk) -> String {
        let (session, bytes) = counted(disk);
        let _ = session.pread(&mut [0; 1000], 0);
        let _ = read_inline(&session, &mut [0; 24], 0);
        let _ = session.pwrite(&[0; 2000], 0, Flags::empty());
        let _ = session.zero(3000, 0, Flags::empty());
        let _ = session.trim(4000, 0, Flags::empty());
        let _ = session.flush();
        let _ = session.cache(5000, 0);
        let _ = session.extents(6000, 0, Flags::empty());
        bytes.to_string()
    }

    #[test]
    fn model() {
        check_model(&["count"], &[], 20_000, &View::same(20_000));
    }

    #[test]
    fn bytes_are_counted() {
        let sum = "read 1024, written 2000, zeroed 3000, trimmed 4000";
        for spec in [Spec::default(), Spec::emulated(64 << 10)] {
            assert_eq!(sums(&spec.disk()), sum);
        }
    }

    #[test]
    fn failed_requests_are_not_counted() {
        let disk = Spec { fail_after: Some(0), ..Spec::default() }.disk();
        assert_eq!(sums(&disk), "read 0, written 0, zeroed 0, trimmed 0");
    }

    #[test]
    fn what_is_lent_or_started_is_counted() {
        let (session, bytes) = counted(&Spec { later: true, ..Spec::default() }.disk());
        assert_eq!(lent(&session, Op::Read, 0, 512), Some(0));
        assert_eq!(lent(&session, Op::Write, 0, 1024), Some(0));
        for (op, length) in [(Op::Read, 1), (Op::Write, 2), (Op::Zero, 3), (Op::Trim, 4), (Op::Cache, 5)] {
            started(&session, Call::new(op, 0, length), &[1; 2]).ended().unwrap().unwrap();
        }
        assert_eq!(bytes.to_string(), "read 513, written 1026, zeroed 3, trimmed 4");
    }

    #[test]
    fn a_started_request_that_fails_is_not_counted() {
        let (session, bytes) = counted(&Spec { later: true, fail_after: Some(0), ..Spec::default() }.disk());
        started(&session, Call::new(Op::Read, 0, 512), &[]).ended().unwrap().unwrap_err();
        assert_eq!(bytes.to_string(), "read 0, written 0, zeroed 0, trimmed 0");
    }
}
