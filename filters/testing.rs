//! What the filters' tests share: a disk in memory that watches how it is used, chains over it, and a byte-array
//! model that random requests are compared with.
//!
//! [`check_model`] is the test that every filter passes. For the rest: `let disk = Spec::default().disk()`, then
//! `session(&disk, "offset", &[("offset", "512")])`, then look at [`Disk::calls`] and [`Disk::contents`].

mod model;

use std::{
    ffi::OsStr,
    fs::File,
    os::fd::AsFd as _,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use nbdkit_core::{
    BlockSize, Chain, Client, Completion, Connection, Errno, Error, Extents, Flags, Handle, Info, Io, Loan,
    Op, Open, Peer, Plugin, Result, Session, Stop, Support, ThreadModel,
};
use parking_lot::{Condvar, Mutex};

pub(crate) use self::model::{View, check_model, check_model_over};

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
    /// Whether requests may sleep.
    pub(crate) may_block: bool,
    /// Reads without a wait succeed although requests may sleep.
    pub(crate) cached: bool,
    /// Reads and writes end on another thread if they may.
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
            may_block: false,
            cached: false,
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
        Disk(Arc::new(Inner {
            memory: Mutex::new(Memory { stable: data.clone(), data }),
            calls: Mutex::default(),
            count: AtomicU64::new(0),
            gate: Mutex::default(),
            gate_changed: Condvar::new(),
            lent: File::open("/dev/null").expect("there is a /dev/null"),
            spec: self,
        }))
    }
}

/// Bytes with data and holes: every third unit of 512 bytes is zero, the others are told apart by their content.
pub(crate) fn pattern(size: u64) -> Vec<u8> {
    (0..size)
        .map(|i| if (i / EXTENT_UNIT).is_multiple_of(3) { 0 } else { (i / EXTENT_UNIT + i) as u8 | 1 })
        .collect()
}

/// One call that reached the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) op: Op,
    pub(crate) offset: u64,
    pub(crate) length: u64,
    pub(crate) flags: Flags,
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
}

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
        inner.calls.lock().push(Call { op, offset, length, flags });
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
    fn get_size(&self) -> Result<u64> {
        Ok(self.0.spec.data.len() as u64)
    }

    fn block_size(&self) -> Result<BlockSize> {
        Ok(self.0.spec.block_size)
    }

    fn can_write(&self) -> Result<bool> {
        Ok(self.0.spec.write)
    }

    fn can_flush(&self) -> Result<bool> {
        Ok(self.0.spec.flush)
    }

    fn can_trim(&self) -> Result<bool> {
        Ok(self.0.spec.trim)
    }

    fn can_zero(&self) -> Result<Support> {
        Ok(self.0.spec.zero)
    }

    fn can_fast_zero(&self) -> Result<bool> {
        Ok(self.0.spec.fast_zero.unwrap_or(self.0.spec.zero != Support::Native))
    }

    fn can_fua(&self) -> Result<Support> {
        Ok(self.0.spec.fua)
    }

    fn can_multi_conn(&self) -> Result<bool> {
        Ok(self.0.spec.multi_conn)
    }

    fn can_cache(&self) -> Result<Support> {
        Ok(self.0.spec.cache)
    }

    fn can_extents(&self) -> Result<bool> {
        Ok(self.0.spec.extents)
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let _visit = self.enter(Op::Read, buf.len() as u64, offset, Flags::empty())?;
        let from = offset as usize;
        buf.copy_from_slice(&self.0.memory.lock().data[from..from + buf.len()]);
        // The others' chance to change what this one has read: a filter that forgets a lock is found out.
        std::thread::yield_now();
        Ok(())
    }

    fn pread_nowait(&self, buf: &mut [u8], offset: u64) -> Result<bool> {
        if self.0.spec.may_block && !self.0.spec.cached {
            return Ok(false);
        }
        self.pread(buf, offset).map(|()| true)
    }

    fn pwrite(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
        let length = buf.len() as u64;
        let _visit = self.enter(Op::Write, length, offset, flags)?;
        self.change(offset, length, flags, Some(buf));
        Ok(())
    }

    fn submit(&self, io: Io<'_>, offset: u64, done: Completion) -> Option<Completion> {
        if !self.0.spec.later {
            return Some(done);
        }
        let disk = self.clone();
        let data = if let Io::Write(data, _) = io { data.to_vec() } else { Vec::new() };
        let (length, flags) = (io.length() as usize, io.flags());
        let op = io.op();
        std::thread::spawn(move || {
            let mut buf = vec![0; length];
            let result = match op {
                Op::Write => disk.pwrite(&data, offset, flags).map(|()| &[][..]),
                _ => disk.pread(&mut buf, offset).map(|()| &buf[..]),
            };
            if let Some(flusher) = done.complete(result) {
                flusher.flush();
            }
        });
        None
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

    fn may_block(&self, _: Op) -> bool {
        self.0.spec.may_block
    }

    fn loan(&self, offset: u64, _: u64) -> Option<Loan<'_>> {
        Some(Loan { fd: self.0.lent.as_fd(), offset, writable: true })
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
    Arc::new(Client::new(1, Peer::Local, Arc::new(Stop::new())))
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
