//! The workers of one connection: they run the requests that may block.
//!
//! Threads are started when there is work that nobody is free for, up to the limit, and end when there was none for some
//! time. What waits is bounded in number, and what waits or runs in bytes; then the connection's thread stops
//! receiving. A request runs until its reply is sent, so this bounds the replies too that a client does not take.

use std::{collections::VecDeque, thread::JoinHandle, time::Duration};

use nbdkit_core::Error;
use parking_lot::{Condvar, Mutex};

use crate::{
    buffer::grow,
    idle::{IDLE, give_back},
    proto::{Request, cmd},
};

/// With this many bytes in buffers, for data to write and data that was read, no further request is queued.
const BYTES: usize = 64 << 20;
/// A worker who has had no work for so long leaves: before the connection counts as idle, so that all of it is gone then.
const PATIENCE: Duration = Duration::from_millis(IDLE.as_millis() as u64 / 2);
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

impl Job {
    /// Bytes of the buffer that it has or will need.
    pub(crate) fn bytes(&self) -> usize {
        match self.request.command {
            cmd::READ => self.request.length as usize,
            _ => self.payload.len(),
        }
    }
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
    /// Of the requests that are queued or with a worker.
    bytes: usize,
    /// Requests that are with a worker, or need none.
    running: usize,
    idle: usize,
    /// Workers that have not left.
    workers: usize,
    /// All that are to be waited for at the end, those who have left not long ago among them.
    threads: Vec<JoinHandle<()>>,
    closed: bool,
    spares: Vec<Vec<u8>>,
}

impl State {
    fn has_room(&self, limit: usize) -> bool {
        self.queue.len() < limit && self.bytes < BYTES
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
        if state.idle <= state.queue.len() && state.workers < self.limit {
            state.threads.retain(|thread| !thread.is_finished());
            match std::thread::Builder::new().name(name.to_owned()).spawn(worker()) {
                Ok(thread) => {
                    state.threads.push(thread);
                    state.workers += 1;
                }
                Err(e) => {
                    log::debug!("cannot start a worker: {e}");
                    if state.workers == 0 {
                        return Err(job);
                    }
                }
            }
        }
        state.bytes += job.bytes();
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

    /// Counts a request that runs without a worker, and has or will need a buffer of so many bytes; false: there are
    /// too many bytes.
    pub(crate) fn enter(&self, bytes: usize) -> bool {
        let mut state = self.state.lock();
        let room = state.bytes < BYTES;
        if room {
            state.running += 1;
            state.bytes += bytes;
        }
        room
    }

    /// The end of what was [entered](Self::enter), or of a worker's request.
    pub(crate) fn leave(&self, bytes: usize) {
        let mut state = self.state.lock();
        state.running -= 1;
        state.bytes -= bytes;
        self.progress.notify_all();
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
    ///
    /// # Errors
    /// `ENOMEM`.
    pub(crate) fn payload(&self, length: usize) -> Result<Vec<u8>, Error> {
        let mut spare = self.state.lock().spares.pop().unwrap_or_default();
        if spare.capacity() < length {
            give_back(&mut spare);
            spare = Vec::new();
        }
        grow(&mut spare, length)?;
        spare.truncate(length);
        Ok(spare)
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

    /// Gives the memory back of spare buffers, and of workers who have left; tells whether all have.
    pub(crate) fn give_back(&self) -> bool {
        let mut state = self.state.lock();
        state.spares.drain(..).for_each(|mut spare| give_back(&mut spare));
        state.threads.retain(|thread| !thread.is_finished());
        state.threads.is_empty()
    }

    /// A worker's life: runs jobs until the pool is closed, or there was none for some time.
    pub(crate) fn work(&self, mut run: impl FnMut(&Job)) {
        let mut state = self.state.lock();
        loop {
            if let Some(job) = state.queue.pop_front() {
                state.running += 1;
                self.progress.notify_all();
                drop(state);
                let running = Running { pool: self, bytes: job.bytes() };
                run(&job);
                self.recycle(job.payload);
                drop(running);
                state = self.state.lock();
            } else if state.closed {
                return;
            } else {
                state.idle += 1;
                let idle = self.work.wait_for(&mut state, PATIENCE).timed_out();
                state.idle -= 1;
                if idle && state.queue.is_empty() {
                    state.workers -= 1;
                    return;
                }
            }
        }
    }
}

/// The body of a worker's thread.
pub(crate) type Worker = Box<dyn FnOnce() + Send>;

/// Counts a running request down, even when it panics.
struct Running<'a> {
    pool: &'a Pool,
    bytes: usize,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.pool.leave(self.bytes);
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

    #[test]
    fn replies_that_nobody_takes_fill_it() {
        let pool = Pool::new(16);
        let request =
            Request { flags: 0, command: cmd::READ, cookie: 0, offset: 0, length: 32 << 20, payload: false };
        for room in [true, true, false] {
            assert_eq!(pool.wait_for_room(Duration::ZERO), room);
            let body = || -> Worker { Box::new(|| ()) };
            pool.submit(Job { request, payload: Vec::new() }, "test", body).unwrap();
        }
        let mut inside = 0;
        pool.state.lock().closed = true;
        pool.work(|_| {
            // One that runs still counts; one that is done does not.
            assert_eq!(pool.wait_for_room(Duration::ZERO), inside == 2);
            inside += 1;
        });
        assert!(pool.wait_for_room(Duration::ZERO) && pool.is_idle());
        pool.close();
    }
}
