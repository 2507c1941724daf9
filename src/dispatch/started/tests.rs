use std::ffi::OsStr;

use nbdkit_core::{
    Call, Caps, Chain, Client, Data, Flags, Handle, Info, Op, Open, Payload, Peer, Pending, Plugin,
    ShutdownFlag, Support,
};
use parking_lot::Mutex;

use super::*;

/// Starts writes, and answers the rest at once; flushes need a thread.
#[derive(Clone, Default)]
struct Disk(Arc<Mutex<Vec<Pending>>>);

impl Plugin for Disk {
    fn info(&self) -> Info {
        Info::bundled("disk", "a disk for tests", "")
    }

    fn open(&self, _: &Open) -> Result<Box<dyn Handle>> {
        Ok(Box::new(self.clone()))
    }
}

impl Handle for Disk {
    fn capabilities(&self) -> Result<Caps> {
        Ok(Caps::of_size(1 << 40).with_write(true).with_flush(true).with_fua(Support::Emulate))
    }

    fn pread(&self, buf: &mut [u8], _: u64) -> Result<()> {
        buf.fill(7);
        Ok(())
    }

    fn pwrite(&self, _: &[u8], _: u64, _: Flags) -> Result<()> {
        Ok(())
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        match request.op() {
            Op::Flush => Outcome::NeedsThread,
            Op::Write => match request.start() {
                Some((pending, started)) => {
                    self.0.lock().push(pending);
                    Outcome::Started(started)
                }
                None => Outcome::NeedsThread,
            },
            _ => request.run(self),
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

fn write(started: &mut Started<u32>, session: &Session, note: u32, bytes: usize) -> Offered<u32> {
    let request = Request::write(b"data", 0, Flags::empty());
    started.offer(session, request, note, bytes, true)
}

#[test]
fn notes_come_back_with_their_requests() {
    let disk = Disk::default();
    let session = session(&disk);
    let mut started = Started::new(Arc::default());
    let mut buf = [0; 4];
    let read = started.offer(&session, Request::read(&mut buf, 0), 1, 4, true);
    assert!(matches!(read, Offered::Done(Ok(()), 1)) && buf == [7; 4]);
    let flush = Request::new(Call::new(Op::Flush, 0, 0), Data::None);
    assert!(matches!(started.offer(&session, flush, 2, 0, true), Offered::NeedsThread(2)));
    for note in 3..6 {
        assert!(matches!(write(&mut started, &session, note, 4), Offered::Started));
    }
    assert_eq!(started.len(), 3);
    // They end in another order.
    let mut pending = std::mem::take(&mut *disk.0.lock());
    pending.rotate_left(1);
    pending.into_iter().for_each(|pending| drop(pending.complete(Ok(Payload::None))));
    let mut ended = Vec::new();
    started.queue().clone().take(&mut ended);
    let mut notes = Vec::new();
    for mut completed in ended {
        session.finish(&mut completed);
        notes.push(started.take(&completed).unwrap());
        assert_eq!(started.take(&completed), None, "once");
        started.recycle(completed);
    }
    assert_eq!(notes, [4, 5, 3]);
    assert!(started.is_empty());
}

#[test]
fn places_and_tasks_are_used_again() {
    let disk = Disk::default();
    let session = session(&disk);
    let mut started = Started::new(Arc::default());
    for round in 0..100 {
        for note in 0..4 {
            assert!(matches!(write(&mut started, &session, note, 4), Offered::Started));
        }
        // Dropping one fails it.
        disk.0.lock().clear();
        let mut ended = Vec::new();
        started.queue().clone().take(&mut ended);
        assert_eq!(ended.len(), 4, "round {round}");
        for mut completed in ended {
            session.finish(&mut completed);
            assert!(completed.result.is_err());
            assert!(started.take(&completed).is_some());
            started.recycle(completed);
        }
    }
    assert_eq!((started.notes.len(), started.tasks.len()), (4, 4));
    started.give_back();
    assert_eq!((started.notes.capacity(), started.tasks.capacity()), (0, 0));
}

#[test]
fn with_too_many_bytes_nothing_is_started() {
    let disk = Disk::default();
    let session = session(&disk);
    let mut started = Started::new(Arc::default());
    assert!(matches!(write(&mut started, &session, 1, BYTES), Offered::Started));
    assert!(matches!(write(&mut started, &session, 2, 1), Offered::NeedsThread(2)));
    let order_kept = started.offer(&session, Request::write(b"x", 0, Flags::empty()), 3, 1, false);
    assert!(matches!(order_kept, Offered::NeedsThread(3)));
    disk.0.lock().clear();
    let mut ended = Vec::new();
    started.queue().clone().take(&mut ended);
    assert_eq!(started.take(&ended[0]), Some(1));
    assert!(matches!(write(&mut started, &session, 4, 1), Offered::Started));
}

#[test]
fn nothing_is_lent_by_a_disk_that_has_no_file() {
    let session = session(&Disk::default());
    let mut started = Started::<u32>::new(Arc::default());
    assert!(started.borrow(&session, Request::new(Call::new(Op::Write, 0, 9), Data::None)).is_none());
}
