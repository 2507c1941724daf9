//! The threads that decode: one for each CPU, made when they are first needed, shared by all exports and connections.
//!
//! What requests wait for comes before what is only likely to be asked for.

use std::{
    collections::VecDeque,
    ops::Range,
    sync::Arc,
    thread::{self, JoinHandle},
};

use nbdkit_core::{Errno, Error};
use parking_lot::{Condvar, Mutex};

use super::{disk::Disk, source::User};

/// A piece to be decoded.
pub(super) struct Job {
    pub(super) disk: Arc<Disk>,
    pub(super) user: User,
    pub(super) piece: Range<u64>,
    /// See [`Format::lane`](super::Format::lane).
    pub(super) lane: Option<u64>,
}

impl Job {
    /// What only one job at a time may have.
    fn lane(&self) -> Option<(usize, u64)> {
        self.lane.map(|lane| (Arc::as_ptr(&self.disk) as usize, lane))
    }
}

/// See the module.
#[derive(Default)]
pub(super) struct Pool {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
}

#[derive(Default)]
struct Queue {
    wanted: VecDeque<Job>,
    ahead: VecDeque<Job>,
    /// Lanes with a job that runs.
    busy: Vec<(usize, u64)>,
    threads: usize,
    idle: usize,
    stopped: bool,
}

impl Queue {
    fn take(&mut self) -> Option<Job> {
        let busy = &self.busy;
        let free = |job: &Job| job.lane().is_none_or(|lane| !busy.contains(&lane));
        let job = match self.wanted.iter().position(free) {
            Some(index) => self.wanted.remove(index),
            None => self.ahead.iter().position(free).and_then(|index| self.ahead.remove(index)),
        }?;
        self.busy.extend(job.lane());
        Some(job)
    }
}

impl Pool {
    /// How many pieces are decoded at once.
    pub(super) fn width() -> usize {
        thread::available_parallelism().map_or(1, usize::from)
    }

    /// Decodes pieces that requests wait for, or `ahead` of those.
    pub(super) fn push(&self, jobs: Vec<Job>, ahead: bool) {
        if jobs.is_empty() {
            return;
        }
        let mut queue = self.shared.queue.lock();
        let missing = (jobs.len() + queue.wanted.len()).saturating_sub(queue.idle);
        let new = missing.min(Self::width().saturating_sub(queue.threads));
        queue.threads += new;
        if ahead {
            queue.ahead.extend(jobs)
        } else {
            queue.wanted.extend(jobs)
        }
        drop(queue);
        self.shared.wake.notify_all();
        for _ in 0..new {
            self.start_thread();
        }
    }

    fn start_thread(&self) {
        let shared = self.shared.clone();
        match thread::Builder::new().name("decompress".into()).spawn(move || shared.run()) {
            Ok(thread) => self.threads.lock().push(thread),
            Err(e) => {
                let mut queue = self.shared.queue.lock();
                queue.threads -= 1;
                if queue.threads > 0 {
                    return;
                }
                // Nobody will ever come for these.
                let jobs: Vec<_> = queue.wanted.drain(..).collect();
                let ahead: Vec<_> = queue.ahead.drain(..).collect();
                drop(queue);
                let error = Error::new(Errno::EAGAIN, format!("there can be no thread to decompress: {e}"));
                for job in jobs.into_iter().chain(ahead) {
                    job.disk.fail(&job.piece, &error);
                }
            }
        }
    }

    /// What was queued ahead is waited for now.
    pub(super) fn promote(&self, disk: &Arc<Disk>, start: u64) {
        let mut queue = self.shared.queue.lock();
        let same = |job: &Job| job.piece.start == start && Arc::ptr_eq(&job.disk, disk);
        if let Some(job) = queue.ahead.iter().position(same).and_then(|index| queue.ahead.remove(index)) {
            queue.wanted.push_back(job);
        }
    }

    /// Takes out what a connection that closes has queued, for others to be asked in its place.
    pub(super) fn take(&self, is_theirs: impl Fn(&User) -> bool) -> Vec<Job> {
        let mut queue = self.shared.queue.lock();
        let mut taken = Vec::new();
        let Queue { wanted, ahead, .. } = &mut *queue;
        for list in [wanted, ahead] {
            let (theirs, others) = list.drain(..).partition::<VecDeque<_>, _>(|job| is_theirs(&job.user));
            taken.extend(theirs);
            *list = others;
        }
        taken
    }

    /// Ends the threads.
    pub(super) fn stop(&self) {
        self.shared.queue.lock().stopped = true;
        self.shared.wake.notify_all();
        for thread in std::mem::take(&mut *self.threads.lock()) {
            if thread.join().is_err() {
                log::error!("a decompressing thread panicked");
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn run(&self) {
        let mut queue = self.queue.lock();
        loop {
            if queue.stopped {
                return;
            }
            let Some(job) = queue.take() else {
                queue.idle += 1;
                self.wake.wait(&mut queue);
                queue.idle -= 1;
                continue;
            };
            drop(queue);
            let lane = job.lane();
            let again = Disk::run(job);
            queue = self.queue.lock();
            queue.wanted.extend(again);
            if let Some(lane) = lane {
                queue.busy.retain(|busy| *busy != lane);
                self.wake.notify_one();
            }
        }
    }
}
