//! Threads for requests that may have to wait. They are started when needed and kept until the mount ends. Requests that
//! wait without a thread are counted here too, for the mount ends after them.

use std::{collections::VecDeque, sync::Arc, thread};

use parking_lot::{Condvar, Mutex};

type Job = Box<dyn FnOnce() + Send>;

/// See the module. Dropping it runs what is queued, joins the threads and waits for the requests without one.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    max: usize,
    threads: Mutex<Vec<thread::JoinHandle<()>>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    wake: Condvar,
    /// The last request without a thread has ended.
    ended: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    idle: usize,
    /// Requests without a thread.
    outside: usize,
    closing: bool,
}

impl Pool {
    /// A pool of at most `max` threads, none of them started.
    pub(crate) fn new(max: usize) -> Self {
        Pool { shared: Arc::default(), max, threads: Mutex::default() }
    }

    /// Runs `job` on a thread of the pool; on this one when no thread can be had.
    pub(crate) fn run(&self, job: impl FnOnce() + Send + 'static) {
        let mut state = self.shared.state.lock();
        let queued = state.queue.len();
        if queued >= state.idle && !self.grow() && self.threads.lock().is_empty() {
            drop(state);
            return job();
        }
        state.queue.push_back(Box::new(job));
        drop(state);
        self.shared.wake.notify_one();
    }

    /// Counts a request that waits without a thread.
    pub(crate) fn enter(&self) -> Entered {
        self.shared.state.lock().outside += 1;
        Entered(self.shared.clone())
    }

    /// Starts one more thread, if there may be one.
    fn grow(&self) -> bool {
        let mut threads = self.threads.lock();
        if threads.len() >= self.max {
            return false;
        }
        let shared = self.shared.clone();
        let name = format!("worker-{}", threads.len());
        match thread::Builder::new().name(name).spawn(move || shared.work()) {
            Ok(thread) => {
                threads.push(thread);
                true
            }
            Err(e) => {
                log::debug!("no further thread for requests: {e}");
                false
            }
        }
    }
}

/// A request that waits without a thread.
pub(crate) struct Entered(Arc<Shared>);

impl Drop for Entered {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.outside -= 1;
        if state.outside == 0 {
            self.0.ended.notify_all();
        }
    }
}

impl Shared {
    fn work(&self) {
        let mut state = self.state.lock();
        loop {
            if let Some(job) = state.queue.pop_front() {
                drop(state);
                job();
                state = self.state.lock();
            } else if state.closing {
                return;
            } else {
                state.idle += 1;
                self.wake.wait(&mut state);
                state.idle -= 1;
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.state.lock().closing = true;
        self.shared.wake.notify_all();
        for thread in self.threads.get_mut().drain(..) {
            if thread.join().is_err() {
                log::error!("a thread for requests panicked");
            }
        }
        let mut state = self.shared.state.lock();
        while state.outside > 0 {
            self.shared.ended.wait(&mut state);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Barrier,
        atomic::{AtomicUsize, Ordering},
    };

    use super::*;

    #[test]
    fn runs_as_many_at_once_as_it_may() {
        let pool = Pool::new(4);
        let barrier = Arc::new(Barrier::new(5));
        for _ in 0..4 {
            let barrier = barrier.clone();
            pool.run(move || {
                barrier.wait();
            });
        }
        barrier.wait();
    }

    #[test]
    fn dropping_it_runs_what_is_queued() {
        let count = Arc::new(AtomicUsize::new(0));
        let pool = Pool::new(2);
        for _ in 0..1000 {
            let count = count.clone();
            pool.run(move || {
                count.fetch_add(1, Ordering::Relaxed);
            });
        }
        drop(pool);
        assert_eq!(count.load(Ordering::Relaxed), 1000);
    }

    #[test]
    fn dropping_it_waits_for_requests_without_a_thread() {
        let pool = Pool::new(1);
        let ended = Arc::new(AtomicUsize::new(0));
        let (entered, seen) = (pool.enter(), ended.clone());
        let other = thread::spawn(move || {
            thread::yield_now();
            seen.store(1, Ordering::Release);
            drop(entered);
        });
        drop(pool);
        assert_eq!(ended.load(Ordering::Acquire), 1);
        other.join().unwrap();
    }

    #[test]
    fn never_starts_more_threads_than_it_may() {
        let pool = Pool::new(2);
        for _ in 0..100 {
            pool.run(|| {});
        }
        assert!(pool.threads.lock().len() <= 2);
    }
}
