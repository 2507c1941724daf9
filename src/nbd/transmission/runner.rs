//! What runs the requests of a connection where they may wait, and sends the replies from there.

use std::sync::Arc;

use nbdkit_core::{Client, Errno, Error};
use nbdkit_dispatch::{Entered, Executor, InlinePolicy, Worker, buffer::Payloads, leader_follower::Run};

use crate::{
    buffer::Buffer,
    output::Outbox,
    proto::{Request, cmd},
    requests::{Requests, changes_data},
};

/// A request for a thread.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) request: Request,
    /// The data of a WRITE, else empty.
    pub(crate) payload: Vec<u8>,
}

impl nbdkit_dispatch::Job for Job {
    fn bytes(&self) -> usize {
        match self.request.command {
            cmd::READ => self.request.length as usize,
            _ => self.payload.len(),
        }
    }
}

/// What the thread that leads a connection shares with those that run its requests.
pub(super) struct Shared {
    pub(super) requests: Requests,
    pub(super) outbox: Arc<Outbox>,
    pub(super) executor: Executor<Job>,
    pub(super) payloads: Payloads,
    pub(super) policy: InlinePolicy,
}

impl Shared {
    fn client(&self) -> &Client {
        self.requests.session.client()
    }

    /// The body of a thread of the executor.
    pub(super) fn worker(self: &Arc<Self>) -> Worker {
        let shared = self.clone();
        Box::new(move || {
            let mut out = Buffer::default();
            shared.executor.work(|job| {
                shared.run(job, &mut out);
                shared.outbox.send(&mut out);
            });
            out.give_back();
        })
    }
}

impl Run for Shared {
    type Job = Job;
    type Reply = Buffer;

    fn enter(&self, bytes: usize) -> Option<Entered<'_, Job>> {
        self.executor.enter(bytes)
    }

    /// Runs a request that may wait, unless nobody waits for it any more, and appends its reply.
    fn run(&self, job: Job, out: &mut Buffer) {
        if changes_data(job.request.command) || !self.client().gone.is_raised() {
            self.policy.measure(|| self.requests.run(&job.request, &job.payload, out));
        } else if !self.outbox.is_dead() {
            // Nobody waits for the data; a client of a server that stops waits for a reply.
            let gone = Error::new(Errno::ESHUTDOWN, "the client or the server stops");
            self.requests.fail(&job.request, &gone, None, out);
        }
        self.payloads.recycle(job.payload);
    }

    fn send(&self, mut reply: Buffer) {
        self.outbox.send(&mut reply);
    }
}
