//! The executor: each request runs once, whatever its threads do meanwhile.

use std::{
    sync::{
        Arc,
        // What the model counts, which is no event in it.
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use super::check;
use crate::{Executor, Job, Worker, sync::Bug};

const JOBS: usize = 4;
const LIMIT: usize = 2;

struct Number(usize);

impl Job for Number {
    fn bytes(&self) -> usize {
        1 << self.0
    }
}

fn model() {
    let executor = Arc::new(Executor::new(LIMIT));
    let runs: Arc<[AtomicUsize; JOBS]> = Arc::default();
    let at_once = Arc::new(AtomicUsize::new(0));
    for number in 0..JOBS {
        while !executor.wait_for_room(Duration::MAX) {}
        let worker = || -> Worker {
            let (executor, runs, at_once) = (executor.clone(), runs.clone(), at_once.clone());
            Box::new(move || {
                executor.work(|job: Number| {
                    assert!(at_once.fetch_add(1, Relaxed) < LIMIT, "more threads than may be");
                    shuttle::thread::yield_now();
                    runs[job.0].fetch_add(1, Relaxed);
                    at_once.fetch_sub(1, Relaxed);
                })
            })
        };
        assert!(executor.submit(Number(number), "model", worker).is_ok());
        if number % 2 == 1 {
            while !executor.wait_for_idle(Duration::MAX) {
                let lost = executor.has_lost_work();
                assert!(!lost, "work, and no thread for it");
            }
            assert!(runs[..=number].iter().all(|runs| runs.load(Relaxed) == 1), "{runs:?}");
        }
    }
    executor.close();
    assert!(executor.is_idle());
    assert!(runs.iter().all(|runs| runs.load(Relaxed) == 1), "{runs:?}");
}

#[test]
fn each_request_runs_once() {
    check(model, false, None);
}

#[test]
fn each_request_runs_once_while_threads_leave() {
    check(model, true, None);
}

#[test]
#[should_panic(expected = "no thread for it")]
fn finds_a_thread_that_leaves_work_behind() {
    check(model, true, Some(Bug::LeavesWithoutALook));
}

#[test]
#[should_panic(expected = "deadlock")]
fn finds_a_notice_that_comes_too_early() {
    check(model, false, Some(Bug::NoticeBeforeTheWork));
}
