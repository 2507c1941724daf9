//! Threads for requests that may have to wait.
//!
//! Threads are started when there is work and no thread is free, up to a limit, and end when there was none for some
//! time. What waits is bounded in number, and what waits or runs in bytes; then the front end stops receiving. A request
//! runs until its reply is sent, so this bounds the replies too that a client does not take.

use std::{collections::VecDeque, fmt, time::Duration};

use crate::{
    reclaim::IDLE,
    sync::{self, Bug, Condvar, JoinHandle, Mutex, is_planted},
};

/// With this many bytes in buffers, for data to write and data that was read, no further request is queued.
const BYTES: usize = 64 << 20;
/// A thread that has had no work for so long ends: before a connection counts as idle, so that all of it is gone then.
const PATIENCE: Duration = Duration::from_millis(IDLE.as_millis() as u64 / 2);

/// A request for a thread.
pub trait Job: Send {
    /// Bytes of the buffer that it has or will need.
    fn bytes(&self) -> usize;
}

/// See the module.
pub struct Executor<J> {
    limit: usize,
    state: Mutex<State<J>>,
    work: Condvar,
    progress: Condvar,
}

impl<J> fmt::Debug for Executor<J> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Executor({} threads at most)", self.limit)
    }
}

struct State<J> {
    queue: VecDeque<J>,
    /// Of the requests that are queued or run.
    bytes: usize,
    /// Requests that run.
    running: usize,
    idle: usize,
    /// Threads that have not left.
    workers: usize,
    /// All that are to be waited for at the end, those who have left not long ago among them.
    threads: Vec<JoinHandle<()>>,
    closed: bool,
}

impl<J> State<J> {
    fn has_room(&self, limit: usize) -> bool {
        self.queue.len() < limit && self.bytes < BYTES
    }

    fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.running == 0
    }
}

impl<J: Job> Executor<J> {
    /// An executor of at most `limit` threads, none of them started.
    pub fn new(limit: usize) -> Self {
        let state = State {
            queue: VecDeque::new(),
            bytes: 0,
            running: 0,
            idle: 0,
            workers: 0,
            threads: Vec::new(),
            closed: false,
        };
        Executor { limit, state: Mutex::new(state), work: Condvar::new(), progress: Condvar::new() }
    }

    /// Whether no request is queued or running.
    pub fn is_idle(&self) -> bool {
        self.state.lock().is_idle()
    }

    /// Queues a request. `worker` makes the body of a new thread called `name`. The job comes back when there is no
    /// thread and none can be started.
    ///
    /// # Errors
    /// The job.
    pub fn submit(&self, job: J, name: &str, worker: impl FnOnce() -> Worker) -> Result<(), J> {
        if is_planted(Bug::NoticeBeforeTheWork) {
            self.work.notify_one();
        }
        let mut state = self.state.lock();
        if state.idle <= state.queue.len() && state.workers < self.limit {
            state.threads.retain(|thread| !thread.is_finished());
            match sync::spawn(name, worker()) {
                Ok(thread) => {
                    state.threads.push(thread);
                    state.workers += 1;
                }
                Err(e) => {
                    log::debug!("cannot start a thread for requests: {e}");
                    if state.workers == 0 {
                        return Err(job);
                    }
                }
            }
        }
        state.bytes += job.bytes();
        state.queue.push_back(job);
        if !is_planted(Bug::NoticeBeforeTheWork) {
            self.work.notify_one();
        }
        Ok(())
    }

    /// Waits until another request may be queued, at most for `timeout`; tells whether it may.
    pub fn wait_for_room(&self, timeout: Duration) -> bool {
        let mut state = self.state.lock();
        state.has_room(self.limit) || {
            self.progress.wait_for(&mut state, timeout);
            state.has_room(self.limit)
        }
    }

    /// Waits until no request is queued or running, at most for `timeout`; tells whether that is so.
    pub fn wait_for_idle(&self, timeout: Duration) -> bool {
        let mut state = self.state.lock();
        state.is_idle() || {
            self.progress.wait_for(&mut state, timeout);
            state.is_idle()
        }
    }

    /// Whether a request is queued and no thread is left that would run it.
    #[cfg(all(test, feature = "shuttle"))]
    pub(crate) fn has_lost_work(&self) -> bool {
        let state = self.state.lock();
        !state.queue.is_empty() && state.workers == 0
    }

    /// Counts a request that runs on a thread of somebody else's, and has or will need a buffer of so many bytes. None:
    /// there are too many bytes.
    pub fn enter(&self, bytes: usize) -> Option<Entered<'_, J>> {
        let mut state = self.state.lock();
        let room = state.bytes < BYTES;
        if room {
            state.running += 1;
            state.bytes += bytes;
        }
        room.then(|| Entered { executor: self, bytes })
    }

    /// Ends the threads after the queue is empty, and waits for them.
    pub fn close(&self) {
        let threads = {
            let mut state = self.state.lock();
            state.closed = true;
            std::mem::take(&mut state.threads)
        };
        self.work.notify_all();
        for thread in threads {
            // One that panicked has said so; the front end ends either way.
            let _ = thread.join();
        }
    }

    /// Forgets the threads that have ended; tells whether all have.
    pub fn give_back(&self) -> bool {
        let mut state = self.state.lock();
        state.threads.retain(|thread| !thread.is_finished());
        state.threads.is_empty()
    }

    /// A thread's life: runs jobs until the executor is closed, or there was none for some time.
    pub fn work(&self, mut run: impl FnMut(J)) {
        let mut state = self.state.lock();
        loop {
            if let Some(job) = state.queue.pop_front() {
                state.running += 1;
                self.progress.notify_all();
                drop(state);
                let running = Entered { executor: self, bytes: job.bytes() };
                run(job);
                drop(running);
                state = self.state.lock();
            } else if state.closed {
                return;
            } else {
                state.idle += 1;
                let idle = self.work.wait_for(&mut state, PATIENCE).timed_out();
                state.idle -= 1;
                if idle && (state.queue.is_empty() || is_planted(Bug::LeavesWithoutALook)) {
                    state.workers -= 1;
                    return;
                }
            }
        }
    }
}

/// The body of a thread.
pub type Worker = Box<dyn FnOnce() + Send>;

/// A request that runs: it counts until this is dropped.
pub struct Entered<'a, J> {
    executor: &'a Executor<J>,
    bytes: usize,
}

impl<J> fmt::Debug for Entered<'_, J> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Entered({})", self.bytes)
    }
}

impl<J> Drop for Entered<'_, J> {
    fn drop(&mut self) {
        let mut state = self.executor.state.lock();
        state.running -= 1;
        state.bytes -= self.bytes;
        self.executor.progress.notify_all();
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use std::sync::{
        Arc, Barrier,
        atomic::{AtomicUsize, Ordering},
    };

    use super::*;

    struct Bytes(usize, u64);

    impl Job for Bytes {
        fn bytes(&self) -> usize {
            self.0
        }
    }

    fn body(executor: &Arc<Executor<Bytes>>, run: impl Fn(Bytes) + Send + 'static) -> Worker {
        let executor = executor.clone();
        Box::new(move || executor.work(run))
    }

    #[test]
    fn one_thread_keeps_the_order() {
        let executor = Arc::new(Executor::new(1));
        let seen = Arc::new(Mutex::new(Vec::new()));
        for number in 0..100 {
            while !executor.wait_for_room(Duration::MAX) {}
            let seen = seen.clone();
            let worker = || body(&executor, move |job| seen.lock().push(job.1));
            assert!(executor.submit(Bytes(10, number), "test", worker).is_ok());
        }
        executor.close();
        assert!(executor.is_idle());
        assert_eq!(*seen.lock(), (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn as_many_run_at_once_as_may() {
        let executor = Arc::new(Executor::new(4));
        let barrier = Arc::new(Barrier::new(5));
        for number in 0..4 {
            let barrier = barrier.clone();
            let worker = || {
                body(&executor, move |_| {
                    barrier.wait();
                })
            };
            assert!(executor.submit(Bytes(0, number), "test", worker).is_ok());
        }
        barrier.wait();
        executor.close();
        assert_eq!(executor.state.lock().workers, 4);
    }

    #[test]
    fn replies_that_nobody_takes_fill_it() {
        let executor = Executor::new(16);
        for room in [true, true, false] {
            assert_eq!(executor.wait_for_room(Duration::ZERO), room);
            assert!(executor.submit(Bytes(32 << 20, 0), "test", || Box::new(|| ())).is_ok());
        }
        assert!(executor.enter(1).is_none());
        let inside = AtomicUsize::new(0);
        executor.state.lock().closed = true;
        executor.work(|_| {
            // One that runs still counts; one that is done does not.
            let second = inside.fetch_add(1, Ordering::Relaxed) == 2;
            assert_eq!(executor.wait_for_room(Duration::ZERO), second);
        });
        assert!(executor.wait_for_room(Duration::ZERO) && executor.is_idle());
        executor.close();
    }
}
