//! For tests of the filters that try again: a disk that fails as often as it is told to.

use std::{
    ffi::OsStr,
    sync::{
        Arc, Barrier,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

use nbdkit_core::{
    Caps, Chain, Client, Errno, Error, Extents, Filter, Flags, Handle, Info, Open, Outcome, Plugin, Request,
    Result, Session, Support,
};
use parking_lot::Mutex;

use crate::testing::client;

/// A disk of one byte value that can do everything. A clone is the same disk.
#[derive(Clone, Default)]
pub(crate) struct Flaky(Arc<State>);

#[derive(Default)]
struct State {
    /// How many more requests, and opens, fail.
    failures: AtomicUsize,
    open_failures: AtomicUsize,
    opens: AtomicUsize,
    /// Opened and not closed; finalized.
    open: AtomicUsize,
    finalized: AtomicUsize,
    /// Where requests that fail wait for each other.
    together: Mutex<Option<Arc<Barrier>>>,
    /// The next opens find the disk changed like this.
    now: Mutex<Now>,
}

/// What the disk is like.
#[derive(Clone, Copy)]
pub(crate) struct Now {
    pub(crate) size: u64,
    pub(crate) write: bool,
    pub(crate) fua: Support,
}

impl Default for Now {
    fn default() -> Self {
        Now { size: 64 << 10, write: true, fua: Support::Native }
    }
}

impl Flaky {
    /// The next `n` requests fail with EIO.
    pub(crate) fn fail(&self, n: usize) {
        self.0.failures.store(n, SeqCst);
    }

    /// The next `n` requests fail with EIO, when all of them are there.
    pub(crate) fn fail_together(&self, n: usize) {
        *self.0.together.lock() = Some(Arc::new(Barrier::new(n)));
        self.fail(n);
    }

    /// The next `n` opens fail with EIO.
    pub(crate) fn fail_open(&self, n: usize) {
        self.0.open_failures.store(n, SeqCst);
    }

    /// Who opens it from now on finds it so.
    pub(crate) fn change(&self, now: Now) {
        *self.0.now.lock() = now;
    }

    /// How often it was opened, or failed to be.
    pub(crate) fn opens(&self) -> usize {
        self.0.opens.load(SeqCst)
    }

    /// How many handles are open.
    pub(crate) fn open_now(&self) -> usize {
        self.0.open.load(SeqCst)
    }

    /// How many handles were finalized.
    pub(crate) fn finalized(&self) -> usize {
        self.0.finalized.load(SeqCst)
    }

    /// Opens it through a filter.
    pub(crate) fn open(
        &self,
        filter: Box<dyn Filter>,
        params: &[(&str, &str)],
        client: Arc<Client>,
    ) -> Result<Session> {
        let mut chain = Chain::new(Box::new(self.clone()), vec![filter]);
        for (key, value) in params {
            chain.config(key, OsStr::new(value)).unwrap();
        }
        chain.config_complete().unwrap();
        crate::testing::open(&Arc::new(chain), client, false)
    }

    /// As [`open`](Self::open), by some client.
    pub(crate) fn session(&self, filter: Box<dyn Filter>, params: &[(&str, &str)]) -> Result<Session> {
        self.open(filter, params, client())
    }

    fn request(&self) -> Result<()> {
        let together = self.0.together.lock().clone();
        fails(&self.0.failures, "the disk fails").inspect_err(|_| {
            if let Some(barrier) = together {
                barrier.wait();
            }
        })
    }
}

fn fails(counter: &AtomicUsize, message: &'static str) -> Result<()> {
    match counter.fetch_update(SeqCst, SeqCst, |n| n.checked_sub(1)) {
        Ok(_) => Err(Error::new(Errno::EIO, message)),
        Err(_) => Ok(()),
    }
}

impl Plugin for Flaky {
    fn info(&self) -> Info {
        Info::bundled("flaky", "", "")
    }

    fn open(&self, open: &Open) -> Result<Box<dyn Handle>> {
        self.0.opens.fetch_add(1, SeqCst);
        fails(&self.0.open_failures, "the open fails")?;
        self.0.open.fetch_add(1, SeqCst);
        let now = *self.0.now.lock();
        Ok(Box::new(Disk { of: self.clone(), now: Now { write: now.write && !open.readonly, ..now } }))
    }
}

struct Disk {
    of: Flaky,
    now: Now,
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.of.0.open.fetch_sub(1, SeqCst);
    }
}

impl Handle for Disk {
    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        request.run(self)
    }

    fn finalize(&self) -> Result<()> {
        self.of.0.finalized.fetch_add(1, SeqCst);
        Ok(())
    }

    fn capabilities(&self) -> Result<Caps> {
        Ok(Caps::of_size(self.now.size)
            .with_write(self.now.write)
            .with_flush(true)
            .with_trim(true)
            .with_zero(Support::Native)
            .with_fast_zero(true)
            .with_fua(self.now.fua)
            .with_cache(Support::Native)
            .with_extents(true))
    }

    fn pread(&self, buf: &mut [u8], _: u64) -> Result<()> {
        self.of.request()?;
        buf.fill(7);
        Ok(())
    }

    fn pwrite(&self, _: &[u8], _: u64, _: Flags) -> Result<()> {
        self.of.request()
    }

    fn flush(&self) -> Result<()> {
        self.of.request()
    }

    fn trim(&self, _: u64, _: u64, _: Flags) -> Result<()> {
        self.of.request()
    }

    fn zero(&self, _: u64, _: u64, flags: Flags) -> Result<()> {
        if flags.contains(Flags::FAST_ZERO) {
            return Err(Errno::EOPNOTSUPP.into());
        }
        self.of.request()
    }

    /// Tells something before it fails.
    fn extents(&self, length: u64, offset: u64, _: Flags, extents: &mut Extents) -> Result<()> {
        extents.add(offset, length / 2, true, true)?;
        self.of.request()?;
        extents.add_data(offset + length / 2, length - length / 2)
    }

    fn cache(&self, _: u64, _: u64) -> Result<()> {
        self.of.request()
    }
}

type Ask = fn(&Session) -> Result<()>;

/// One request of each kind; those that succeed are checked.
pub(crate) fn each_request() -> [(&'static str, Ask); 7] {
    [
        ("pread", |session| {
            let mut buf = [0; 512];
            session.pread(&mut buf, 512)?;
            assert_eq!(buf, [7; 512]);
            Ok(())
        }),
        ("pwrite", |session| session.pwrite(&[0; 512], 512, Flags::FUA)),
        ("flush", Session::flush),
        ("trim", |session| session.trim(512, 512, Flags::empty())),
        ("zero", |session| session.zero(512, 512, Flags::MAY_TRIM)),
        ("extents", |session| {
            let extents = session.extents(512, 512, Flags::empty())?;
            let found: Vec<_> = extents.iter().map(|e| (e.offset, e.length, e.kind())).collect();
            assert_eq!(found, [(512, 256, 3), (768, 256, 0)]);
            Ok(())
        }),
        ("cache", |session| session.cache(512, 512)),
    ]
}
