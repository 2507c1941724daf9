//! The thread that answers requests which the chain has started: it takes what was posted in batches, takes each back
//! through the layers and sends its reply.
//!
//! There is one for each mount, from the first started request on.

use std::{
    mem,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{Builder, JoinHandle},
};

use nbdkit_core::{Completed, Completions as _, Payload, Task, sync::Mutex};
use nbdkit_dispatch::reclaim::IDLE;

use super::Shared;
use crate::{export_file::errno, transfer::Transfer};

/// See the module.
pub(super) struct Completer {
    work: Arc<Work>,
    started: AtomicBool,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Work {
    shared: Arc<Shared>,
    closing: AtomicBool,
}

impl Completer {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        let work = Arc::new(Work { shared, closing: AtomicBool::new(false) });
        Completer { work, started: AtomicBool::new(false), thread: Mutex::default() }
    }

    /// A request was started: sees to it that there is the thread.
    pub(super) fn start(&self) {
        if !self.started.load(Ordering::Acquire) {
            self.start_thread();
        }
    }

    #[cold]
    fn start_thread(&self) {
        let mut thread = self.thread.lock();
        if thread.is_some() {
            return;
        }
        let work = self.work.clone();
        match Builder::new().name("completer".into()).spawn(move || work.run()) {
            Ok(new) => {
                *thread = Some(new);
                self.started.store(true, Ordering::Release);
            }
            Err(e) => {
                log::debug!("no thread for the ends of requests, they are waited for: {e}");
                self.work.run_until_idle();
            }
        }
    }

    /// Waits for the requests under way and ends the thread.
    pub(super) fn close(&self) {
        let Some(thread) = self.thread.lock().take() else { return };
        self.work.closing.store(true, Ordering::Release);
        // The end of no request wakes it.
        let queue = &self.work.shared.queue;
        let mut task = Task::new(queue.clone());
        task.arm(u64::MAX);
        queue.post(Completed { task, result: Ok(()), payload: Payload::None });
        if thread.join().is_err() {
            log::error!("the thread for the ends of requests panicked");
        }
    }
}

impl Work {
    fn run(&self) {
        let (mut ready, mut transfers) = (Vec::new(), Vec::new());
        loop {
            self.batch(&mut ready, &mut transfers);
            if self.closing.load(Ordering::Acquire) && self.shared.started.lock().is_empty() {
                return;
            }
        }
    }

    fn run_until_idle(&self) {
        let (mut ready, mut transfers) = (Vec::new(), Vec::new());
        while !self.shared.started.lock().is_empty() {
            self.batch(&mut ready, &mut transfers);
        }
    }

    /// Waits for ends of requests, and answers.
    fn batch(&self, ready: &mut Vec<Completed>, transfers: &mut Vec<Option<Transfer>>) {
        let shared = &*self.shared;
        if shared.queue.is_empty() {
            shared.queue.wait(IDLE);
        }
        shared.queue.take(ready);
        if ready.is_empty() {
            shared.started.lock().give_back();
            (*ready, *transfers) = Default::default();
            return;
        }
        {
            let mut started = shared.started.lock();
            transfers.extend(ready.iter().map(|completed| started.take(completed)));
        }
        for (completed, transfer) in ready.iter_mut().zip(transfers.drain(..)) {
            if let Some(transfer) = transfer {
                transfer.file.session.finish(completed);
                let result = mem::replace(&mut completed.result, Ok(()));
                let payload = mem::take(&mut completed.payload);
                transfer.end(&shared.volume, result.map(|()| payload.bytes()).map_err(|e| errno(&e)));
            }
        }
        let mut started = shared.started.lock();
        ready.drain(..).for_each(|completed| started.recycle(completed));
    }
}
