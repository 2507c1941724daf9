//! The requests under way: each completion finds its own note, in whatever order they come and from whatever thread.

use std::{
    ffi::OsStr,
    sync::{Arc, Mutex},
    time::Duration,
};

use nbdkit_core::{
    Caps, Chain, Client, Errno, Error, Flags, Handle, Info, Open, Outcome, Peer, Pending, Plugin, Request,
    Result, Session, ShutdownFlag,
};

use super::check;
use crate::{CompletionQueue, Offered, Started, sync::Bug};

const REQUESTS: u64 = 4;

/// Starts writes. A mutex of the machine's: no event in the model.
#[derive(Clone, Default)]
struct Disk(Arc<Mutex<Vec<(Pending, u64)>>>);

impl Plugin for Disk {
    fn info(&self) -> Info {
        Info::bundled("disk", "a disk for models", "")
    }

    fn open(&self, _: &Open) -> Result<Box<dyn Handle>> {
        Ok(Box::new(self.clone()))
    }
}

impl Handle for Disk {
    fn capabilities(&self) -> Result<Caps> {
        Ok(Caps::of_size(1 << 40).with_write(true))
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        match request.start() {
            Some((pending, started)) => {
                self.0.lock().unwrap().push((pending, request.offset()));
                Outcome::Started(started)
            }
            None => Outcome::NeedsThread,
        }
    }
}

fn session(disk: &Disk) -> Session {
    let mut chain = Chain::new(Box::new(disk.clone()), Vec::new());
    chain.config_complete().unwrap();
    chain.get_ready().unwrap();
    let client = Arc::new(Client::new(1, Peer::Local, Arc::new(ShutdownFlag::new())));
    Arc::new(Arc::new(chain).connect(client, false).unwrap()).open(OsStr::new(""), false).unwrap()
}

fn model() {
    let disk = Disk::default();
    let session = session(&disk);
    let queue = Arc::<CompletionQueue>::default();
    let mut started = Started::new(queue.clone());
    let completer = || {
        let disk = disk.clone();
        shuttle::thread::spawn(move || {
            for _ in 0..REQUESTS / 2 {
                // The one that came last.
                let (pending, offset) = loop {
                    if let Some(one) = disk.0.lock().unwrap().pop() {
                        break one;
                    }
                    shuttle::thread::yield_now();
                };
                drop(pending.complete(Err(Error::new(Errno::EIO, format!("at {offset}")))));
            }
        })
    };
    let completers = [completer(), completer()];
    let (mut offered, mut answered) = (0, Vec::new());
    let mut taken = Vec::new();
    while (answered.len() as u64) < REQUESTS {
        if offered < REQUESTS && started.len() < 3 {
            let request = Request::write(&[1; 512], offered * 512, Flags::empty());
            assert!(matches!(started.offer(&session, request, offered, 512, true), Offered::Started));
            offered += 1;
        } else {
            queue.wait(Duration::MAX);
        }
        queue.take(&mut taken);
        for completed in taken.drain(..) {
            let note: u64 = started.take(&completed).expect("a note for each");
            let said = completed.result.as_ref().unwrap_err().to_string();
            assert!(said.contains(&format!("at {}", note * 512)), "{said} is not the end of {note}");
            answered.push(note);
            started.recycle(completed);
        }
    }
    answered.sort_unstable();
    assert!(answered.into_iter().eq(0..REQUESTS));
    assert!(started.is_empty());
    completers.into_iter().for_each(|completer| completer.join().unwrap());
}

#[test]
fn each_completion_finds_its_note() {
    check(model, false, None);
}

#[test]
#[should_panic]
fn finds_a_place_that_is_given_away_twice() {
    check(model, false, Some(Bug::PlaceStaysFree));
}
