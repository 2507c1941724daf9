//! What the filters' tests share: a disk in memory that watches how it is used, chains over it, and a byte-array
//! model that random requests are compared with, inline, on a thread and started.
//!
//! [`check_model`] is the test that every filter passes. For the rest: `let disk = Spec::default().disk()`, then
//! `session(&disk, "offset", &[("offset", "512")])`, then look at [`Disk::calls`] and [`Disk::contents`].

mod model;
mod submit;

use std::{
    ffi::OsStr,
    fs::File,
    hash::{BuildHasher as _, RandomState},
    os::fd::AsFd as _,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use nbdkit_core::{
    BlockSize, Buffers, Caps, Chain, Client, Connection, Data, Errno, Error, Extents, Flags, Handle, Info,
    Loan, Op, Open, Outcome, Payload, Peer, Plugin, Request, Result, Session, ShutdownFlag, Support,
    ThreadModel,
};
use parking_lot::{Condvar, Mutex};

pub(crate) use nbdkit_core::Call;

pub(crate) use self::{
    model::{View, check_model, check_model_over},
    submit::{Answer, inline, is_watched, lent, needs_thread, read_inline, started},
};

/// Unit of the extents that the disk reports, in bytes.
pub(crate) const EXTENT_UNIT: u64 = 512;

/// How long a test waits for something that must happen.
const DEADLINE: Duration = Duration::from_secs(30);

/// What a test disk holds and can do. The default can do everything itself.
#[derive(Clone, Debug)]
pub(crate) struct Spec {
    /// Content at the start.
    pub(crate) data: Vec<u8>,
    pub(crate) write: bool,
    pub(crate) flush: bool,
    pub(crate) trim: bool,
    pub(crate) zero: Support,
    /// None: the default of the core.
    pub(crate) fast_zero: Option<bool>,
    pub(crate) fua: Support,
    pub(crate) extents: bool,
    pub(crate) cache: Support,
    pub(crate) multi_conn: bool,
    /// Requests that do not keep to it fail with EINVAL.
    pub(crate) block_size: BlockSize,
    pub(crate) thread_model: ThreadModel,
    /// Which kinds of requests need a thread, unless they are started.
    pub(crate) blocks: fn(Op) -> bool,
    /// Requests of all kinds but extents are started if they may be, and end in no particular order.
    pub(crate) later: bool,
    /// After this many calls all fail with EIO.
    pub(crate) fail_after: Option<u64>,
}

impl Default for Spec {
    fn default() -> Self {
        Spec {
            data: pattern(64 << 10),
            write: true,
            flush: true,
            trim: true,
            zero: Support::Native,
            fast_zero: Some(true),
            fua: Support::Native,
            extents: true,
            cache: Support::Native,
            multi_conn: true,
            block_size: BlockSize::default(),
            thread_model: ThreadModel::Parallel,
            blocks: |_| false,
            later: false,
            fail_after: None,
        }
    }
}

impl Spec {
    /// A disk of `size` bytes that can do everything, filled with [`pattern`].
    pub(crate) fn sized(size: u64) -> Self {
        Spec { data: pattern(size), ..Spec::default() }
    }

    /// One that offers as little as a writable plugin can: everything else is emulated or missing.
    pub(crate) fn minimal(size: u64) -> Self {
        Spec {
            data: pattern(size),
            flush: false,
            trim: false,
            zero: Support::Emulate,
            fast_zero: None,
            fua: Support::None,
            extents: false,
            cache: Support::None,
            multi_conn: false,
            ..Spec::default()
        }
    }

    /// One whose zero, FUA and cache are emulated.
    pub(crate) fn emulated(size: u64) -> Self {
        Spec {
            data: pattern(size),
            zero: Support::Emulate,
            fast_zero: None,
            fua: Support::Emulate,
            cache: Support::Emulate,
            ..Spec::default()
        }
    }

    /// The disk.
    pub(crate) fn disk(self) -> Disk {
        let data = self.data.clone();
        let (later, jobs) = channel();
        if self.later {
            thread::spawn(|| run_shuffled(jobs));
        }
        Disk(Arc::new(Inner {
            memory: Mutex::new(Memory { stable: data.clone(), data }),
            calls: Mutex::default(),
            count: AtomicU64::new(0),
            gate: Mutex::default(),
            gate_changed: Condvar::new(),
            lent: File::open("/dev/null").expect("there is a /dev/null"),
            later,
            buffers: Buffers::default(),
            spec: self,
        }))
    }
}

/// Runs jobs until nobody can add more, and those that are there at once in any order.
fn run_shuffled(jobs: Receiver<Job>) {
    let random = RandomState::new();
    while let Ok(first) = jobs.recv() {
        let mut batch = vec![first];
        loop {
            thread::yield_now();
            batch.extend(jobs.try_iter());
            let Some(last) = batch.len().checked_sub(1) else { break };
            let pick = random.hash_one(last) as usize % batch.len();
            batch.swap_remove(pick)();
        }
    }
}

/// Bytes with data and holes: every third unit of 512 bytes is zero, the others are told apart by their content.
pub(crate) fn pattern(size: u64) -> Vec<u8> {
    (0..size)
        .map(|i| if (i / EXTENT_UNIT).is_multiple_of(3) { 0 } else { (i / EXTENT_UNIT + i) as u8 | 1 })
        .collect()
}

/// The test disk: the plugin serves it, the test watches it. A clone is the same disk.
#[derive(Clone)]
pub(crate) struct Disk(Arc<Inner>);

struct Inner {
    spec: Spec,
    memory: Mutex<Memory>,
    calls: Mutex<Vec<Call>>,
    count: AtomicU64,
    gate: Mutex<Gate>,
    gate_changed: Condvar,
    /// What the disk lends; not its content.
    lent: File,
    /// Where requests go that were started.
    later: Sender<Job>,
    buffers: Buffers,
}

type Job = Box<dyn FnOnce() + Send>;

struct Memory {
    data: Vec<u8>,
    /// What would be left after a power cut.
    stable: Vec<u8>,
}

#[derive(Default)]
struct Gate {
    held: bool,
    inside: usize,
    max_inside: usize,
}

impl Disk {
    /// What the disk holds now.
    pub(crate) fn contents(&self) -> Vec<u8> {
        self.0.memory.lock().data.clone()
    }

    /// What would be left after a power cut.
    pub(crate) fn stable(&self) -> Vec<u8> {
        self.0.memory.lock().stable.clone()
    }

    /// All calls so far, in the order of their arrival.
    pub(crate) fn calls(&self) -> Vec<Call> {
        self.0.calls.lock().clone()
    }

    /// The calls so far, which are then forgotten.
    pub(crate) fn take_calls(&self) -> Vec<Call> {
        std::mem::take(&mut *self.0.calls.lock())
    }

    /// How many calls of one kind there were.
    pub(crate) fn count(&self, op: Op) -> usize {
        self.0.calls.lock().iter().filter(|call| call.op == op).count()
    }

    /// From now on requests wait inside the disk, until [`release`](Self::release).
    pub(crate) fn hold(&self) {
        self.0.gate.lock().held = true;
    }

    /// Lets the requests that wait go on.
    pub(crate) fn release(&self) {
        self.0.gate.lock().held = false;
        self.0.gate_changed.notify_all();
    }

    /// Waits until `n` requests are inside the disk at once.
    pub(crate) fn wait_inside(&self, n: usize) {
        let deadline = Instant::now() + DEADLINE;
        let mut gate = self.0.gate.lock();
        while gate.inside < n {
            assert!(
                !self.0.gate_changed.wait_until(&mut gate, deadline).timed_out(),
                "only {} of {n} requests arrived",
                gate.inside
            );
        }
    }

    /// The largest number of requests that were inside the disk at once.
    pub(crate) fn max_inside(&self) -> usize {
        self.0.gate.lock().max_inside
    }

    /// Logs a call, waits at the gate, and fails it where the spec says so.
    fn enter(&self, op: Op, length: u64, offset: u64, flags: Flags) -> Result<Visit<'_>> {
        let inner = &*self.0;
        inner.calls.lock().push(Call::new(op, offset, length).with_flags(flags));
        let count = inner.count.fetch_add(1, Ordering::SeqCst);
        {
            let mut gate = inner.gate.lock();
            gate.inside += 1;
            gate.max_inside = gate.max_inside.max(gate.inside);
            inner.gate_changed.notify_all();
            let deadline = Instant::now() + DEADLINE;
            while gate.held {
                let late = inner.gate_changed.wait_until(&mut gate, deadline).timed_out();
                assert!(!late, "the test disk was never released");
            }
        }
        let visit = Visit(self);
        if inner.spec.fail_after.is_some_and(|n| count >= n) {
            return Err(Error::new(Errno::EIO, "the test disk fails from here on"));
        }
        let minimum = u64::from(inner.spec.block_size.minimum).max(1);
        if !offset.is_multiple_of(minimum) || !length.is_multiple_of(minimum) {
            return Err(Error::new(Errno::EINVAL, format!("{op:?} {length}@{offset} is not aligned")));
        }
        let maximum = inner.spec.block_size.maximum;
        if matches!(op, Op::Read | Op::Write) && maximum != 0 && length > u64::from(maximum) {
            return Err(Error::new(Errno::EINVAL, format!("{op:?} of {length} bytes is too large")));
        }
        Ok(visit)
    }

    /// The request goes on in a thread of the disk's.
    fn start(&self, request: &mut Request<'_>) -> Outcome<'static> {
        let (disk, call) = (self.clone(), *request.call());
        let data = if let Data::Write(data) = request.data() { data.to_vec() } else { Vec::new() };
        let Some((pending, started)) = request.start() else { return Outcome::NeedsThread };
        let job = move || {
            let result = disk.run(call, &data);
            drop(pending.complete(result));
        };
        self.0.later.send(Box::new(job)).expect("the thread lives as long as the disk");
        Outcome::Started(started)
    }

    fn run(&self, call: Call, data: &[u8]) -> Result<Payload> {
        let Call { op, offset, length, flags } = call;
        match op {
            Op::Read => {
                let mut memory = self.0.buffers.take(length as usize)?;
                let range = 0..length as usize;
                self.pread(&mut memory[range.clone()], offset)?;
                return Ok(Payload::Memory(memory, range));
            }
            Op::Write => self.pwrite(data, offset, flags)?,
            Op::Flush => self.flush()?,
            Op::Trim => self.trim(length, offset, flags)?,
            Op::Zero => self.zero(length, offset, flags)?,
            Op::Cache => self.cache(length, offset)?,
            Op::Extents => return Err(Errno::EINVAL.into()),
        }
        Ok(Payload::None)
    }

    fn change(&self, offset: u64, length: u64, flags: Flags, bytes: Option<&[u8]>) {
        let range = offset as usize..(offset + length) as usize;
        let mut memory = self.0.memory.lock();
        match bytes {
            Some(bytes) => memory.data[range.clone()].copy_from_slice(bytes),
            None => memory.data[range.clone()].fill(0),
        }
        if flags.contains(Flags::FUA) {
            let Memory { data, stable } = &mut *memory;
            stable[range.clone()].copy_from_slice(&data[range]);
        }
    }
}

/// A request that is inside the disk.
struct Visit<'a>(&'a Disk);

impl Drop for Visit<'_> {
    fn drop(&mut self) {
        self.0.0.gate.lock().inside -= 1;
        self.0.0.gate_changed.notify_all();
    }
}

impl Plugin for Disk {
    fn info(&self) -> Info {
        Info::bundled("testdisk", "a disk for tests", "")
    }

    fn thread_model(&self) -> ThreadModel {
        self.0.spec.thread_model
    }

    fn open(&self, _: &Open) -> Result<Box<dyn Handle>> {
        Ok(Box::new(self.clone()))
    }
}

impl Handle for Disk {
    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        assert!(!request.may_wait() || !submit::must_not_wait(), "a layer waits where it must not");
        if request.may_lend() {
            let loan = Loan { fd: self.0.lent.as_fd(), offset: request.offset() };
            return if request.flags().is_empty() { Outcome::Lent(loan) } else { Outcome::NeedsThread };
        }
        if self.0.spec.later && request.op() != Op::Extents && request.may_start() {
            return self.start(request);
        }
        if (self.0.spec.blocks)(request.op()) && !request.may_wait() {
            return Outcome::NeedsThread;
        }
        request.run(self)
    }

    fn capabilities(&self) -> Result<Caps> {
        Ok(Caps::of_size(self.0.spec.data.len() as u64)
            .with_block_size(self.0.spec.block_size)
            .with_write(self.0.spec.write)
            .with_flush(self.0.spec.flush)
            .with_trim(self.0.spec.trim)
            .with_zero(self.0.spec.zero)
            .with_fast_zero(self.0.spec.fast_zero.unwrap_or(self.0.spec.zero != Support::Native))
            .with_fua(self.0.spec.fua)
            .with_multi_conn(self.0.spec.multi_conn)
            .with_cache(self.0.spec.cache)
            .with_extents(self.0.spec.extents))
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let _visit = self.enter(Op::Read, buf.len() as u64, offset, Flags::empty())?;
        let from = offset as usize;
        buf.copy_from_slice(&self.0.memory.lock().data[from..from + buf.len()]);
        // The others' chance to change what this one has read: a filter that forgets a lock is found out.
        thread::yield_now();
        Ok(())
    }

    fn pwrite(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
        let length = buf.len() as u64;
        let _visit = self.enter(Op::Write, length, offset, flags)?;
        self.change(offset, length, flags, Some(buf));
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        let _visit = self.enter(Op::Flush, 0, 0, Flags::empty())?;
        let Memory { data, stable } = &mut *self.0.memory.lock();
        stable.copy_from_slice(data);
        Ok(())
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        let _visit = self.enter(Op::Trim, length, offset, flags)?;
        self.change(offset, length, flags, None);
        Ok(())
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        let _visit = self.enter(Op::Zero, length, offset, flags)?;
        self.change(offset, length, flags, None);
        Ok(())
    }

    fn extents(&self, length: u64, offset: u64, flags: Flags, extents: &mut Extents) -> Result<()> {
        let _visit = self.enter(Op::Extents, length, offset, flags)?;
        let memory = self.0.memory.lock();
        let size = memory.data.len() as u64;
        let mut at = offset - offset % EXTENT_UNIT;
        while at < offset + length {
            let end = (at + EXTENT_UNIT).min(size);
            let zero = memory.data[at as usize..end as usize].iter().all(|b| *b == 0);
            extents.add(at, end - at, zero, zero)?;
            at = end;
        }
        Ok(())
    }

    fn cache(&self, length: u64, offset: u64) -> Result<()> {
        self.enter(Op::Cache, length, offset, Flags::empty()).map(drop)
    }
}

/// A started chain of `filters` (the outermost first) over a disk.
///
/// # Errors
/// Those of the configuration.
pub(crate) fn chain(disk: &Disk, filters: &[&str], params: &[(&str, &str)]) -> anyhow::Result<Arc<Chain>> {
    let filters = filters.iter().map(|name| crate::load(name).expect("the filter is registered")).collect();
    let mut chain = Chain::new(Box::new(disk.clone()), filters);
    for (key, value) in params {
        chain.config(key, OsStr::new(value))?;
    }
    chain.config_complete()?;
    chain.get_ready()?;
    let chain = Arc::new(chain);
    chain.after_fork()?;
    Ok(chain)
}

/// A client of its own server.
pub(crate) fn client() -> Arc<Client> {
    Arc::new(Client::new(1, Peer::Local, Arc::new(ShutdownFlag::new())))
}

/// Opens the default export for a client.
///
/// # Errors
/// Those of the layers.
pub(crate) fn open(chain: &Arc<Chain>, client: Arc<Client>, readonly: bool) -> Result<Session> {
    let connection: Arc<Connection> = Arc::new(chain.connect(client, readonly)?);
    connection.open(OsStr::new(""), false)
}

/// A writable session of one filter over a disk; panics on any error.
pub(crate) fn session(disk: &Disk, filter: &str, params: &[(&str, &str)]) -> Session {
    let chain = chain(disk, &[filter], params).unwrap();
    open(&chain, client(), false).unwrap()
}

/// The error of configuring one filter over a disk.
pub(crate) fn config_error(filter: &str, params: &[(&str, &str)]) -> String {
    let error = chain(&Spec::default().disk(), &[filter], params).expect_err("the configuration must fail");
    format!("{error:#}")
}

#[test]
fn the_gate_counts_requests_inside() {
    let disk = Spec::default().disk();
    let chain = chain(&disk, &[], &[]).unwrap();
    let session = open(&chain, client(), false).unwrap();
    disk.hold();
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| session.pread(&mut [0; 8], 0).unwrap());
        }
        disk.wait_inside(3);
        disk.release();
    });
    assert_eq!((disk.max_inside(), disk.count(Op::Read)), (3, 3));
}
