//! The thread that has the transfers of all clients: they run side by side, over few connections, and no thread of a client
//! waits for one.

use std::{
    collections::{HashMap, VecDeque},
    ffi::CString,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use nbdkit_core::{Buffers, Errno, Error, Memory, Payload, Pending, Result, Wake, Wakes, sync::Mutex};

use super::{
    answer::{Answer, Header},
    libcurl::{Easy, Ended, Multi, Opt, Waker},
    settings::Settings,
};
use crate::waiter::Promise;

/// Transfers that run at once, of which some may wait for a connection.
const MOST: usize = 64;
/// How long the place that a redirection has led to is gone to directly.
const REMEMBERED: Duration = Duration::from_secs(300);
/// The thread looks around so often at least.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// Only the header.
    Head,
    /// A part of the file.
    Part { offset: u64, length: usize },
}

/// What was answered.
#[derive(Debug)]
pub(super) struct Told {
    /// 0: there is none, by a protocol without.
    pub(super) status: i64,
    pub(super) header: Header,
    pub(super) length: Option<u64>,
    pub(super) memory: Memory,
}

/// Who waits for it.
pub(super) enum Who {
    Pending(Pending),
    Thread(Promise<Told>),
}

/// What a client knows of the file, by which answers are checked.
pub(super) type Check = dyn Fn(&What, &Told) -> Result<()> + Send + Sync;

pub(super) struct Job {
    pub(super) what: What,
    pub(super) owner: u64,
    pub(super) who: Who,
    pub(super) check: Arc<Check>,
    pub(super) memory: Memory,
}

impl Job {
    fn end(self, result: Result<Told>) -> Option<Wake> {
        match self.who {
            Who::Thread(promise) => {
                promise.answer(result);
                None
            }
            Who::Pending(pending) => Some(pending.complete(result.map(|told| match self.what {
                What::Part { length, .. } => Payload::Memory(told.memory, 0..length),
                What::Head => Payload::None,
            }))),
        }
    }
}

/// See the module. Dropping it ends the thread.
pub(super) struct Engine {
    shared: Arc<Shared>,
    buffers: Buffers,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    queue: Mutex<Queue>,
    waker: Waker,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    /// Clients that have gone.
    left: Vec<u64>,
    owners: u64,
    closed: bool,
}

impl Engine {
    /// Starts the thread.
    ///
    /// # Errors
    /// libcurl cannot be used, or there can be no thread.
    pub(super) fn new(settings: Settings, connections: u32) -> anyhow::Result<Self> {
        let multi = Multi::new(connections)?;
        // What this libcurl does not know is an error now.
        settings.easy()?;
        let shared = Arc::new(Shared { queue: Mutex::default(), waker: multi.waker() });
        let worker = Worker {
            shared: shared.clone(),
            multi,
            settings,
            idle: Vec::new(),
            flying: HashMap::new(),
            next: 0,
            place: None,
        };
        let thread = std::thread::Builder::new().name("curl".into()).spawn(move || {
            let shared = worker.shared.clone();
            if catch_unwind(AssertUnwindSafe(|| worker.run())).is_err() {
                log::error!("curl: the thread of the transfers panicked: nothing can be read any more");
            }
            let mut queue = shared.queue.lock();
            queue.closed = true;
            // To drop them is to say so.
            queue.jobs.clear();
        })?;
        Ok(Engine { shared, buffers: Buffers::default(), thread: Some(thread) })
    }

    /// Memory for an answer.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub(super) fn memory(&self, length: usize) -> Result<Memory> {
        self.buffers.take(length)
    }

    /// A number for one more client.
    pub(super) fn owner(&self) -> u64 {
        let mut queue = self.shared.queue.lock();
        queue.owners += 1;
        queue.owners
    }

    /// A client has gone: nobody waits for its answers.
    pub(super) fn leave(&self, owner: u64) {
        self.shared.queue.lock().left.push(owner);
        self.shared.waker.wake();
    }

    /// Has a request made; it is answered, whatever happens.
    pub(super) fn submit(&self, job: Job) {
        let mut queue = self.shared.queue.lock();
        if !queue.closed {
            queue.jobs.push_back(job);
            drop(queue);
            self.shared.waker.wake();
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shared.queue.lock().closed = true;
        self.shared.waker.wake();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("curl: the thread of the transfers panicked");
        }
    }
}

/// A job whose transfer runs.
struct Flying {
    job: Job,
    /// It was sent where a redirection had led to before.
    direct: bool,
}

struct Worker {
    shared: Arc<Shared>,
    multi: Multi<Answer>,
    settings: Settings,
    idle: Vec<Easy<Answer>>,
    flying: HashMap<u64, Flying>,
    next: u64,
    /// Where the last redirection led to, and when that was.
    place: Option<(CString, Instant)>,
}

impl Worker {
    fn run(mut self) {
        let mut waiting = VecDeque::new();
        let mut wakes = Wakes::default();
        loop {
            let (left, closed) = {
                let mut queue = self.shared.queue.lock();
                waiting.extend(queue.jobs.drain(..));
                (std::mem::take(&mut queue.left), queue.closed)
            };
            if closed {
                return;
            }
            if !left.is_empty() {
                self.forget(&left, &mut waiting, &mut wakes);
            }
            while self.multi.len() < MOST
                && let Some(job) = waiting.pop_front()
            {
                self.start(job, &mut wakes);
            }
            let ended = self.multi.perform();
            let idle = ended.is_empty();
            for ended in ended {
                if let Some(job) = self.end(ended, &mut wakes) {
                    waiting.push_front(job);
                }
            }
            wakes.clear();
            if idle {
                self.multi.wait(PATIENCE);
            }
        }
    }

    fn start(&mut self, job: Job, wakes: &mut Wakes) {
        match self.prepare(&job) {
            Ok((mut easy, direct)) => {
                let mut job = job;
                let wanted = match job.what {
                    What::Head => 0,
                    What::Part { length, .. } => length,
                };
                easy.sink().begin(std::mem::take(&mut job.memory), wanted);
                self.next += 1;
                self.flying.insert(self.next, Flying { job, direct });
                self.multi.start(self.next, easy);
            }
            Err(e) => wakes.extend(job.end(Err(Error::new(Errno::EIO, format!("{e:#}"))))),
        }
    }

    /// A transfer for a job, and whether it goes where a redirection has led to before.
    fn prepare(&mut self, job: &Job) -> anyhow::Result<(Easy<Answer>, bool)> {
        let mut easy = match self.idle.pop() {
            Some(easy) => easy,
            None => self.settings.easy()?,
        };
        self.settings.refresh(&mut easy)?;
        let place = self.place.as_ref().filter(|(_, since)| since.elapsed() < REMEMBERED);
        let direct = place.is_some() && job.what != What::Head;
        match place.filter(|_| direct) {
            Some((url, _)) => easy.set_text(Opt::Url, url)?,
            None => easy.set_text(Opt::Url, &self.settings.url)?,
        }
        match job.what {
            What::Head => easy.set_number(Opt::NoBody, 1)?,
            What::Part { offset, length } => {
                easy.set_number(Opt::NoBody, 0)?;
                let range = format!("{offset}-{}", offset + length as u64 - 1);
                easy.set_text(Opt::Range, &CString::new(range)?)?;
            }
        }
        Ok((easy, direct))
    }

    /// A transfer has ended. Some: it has to be made once more.
    fn end(&mut self, ended: Ended<Answer>, wakes: &mut Wakes) -> Option<Job> {
        let Ended { number, mut easy, result } = ended;
        let Flying { mut job, direct } = self.flying.remove(&number)?;
        let (status, length) = (easy.status(), easy.content_length());
        if direct && status >= 400 {
            // The place was good for some time only.
            self.place = None;
            job.memory = std::mem::take(&mut easy.sink().memory);
            self.idle.push(easy);
            return Some(job);
        }
        if (200..300).contains(&status) && !direct {
            let moved = easy.effective_url().filter(|url| *url != self.settings.url);
            self.place = moved.map(|url| (url, Instant::now()));
        }
        let answer = std::mem::take(easy.sink());
        let told = Told { status, header: answer.header, length, memory: answer.memory };
        let result = match (result, job.what) {
            (Err(_), _) if answer.too_much && status < 300 => {
                let more = || Error::new(Errno::EIO, "the server sends more than was asked for");
                (job.check)(&job.what, &told).and_then(|()| Err(more()))
            }
            // A status says more than that its text was not wanted.
            (Err(why), what) => (job.check)(&what, &told).and(Err(Error::new(Errno::EIO, why))),
            (Ok(()), what) => (job.check)(&what, &told).and_then(|()| match answer.got == answer.wanted {
                true => Ok(()),
                false => Err(Error::new(
                    Errno::EIO,
                    format!("the server has sent {} bytes instead of {}", answer.got, answer.wanted),
                )),
            }),
        };
        self.idle.push(easy);
        wakes.extend(job.end(result.map(|()| told)));
        None
    }

    /// Ends what clients have asked for that have gone.
    fn forget(&mut self, left: &[u64], waiting: &mut VecDeque<Job>, wakes: &mut Wakes) {
        let gone = |job: &Job| left.contains(&job.owner);
        let numbers: Vec<u64> =
            self.flying.iter().filter(|(_, flying)| gone(&flying.job)).map(|(number, _)| *number).collect();
        let mut jobs: Vec<Job> = Vec::new();
        for number in numbers {
            self.idle.extend(self.multi.cancel(number));
            jobs.extend(self.flying.remove(&number).map(|flying| flying.job));
        }
        let (forgotten, kept): (VecDeque<Job>, _) = std::mem::take(waiting).into_iter().partition(gone);
        *waiting = kept;
        for job in jobs.into_iter().chain(forgotten) {
            wakes.extend(job.end(Err(Error::new(Errno::ESHUTDOWN, "the client is gone"))));
        }
    }
}
