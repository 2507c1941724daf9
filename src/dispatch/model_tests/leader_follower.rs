//! Leader and follower: one leads at a time, and each request is answered once.

use std::sync::{
    Arc,
    // What the model counts, which is no event in it.
    atomic::{AtomicUsize, Ordering::Relaxed},
};

use shuttle::{
    rand::Rng as _,
    thread::{ThreadId, current},
};

use super::check;
use crate::{
    Entered, Executor, Job,
    leader_follower::{Lead, Run, run},
    sync::Bug,
};

const JOBS: usize = 4;

#[derive(Debug)]
struct Number(usize);

impl Job for Number {
    fn bytes(&self) -> usize {
        1
    }
}

struct Runner {
    executor: Executor<Number>,
    answers: [AtomicUsize; JOBS],
    takeovers: AtomicUsize,
}

impl Runner {
    fn answered(&self, reply: Vec<usize>) {
        assert_eq!(reply.len(), 1, "each request has a reply of its own");
        self.answers[reply[0]].fetch_add(1, Relaxed);
    }
}

impl Run for Runner {
    type Job = Number;
    type Reply = Vec<usize>;

    fn enter(&self, bytes: usize) -> Option<Entered<'_, Number>> {
        self.executor.enter(bytes)
    }

    fn run(&self, job: Number, reply: &mut Vec<usize>) {
        // Some are slow.
        for _ in 0..shuttle::rand::thread_rng().gen_range(0..12) {
            shuttle::thread::yield_now();
        }
        reply.push(job.0);
    }

    fn send(&self, reply: Vec<usize>) {
        self.answered(reply);
    }
}

struct Connection {
    runner: Arc<Runner>,
    next: usize,
    leader: Option<ThreadId>,
    ended: bool,
}

impl Lead for Connection {
    type Runner = Runner;
    type End = bool;

    fn runner(&self) -> Arc<Runner> {
        self.runner.clone()
    }

    fn name(&self) -> &str {
        "model"
    }

    fn lead(&mut self) -> Result<Number, bool> {
        assert!(!self.ended, "two lead: one after the end");
        assert_eq!(*self.leader.get_or_insert(current().id()), current().id(), "two lead");
        shuttle::thread::yield_now();
        self.next += 1;
        if self.next <= JOBS { Ok(Number(self.next - 1)) } else { Err(true) }
    }

    fn hand_over(&mut self, job: Number) -> Result<(), bool> {
        self.runner.answered(vec![job.0]);
        Ok(())
    }

    fn take_reply(&mut self) -> Vec<usize> {
        Vec::new()
    }

    fn answer(&mut self, reply: Vec<usize>) -> Result<(), bool> {
        assert_eq!(self.leader, Some(current().id()), "two lead");
        self.runner.answered(reply);
        Ok(())
    }

    fn taken_over(&mut self) {
        self.runner.takeovers.fetch_add(1, Relaxed);
        self.leader = Some(current().id());
    }

    fn finish(&mut self, _: &bool) {
        self.ended = true;
    }

    fn lost() -> bool {
        false
    }
}

fn model() -> usize {
    let runner = Arc::new(Runner {
        executor: Executor::new(2),
        answers: Default::default(),
        takeovers: AtomicUsize::new(0),
    });
    assert!(run(Connection { runner: runner.clone(), next: 0, leader: None, ended: false }));
    assert!(runner.answers.iter().all(|answers| answers.load(Relaxed) == 1), "{:?}", runner.answers);
    assert!(runner.executor.is_idle());
    runner.takeovers.load(Relaxed)
}

#[test]
fn one_leads_and_each_request_is_answered_once() {
    let takeovers = Arc::new(AtomicUsize::new(0));
    let count = takeovers.clone();
    let counted = move || {
        count.fetch_add(model(), Relaxed);
    };
    check(counted, true, None);
    assert!(takeovers.load(Relaxed) > 0, "the follower never took the lead");
}

/// What is noticed first differs: two that lead, one that leads after the end, a request without an answer.
#[test]
#[should_panic]
fn finds_a_turn_that_both_take() {
    let model = || {
        model();
    };
    check(model, true, Some(Bug::TurnWithoutExchange));
}
