use std::{os::fd::BorrowedFd, sync::Arc, thread};

use nbdkit_core::{Payload, Task};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::*;

fn completed(queue: &Arc<CompletionQueue>, tag: u64) -> Completed {
    let mut task = Task::new(queue.clone());
    task.arm(tag);
    Completed { task, result: Ok(()), payload: Payload::None }
}

fn tags(queue: &CompletionQueue) -> Vec<u64> {
    let mut taken = Vec::new();
    queue.take(&mut taken);
    taken.iter().map(|completed| completed.task.tag()).collect()
}

fn is_readable(fd: BorrowedFd<'_>, timeout: i64) -> bool {
    let timeout = Timespec { tv_sec: timeout, tv_nsec: 0 };
    poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&timeout)).unwrap() > 0
}

#[test]
fn what_is_posted_is_taken_once_and_in_order() {
    let queue = Arc::<CompletionQueue>::default();
    assert!(queue.is_empty());
    for tag in 0..3 {
        assert!(!queue.post(completed(&queue, tag)), "nobody sleeps");
    }
    assert!(!queue.is_empty());
    assert_eq!(tags(&queue), [0, 1, 2]);
    assert!(queue.is_empty());
    assert_eq!(tags(&queue), []);
}

#[test]
fn a_sleeper_is_woken_once() {
    let queue = Arc::<CompletionQueue>::default();
    let fd = queue.fall_asleep().unwrap().expect("nothing was posted");
    assert!(!is_readable(fd, 0));
    assert!(queue.post(completed(&queue, 1)), "it has to be woken");
    assert!(!queue.post(completed(&queue, 2)), "by one");
    queue.wake();
    assert!(is_readable(fd, 0));
    queue.wake_up(true);
    assert!(!is_readable(fd, 0));
    assert!(queue.fall_asleep().unwrap().is_none(), "there is something to be taken first");
    assert_eq!(tags(&queue), [1, 2]);
    assert!(queue.fall_asleep().unwrap().is_some());
    queue.wake_up(false);
    assert!(!queue.post(completed(&queue, 3)), "it is awake");
}

#[test]
fn nothing_is_lost_between_falling_asleep_and_posting() {
    const COUNT: u64 = 20_000;
    let queue = Arc::<CompletionQueue>::default();
    let posting = queue.clone();
    let poster = thread::spawn(move || {
        for tag in 0..COUNT {
            if posting.post(completed(&posting, tag)) {
                posting.wake();
            }
        }
    });
    let mut next = 0;
    while next < COUNT {
        for tag in tags(&queue) {
            assert_eq!(tag, next);
            next += 1;
        }
        if next == COUNT {
            break;
        }
        if let Some(fd) = queue.fall_asleep().unwrap() {
            let woken = is_readable(fd, 20);
            assert!(woken, "a completion was posted and nobody was woken");
            queue.wake_up(woken);
        }
    }
    poster.join().unwrap();
}
