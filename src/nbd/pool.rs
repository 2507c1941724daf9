//! The workers of one connection: they run the requests that may block.
//!
//! Threads are started when there is work that nobody is free for, up to the limit, and stay until the connection
//! ends. What waits is bounded in number and bytes; then the connection's thread stops receiving.

use std::{collections::VecDeque, thread::JoinHandle, time::Duration};

use parking_lot::{Condvar, Mutex};

use crate::proto::Request;

/// Bytes of write payloads that may wait.
const QUEUED_BYTES: usize = 64 << 20;
/// Buffers kept for the next payloads.
const SPARES: usize = 4;
/// A larger one is not kept.
const SPARE_MAX: usize = 4 << 20;

/// A request for a worker.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) request: Request,
    /// The data of a WRITE, else empty.
    pub(crate) payload: Vec<u8>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Pool {
    limit: usize,
    state: Mutex<State>,
    work: Condvar,
    progress: Condvar,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<Job>,
    queued_bytes: usize,
    /// Requests that are with a worker.
    running: usize,
    idle: usize,
    threads: Vec<JoinHandle<()>>,
    closed: bool,
    spares: Vec<Vec<u8>>,
}

impl State {
    fn has_room(&self, limit: usize) -> bool {
        self.queue.len() < limit && self.queued_bytes < QUEUED_BYTES
    }
}

impl Pool {
    /// A pool of at most `limit` workers.
    pub(crate) fn new(limit: usize) -> Self {
        Pool { limit, state: Mutex::default(), work: Condvar::new(), progress: Condvar::new() }
    }

    /// Whether no request is queued or running.
    pub(crate) fn is_idle(&self) -> bool {
        let state = self.state.lock();
        state.queue.is_empty() && state.running == 0
    }

    /// Queues a request. `worker` makes the body of a new worker's thread called `name`. The job comes back when
    /// there is no worker and none can be started.
    pub(crate) fn submit(&self, job: Job, name: &str, worker: impl FnOnce() -> Worker) -> Result<(), Job> {
        let mut state = self.state.lock();
        if state.idle <= state.queue.len() && state.threads.len() < self.limit {
            match std::thread::Builder::new().name(name.to_owned()).spawn(worker()) {
                Ok(thread) => state.threads.push(thread),
                Err(e) => {
                    log::debug!("cannot start a worker: {e}");
                    if state.threads.is_empty() {
                        return Err(job);
                    }
                }
            }
        }
        state.queued_bytes += job.payload.len();
        state.queue.push_back(job);
        self.work.notify_one();
        Ok(())
    }

    /// Waits until another request may be queued, at most for `timeout`; tells whether it may.
    pub(crate) fn wait_for_room(&self, timeout: Duration) -> bool {
        let mut state = self.state.lock();
        state.has_room(self.limit) || {
            self.progress.wait_for(&mut state, timeout);
            state.has_room(self.limit)
        }
    }

    /// Waits until no request is queued or running, at most for `timeout`; tells whether that is so.
    pub(crate) fn wait_for_idle(&self, timeout: Duration) -> bool {
        let mut state = self.state.lock();
        let idle = |s: &State| s.queue.is_empty() && s.running == 0;
        idle(&state) || {
            self.progress.wait_for(&mut state, timeout);
            idle(&state)
        }
    }

    /// Ends the workers after the queue is empty, and waits for them.
    pub(crate) fn close(&self) {
        let threads = {
            let mut state = self.state.lock();
            state.closed = true;
            std::mem::take(&mut state.threads)
        };
        self.work.notify_all();
        for thread in threads {
            // A worker that panicked has said so; the connection ends either way.
            let _ = thread.join();
        }
    }

    /// A buffer for a payload of `length` bytes, whose content is left over from before.
    pub(crate) fn payload(&self, length: usize) -> Vec<u8> {
        let mut spare = self.state.lock().spares.pop().unwrap_or_default();
        if spare.capacity() < length {
            return vec![0; length];
        }
        spare.resize(length, 0);
        spare
    }

    /// Gives a payload's buffer back.
    pub(crate) fn recycle(&self, payload: Vec<u8>) {
        if payload.capacity() == 0 || payload.capacity() > SPARE_MAX {
            return;
        }
        let mut state = self.state.lock();
        if state.spares.len() < SPARES {
            state.spares.push(payload);
        }
    }

    /// A worker's life: runs jobs until the pool is closed.
    pub(crate) fn work(&self, mut run: impl FnMut(&Job)) {
        let mut state = self.state.lock();
        loop {
            if let Some(job) = state.queue.pop_front() {
                state.queued_bytes -= job.payload.len();
                state.running += 1;
                self.progress.notify_all();
                drop(state);
                let running = Running(self);
                run(&job);
                self.recycle(job.payload);
                drop(running);
                state = self.state.lock();
            } else if state.closed {
                return;
            } else {
                state.idle += 1;
                self.work.wait(&mut state);
                state.idle -= 1;
            }
        }
    }
}

/// The body of a worker's thread.
pub(crate) type Worker = Box<dyn FnOnce() + Send>;

/// Counts a running request down, even when it panics.
struct Running<'a>(&'a Pool);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.state.lock().running -= 1;
        self.0.progress.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn job(cookie: u64) -> Job {
        let request = Request { flags: 0, command: 0, cookie, offset: 0, length: 0, payload: true };
        Job { request, payload: vec![0; 10] }
    }

    #[test]
    fn one_worker_keeps_the_order() {
        let pool = Arc::new(Pool::new(1));
        let seen = Arc::new(Mutex::new(Vec::new()));
        for cookie in 0..100 {
            while !pool.wait_for_room(Duration::MAX) {}
            let (p, s) = (pool.clone(), seen.clone());
            pool.submit(job(cookie), "test", || {
                Box::new(move || p.work(|job| s.lock().push(job.request.cookie)))
            })
            .unwrap();
        }
        pool.close();
        assert!(pool.is_idle());
        assert_eq!(*seen.lock(), (0..100).collect::<Vec<_>>());
    }
}
