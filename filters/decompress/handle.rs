//! The filter's side towards the front ends: what is in the cache is answered at once, the rest when threads have decoded it.

use std::sync::Arc;

use nbdkit_core::{
    BlockSize, Buffers, Caps, Data, Extents, Flags, Handle, Next, Op, Outcome, Request, Result, Support,
};
use parking_lot::Mutex;

use super::{
    disk::Disk,
    pool::{Job, Pool},
    sequence::Sequence,
    source::Source,
    waiter::Waiter,
};

/// A connection to a decompressed disk.
pub(super) struct Opened {
    disk: Arc<Disk>,
    source: Arc<Source>,
    pool: Arc<Pool>,
    /// Threads of the pool may read from the source. If not, the thread of the request decodes.
    parallel: bool,
    buffers: Buffers,
    sequence: Mutex<Sequence>,
}

impl Opened {
    pub(super) fn new(disk: Arc<Disk>, source: Arc<Source>, pool: Arc<Pool>, parallel: bool) -> Self {
        Opened { disk, source, pool, parallel, buffers: Buffers::default(), sequence: Mutex::default() }
    }

    fn run(&self, jobs: Vec<Job>) {
        if self.parallel {
            self.pool.push(jobs, false);
            return;
        }
        for job in jobs {
            let mut job = Some(job);
            while let Some(next) = job {
                job = Disk::run(next);
            }
        }
    }

    fn read(&self, request: &mut Request<'_>) -> Outcome<'_> {
        let range = request.offset()..request.offset() + request.length();
        let Data::Read(buf) = request.data() else { return Outcome::NeedsThread };
        let outcome = if self.disk.read_cached(buf, range.start) {
            Outcome::Done(Ok(()))
        } else {
            self.read_missing(request)
        };
        if !matches!(outcome, Outcome::NeedsThread) && self.parallel && self.sequence.lock().note(&range) {
            self.pool.push(self.disk.ahead(&self.source, range.end), true);
        }
        outcome
    }

    fn read_missing(&self, request: &mut Request<'_>) -> Outcome<'static> {
        let startable = self.parallel && request.may_start();
        if !startable && !request.may_wait() {
            return Outcome::NeedsThread;
        }
        let range = request.offset()..request.offset() + request.length();
        let memory = match self.buffers.take(request.length() as usize) {
            Ok(memory) => memory,
            Err(e) => return Outcome::Done(Err(e)),
        };
        let started = if startable { request.start() } else { None };
        let (pending, started) = started.unzip();
        let waiter = Waiter::new(&self.source, range, memory, pending);
        let jobs = self.disk.request(&waiter, &self.source, &self.pool);
        self.run(jobs);
        match (started, request.data()) {
            (Some(started), _) => Outcome::Started(started),
            (None, Data::Read(buf)) => Outcome::Done(waiter.wait(buf)),
            (None, _) => Outcome::NeedsThread,
        }
    }

    /// Stops what runs for this connection.
    fn stop(&self) {
        self.source.close();
        let jobs = self.pool.take(|user| Arc::ptr_eq(user.source(), &self.source));
        let others: Vec<_> = jobs.into_iter().filter_map(|job| job.disk.clone().pass_on(job)).collect();
        self.pool.push(others, false);
        self.source.wait_unused();
    }
}

impl Handle for Opened {
    fn next(&self) -> Option<&Next> {
        Some(self.source.next())
    }

    fn finalize(&self) -> Result<()> {
        self.stop();
        Ok(())
    }

    fn capabilities(&self) -> Result<Caps> {
        Ok(self
            .source
            .next()
            .capabilities()
            .with_size(self.disk.size())
            .with_block_size(BlockSize::default())
            .with_write(false)
            .with_multi_conn(true)
            .with_cache(Support::Native)
            .with_extents(true)
            .with_skip_holes(true))
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        if request.may_lend() {
            return Outcome::NeedsThread;
        }
        match request.op() {
            Op::Read => self.read(request),
            Op::Extents | Op::Cache => request.run(self),
            _ => self.source.next().submit(request),
        }
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        match self.read(&mut Request::read(buf, offset).on_thread()) {
            Outcome::Done(result) => result,
            _ => Err(nbdkit_core::Errno::EIO.into()),
        }
    }

    fn extents(&self, length: u64, offset: u64, _: Flags, extents: &mut Extents) -> Result<()> {
        self.disk.extents(offset, length, extents)
    }

    fn cache(&self, length: u64, offset: u64) -> Result<()> {
        if self.parallel {
            self.pool.push(self.disk.fetch(&self.source, offset..offset + length), true);
        }
        Ok(())
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        self.stop();
    }
}
