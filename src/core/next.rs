//! The glue between two layers: the contract is checked here, once for each layer and never in a layer, and what
//! the plugin lacks is emulated here.
//!
//! Emulation happens at the plugin only: a filter above sees one call for one request, so a delay filter over a
//! plugin without zero delays once, however many writes the zero becomes.

use std::sync::Arc;

use log::{Level, debug, log_enabled};

use crate::{
    Call, Caps, Completed, Data, Errno, Error, Extents, Flags, Handle, Loan, Op, Outcome, Request, Result,
    Status, Support, emulate,
    request::{Frame, FrameKind, whole_file},
    stats::Counters,
};

/// The log target of calls that open, ask and close.
pub(crate) const CONTROLPATH: &str = "nbdkit::controlpath";
/// The log target of requests.
pub(crate) const DATAPATH: &str = "nbdkit::datapath";

/// An open layer, seen from above.
pub struct Next {
    name: Arc<str>,
    /// Its place in the chain: 0 is the plugin.
    level: u32,
    handle: Box<dyn Handle>,
    caps: Caps,
    /// No layer below: the plugin.
    last: bool,
    counters: Option<Arc<Counters>>,
}

impl Next {
    /// Prepares the layer and asks it what it can do.
    pub(crate) fn new(
        (name, level): (Arc<str>, usize),
        handle: Box<dyn Handle>,
        readonly: bool,
        counters: Option<Arc<Counters>>,
    ) -> Result<Self> {
        debug!(target: CONTROLPATH, "{name}: prepare readonly={}", i32::from(readonly));
        handle.prepare()?;
        let caps = ask(&name, &*handle, readonly)?;
        let last = !handle.is_filter();
        Ok(Next { name, level: level as u32, handle, caps, last, counters })
    }

    /// What the layer can do.
    pub fn caps(&self) -> &Caps {
        &self.caps
    }

    /// What the layer can do, for a filter above it to start from: one that has to see every read, unless it
    /// [says so](Caps::with_skip_holes).
    pub fn capabilities(&self) -> Caps {
        self.caps.clone().with_skip_holes(false)
    }

    /// Name of the layer.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A line about the export for people.
    ///
    /// # Errors
    /// Those of the layer.
    pub fn export_description(&self) -> Result<Option<String>> {
        debug!(target: CONTROLPATH, "{}: export_description", self.name);
        Ok(self.handle.export_description()?.filter(|d| d.len() <= crate::Exports::MAX_STRING))
    }

    /// Tells the layers, the outermost first, that they will be closed. The code that opened the layers outside a
    /// session calls this once before dropping them.
    pub fn finalize(&self) {
        debug!(target: CONTROLPATH, "{}: finalize", self.name);
        if let Err(e) = self.handle.finalize() {
            log::error!("{}: finalize: {e}", self.name);
        }
        if let Some(next) = self.handle.next() {
            next.finalize();
        }
    }

    /// Hands a request to the layer, for one that does not have to know how it ends; nothing is lent.
    pub fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        if request.may_lend() {
            return Outcome::NeedsThread;
        }
        self.pass(request)
    }

    /// As [`submit`](Self::submit), for a layer through which data passes unchanged: the layers below may lend a file in its
    /// place.
    pub fn pass(&self, request: &mut Request<'_>) -> Outcome<'_> {
        if let Err(e) = self.check(request.call()) {
            return Outcome::Done(Err(e));
        }
        let logged = log_enabled!(target: DATAPATH, Level::Debug);
        if logged && request.may_wait() {
            self.log(request);
        }
        let (inline, call) = (!request.may_wait(), *request.call());
        let outcome = match &self.counters {
            None => self.enter(request),
            Some(counters) => {
                let began = counters.begin(call.op);
                request.push(self.level, FrameKind::Count(began));
                let outcome = self.enter(request);
                match &outcome {
                    Outcome::Done(result) => {
                        request.pop();
                        counters.end(&call, began, result.as_ref().err(), inline);
                    }
                    Outcome::NeedsThread => request.pop(),
                    Outcome::Started(_) | Outcome::Lent(_) => {}
                }
                outcome
            }
        };
        if logged && inline {
            // One that needs a thread comes again.
            if !matches!(outcome, Outcome::NeedsThread) {
                self.log(request);
            }
        }
        outcome
    }

    /// As [`pass`](Self::pass), for a `layer` that wants to know how the request ended, but does not look at its
    /// data: its [`ended`](Handle::ended) is called with `token`, once, unless the request comes back because it
    /// needs a thread.
    pub fn watch(&self, layer: &dyn Handle, request: &mut Request<'_>, token: u64) -> Outcome<'_> {
        request.push(self.level + 1, FrameKind::Watch(token));
        match self.pass(request) {
            Outcome::Done(mut result) => {
                request.pop();
                layer.ended(request.call(), token, &mut result);
                Outcome::Done(result)
            }
            Outcome::NeedsThread => {
                request.pop();
                Outcome::NeedsThread
            }
            outcome => outcome,
        }
    }

    /// As [`submit`](Self::submit), for a `layer` that changes data that was read: its
    /// [`transform`](Handle::transform) is called with `token` when the read has succeeded. It cannot be lent for.
    pub fn transform(&self, layer: &dyn Handle, request: &mut Request<'_>, token: u64) -> Outcome<'_> {
        self.transform_at(layer, request, request.offset(), token)
    }

    /// As [`transform`](Self::transform), of what is at `offset` of the layer below.
    pub fn transform_at(
        &self,
        layer: &dyn Handle,
        request: &mut Request<'_>,
        offset: u64,
        token: u64,
    ) -> Outcome<'_> {
        let call = *request.call();
        if request.may_lend() {
            return Outcome::NeedsThread;
        }
        request.push(self.level + 1, FrameKind::Transform(token));
        match request.with_call(Call { offset, ..call }, |request| self.pass(request)) {
            Outcome::Done(result) => {
                request.pop();
                Outcome::Done(result.and_then(|()| match request.data() {
                    Data::Read(buf) => layer.transform(&call, token, buf),
                    _ => Ok(()),
                }))
            }
            Outcome::NeedsThread => {
                request.pop();
                Outcome::NeedsThread
            }
            outcome => outcome,
        }
    }

    /// As [`pass`](Self::pass), for a layer whose disk begins at another place of the one below: the request is for
    /// `offset` there, and what follows on it is there too.
    pub fn shifted(&self, request: &mut Request<'_>, offset: u64) -> Outcome<'_> {
        self.shift(request, offset, false)
    }

    /// As [`shifted`](Self::shifted), where what follows on the request may be elsewhere.
    pub fn relocated(&self, request: &mut Request<'_>, offset: u64) -> Outcome<'_> {
        self.shift(request, offset, true)
    }

    fn shift(&self, request: &mut Request<'_>, offset: u64, elsewhere: bool) -> Outcome<'_> {
        let own = *request.call();
        let call = Call { offset, ..own };
        if !matches!(request.data(), Data::Extents(_)) {
            return request.with_call(call, |request| self.pass(request));
        }
        let mut found = Extents::new(call.offset, call.end());
        let outcome = request.at_once(|request| {
            request.with_data(call, Data::Extents(&mut found), |request| self.submit(request))
        });
        match (outcome, request.data()) {
            (Outcome::Done(result), Data::Extents(extents)) => {
                Outcome::Done(result.and_then(|()| extents.add_shifted(&found, own.offset, elsewhere)))
            }
            (outcome, _) => outcome,
        }
    }

    /// As [`submit`](Self::submit), for a layer that writes other data than it was given, or passes on other flags.
    pub fn replaced(&self, request: &mut Request<'_>, call: Call, data: Data<'_>) -> Outcome<'_> {
        request.with_data(call, data, |request| self.pass(request))
    }

    /// As [`pass`](Self::pass), with other flags.
    pub fn flagged(&self, request: &mut Request<'_>, flags: Flags) -> Outcome<'_> {
        let call = request.call().with_flags(flags);
        request.with_call(call, |request| self.pass(request))
    }

    /// As [`submit`](Self::submit), for a layer that has more to do when the answer is there: that is
    /// [`Outcome::Done`] or [`Outcome::NeedsThread`].
    pub fn at_once(&self, request: &mut Request<'_>) -> Outcome<'_> {
        if request.may_lend() {
            return Outcome::NeedsThread;
        }
        request.at_once(|request| self.pass(request))
    }

    /// Runs a request of a layer's own in place of the one it has, such as one for a piece of it. It may wait where that
    /// one may, and is neither started nor lent for: the answer is [`Outcome::Done`] or [`Outcome::NeedsThread`].
    pub fn piece(&self, call: Call, data: Data<'_>, may_wait: bool) -> Outcome<'_> {
        let request = Request::new(call, data);
        self.submit(&mut if may_wait { request.on_thread() } else { request })
    }

    /// Runs a request of a layer's own, on a thread that may wait.
    fn run(&self, call: Call, data: Data<'_>) -> Result<()> {
        let mut request = Request::new(call, data).on_thread();
        self.submit(&mut request).into_result()
    }

    /// The handles that have asked for it get to know how a started request ended, the innermost first.
    pub(crate) fn unwind(&self, completed: &mut Completed) {
        if completed.task.frames.is_empty() {
            return;
        }
        if let Some(below) = self.handle.below() {
            below.unwind(completed);
        }
        while let Some(Frame { kind, call, .. }) =
            completed.task.frames.pop_if(|frame| frame.layer == self.level)
        {
            match kind {
                FrameKind::Count(began) => {
                    if let Some(counters) = &self.counters {
                        counters.end(&call, began, completed.result.as_ref().err(), false);
                    }
                }
                FrameKind::Watch(token) => self.handle.ended(&call, token, &mut completed.result),
                FrameKind::Transform(token) => {
                    if completed.result.is_ok() {
                        completed.result = self.handle.transform(&call, token, completed.payload.bytes_mut());
                    }
                }
            }
        }
    }

    fn check(&self, call: &Call) -> Result<()> {
        let Call { op, offset, length, flags } = *call;
        if offset.checked_add(length).is_none_or(|end| end > self.caps.size) {
            return Err(self.broken(op, format!("{offset}+{length} is past the size {}", self.caps.size)));
        }
        let (able, legal) = match op {
            Op::Read => (true, Flags::empty()),
            Op::Write => (self.caps.write, Flags::FUA),
            Op::Flush => (self.caps.flush, Flags::empty()),
            Op::Trim => (self.caps.trim, Flags::FUA),
            Op::Zero => (self.caps.zero != Support::None, Flags::MAY_TRIM | Flags::FUA | Flags::FAST_ZERO),
            Op::Cache => (self.caps.cache != Support::None, Flags::empty()),
            Op::Extents => (true, Flags::REQ_ONE),
        };
        if !able {
            return Err(self.broken(op, "the layer does not offer it".into()));
        }
        if !legal.contains(flags)
            || (flags.contains(Flags::FUA) && self.caps.fua == Support::None)
            || (flags.contains(Flags::FAST_ZERO) && !self.caps.fast_zero)
        {
            return Err(self.broken(op, format!("illegal flags {flags:?}")));
        }
        Ok(())
    }

    #[cold]
    fn broken(&self, op: Op, why: String) -> Error {
        Error::new(Errno::EINVAL, format!("{}: bad {op:?} request: {why}", self.name))
    }

    #[cold]
    fn log(&self, request: &mut Request<'_>) {
        let (Call { op, offset, length, flags }, name) = (*request.call(), &self.name);
        let bit = |flag| i32::from(flags.contains(flag));
        let range = format_args!("count={length} offset={offset}");
        match (op, request.data()) {
            (_, Data::Status(context, _)) => {
                debug!(target: DATAPATH, "{name}: context_status {context} {range}");
            }
            (Op::Read, _) => debug!(target: DATAPATH, "{name}: pread {range}"),
            (Op::Write, _) => {
                debug!(target: DATAPATH, "{name}: pwrite {range} fua={}", bit(Flags::FUA));
            }
            (Op::Flush, _) => debug!(target: DATAPATH, "{name}: flush"),
            (Op::Trim, _) => debug!(target: DATAPATH, "{name}: trim {range} fua={}", bit(Flags::FUA)),
            (Op::Zero, _) => debug!(
                target: DATAPATH,
                "{name}: zero {range} may_trim={} fua={} fast={}",
                bit(Flags::MAY_TRIM),
                bit(Flags::FUA),
                bit(Flags::FAST_ZERO)
            ),
            (Op::Extents, _) => {
                debug!(target: DATAPATH, "{name}: extents {range} req_one={}", bit(Flags::REQ_ONE));
            }
            (Op::Cache, _) => debug!(target: DATAPATH, "{name}: cache {range}"),
        }
    }

    /// The request was checked: the contract between the layers, and what is emulated at the plugin.
    fn enter(&self, request: &mut Request<'_>) -> Outcome<'_> {
        let Call { op, offset, length, .. } = *request.call();
        match op {
            Op::Extents if !self.caps.extents => {
                if let Data::Extents(extents) = request.data() {
                    return Outcome::Done(extents.add_data(offset, length));
                }
            }
            Op::Trim | Op::Zero | Op::Cache if length == 0 => return Outcome::Done(Ok(())),
            _ => {}
        }
        let outcome = if self.last { self.enter_plugin(request) } else { self.handle.submit(request) };
        let may_wait = request.may_wait();
        if let (Outcome::Done(Ok(())), Data::Extents(extents)) = (&outcome, request.data()) {
            extents.clip(self.caps.size);
        }
        match (outcome, request.data()) {
            (Outcome::Done(Ok(())), Data::Extents(extents))
                if extents.as_slice().is_empty() && length > 0 =>
            {
                let why = format!("{}: the layer told no extent at {offset}", self.name);
                Outcome::Done(Err(Error::new(Errno::EIO, why)))
            }
            (Outcome::Done(Ok(())), Data::Status(context, list))
                if list.first().is_none_or(|status| status.length == 0) =>
            {
                let why = format!("{}: {context} has no status at {offset}", self.name);
                Outcome::Done(Err(Error::new(Errno::EIO, why)))
            }
            (Outcome::NeedsThread, _) if may_wait => {
                Outcome::Done(Err(self.broken(op, "the layer wants a thread on a thread".into())))
            }
            (outcome, _) => outcome,
        }
    }

    /// A request for the plugin: what it does not have is made from what it has.
    fn enter_plugin(&self, request: &mut Request<'_>) -> Outcome<'_> {
        let Call { op, flags, .. } = *request.call();
        let flush = flags.contains(Flags::FUA) && self.caps.fua == Support::Emulate;
        let emulated = match op {
            Op::Zero => self.caps.zero == Support::Emulate,
            Op::Cache => self.caps.cache == Support::Emulate,
            _ => false,
        };
        if op == Op::Zero && emulated && flags.contains(Flags::FAST_ZERO) {
            return Outcome::Done(Err(Errno::EOPNOTSUPP.into()));
        }
        if flush || emulated {
            if !request.may_wait() {
                return Outcome::NeedsThread;
            }
            return Outcome::Done(self.emulate(request, emulated, flush));
        }
        match self.handle.submit(request) {
            Outcome::Done(Err(e))
                if op == Op::Zero && e.is_unsupported() && !flags.contains(Flags::FAST_ZERO) =>
            {
                if !request.may_wait() {
                    return Outcome::NeedsThread;
                }
                Outcome::Done(self.emulate(request, true, false))
            }
            outcome => outcome,
        }
    }

    /// Zero as writes, cache as reads, FUA as a flush that follows.
    fn emulate(&self, request: &mut Request<'_>, emulated: bool, flush: bool) -> Result<()> {
        let Call { op, offset, length, flags } = *request.call();
        let flags = if flush { flags - Flags::FUA } else { flags };
        let block = self.caps.block_size;
        let plugin = |call, data: Data<'_>| {
            self.handle.submit(&mut Request::new(call, data).on_thread()).into_result()
        };
        let zero = || {
            emulate::zero(length, offset, block, |zeroes, at| {
                let call = Call::new(Op::Write, at, zeroes.len() as u64).with_flags(flags & Flags::FUA);
                plugin(call, Data::Write(zeroes))
            })
        };
        match op {
            Op::Zero if emulated => zero()?,
            Op::Cache if emulated => emulate::cache(length, offset, block, |buf, at| {
                plugin(Call::new(Op::Read, at, buf.len() as u64), Data::Read(buf))
            })?,
            _ => match request.with_call(Call { flags, ..*request.call() }, |request| {
                self.handle.submit(request).into_result()
            }) {
                Err(e) if op == Op::Zero && e.is_unsupported() && !flags.contains(Flags::FAST_ZERO) => {
                    zero()?
                }
                done => done?,
            },
        }
        if flush { plugin(Call::new(Op::Flush, 0, 0), Data::None) } else { Ok(()) }
    }

    /// Fills `buf` from `offset`. This and what follows may wait.
    ///
    /// # Errors
    /// Those of the layer; `EINVAL` out of range.
    pub fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.run(Call::new(Op::Read, offset, buf.len() as u64), Data::Read(buf))
    }

    /// Writes all of `buf` at `offset`. Flags: FUA.
    ///
    /// # Errors
    /// Those of the layer; `EINVAL` out of range.
    pub fn pwrite(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
        let call = Call::new(Op::Write, offset, buf.len() as u64).with_flags(flags);
        self.run(call, Data::Write(buf))
    }

    /// Makes every completed write durable.
    ///
    /// # Errors
    /// Those of the layer.
    pub fn flush(&self) -> Result<()> {
        self.run(Call::new(Op::Flush, 0, 0), Data::None)
    }

    /// Discards a range. Flags: FUA.
    ///
    /// # Errors
    /// Those of the layer; `EINVAL` out of range.
    pub fn trim(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.run(Call::new(Op::Trim, offset, length).with_flags(flags), Data::None)
    }

    /// Makes a range read as zeroes, by writing them when the plugin cannot. Flags: MAY_TRIM, FUA, FAST_ZERO.
    ///
    /// # Errors
    /// Those of the layer; `EOPNOTSUPP` when FAST_ZERO was given and it would be slow; `EINVAL` out of range.
    pub fn zero(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.run(Call::new(Op::Zero, offset, length).with_flags(flags), Data::None)
    }

    /// Adds the extents of a range, at least one that covers `offset`. Flags: REQ_ONE.
    ///
    /// # Errors
    /// Those of the layer; `EINVAL` out of range; `EIO` when the layer left the answer empty.
    pub fn extents(&self, length: u64, offset: u64, flags: Flags, extents: &mut Extents) -> Result<()> {
        self.run(Call::new(Op::Extents, offset, length).with_flags(flags), Data::Extents(extents))
    }

    /// The status of a range in a context of the layer's: at least one descriptor. Flags: REQ_ONE.
    ///
    /// # Errors
    /// Those of the layer; `EINVAL` out of range; `EIO` when there is no descriptor.
    pub fn context_status(
        &self,
        context: &str,
        length: u64,
        offset: u64,
        flags: Flags,
    ) -> Result<Vec<Status>> {
        let mut list = Vec::new();
        let call = Call::new(Op::Extents, offset, length).with_flags(flags);
        self.run(call, Data::Status(context, &mut list))?;
        Ok(list)
    }

    /// Reads a range ahead.
    ///
    /// # Errors
    /// Those of the layer; `EINVAL` out of range.
    pub fn cache(&self, length: u64, offset: u64) -> Result<()> {
        self.run(Call::new(Op::Cache, offset, length), Data::None)
    }

    /// The file that holds the whole disk, if the layers lend one.
    pub fn whole_file(&self) -> Option<Loan<'_>> {
        whole_file(self.caps.size, |request| self.pass(request)).map(|(loan, _)| loan)
    }
}

impl Drop for Next {
    fn drop(&mut self) {
        debug!(target: CONTROLPATH, "{}: close", self.name);
    }
}

/// Asks a layer what it can do.
fn ask(name: &str, handle: &dyn Handle, readonly: bool) -> Result<Caps> {
    let caps = handle.capabilities()?.resolve(name, readonly)?;
    if log_enabled!(target: CONTROLPATH, Level::Debug) {
        // Named as in the C nbdkit, where each is a call.
        let asked = |questions: &[&str]| {
            questions.iter().for_each(|question| debug!(target: CONTROLPATH, "{name}: {question}"));
        };
        asked(&["get_size", "block_size"]);
        if !readonly {
            asked(&["can_write"]);
        }
        asked(&["can_flush", "can_multi_conn", "can_cache", "can_extents", "is_rotational"]);
        if caps.write {
            asked(&["can_trim", "can_zero", "can_fua"]);
        }
        if caps.zero != Support::None {
            asked(&["can_fast_zero"]);
        }
    }
    Ok(caps)
}
