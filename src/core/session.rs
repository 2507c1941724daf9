//! One open client: where requests of all front ends enter the chain, and where those that were started leave it.
//!
//! A front end decodes a request and calls [`Session::submit`], which checks what a client can get wrong (range, flags,
//! read-only), takes the permit that the thread model asks for, and calls the outermost layer. A panic in a layer
//! fails that request with `EIO`.

use std::{
    any::Any,
    ffi::{OsStr, OsString},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, OnceLock, atomic::Ordering},
};

use crate::{
    Announced, Call, Caps, Chain, Client, Completed, Data, Errno, Error, Extent, Extents, Flags, Loan, Next,
    Op, Open, Outcome, Payload, Request, Result, Status, Support, Task, ThreadModel, WriteObserver,
    locks::{ConnectionPermit, Permit},
    request::{Frame, FrameKind, whole_file},
    stats::{CountedConnection, Counters, Stats},
    sync::Mutex,
};

/// A client that has connected and has not chosen an export, or is between two.
pub struct Connection {
    chain: Arc<Chain>,
    client: Arc<Client>,
    readonly: bool,
    /// What the empty name stands for, once it was asked, without and with TLS.
    default_export: [OnceLock<Option<OsString>>; 2],
    _permit: ConnectionPermit,
    _counted: Option<CountedConnection>,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Connection({} to {:?})", self.client.number, self.chain)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.chain.connections.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Connection {
    pub(crate) fn new(
        chain: Arc<Chain>,
        client: Arc<Client>,
        readonly: bool,
        permit: ConnectionPermit,
    ) -> Self {
        let counted = chain.stats().map(Stats::connection);
        chain.connections.fetch_add(1, Ordering::AcqRel);
        Connection {
            chain,
            client,
            readonly,
            default_export: Default::default(),
            _permit: permit,
            _counted: counted,
        }
    }

    /// The chain behind the front end.
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
        // No layer has masked it.
        if let Some(e) = caps.failure() {
            return Err(e);
        }
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

    /// The chain behind the front end.
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

    fn permit(&self) -> Permit<'_> {
        self.connection.chain.locks.request(&self.lock)
    }

    #[cold]
    fn log(&self, what: &str, e: &Error) {
        if !e.is_logged() {
            log::error!("{}: {what}: {e}", self.next.name());
        }
    }

    /// Calls `tell` with the other front ends that want to know of a change, if this is one.
    fn for_observers(&self, call: &Call, tell: impl FnMut(&dyn WriteObserver)) {
        let chain = &self.connection.chain;
        let own = usize::from(self.observer.is_some());
        if changes_data(call.op) && chain.observer_count.load(Ordering::Acquire) > own {
            chain.for_observers(self.observer.as_ref(), tell);
        }
    }

    /// Tells other front ends that a range is about to change.
    fn announce(&self, call: &Call, may_wait: bool) -> Announced {
        let mut said = Announced::Unheard;
        self.for_observers(call, |observer| {
            if said != Announced::NeedsThread {
                match observer.writing(&self.export_name, call.offset, call.length, may_wait) {
                    Announced::Unheard => {}
                    other => said = other,
                }
            }
        });
        if said == Announced::NeedsThread {
            self.withdraw(call);
        }
        said
    }

    /// Tells other front ends that it will not.
    fn withdraw(&self, call: &Call) {
        self.for_observers(call, |observer| {
            observer.withdrawn(&self.export_name, call.offset, call.length);
        });
    }

    /// Tells other front ends that a range has changed.
    fn written(&self, call: &Call) {
        self.for_observers(call, |observer| {
            observer.written(&self.export_name, call.offset, call.length);
        });
    }

    /// Checks what a client can get wrong.
    fn check(&self, call: &Call) -> Result<()> {
        let Call { op, offset, length, flags } = *call;
        let fail = |errno, message| Err(Error::new(errno, message));
        if changes_data(op) && !self.caps.write {
            return fail(Errno::EPERM, "the export is read-only");
        }
        let in_range = match op {
            Op::Flush => true,
            _ => length > 0 && offset.checked_add(length).is_some_and(|end| end <= self.caps.size),
        };
        if !in_range {
            return Err(self.out_of_range(call));
        }
        if flags.contains(Flags::FUA) && self.caps.fua == Support::None {
            return fail(Errno::EINVAL, "the export does not offer FUA");
        }
        match op {
            Op::Flush if !self.caps.flush => fail(Errno::EINVAL, "the export does not offer flush"),
            Op::Trim if !self.caps.trim => fail(Errno::EINVAL, "the export does not offer trim"),
            Op::Zero if flags.contains(Flags::FAST_ZERO) && !self.caps.fast_zero => {
                fail(Errno::EINVAL, "the export does not offer fast zero")
            }
            Op::Zero if self.caps.zero == Support::None => {
                fail(Errno::EINVAL, "the export does not offer zero")
            }
            Op::Cache if self.caps.cache == Support::None => {
                fail(Errno::EINVAL, "the export does not offer cache")
            }
            _ => Ok(()),
        }
    }

    #[cold]
    fn out_of_range(&self, call: &Call) -> Error {
        let Call { op, offset, length, .. } = *call;
        let errno = if matches!(op, Op::Write | Op::Zero) { Errno::ENOSPC } else { Errno::EINVAL };
        let size = self.caps.size;
        Error::new(
            errno,
            format!("{op:?} of {length} bytes at {offset} is not within the export's {size} bytes"),
        )
    }

    /// Answers a request of the client's: the one way in for a front end.
    ///
    /// The errors are: `EPERM`, a change of a read-only export; `ENOSPC`, a write or zero that is empty or out of range;
    /// `EINVAL`, the same for the others, and what is not offered; `EOPNOTSUPP` only with FAST_ZERO; those of the layers,
    /// which were logged. Of a request that was [started](Outcome::Started) or [lent](Outcome::Lent) for, the front end
    /// tells the end with [`finish`](Self::finish) or [`finish_lent`](Self::finish_lent).
    pub fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        let call = *request.call();
        if let Err(e) = self.check(&call) {
            return Outcome::Done(Err(e));
        }
        // Before the permit, since others may need it to put their caches in order.
        match self.announce(&call, request.may_wait()) {
            Announced::Unheard => return self.submit_announced(&call, request),
            Announced::NeedsThread => return Outcome::NeedsThread,
            // Caches wait for the end of it: a client must not have the time to think in the middle.
            Announced::Heard => request.forbid_loan(),
        }
        let outcome = self.submit_announced(&call, request);
        if let Outcome::NeedsThread | Outcome::Lent(_) = outcome {
            self.withdraw(&call);
        }
        outcome
    }

    fn submit_announced(&self, call: &Call, request: &mut Request<'_>) -> Outcome<'_> {
        let locks = &self.connection.chain.locks;
        let permit = if request.may_wait() {
            locks.request(&self.lock)
        } else {
            let long = matches!(call.op, Op::Trim | Op::Zero | Op::Cache) && call.length > INLINE_RANGE;
            match locks.request_nowait(&self.lock) {
                Some(permit) if !long => permit,
                _ => return Outcome::NeedsThread,
            }
        };
        if !locks.is_free() {
            // A permit is not for one thread to take and for another to give back.
            request.forbid_start_and_loan();
        }
        request.begin();
        let began = self.counters.as_ref().and_then(|counters| counters.begin(call.op));
        if self.counters.is_some() {
            request.push(SESSION, FrameKind::Count(began));
        }
        let outcome = catch_unwind(AssertUnwindSafe(|| self.next.pass(request)));
        let result = match outcome {
            // Whatever else is said: who has taken it, or drops it, answers.
            _ if request.is_taken() => return Outcome::Started(request.taken()),
            Ok(Outcome::Done(result)) => result,
            Ok(outcome) => return outcome,
            Err(panic) => Err(panicked(call, &*panic)),
        };
        if let Some(counters) = &self.counters {
            counters.end(call, began, result.as_ref().err(), !request.may_wait());
        }
        // Other front ends that are told of a write may have to wait for requests of their own.
        drop(permit);
        Outcome::Done(self.ended(call, result))
    }

    /// A request has ended: says so to those who have to know.
    fn ended(&self, call: &Call, result: Result<()>) -> Result<()> {
        if let Err(e) = &result
            && !(e.is_unsupported() && call.flags.contains(Flags::FAST_ZERO))
        {
            self.log(call_name(call), e);
        }
        self.written(call);
        result
    }

    /// Takes a started request back through the layers. To be called by the front end, on a thread of its own, before it
    /// answers.
    pub fn finish(&self, completed: &mut Completed) {
        let call = completed.task.call;
        let unwound = catch_unwind(AssertUnwindSafe(|| self.next.unwind(completed)));
        if let Err(panic) = unwound {
            completed.result = Err(panicked(&call, &*panic));
        }
        let counted = completed.task.frames.pop_if(|frame| frame.layer == SESSION);
        if let (Some(counters), Some(Frame { kind: FrameKind::Count(began), .. })) = (&self.counters, counted)
        {
            counters.end(&call, began, completed.result.as_ref().err(), false);
        }
        completed.task.frames.clear();
        let result = std::mem::replace(&mut completed.result, Ok(()));
        completed.result = self.ended(&call, result);
    }

    /// Tells the layers how a request ended that was [lent](Outcome::Lent) for: the front end has moved the data.
    ///
    /// # Errors
    /// `result`, as the layers have changed it.
    pub fn finish_lent(&self, task: Box<Task>, result: Result<()>) -> (Box<Task>, Result<()>) {
        let mut completed = Completed { task, result, payload: Payload::None };
        self.finish(&mut completed);
        (completed.task, completed.result)
    }

    /// Runs a request on this thread, which may wait.
    fn run_with(&self, call: Call, data: Data<'_>) -> Result<()> {
        self.submit(&mut Request::new(call, data).on_thread()).into_result()
    }

    /// Runs a request that answers without data on this thread, which may wait: a write of `payload`, a flush, trim,
    /// zero or cache.
    ///
    /// # Errors
    /// As [`submit`](Self::submit).
    pub fn run(&self, call: Call, payload: &[u8]) -> Result<()> {
        self.run_with(call, if call.op == Op::Write { Data::Write(payload) } else { Data::None })
    }

    /// Fills `buf` from `offset`. This and what follows may wait; errors are those of [`submit`](Self::submit).
    ///
    /// # Errors
    /// `EINVAL` out of range or empty; those of the layers.
    pub fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.run_with(Call::new(Op::Read, offset, buf.len() as u64), Data::Read(buf))
    }

    /// As [`pread`](Self::pread), if that needs no wait; else `Ok(false)`, and `buf` may have been written to.
    ///
    /// # Errors
    /// As `pread`.
    pub fn pread_nowait(&self, buf: &mut [u8], offset: u64) -> Result<bool> {
        match self.submit(&mut Request::read(buf, offset)) {
            Outcome::Done(result) => result.map(|()| true),
            _ => Ok(false),
        }
    }

    /// Writes all of `buf` at `offset`. Flags: FUA.
    ///
    /// # Errors
    /// `EPERM` read-only; `ENOSPC` out of range or empty; those of the layers.
    pub fn pwrite(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
        let call = Call::new(Op::Write, offset, buf.len() as u64).with_flags(flags);
        self.run_with(call, Data::Write(buf))
    }

    /// Makes every completed write durable.
    ///
    /// # Errors
    /// `EINVAL` when the chain cannot; those of the layers.
    pub fn flush(&self) -> Result<()> {
        self.run_with(Call::new(Op::Flush, 0, 0), Data::None)
    }

    /// Discards a range. Flags: FUA.
    ///
    /// # Errors
    /// `EPERM` read-only; `EINVAL` out of range, empty or not offered; those of the layers.
    pub fn trim(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.run_with(Call::new(Op::Trim, offset, length).with_flags(flags), Data::None)
    }

    /// Makes a range read as zeroes. Flags: MAY_TRIM, FUA, FAST_ZERO.
    ///
    /// # Errors
    /// `EPERM` read-only; `ENOSPC` out of range or empty; `EOPNOTSUPP` only with FAST_ZERO; those of the
    /// layers.
    pub fn zero(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.run_with(Call::new(Op::Zero, offset, length).with_flags(flags), Data::None)
    }

    /// Reads a range ahead.
    ///
    /// # Errors
    /// `EINVAL` out of range, empty or not offered; those of the layers.
    pub fn cache(&self, length: u64, offset: u64) -> Result<()> {
        self.run_with(Call::new(Op::Cache, offset, length), Data::None)
    }

    /// The extents of a range: at least one, ascending, contiguous from `offset`. They may end before the range does, and
    /// the last one may pass its end, unless with REQ_ONE, but not that of the disk. Flags: REQ_ONE.
    ///
    /// # Errors
    /// `EINVAL` out of range or empty; those of the layers.
    pub fn extents(&self, length: u64, offset: u64, flags: Flags) -> Result<Vec<Extent>> {
        self.ask_extents(length, offset, flags, true).unwrap_or(Err(Errno::EIO.into()))
    }

    /// As [`extents`](Self::extents), if that needs no wait; else None.
    pub fn extents_nowait(&self, length: u64, offset: u64, flags: Flags) -> Option<Result<Vec<Extent>>> {
        self.ask_extents(length, offset, flags, false)
    }

    fn ask_extents(&self, length: u64, offset: u64, flags: Flags, wait: bool) -> Option<Result<Vec<Extent>>> {
        let mut extents = Extents::new(offset, offset.saturating_add(length));
        let call = Call::new(Op::Extents, offset, length).with_flags(flags);
        let asked = self.ask(call, Data::Extents(&mut extents), wait)?;
        Some(asked.map(|()| {
            let mut list = extents.into_list();
            if flags.contains(Flags::REQ_ONE) {
                list.truncate(1);
                if let Some(only) = list.last_mut() {
                    only.length = only.length.min(length);
                }
            }
            list
        }))
    }

    fn ask(&self, call: Call, data: Data<'_>, wait: bool) -> Option<Result<()>> {
        let request = Request::new(call, data);
        let mut request = if wait { request.on_thread() } else { request };
        match self.submit(&mut request) {
            Outcome::Done(result) => Some(result),
            _ => None,
        }
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
        let mut list = Vec::new();
        let call = Call::new(Op::Extents, offset, length).with_flags(flags);
        self.run_with(call, Data::Status(context, &mut list))?;
        list.truncate(if flags.contains(Flags::REQ_ONE) { 1 } else { usize::MAX });
        let mut left = length;
        list.retain_mut(|status| {
            status.length = status.length.min(left);
            left -= status.length;
            status.length > 0
        });
        Ok(list)
    }

    /// The file that holds the whole disk, if the layers lend one, and whether a layer wants to see the requests all the
    /// same: then others than the front end must not have the file.
    pub fn whole_file(&self) -> Option<(Loan<'_>, bool)> {
        whole_file(self.caps.size, |request| self.submit(request))
    }

    /// The extents of a range that is about to be read, as far as they can be had: ascending, contiguous from
    /// `offset`. The last one may pass the end of the range. This is no request of the client, so it is not counted,
    /// and what fails here will fail again in the read. None: it failed; or, unless it may `wait`, it is not its turn.
    pub fn holes(&self, length: u64, offset: u64, wait: bool) -> Option<Vec<Extent>> {
        let mut extents = Extents::new(offset, offset.checked_add(length)?);
        let _permit =
            if wait { self.permit() } else { self.connection.chain.locks.request_nowait(&self.lock)? };
        guard("extents", || self.next.extents(length, offset, Flags::empty(), &mut extents)).ok()?;
        Some(extents.into_list())
    }
}

/// Longer ranges are not trimmed, zeroed or cached where they were received, even if that cannot wait, in bytes.
const INLINE_RANGE: u64 = 1 << 20;
/// The frames of the session itself.
const SESSION: u32 = u32::MAX;

/// Whether requests of this kind may change data, so that they are worth running for a client who is gone.
fn changes_data(op: Op) -> bool {
    matches!(op, Op::Write | Op::Trim | Op::Zero)
}

fn call_name(call: &Call) -> &'static str {
    match call.op {
        Op::Read => "pread",
        Op::Write => "pwrite",
        Op::Flush => "flush",
        Op::Trim => "trim",
        Op::Zero => "zero",
        Op::Cache => "cache",
        Op::Extents => "extents",
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.next.finalize();
    }
}

/// Calls into the layers; a panic there becomes `EIO`, logged with its message.
fn guard<T>(what: &str, call: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| Err(panicked_in(what, &*panic)))
}

fn panicked(call: &Call, panic: &(dyn Any + Send)) -> Error {
    panicked_in(call_name(call), panic)
}

#[cold]
fn panicked_in(what: &str, panic: &(dyn Any + Send)) -> Error {
    let message = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message");
    Error::new(Errno::EIO, format!("a layer panicked in {what}: {message}"))
}
