//! Answers to the kernel's requests: each is given once, by the chain or, when that takes too long, by the watch.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Weak},
    thread,
    time::{Duration, Instant},
};

use fuser::{
    Errno, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyWrite,
};
use parking_lot::{Condvar, Mutex};

/// A reply that can fail.
pub(crate) trait Reply: Send + 'static {
    fn fail(self, errno: Errno);
}

macro_rules! replies {
    ($($reply:ty),*) => {
        $(impl Reply for $reply {
            fn fail(self, errno: Errno) {
                self.error(errno);
            }
        })*
    };
}
replies!(ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyWrite);

/// The right to answer a request.
pub(crate) enum Answer<R> {
    /// Nobody else has it.
    Own(R),
    /// Others have it too, such as the watch; whoever is first takes it.
    Shared(Arc<Mutex<Option<R>>>),
}

impl<R: Reply> Answer<R> {
    /// One that others can have too.
    pub(crate) fn shared(reply: R) -> Self {
        Answer::Shared(Arc::new(Mutex::new(Some(reply))))
    }

    /// The same once more, if it is shared.
    pub(crate) fn share(&self) -> Option<Self> {
        match self {
            Answer::Own(_) => None,
            Answer::Shared(reply) => Some(Answer::Shared(reply.clone())),
        }
    }

    /// Whether there still is somebody to answer.
    pub(crate) fn is_open(&self) -> bool {
        match self {
            Answer::Own(_) => true,
            Answer::Shared(reply) => reply.lock().is_some(),
        }
    }

    /// Takes the reply; None: too late.
    pub(crate) fn take(self) -> Option<R> {
        match self {
            Answer::Own(reply) => Some(reply),
            Answer::Shared(reply) => reply.lock().take(),
        }
    }

    /// Answers with an error.
    pub(crate) fn fail(self, errno: Errno) {
        if let Some(reply) = self.take() {
            reply.fail(errno);
        }
    }
}

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
    closing: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
}

/// Answers requests with `EIO` when they take too long. Dropping it lets the thread end.
pub(crate) struct Watch {
    shared: Arc<Shared>,
    limit: Duration,
}

impl Watch {
    /// A watch that lets requests take `limit`.
    ///
    /// # Errors
    /// If no thread can be started.
    pub(crate) fn new(limit: Duration) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let watching = shared.clone();
        thread::Builder::new().name("timeouts".into()).spawn(move || watching.work(limit))?;
        Ok(Watch { shared, limit })
    }

    /// Watches over a request. `what` is for the message.
    pub(crate) fn over<R: Reply>(&self, reply: R, what: &'static str) -> Answer<R> {
        let reply = Arc::new(Mutex::new(Some(reply)));
        let expire: Arc<dyn Expire> = reply.clone();
        let mut queue = self.shared.queue.lock();
        // What was answered meanwhile is not kept.
        while queue.waiting.front().is_some_and(|(_, _, request)| request.strong_count() == 0) {
            queue.waiting.pop_front();
        }
        let idle = queue.waiting.is_empty();
        queue.waiting.push_back((Instant::now() + self.limit, what, Arc::downgrade(&expire)));
        drop(queue);
        if idle {
            self.shared.wake.notify_one();
        }
        Answer::Shared(reply)
    }
}

impl Drop for Watch {
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
                None => self.wake.wait(&mut queue),
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
    fn the_watch_answers_once_the_time_is_over() {
        let watch = Watch::new(Duration::from_millis(1)).unwrap();
        let (tell, told) = mpsc::channel();
        let answer = watch.over(Probe(tell), "read");
        assert_eq!(told.recv(), Ok(5));
        assert!(!answer.is_open());
        assert!(answer.take().is_none());
    }

    #[test]
    fn whoever_answers_in_time_is_alone() {
        let watch = Watch::new(Duration::from_secs(3600)).unwrap();
        let (tell, told) = mpsc::channel();
        let answer = watch.over(Probe(tell), "read");
        assert!(answer.is_open());
        answer.fail(Errno::ENXIO);
        assert_eq!(told.recv(), Ok(6));
        assert!(told.recv().is_err(), "nobody is left to answer");
    }
}
