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
                // Requests that come slowly.
                while !receivers.0.state.lock().over {
                    drop(receivers.receive());
                    thread::sleep(Duration::from_micros(200));
                }
                tell.send(()).unwrap();
            });
        }
        // The thread of the test is the fourth.
        until(|| active() == 1 && receivers.may_wait());
        let mut receiver = Receiver {
            shared: receivers.0.clone(),
            poll: BusyPoll::new(Awake::default()),
            found: None,
            busy: 0,
            idle: 0,
        };
        for _ in 0..2 * BUSY {
            receiver.found = Some(true);
            receiver.wake_up();
        }
        until(|| active() > 1);
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
    assert_eq!(receivers.0.has_request(), None);
    rustix::io::write(&write, b"x").unwrap();
    assert_eq!(receivers.0.has_request(), Some(()));
    // One that is gone is a reason to read too.
    let gone = Receivers::new(1, File::open("/dev/null").unwrap().into());
    assert_eq!(gone.0.has_request(), Some(()));
}
