use std::{fs::File, sync::mpsc, thread};

use super::*;

/// A device that has no requests.
fn silence() -> (OwnedFd, OwnedFd) {
    rustix::pipe::pipe().unwrap()
}

/// Waits for something that will be.
fn until(it_is_so: impl Fn() -> bool) {
    while !it_is_so() {
        thread::yield_now();
    }
}

#[test]
fn alone_it_is_never_parked_and_never_waits() {
    let (device, _write) = silence();
    let receivers = Receivers::new(1, device);
    for _ in 0..100 {
        let _received = receivers.receive();
        assert!(!receivers.may_wait());
    }
    assert_eq!(receivers.0.active.load(SeqCst), 1);
}

#[test]
fn the_first_stands_by_and_takes_over_from_one_that_is_held_up() {
    let (device, _write) = silence();
    let receivers = &Receivers::new(2, device);
    drop(receivers.receive());
    assert!(!receivers.may_wait(), "the other one may not even have been started");
    thread::scope(|scope| {
        let other = scope.spawn(|| drop(receivers.receive()));
        until(|| receivers.may_wait());
        // Nothing is to be done.
        until(|| receivers.0.asleep.load(SeqCst));
        assert!(!other.is_finished());
        let received = receivers.receive();
        other.join().unwrap();
        assert!(!receivers.may_wait(), "now no thread is on standby");
        drop(received);
    });
}

#[test]
fn those_that_are_too_many_are_parked_and_let_go_when_there_is_much_to_do() {
    const COUNT: usize = 4;
    let (device, _write) = silence();
    let receivers = &Receivers::new(COUNT, device);
    let active = || receivers.0.active.load(SeqCst);
    drop(receivers.receive());
    thread::scope(|scope| {
        let (tell, told) = mpsc::channel();
        for _ in 0..COUNT - 1 {
            let tell = tell.clone();
            scope.spawn(move || {
                // None of these is followed by another one at once.
                while !receivers.0.state.lock().over {
                    drop(receivers.receive());
                }
                tell.send(()).unwrap();
            });
        }
        // The thread of the test is the fourth.
        until(|| active() == 1 && receivers.may_wait());
        let mut receiver = Receiver::new(receivers.0.clone());
        let done = receivers.0.done.load(SeqCst);
        // Short requests need one thread for two CPUs.
        (0..BUSY).for_each(|_| receiver.look(true, Duration::ZERO));
        if receiver.poll.cpus() < 4 {
            assert_eq!((active(), receivers.0.done.load(SeqCst)), (1, done));
        }
        (0..BUSY).for_each(|_| receiver.look(true, LONG * 2));
        until(|| receivers.0.done.load(SeqCst) > done);
        assert!(active() < COUNT, "one is on standby");
        // A thread ends.
        drop(receiver);
        (0..COUNT - 1).for_each(|_| told.recv().unwrap());
    });
}

#[test]
fn a_request_is_seen_before_it_is_read() {
    let (device, write) = silence();
    let receivers = Receivers::new(1, device);
    assert!(!receivers.0.has_request());
    rustix::io::write(&write, b"x").unwrap();
    assert!(receivers.0.has_request());
    // One that is gone is a reason to read too.
    let gone = Receivers::new(1, File::open("/dev/null").unwrap().into());
    assert!(gone.0.has_request());
}
