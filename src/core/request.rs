//! A request under way: what travels from a front end through the layers and, if it is started, back.
//!
//! A front end makes a [`Request`] and hands it to [`Session::submit`](crate::Session::submit); each layer hands it to
//! the one below with [`Next`](crate::Next) or answers it. There is one entry for a layer,
//! [`Handle::submit`](crate::Handle::submit), and four answers ([`Outcome`]): done, started, lent, or "run me on a
//! thread". Whether the request may run where it was received and whether it may sleep is therefore decided for each
//! request, by the layer that knows.
//!
//! A request borrows the memory of its front end for the time of the call. What outlives the call when a plugin starts
//! it is its [`Task`]: one frame for each layer that wants to know how it ends. Front ends keep tasks and use them again,
//! so that nothing is allocated per request. The plugin gets a [`Pending`], which completes exactly once: dropping it
//! answers `EIO`. Completing only posts to the front end's [`Completions`]; the front end unwinds the frames and sends
//! the reply on a thread of its own, so a slow client never holds a thread of a plugin's.

use std::{fmt, ops::Range, sync::Arc, time::Instant};

use crate::{Errno, Error, Extents, Flags, Handle, Loan, Memory, Op, Result, Status};

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// The kind of request.
    pub op: Op,
    /// Start of the range in bytes; 0 for a flush.
    pub offset: u64,
    /// Length of the range in bytes; 0 for a flush.
    pub length: u64,
    /// Flags; which are legal depends on `op`.
    pub flags: Flags,
}

impl Call {
    /// A call without flags.
    pub fn new(op: Op, offset: u64, length: u64) -> Self {
        Call { op, offset, length, flags: Flags::empty() }
    }

    /// The same with `flags`.
    #[must_use]
    pub fn with_flags(self, flags: Flags) -> Self {
        Call { flags, ..self }
    }

    /// The first byte after the range.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.length)
    }
}

/// The memory that a request reads into, writes from, or answers with. It belongs to the code that made the request.
#[derive(Debug)]
pub enum Data<'a> {
    /// None: flush, trim, zero, cache; and a read or a write that only asks for a [`Loan`].
    None,
    /// A read fills it.
    Read(&'a mut [u8]),
    /// A write takes it.
    Write(&'a [u8]),
    /// An extents request adds to it.
    Extents(&'a mut Extents),
    /// A question for the status of a metadata context of a layer's own, by name.
    Status(&'a str, &'a mut Vec<Status>),
}

/// A request under way. See the module.
#[derive(Debug)]
pub struct Request<'a> {
    call: Call,
    data: Data<'a>,
    may_wait: bool,
    may_start: bool,
    may_lend: bool,
    task: Option<Box<Task>>,
}

/// How a layer answers a request.
#[must_use]
#[derive(Debug)]
pub enum Outcome<'a> {
    /// It has ended.
    Done(Result<()>),
    /// It goes on by itself and ends later.
    Started(Started),
    /// The front end moves the data itself, by way of a file; only where [`Request::may_lend`].
    Lent(Loan<'a>),
    /// It would have to wait: nothing was done, and it has to come again on a thread that may. Never an answer where
    /// [`Request::may_wait`].
    NeedsThread,
}

/// Proof that a request was started: [`Request::start`] alone makes one.
#[derive(Debug)]
pub struct Started(());

impl Outcome<'_> {
    /// The result of a request that could neither be started nor lent for, and that might wait.
    ///
    /// # Errors
    /// Its own; `EIO` when the layer broke that rule.
    pub(crate) fn into_result(self) -> Result<()> {
        match self {
            Outcome::Done(result) => result,
            _ => Err(Error::new(Errno::EIO, "a layer did not finish a request that might wait")),
        }
    }
}

impl<'a> Request<'a> {
    /// A request that runs where it is or not at all: it must not wait, and cannot be started or lent for.
    pub fn new(call: Call, data: Data<'a>) -> Self {
        Request { call, data, may_wait: false, may_start: false, may_lend: false, task: None }
    }

    /// A read of all of `buf`.
    pub fn read(buf: &'a mut [u8], offset: u64) -> Self {
        Self::new(Call::new(Op::Read, offset, buf.len() as u64), Data::Read(buf))
    }

    /// A write of all of `buf`.
    pub fn write(buf: &'a [u8], offset: u64, flags: Flags) -> Self {
        Self::new(Call::new(Op::Write, offset, buf.len() as u64).with_flags(flags), Data::Write(buf))
    }

    /// Extents of a range, added to `extents`.
    pub fn extents(length: u64, offset: u64, flags: Flags, extents: &'a mut Extents) -> Self {
        Self::new(Call::new(Op::Extents, offset, length).with_flags(flags), Data::Extents(extents))
    }

    /// Lets it wait: the thread that it is on has nothing else to do.
    #[must_use]
    pub fn on_thread(mut self) -> Self {
        self.may_wait = true;
        self
    }

    /// Lets a plugin start it. `task` was [armed](Task::arm).
    #[must_use]
    pub fn startable(mut self, task: Box<Task>) -> Self {
        (self.may_start, self.task) = (true, Some(task));
        self
    }

    /// Lets a plugin lend a file in place of the data, which this request then does not have. `task` was
    /// [armed](Task::arm).
    #[must_use]
    pub fn lendable(mut self, task: Box<Task>) -> Self {
        (self.may_lend, self.task) = (true, Some(task));
        self
    }

    /// What is asked for, as seen by the layer that has the request now.
    pub fn call(&self) -> &Call {
        &self.call
    }

    /// The kind of request.
    pub fn op(&self) -> Op {
        self.call.op
    }

    /// Start of the range in bytes.
    pub fn offset(&self) -> u64 {
        self.call.offset
    }

    /// Length of the range in bytes.
    pub fn length(&self) -> u64 {
        self.call.length
    }

    /// Its flags.
    pub fn flags(&self) -> Flags {
        self.call.flags
    }

    /// The memory that it is about.
    pub fn data(&mut self) -> &mut Data<'a> {
        &mut self.data
    }

    /// Whether it may wait for something: a device, a lock that is held for long, a delay.
    pub fn may_wait(&self) -> bool {
        self.may_wait
    }

    /// Whether a plugin may [start](Self::start) it.
    pub fn may_start(&self) -> bool {
        self.may_start && self.task.is_some()
    }

    /// Whether a plugin may answer with a file that holds the range: [`Outcome::Lent`]. Then there is no memory.
    pub fn may_lend(&self) -> bool {
        self.may_lend
    }

    /// Starts it: the answer is then [`Outcome::Started`], and the holder of the [`Pending`] completes it. None: it may
    /// not be started.
    pub fn start(&mut self) -> Option<(Pending, Started)> {
        if !self.may_start {
            return None;
        }
        let task = self.task.take()?;
        Some((Pending(Some(task)), Started(())))
    }

    /// Runs it at once by the methods of `handle` for each kind of request, which may wait.
    pub fn run<'h, H: Handle + ?Sized>(&mut self, handle: &'h H) -> Outcome<'h> {
        let Call { op, offset, length, flags } = self.call;
        Outcome::Done(match (&mut self.data, op) {
            (Data::Read(buf), _) => handle.pread(buf, offset),
            (Data::Write(buf), _) => handle.pwrite(buf, offset, flags),
            (Data::Extents(extents), _) => handle.extents(length, offset, flags, extents),
            (Data::Status(context, list), _) => {
                handle.context_status(context, length, offset, flags).map(|found| **list = found)
            }
            (Data::None, Op::Flush) => handle.flush(),
            (Data::None, Op::Trim) => handle.trim(length, offset, flags),
            (Data::None, Op::Zero) => handle.zero(length, offset, flags),
            (Data::None, Op::Cache) => handle.cache(length, offset),
            // It asked for a loan only.
            (Data::None, Op::Read | Op::Write | Op::Extents) => return Outcome::NeedsThread,
        })
    }

    /// The task, to be used again: after anything but [`Outcome::Started`].
    pub fn into_task(mut self) -> Option<Box<Task>> {
        self.task.take()
    }

    /// Whether a plugin took the task.
    pub(crate) fn is_taken(&self) -> bool {
        self.may_start && self.task.is_none()
    }

    /// The proof of that, where the plugin's own was lost.
    pub(crate) fn taken(&self) -> Started {
        Started(())
    }

    /// It enters the chain.
    pub(crate) fn begin(&mut self) {
        if let Some(task) = &mut self.task {
            task.call = self.call;
        }
    }

    pub(crate) fn forbid_loan(&mut self) {
        self.may_lend = false;
    }

    pub(crate) fn forbid_start_and_loan(&mut self) {
        (self.may_start, self.may_lend) = (false, false);
    }

    /// Runs `pass` with another call in its place.
    pub(crate) fn with_call<T>(&mut self, call: Call, pass: impl FnOnce(&mut Self) -> T) -> T {
        let own = std::mem::replace(&mut self.call, call);
        let result = pass(self);
        self.call = own;
        result
    }

    /// Runs `pass` with what it may do cut down to answering at once.
    pub(crate) fn at_once<T>(&mut self, pass: impl FnOnce(&mut Self) -> T) -> T {
        let own = (self.may_start, self.may_lend);
        self.forbid_start_and_loan();
        let result = pass(self);
        (self.may_start, self.may_lend) = own;
        result
    }

    /// Runs `pass` with a request of the same standing and of other data.
    pub(crate) fn with_data<T>(
        &mut self,
        call: Call,
        data: Data<'_>,
        pass: impl FnOnce(&mut Request<'_>) -> T,
    ) -> T {
        let (may_wait, may_start, task) = (self.may_wait, self.may_start, self.task.take());
        let other = Request { call, data, may_wait, may_start, may_lend: false, task };
        pass(&mut Borrowed { task: &mut self.task, other }.other)
    }

    pub(crate) fn push(&mut self, layer: u32, kind: FrameKind) {
        if let Some(task) = &mut self.task {
            task.frames.push(Frame { layer, kind, call: self.call });
        }
    }

    pub(crate) fn pop(&mut self) {
        if let Some(task) = &mut self.task {
            task.frames.pop();
        }
    }

    /// Whether a layer wants to know how each such request ends, so that a front end must tell it.
    pub fn is_watched(&self) -> bool {
        self.task.as_ref().is_some_and(|task| task.is_watched())
    }
}

/// A request with the task of another one, which gets it back.
struct Borrowed<'a, 'b> {
    task: &'a mut Option<Box<Task>>,
    other: Request<'b>,
}

impl Drop for Borrowed<'_, '_> {
    fn drop(&mut self) {
        *self.task = self.other.task.take();
    }
}

/// What a layer wants to be done when the request comes back.
#[derive(Clone, Copy, Debug)]
pub(crate) enum FrameKind {
    /// Count it; it began then, if it is to be timed.
    Count(Option<Instant>),
    /// Call [`Handle::ended`].
    Watch(u64),
    /// Call [`Handle::transform`].
    Transform(u64),
}

/// A layer's part of a request that was started.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Frame {
    pub(crate) layer: u32,
    pub(crate) kind: FrameKind,
    /// The call as the layer saw it.
    pub(crate) call: Call,
}

/// The part of a request that outlives its call: to be made once and used for one request after the other.
pub struct Task {
    completions: Arc<dyn Completions>,
    tag: u64,
    pub(crate) frames: Vec<Frame>,
    pub(crate) call: Call,
}

impl Task {
    /// A task for requests whose ends are posted to `completions`.
    pub fn new(completions: Arc<dyn Completions>) -> Box<Self> {
        let call = Call::new(Op::Flush, 0, 0);
        Box::new(Task { completions, tag: 0, frames: Vec::with_capacity(8), call })
    }

    /// Makes it ready for a request, which the front end knows by `tag`.
    pub fn arm(&mut self, tag: u64) {
        self.tag = tag;
        self.frames.clear();
    }

    /// Whether a layer wants to know how the request ends; counters do not matter.
    pub fn is_watched(&self) -> bool {
        self.frames.iter().any(|frame| !matches!(frame.kind, FrameKind::Count(_)))
    }

    /// What the front end knows the request by.
    pub fn tag(&self) -> u64 {
        self.tag
    }
}

impl fmt::Debug for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Task({} {:?} {} frames)", self.tag, self.call, self.frames.len())
    }
}

/// Where the ends of started requests are posted.
pub trait Completions: Send + Sync {
    /// Takes the end of a request. Called on threads of plugins, which have more to do: it must not wait for anybody.
    /// True: [`wake`](Self::wake) has to follow, for the front end may sleep.
    fn post(&self, completed: Completed) -> bool;

    /// Wakes the front end.
    fn wake(&self);
}

/// Wakes a front end when it is dropped. A plugin that completes many requests at once keeps these until the last.
#[derive(Default)]
pub struct Wake(Option<Arc<dyn Completions>>);

impl Wake {
    /// Whether it wakes the same front end as `other`, or none: then one of the two suffices.
    pub fn is_covered_by(&self, other: &Wake) -> bool {
        match (&self.0, &other.0) {
            (None, _) => true,
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            (Some(_), None) => false,
        }
    }

    /// Forgets about it: another one covers it.
    pub fn forget(mut self) {
        self.0 = None;
    }
}

impl Drop for Wake {
    fn drop(&mut self) {
        if let Some(front_end) = self.0.take() {
            front_end.wake();
        }
    }
}

impl fmt::Debug for Wake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Wake({})", self.0.is_some())
    }
}

/// The wake-ups that a plugin has kept, one for each front end. Dropping or clearing them wakes the front ends.
#[derive(Debug, Default)]
pub struct Wakes(Vec<Wake>);

impl Wakes {
    /// Wakes the front ends.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

impl Extend<Wake> for Wakes {
    /// Keeps what no other one covers.
    fn extend<I: IntoIterator<Item = Wake>>(&mut self, new: I) {
        for wake in new {
            if self.0.iter().any(|other| wake.is_covered_by(other)) {
                wake.forget();
            } else {
                self.0.push(wake);
            }
        }
    }
}

/// For requests that cannot be started.
struct Nobody;

impl Completions for Nobody {
    fn post(&self, _: Completed) -> bool {
        false
    }

    fn wake(&self) {}
}

/// Asks for the file that holds a whole disk of `size` bytes, and whether a layer wants to see the requests all the same.
pub(crate) fn whole_file<'s>(
    size: u64,
    submit: impl FnOnce(&mut Request<'_>) -> Outcome<'s>,
) -> Option<(Loan<'s>, bool)> {
    let mut task = Task::new(Arc::new(Nobody));
    task.arm(0);
    let mut request = Request::new(Call::new(Op::Read, 0, size), Data::None).lendable(task);
    match submit(&mut request) {
        Outcome::Lent(loan) => Some((loan, request.is_watched())),
        _ => None,
    }
}

/// What a started request answers with.
#[derive(Debug, Default)]
pub enum Payload {
    /// Nothing: a write and all others without data; or an error.
    #[default]
    None,
    /// What was read: that part of the memory.
    Memory(Memory, Range<usize>),
    /// Extents.
    Extents(Extents),
    /// The status of a metadata context.
    Status(Vec<Status>),
}

impl Payload {
    /// The bytes that were read.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Payload::Memory(memory, range) => memory.get(range.clone()).unwrap_or_default(),
            _ => &[],
        }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Payload::Memory(memory, range) => memory.get_mut(range.clone()).unwrap_or_default(),
            _ => &mut [],
        }
    }
}

/// The duty to say how a started request ended, once. Dropping it says `EIO`.
#[derive(Debug)]
#[must_use = "dropping it fails the request"]
pub struct Pending(Option<Box<Task>>);

impl Pending {
    /// Says how it ended. The front end is woken when the [`Wake`] is dropped.
    pub fn complete(mut self, result: Result<Payload>) -> Wake {
        self.finish(result)
    }

    fn finish(&mut self, result: Result<Payload>) -> Wake {
        let Some(task) = self.0.take() else { return Wake(None) };
        let (result, payload) = match result {
            Ok(payload) => (Ok(()), payload),
            Err(e) => (Err(e), Payload::None),
        };
        let completions = task.completions.clone();
        let asleep = completions.post(Completed { task, result, payload });
        Wake(asleep.then_some(completions))
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if self.0.is_some() {
            drop(self.finish(Err(Error::new(Errno::EIO, "a layer forgot about the request"))));
        }
    }
}

/// A started request that has ended, on its way back through the layers:
/// [`Session::finish`](crate::Session::finish).
#[derive(Debug)]
pub struct Completed {
    /// To be used again.
    pub task: Box<Task>,
    /// How it ended.
    pub result: Result<()>,
    /// With what.
    pub payload: Payload,
}

#[cfg(test)]
mod tests;
