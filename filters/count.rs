//! Counts the bytes that clients read and write, and tells the sums in a debug message when the server ends.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use nbdkit_core::{Below, Filter, Flags, Handle, Info, Next, Open, Result};

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

/// Adds `length` for a request that has succeeded.
fn add(sum: &AtomicU64, length: u64) {
    sum.fetch_add(length, Ordering::Relaxed);
}

// Nothing is lent: what is read from a loan is not seen.
impl Handle for Counted {
    fn next(&self) -> Option<&Next> {
        Some(&self.next)
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.next.pread(buf, offset)?;
        add(&self.bytes.read, buf.len() as u64);
        Ok(())
    }

    fn pread_nowait(&self, buf: &mut [u8], offset: u64) -> Result<bool> {
        let done = self.next.pread_nowait(buf, offset)?;
        if done {
            add(&self.bytes.read, buf.len() as u64);
        }
        Ok(done)
    }

    fn pwrite(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
        self.next.pwrite(buf, offset, flags)?;
        add(&self.bytes.written, buf.len() as u64);
        Ok(())
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.next.trim(length, offset, flags)?;
        add(&self.bytes.trimmed, length);
        Ok(())
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.next.zero(length, offset, flags)?;
        add(&self.bytes.zeroed, length);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use nbdkit_core::Chain;

    use super::*;
    use crate::testing::{Disk, Spec, View, check_model, client, open, session};

    /// The sums after one request of each kind.
    fn sums(disk: &Disk) -> String {
        let bytes = Arc::<Bytes>::default();
        let filter = Count { bytes: bytes.clone() };
        let chain = Arc::new(Chain::new(Box::new(disk.clone()), vec![Box::new(filter)]));
        let session = open(&chain, client(), false).unwrap();
        let _ = session.pread(&mut [0; 1000], 0);
        let _ = session.pread_nowait(&mut [0; 24], 0);
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
    fn nothing_escapes_by_a_loan() {
        assert!(session(&Spec::default().disk(), "count", &[]).loan(0, 512).is_none());
    }
}
