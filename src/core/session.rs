//! One open client, the one request dispatcher behind both doors.
//!
//! A door decodes a request and calls one method here. The method checks what a client can get wrong (range,
//! flags, read-only), takes the permit that the thread model asks for, and calls the outermost layer. A panic in a
//! layer fails that request with `EIO`.

use std::{
    any::Any,
    ffi::{OsStr, OsString},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, OnceLock, atomic::Ordering},
};

use parking_lot::Mutex;

use crate::{
    Caps, Chain, Client, Completion, Errno, Error, Extents, Flags, Io, Loan, Next, Op, Open, Result, Status,
    Support, ThreadModel, WriteObserver,
    locks::{ConnectionPermit, Permit},
    next::DATAPATH,
    stats::{self, Counters},
};

/// A client that has connected and has not chosen an export, or is between two.
pub struct Connection {
    chain: Arc<Chain>,
    client: Arc<Client>,
    readonly: bool,
    /// What the empty name stands for, once it was asked, without and with TLS.
    default_export: [OnceLock<Option<OsString>>; 2],
    _permit: ConnectionPermit,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Connection({} to {:?})", self.client.number, self.chain)
    }
}

impl Connection {
    pub(crate) fn new(
        chain: Arc<Chain>,
        client: Arc<Client>,
        readonly: bool,
        permit: ConnectionPermit,
    ) -> Self {
        Connection { chain, client, readonly, default_export: Default::default(), _permit: permit }
    }

    /// The chain behind the door.
    pub fn chain(&self) -> &Arc<Chain> {
        &self.chain
    }

    /// The client.
    pub fn client(&self) -> &Arc<Client> {
        &self.client
    }

    /// The exports that this client may open.
    ///
    /// # Errors
    /// Those of the layers; `EIO` for one that panics.
    pub fn list_exports(&self, tls: bool) -> Result<crate::Exports> {
        guard("list_exports", || self.chain.whole(Some(&self.client)).list_exports(self.readonly, tls))
    }

    /// The name that the empty name stands for; None: forbidden. The layers are asked once.
    ///
    /// # Errors
    /// As [`list_exports`](Self::list_exports).
    pub fn default_export(&self, tls: bool) -> Result<Option<OsString>> {
        let answer = &self.default_export[usize::from(tls)];
        if let Some(name) = answer.get() {
            return Ok(name.clone());
        }
        let whole = self.chain.whole(Some(&self.client));
        let name = guard("default_export", || whole.default_export(self.readonly, tls))?;
        Ok(answer.get_or_init(|| name).clone())
    }

    /// The metadata contexts there are beside `base:allocation`.
    ///
    /// # Errors
    /// `EIO` for a layer that panics.
    pub fn meta_contexts(&self) -> Result<Vec<String>> {
        guard("meta_contexts", || Ok(self.chain.whole(Some(&self.client)).meta_contexts()))
    }

    /// Opens an export. The connection may open several, one after the other (`NBD_OPT_INFO`) or at once (the
    /// files of a mount).
    ///
    /// # Errors
    /// Those of the layers; `EIO` for one that panics.
    pub fn open(self: &Arc<Self>, export_name: &OsStr, tls: bool) -> Result<Session> {
        let open = Open {
            readonly: self.readonly,
            export_name: export_name.to_owned(),
            tls,
            client: self.client.clone(),
        };
        let next = guard("open", || self.chain.whole(Some(&self.client)).open(&open))?;
        let mut caps = next.caps().clone();
        if self.chain.thread_model() == ThreadModel::SerializeConnections {
            caps.multi_conn = false;
        }
        Ok(Session {
            next,
            caps,
            lock: Mutex::new(()),
            observer: None,
            counters: self.chain.stats().map(|stats| stats.requests().clone()),
            export_name: open.export_name,
            connection: self.clone(),
        })
    }
}

/// One client with an open export.
pub struct Session {
    /// First, so that it is closed before the connection's permit is given back.
    next: Next,
    caps: Caps,
    lock: Mutex<()>,
    observer: Option<Arc<dyn WriteObserver>>,
    counters: Option<Arc<Counters>>,
    export_name: OsString,
    connection: Arc<Connection>,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Session({:?} of {:?})", self.export_name, self.connection.chain)
    }
}

impl Session {
    /// What the client may do.
    pub fn caps(&self) -> &Caps {
        &self.caps
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.caps.size
    }

    /// The export's name as the client gave it.
    pub fn export_name(&self) -> &OsStr {
        &self.export_name
    }

    /// The client.
    pub fn client(&self) -> &Arc<Client> {
        &self.connection.client
    }

    /// The chain behind the door.
    pub fn chain(&self) -> &Arc<Chain> {
        &self.connection.chain
    }

    /// Makes `observer` the one that is not told of what this session writes.
    pub fn set_observer(&mut self, observer: Arc<dyn WriteObserver>) {
        self.observer = Some(observer);
    }

    /// A line about the export for people.
    ///
    /// # Errors
    /// Those of the layers; `EIO` for one that panics.
    pub fn export_description(&self) -> Result<Option<String>> {
        guard("export_description", || self.next.export_description())
    }

    /// Whether a request of this kind may sleep, in a layer or for its permit. A door runs the others inline.
    pub fn may_block(&self, op: Op) -> bool {
        self.connection.chain.locks.is_busy(&self.lock) || self.next.may_block(op)
    }

    fn permit(&self) -> Permit<'_> {
        self.connection.chain.locks.request(&self.lock)
    }

    /// Runs a request in the chain under its permit, turns a panic into `EIO` and logs a failure.
    fn run<T>(
        &self,
        op: Op,
        length: u64,
        what: &'static str,
        request: impl FnOnce(&Next) -> Result<T>,
    ) -> Result<T> {
        let result = stats::timed(self.counters.as_ref(), op, length, || {
            let _permit = self.permit();
            guard(what, || request(&self.next))
        });
        result.inspect_err(|e| self.log(what, e))
    }

    #[cold]
    fn log(&self, what: &str, e: &Error) {
        if !e.is_logged() {
            log::error!("{}: {what}: {e}", self.next.name());
        }
    }

    /// Tells other doors that a range has changed. To be called by a door that has written to what the chain
    /// [lent](Self::loan).
    pub fn written(&self, offset: u64, length: u64) {
        let chain = &self.connection.chain;
        if chain.observer_count.load(Ordering::Acquire) > 0 {
            chain.notify(self.observer.as_ref(), self, offset, length);
        }
    }

    fn in_range(&self, length: u64, offset: u64) -> bool {
        length > 0 && offset.checked_add(length).is_some_and(|end| end <= self.caps.size)
    }

    /// Checks a request that does not write.
    fn check(&self, op: Op, length: u64, offset: u64) -> Result<()> {
        if self.in_range(length, offset) {
            Ok(())
        } else {
            Err(self.refuse(Errno::EINVAL, op, length, offset))
        }
    }

    /// Checks a request that writes; `out_of_range` is the errno for that.
    fn check_write(&self, op: Op, length: u64, offset: u64, flags: Flags, out_of_range: Errno) -> Result<()> {
        if !self.caps.write {
            return Err(Error::new(Errno::EPERM, "the export is read-only"));
        }
        if !self.in_range(length, offset) {
            return Err(self.refuse(out_of_range, op, length, offset));
        }
        if flags.contains(Flags::FUA) && self.caps.fua == Support::None {
            return Err(Error::new(Errno::EINVAL, "the export does not offer FUA"));
        }
        Ok(())
    }

    #[cold]
    fn refuse(&self, errno: Errno, op: Op, length: u64, offset: u64) -> Error {
        Error::new(
            errno,
            format!(
                "{op:?} of {length} bytes at {offset} is not within the export's {} bytes",
                self.caps.size
            ),
        )
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// `EINVAL` out of range or empty; those of the layers.
    pub fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.check(Op::Read, buf.len() as u64, offset)?;
        self.run(Op::Read, buf.len() as u64, "pread", |next| next.pread(buf, offset))
    }

    /// As [`pread`](Self::pread), but only if that needs no wait: `Ok(false)` says that it would, and `buf` may
    /// have been written to.
    ///
    /// # Errors
    /// As `pread`.
    pub fn pread_nowait(&self, buf: &mut [u8], offset: u64) -> Result<bool> {
        self.check(Op::Read, buf.len() as u64, offset)?;
        let Some(permit) = self.connection.chain.locks.request_nowait(&self.lock) else { return Ok(false) };
        let result = stats::timed_at_once(self.counters.as_ref(), buf.len() as u64, || {
            guard("pread", || self.next.pread_nowait(buf, offset))
        });
        drop(permit);
        result.inspect_err(|e| self.log("pread", e))
    }

    /// Writes all of `buf` at `offset`. Flags: FUA.
    ///
    /// # Errors
    /// `EPERM` read-only; `ENOSPC` out of range or empty; those of the layers.
    pub fn pwrite(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
        let length = buf.len() as u64;
        self.check_write(Op::Write, length, offset, flags, Errno::ENOSPC)?;
        let result = self.run(Op::Write, length, "pwrite", |next| next.pwrite(buf, offset, flags));
        self.written(offset, length);
        result
    }

    /// Starts a read or a write, if the chain can do so without a thread that waits for it, and calls `done` on another
    /// thread when it has ended. If `done` comes back, the request was not taken, for whatever reason, and is to be run.
    pub fn submit(self: &Arc<Self>, io: Io<'_>, offset: u64, mut done: Completion) -> Option<Completion> {
        let (op, length) = (io.op(), io.length());
        let checked = match io {
            Io::Read(_) => self.check(op, length, offset),
            Io::Write(_, flags) => self.check_write(op, length, offset, flags, Errno::ENOSPC),
        };
        // A permit is not for one thread to take and for another to give back.
        if checked.is_err() || self.connection.chain.thread_model() != ThreadModel::Parallel {
            return Some(done);
        }
        let count = self.counters.as_ref().map(|counters| stats::timed_later(counters, op, length));
        let session = self.clone();
        done.look(move |failure| {
            if let Some(count) = count {
                count(failure);
            }
            if let Some(e) = failure {
                session.log(if op == Op::Read { "pread" } else { "pwrite" }, e);
            }
            if op == Op::Write {
                session.written(offset, length);
            }
        });
        // After a panic the completion has been dropped, which was an answer too.
        let mut back = guard("submit", || Ok(self.next.submit(io, offset, done)))
            .inspect_err(|e| self.log("submit", e))
            .ok()??;
        back.unlook();
        Some(back)
    }

    /// Makes every completed write durable.
    ///
    /// # Errors
    /// `EINVAL` when the chain cannot; those of the layers.
    pub fn flush(&self) -> Result<()> {
        if !self.caps.flush {
            return Err(Error::new(Errno::EINVAL, "the export does not offer flush"));
        }
        self.run(Op::Flush, 0, "flush", Next::flush)
    }

    /// Discards a range. Flags: FUA.
    ///
    /// # Errors
    /// `EPERM` read-only; `EINVAL` out of range, empty or not offered; those of the layers.
    pub fn trim(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.check_write(Op::Trim, length, offset, flags, Errno::EINVAL)?;
        if !self.caps.trim {
            return Err(Error::new(Errno::EINVAL, "the export does not offer trim"));
        }
        let result = self.run(Op::Trim, length, "trim", |next| next.trim(length, offset, flags));
        self.written(offset, length);
        result
    }

    /// Makes a range read as zeroes. Flags: MAY_TRIM, FUA, FAST_ZERO.
    ///
    /// # Errors
    /// `EPERM` read-only; `ENOSPC` out of range or empty; `EOPNOTSUPP` only with FAST_ZERO; those of the
    /// layers.
    pub fn zero(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.check_write(Op::Zero, length, offset, flags, Errno::ENOSPC)?;
        if flags.contains(Flags::FAST_ZERO) && !self.caps.fast_zero {
            return Err(Error::new(Errno::EINVAL, "the export does not offer fast zero"));
        }
        if self.caps.zero == Support::None {
            return Err(Error::new(Errno::EINVAL, "the export does not offer zero"));
        }
        let result = stats::timed(self.counters.as_ref(), Op::Zero, length, || {
            let _permit = self.permit();
            guard("zero", || self.next.zero(length, offset, flags))
        });
        if let Err(e) = &result
            && !(e.is_unsupported() && flags.contains(Flags::FAST_ZERO))
        {
            self.log("zero", e);
        }
        self.written(offset, length);
        result
    }

    /// The extents of a range: at least one, ascending, contiguous from `offset`. They may end before the range does, and
    /// the last one may pass its end, unless with REQ_ONE, but not that of the disk. Flags: REQ_ONE.
    ///
    /// # Errors
    /// `EINVAL` out of range or empty; those of the layers.
    pub fn extents(&self, length: u64, offset: u64, flags: Flags) -> Result<Vec<crate::Extent>> {
        self.check(Op::Extents, length, offset)?;
        let mut extents = Extents::new(offset, offset + length);
        self.run(Op::Extents, 0, "extents", |next| next.extents(length, offset, flags, &mut extents))?;
        let mut list = extents.into_list();
        if flags.contains(Flags::REQ_ONE) {
            list.truncate(1);
            if let Some(only) = list.last_mut() {
                only.length = only.length.min(length);
            }
        }
        Ok(list)
    }

    /// The status of a range in a context that [`Connection::meta_contexts`] has named, clipped to the range: at
    /// least one descriptor, contiguous from `offset`; they may end before the range does. Flags: REQ_ONE.
    ///
    /// # Errors
    /// `EINVAL` out of range or empty; those of the layers.
    pub fn context_status(
        &self,
        context: &str,
        length: u64,
        offset: u64,
        flags: Flags,
    ) -> Result<Vec<Status>> {
        self.check(Op::Extents, length, offset)?;
        let mut list = self.run(Op::Extents, 0, "context_status", |next| {
            next.context_status(context, length, offset, flags)
        })?;
        list.truncate(if flags.contains(Flags::REQ_ONE) { 1 } else { usize::MAX });
        let mut left = length;
        list.retain_mut(|status| {
            status.length = status.length.min(left);
            left -= status.length;
            status.length > 0
        });
        Ok(list)
    }

    /// Whether [`holes`](Self::holes) may be asked before a read.
    pub fn may_skip_holes(&self) -> bool {
        self.next.may_skip_holes()
    }

    /// The extents of a range that is about to be read, as far as they can be had: ascending, contiguous from
    /// `offset`. The last one may pass the end of the range. This is no request of the client, so it is not counted,
    /// and what fails here will fail again in the read. None: it failed; or, unless it may `wait`, it is not its turn.
    pub fn holes(&self, length: u64, offset: u64, wait: bool) -> Option<Vec<crate::Extent>> {
        let mut extents = Extents::new(offset, offset.checked_add(length)?);
        let _permit =
            if wait { self.permit() } else { self.connection.chain.locks.request_nowait(&self.lock)? };
        guard("extents", || self.next.extents(length, offset, Flags::empty(), &mut extents)).ok()?;
        Some(extents.into_list())
    }

    /// Reads a range ahead.
    ///
    /// # Errors
    /// `EINVAL` out of range, empty or not offered; those of the layers.
    pub fn cache(&self, length: u64, offset: u64) -> Result<()> {
        self.check(Op::Cache, length, offset)?;
        if self.caps.cache == Support::None {
            return Err(Error::new(Errno::EINVAL, "the export does not offer cache"));
        }
        self.run(Op::Cache, length, "cache", |next| next.cache(length, offset))
    }

    /// Logs the failure of what a door did itself, with what the chain [lent](Self::loan).
    pub fn failed(&self, what: &str, e: &Error) {
        self.log(what, e);
    }

    /// Whether requests are counted or told of in the log. Then a door lets the chain see them all.
    pub fn is_watched(&self) -> bool {
        self.counters.is_some() || log::log_enabled!(target: DATAPATH, log::Level::Debug)
    }

    /// Lends a range of the disk, if the chain can and the thread model lets requests by without a permit.
    pub fn loan(&self, offset: u64, length: u64) -> Option<Loan<'_>> {
        if self.connection.chain.thread_model() != ThreadModel::Parallel {
            return None;
        }
        self.next.loan(offset, length)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.next.finalize();
    }
}

/// Calls into the layers; a panic there becomes `EIO`, logged with its message.
fn guard<T>(what: &str, call: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| Err(panicked(what, &*panic)))
}

#[cold]
fn panicked(what: &str, panic: &(dyn Any + Send)) -> Error {
    let message = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message");
    Error::new(Errno::EIO, format!("a layer panicked in {what}: {message}"))
}
