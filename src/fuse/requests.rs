//! Where the kernel's requests meet the chain: each is offered to it where it was received, and answered there if that
//! needs no wait.
//!
//! A read or a write that the chain starts is answered by the [completer]. One that needs a thread runs on the one that
//! has received it, where such requests have been quick and another thread is left to listen to the kernel; all others
//! run on threads of the [`Executor`]. How much may wait is bounded by the kernel: a process that makes a request waits
//! for it.

use std::sync::Arc;

use fuser::{Errno, ReplyData, ReplyWrite};
use nbdkit_core::{Outcome, Request, ThreadModel, sync::Mutex};
use nbdkit_dispatch::{CompletionQueue, Executor, InlinePolicy, Offered, Started, buffer::Payloads};

use crate::{
    buffer,
    coherence::Stale,
    export_file::{ExportFile, errno},
    receivers::Receivers,
    reply::{Answer, Reply},
    request_timeout::RequestTimeout,
    transfer::{Kind, ThreadJob, Transfer, Write},
    volume::{PendingWrite, Volume},
};

mod completer;
mod seek;

use completer::Completer;

/// See the module. Dropping it runs what is queued and waits for what is under way.
pub(crate) struct Requests {
    shared: Arc<Shared>,
    completer: Completer,
    receivers: Receivers,
    /// All run in the order in which they came.
    serial: bool,
    timeout: Option<RequestTimeout>,
}

/// What the threads have in common.
pub(crate) struct Shared {
    volume: Arc<Volume>,
    queue: Arc<CompletionQueue>,
    started: Mutex<Started<Transfer>>,
    executor: Executor<ThreadJob>,
    policy: InlinePolicy,
    payloads: Payloads,
}

impl Shared {
    fn run(&self, job: ThreadJob) {
        self.payloads.recycle(job.run(&self.volume, &self.policy));
    }

    fn run_on_thread(self: &Arc<Self>, job: ThreadJob) {
        let worker = || -> nbdkit_dispatch::Worker {
            let shared = self.clone();
            Box::new(move || {
                shared.executor.work(|job| shared.run(job));
                shared.payloads.give_back();
            })
        };
        if let Err(job) = self.executor.submit(job, "worker", worker) {
            self.run(job);
        }
    }
}

impl Requests {
    /// For requests to the files of `volume`, at most `threads` of which wait in the chain at once. `receivers` threads
    /// will call.
    pub(crate) fn new(
        volume: Arc<Volume>,
        threads: usize,
        receivers: Receivers,
        timeout: Option<RequestTimeout>,
    ) -> Self {
        let queue = Arc::new(CompletionQueue::default());
        let ordered = volume.chain().thread_model() != ThreadModel::Parallel;
        let shared = Arc::new(Shared {
            volume,
            started: Mutex::new(Started::new(queue.clone())),
            queue,
            executor: Executor::new(threads),
            policy: InlinePolicy::new(ordered),
            payloads: Payloads::default(),
        });
        Requests {
            completer: Completer::new(shared.clone()),
            shared,
            receivers,
            serial: threads == 1,
            timeout,
        }
    }

    fn answer<R: Reply>(&self, what: &'static str, reply: R) -> Answer<R> {
        match &self.timeout {
            None => Answer::Own(reply),
            Some(timeout) => timeout.limit(reply, what),
        }
    }

    /// Reads a range within a file.
    pub(crate) fn read(&self, file: &Arc<ExportFile>, offset: u64, length: usize, reply: ReplyData) {
        let mut received = self.receivers.receive();
        let kind = Kind::Read(self.answer("read", reply));
        let transfer = Transfer { file: file.clone(), offset, length, kind };
        if transfer.must_wait(&self.shared.volume) {
            received.handed_over();
            return self.shared.run_on_thread(ThreadJob::Transfer(transfer, Vec::new()));
        }
        let left = buffer::with(length, |buffer| {
            match self.offer(file.read_request(buffer, offset), file, transfer) {
                Offered::Done(result, transfer) => {
                    transfer.end(&self.shared.volume, result.map(|()| &*buffer).map_err(|e| errno(&e)));
                    None
                }
                Offered::Started => {
                    received.handed_over();
                    self.completer.start();
                    None
                }
                Offered::NeedsThread(transfer) => self.run_here(transfer, |transfer| {
                    transfer.read(&self.shared.volume, &self.shared.policy, buffer);
                }),
            }
        });
        if let Some(transfer) = left {
            received.handed_over();
            self.shared.run_on_thread(ThreadJob::Transfer(transfer, Vec::new()));
        }
    }

    /// Writes a range within a file.
    pub(crate) fn write(
        &self,
        file: &Arc<ExportFile>,
        offset: u64,
        data: &[u8],
        mut write: Write,
        reply: ReplyWrite,
    ) {
        let mut received = self.receivers.receive();
        let synchronous = write.synchronous;
        let blocking = write.pending.as_mut().filter(|pending| pending.is_blocked());
        let blocking = blocking.map(PendingWrite::take_blocking);
        let kind = Kind::Write(self.answer("write", reply), write);
        let transfer = Transfer { file: file.clone(), offset, length: data.len(), kind };
        if let Some(blocking) = blocking {
            received.handed_over();
            return self.write_on_thread(transfer, data, Some(blocking));
        }
        let left = match self.offer(file.write_request(data, offset, synchronous), file, transfer) {
            Offered::Done(result, transfer) => {
                transfer.end(&self.shared.volume, result.map(|()| &[][..]).map_err(|e| errno(&e)));
                None
            }
            Offered::Started => {
                received.handed_over();
                self.completer.start();
                None
            }
            Offered::NeedsThread(transfer) => self.run_here(transfer, |transfer| {
                transfer.write(&self.shared.volume, &self.shared.policy, data);
            }),
        };
        let Some(transfer) = left else { return };
        received.handed_over();
        self.write_on_thread(transfer, data, None);
    }

    /// Writes a copy of `data` on another thread, after pages were dropped that are in the way.
    fn write_on_thread(&self, transfer: Transfer, data: &[u8], blocking: Option<(u64, Vec<Stale>)>) {
        let mut copy = match self.shared.payloads.take(data.len()) {
            Ok(copy) => copy,
            Err(e) => return transfer.end(&self.shared.volume, Err(errno(&e))),
        };
        copy.copy_from_slice(data);
        let job = ThreadJob::Transfer(transfer, copy);
        let Some(blocking) = blocking else { return self.shared.run_on_thread(job) };
        let shared = self.shared.clone();
        self.shared.volume.coherence.before(blocking, move || shared.run_on_thread(job));
    }

    /// Offers a request to the chain, to be answered at once or started. None: it has to run in parts.
    fn offer(
        &self,
        request: Option<Request<'_>>,
        file: &ExportFile,
        transfer: Transfer,
    ) -> Offered<Transfer> {
        let Some(request) = request.filter(|_| !self.serial) else { return Offered::NeedsThread(transfer) };
        let bytes = transfer.length;
        // The lock is not held while the chain has the request.
        let prepared = self.shared.started.lock().prepare(transfer, bytes);
        let (mut request, mut transfer) = match prepared {
            Ok(task) => (request.startable(task), None),
            Err(transfer) => (request, Some(transfer)),
        };
        let outcome = file.session.submit(&mut request);
        if let Some(task) = request.into_task() {
            transfer = self.shared.started.lock().take_back(task);
        }
        match (outcome, transfer) {
            (Outcome::Done(result), Some(transfer)) => Offered::Done(result, transfer),
            (_, Some(transfer)) => Offered::NeedsThread(transfer),
            (_, None) => Offered::Started,
        }
    }

    /// Runs a request that may wait on this thread, if that holds up nobody; else it comes back.
    fn run_here(&self, transfer: Transfer, run: impl FnOnce(Transfer)) -> Option<Transfer> {
        let here = match self.serial {
            true => self.timeout.is_none(),
            false => self.shared.policy.is_quick() && self.receivers.may_wait(),
        };
        if !here {
            return Some(transfer);
        }
        run(transfer);
        None
    }

    /// Runs a request of any other kind, here if that needs no wait. `ask` is called with whether it may wait, and returns
    /// None when it would have to and may not. `answer` is called once.
    pub(crate) fn ask<R: Reply, T>(
        &self,
        what: &'static str,
        reply: R,
        mut ask: impl FnMut(bool) -> Option<T> + Send + 'static,
        answer: impl FnOnce(Answer<R>, T) + Send + 'static,
    ) {
        let mut received = self.receivers.receive();
        let alone = self.serial && self.timeout.is_none();
        match ask(alone) {
            Some(told) => answer(Answer::Own(reply), told),
            None => {
                received.handed_over();
                self.ask_on_thread(what, reply, ask, answer);
            }
        }
    }

    /// As [`ask`](Self::ask), but never here.
    pub(crate) fn ask_on_thread<R: Reply, T>(
        &self,
        what: &'static str,
        reply: R,
        ask: impl FnMut(bool) -> Option<T> + Send + 'static,
        answer: impl FnOnce(Answer<R>, T) + Send + 'static,
    ) {
        self.shared.run_on_thread(self.job(what, reply, ask, answer));
    }

    /// As [`ask_on_thread`](Self::ask_on_thread), after pages were dropped that are in the way.
    pub(crate) fn ask_unblocked<R: Reply, T>(
        &self,
        what: &'static str,
        reply: R,
        blocking: (u64, Vec<Stale>),
        ask: impl FnMut(bool) -> Option<T> + Send + 'static,
        answer: impl FnOnce(Answer<R>, T) + Send + 'static,
    ) {
        self.receivers.receive().handed_over();
        let (shared, job) = (self.shared.clone(), self.job(what, reply, ask, answer));
        self.shared.volume.coherence.before(blocking, move || shared.run_on_thread(job));
    }

    fn job<R: Reply, T>(
        &self,
        what: &'static str,
        reply: R,
        mut ask: impl FnMut(bool) -> Option<T> + Send + 'static,
        answer: impl FnOnce(Answer<R>, T) + Send + 'static,
    ) -> ThreadJob {
        let right = self.answer(what, reply);
        ThreadJob::Other(Box::new(move || {
            if !right.is_open() {
                return;
            }
            match ask(true) {
                Some(told) => answer(right, told),
                None => right.give(Err(Errno::EIO), |_, ()| ()),
            }
        }))
    }
}

impl Drop for Requests {
    fn drop(&mut self) {
        self.shared.executor.close();
        self.completer.close();
    }
}
