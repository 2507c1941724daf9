//! Answers requests with `EIO` that take too long.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Weak},
    thread,
    time::{Duration, Instant},
};

use fuser::Errno;
use nbdkit_core::sync::Mutex;
use parking_lot::Condvar;

use crate::reply::{Answer, Reply};

/// A request that can run out of time.
trait Expire: Send + Sync {
    /// Answers for the chain, if that has not; tells whether it did.
    fn expire(&self) -> bool;
}

impl<R: Reply> Expire for Mutex<Option<R>> {
    fn expire(&self) -> bool {
        let Some(reply) = self.lock().take() else { return false };
        reply.fail(Errno::EIO);
        true
    }
}

#[derive(Default)]
struct Queue {
    /// All wait equally long, so the first in is the first out.
    waiting: VecDeque<(Instant, &'static str, Weak<dyn Expire>)>,
    /// The thread sleeps until there is something to wait for.
    idle: bool,
    closing: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
}

/// See the module. Dropping it lets the thread end.
pub(crate) struct RequestTimeout {
    shared: Arc<Shared>,
    limit: Duration,
}

impl RequestTimeout {
    /// Requests may take `limit`.
    ///
    /// # Errors
    /// If no thread can be started.
    pub(crate) fn new(limit: Duration) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let watching = shared.clone();
        thread::Builder::new().name("timeouts".into()).spawn(move || watching.work(limit))?;
        Ok(RequestTimeout { shared, limit })
    }

    /// Limits the time of a request. `what` is for the message.
    pub(crate) fn limit<R: Reply>(&self, reply: R, what: &'static str) -> Answer<R> {
        let reply = Arc::new(Mutex::new(Some(reply)));
        let expire: Arc<dyn Expire> = reply.clone();
        let mut queue = self.shared.queue.lock();
        // What was answered meanwhile is not kept.
        while queue.waiting.front().is_some_and(|(_, _, request)| request.strong_count() == 0) {
            queue.waiting.pop_front();
        }
        queue.waiting.push_back((Instant::now() + self.limit, what, Arc::downgrade(&expire)));
        // One that sleeps until the deadline of a request that was answered finds this one then.
        let idle = std::mem::take(&mut queue.idle);
        drop(queue);
        if idle {
            self.shared.wake.notify_one();
        }
        Answer::Shared(reply)
    }
}

impl Drop for RequestTimeout {
    fn drop(&mut self) {
        self.shared.queue.lock().closing = true;
        self.shared.wake.notify_one();
    }
}

impl Shared {
    fn work(&self, limit: Duration) {
        let mut queue = self.queue.lock();
        while !queue.closing {
            match queue.waiting.front() {
                None => {
                    queue.idle = true;
                    self.wake.wait(&mut queue);
                }
                Some((deadline, ..)) if *deadline > Instant::now() => {
                    let deadline = *deadline;
                    self.wake.wait_until(&mut queue, deadline);
                }
                Some(_) => {
                    let Some((_, what, request)) = queue.waiting.pop_front() else { continue };
                    drop(queue);
                    if request.upgrade().is_some_and(|request| request.expire()) {
                        log::error!(
                            "{what}: no answer within {} s: the caller gets EIO",
                            limit.as_secs_f64()
                        );
                    }
                    queue = self.queue.lock();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    struct Probe(mpsc::Sender<i32>);

    impl Reply for Probe {
        fn fail(self, errno: Errno) {
            self.0.send(errno.code()).unwrap();
        }
    }

    #[test]
    fn a_request_is_answered_once_its_time_is_over() {
        let timeout = RequestTimeout::new(Duration::from_millis(1)).unwrap();
        let (tell, told) = mpsc::channel();
        let answer = timeout.limit(Probe(tell), "read");
        assert_eq!(told.recv(), Ok(5));
        assert!(!answer.is_open());
        assert!(answer.take().is_none());
    }

    #[test]
    fn an_answer_in_time_is_the_only_one() {
        let timeout = RequestTimeout::new(Duration::from_secs(3600)).unwrap();
        let (tell, told) = mpsc::channel();
        let answer = timeout.limit(Probe(tell), "read");
        assert!(answer.is_open());
        answer.give(Err::<(), _>(Errno::ENXIO), |_, ()| ());
        assert_eq!(told.recv(), Ok(6));
        assert!(told.recv().is_err(), "nobody is left to answer");
    }
}
