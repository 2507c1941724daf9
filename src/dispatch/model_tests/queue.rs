//! The completion queue: nothing that is posted is lost, and nobody sleeps beside it.

use std::{sync::Arc, time::Duration};

use nbdkit_core::{Completed, Completions as _, Payload, Task};

use super::check;
use crate::{CompletionQueue, sync::Bug};

const POSTERS: u64 = 2;
const EACH: u64 = 2;

fn completed(queue: &Arc<CompletionQueue>, tag: u64) -> Completed {
    let mut task = Task::new(queue.clone());
    task.arm(tag);
    Completed { task, result: Ok(()), payload: Payload::None }
}

/// Posters, and a front end that takes all and sleeps by `sleep` when there is nothing.
fn model(sleep: impl Fn(&CompletionQueue)) {
    let queue = Arc::<CompletionQueue>::default();
    let post = |poster: u64| {
        let queue = queue.clone();
        shuttle::thread::spawn(move || {
            for n in 0..EACH {
                if queue.post(completed(&queue, poster * EACH + n)) {
                    queue.wake();
                }
            }
        })
    };
    let posters: Vec<_> = (0..POSTERS).map(post).collect();
    let mut seen = Vec::new();
    let mut taken = Vec::new();
    loop {
        queue.take(&mut taken);
        seen.extend(taken.drain(..).map(|completed| completed.task.tag()));
        if seen.len() as u64 == POSTERS * EACH {
            break;
        }
        sleep(&queue);
    }
    for poster in 0..POSTERS {
        let own = seen.iter().filter(|tag| **tag / EACH == poster);
        assert!(own.copied().eq(poster * EACH..(poster + 1) * EACH), "lost or out of order: {seen:?}");
    }
    posters.into_iter().for_each(|poster| poster.join().unwrap());
    assert!(queue.is_empty());
}

/// By the descriptor.
fn polls() {
    model(|queue| {
        if let Some(event) = queue.may_sleep().unwrap() {
            event.poll();
            queue.wake_up(true);
        }
    });
}

/// By the descriptor, beside one of its own that may wake it as well.
fn polls_beside_another() {
    model(|queue| {
        if let Some(event) = queue.may_sleep().unwrap() {
            let woken = shuttle::rand::Rng::gen_bool(&mut shuttle::rand::thread_rng(), 0.5);
            if woken {
                event.poll();
            }
            queue.wake_up(woken);
        }
    });
}

/// By the queue's own notice.
fn waits() {
    model(|queue| queue.wait(Duration::MAX));
}

#[test]
fn a_front_end_that_polls_sees_all() {
    check(polls, false, None);
    check(polls_beside_another, false, None);
}

#[test]
fn a_front_end_that_waits_sees_all() {
    check(waits, false, None);
    check(waits, true, None);
}

#[test]
#[should_panic(expected = "deadlock")]
fn finds_a_front_end_that_falls_asleep_too_late() {
    check(polls, false, Some(Bug::AsleepAfterTheLook));
}

#[test]
#[should_panic(expected = "deadlock")]
fn finds_a_notice_that_is_missing() {
    check(waits, false, Some(Bug::NoNotice));
}
