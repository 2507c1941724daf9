//! A disk whose requests end later, on another thread, or need a thread; it allocates nothing itself.

use std::{collections::VecDeque, sync::Arc};

use nbdkit_core::{
    Buffers, Call, Caps, Data, Error, Flags, Handle, Info, Op, Open, Outcome, Payload, Pending, Plugin,
    Request, Result, Wake,
};
use parking_lot::{Condvar, Mutex};

use super::DISK;

/// How the disk answers.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Started,
    OnThread,
}

/// See the module.
pub(crate) struct Disk {
    way: Way,
    queue: Arc<Queue>,
}

/// What was started. Locks of parking_lot's own: those of the test are not counted.
struct Queue {
    started: Mutex<VecDeque<(Pending, Call)>>,
    more: Condvar,
    buffers: Buffers,
}

impl Disk {
    pub(crate) fn new(way: Way) -> Self {
        let started = Mutex::new(VecDeque::with_capacity(1024));
        let queue = Arc::new(Queue { started, more: Condvar::new(), buffers: Buffers::default() });
        let ender = queue.clone();
        std::thread::spawn(move || ender.end_all());
        Disk { way, queue }
    }
}

impl Queue {
    fn end_all(&self) {
        loop {
            let mut started = self.started.lock();
            while started.is_empty() {
                self.more.wait(&mut started);
            }
            drop(started);
            let mut last = Wake::default();
            loop {
                let next = self.started.lock().pop_front();
                let Some((pending, call)) = next else { break };
                let wake = pending.complete(self.payload(&call));
                if wake.is_covered_by(&last) { wake.forget() } else { last = wake }
            }
            drop(last);
        }
    }

    fn payload(&self, call: &Call) -> Result<Payload> {
        if call.op != Op::Read {
            return Ok(Payload::None);
        }
        let length = call.length as usize;
        Ok(Payload::Memory(self.buffers.take(length)?, 0..length))
    }
}

impl Plugin for Disk {
    fn info(&self) -> Info {
        Info::bundled("later", "a disk whose requests end later", "")
    }

    fn open(&self, _: &Open) -> Result<Box<dyn Handle>> {
        Ok(Box::new(Disk { way: self.way, queue: self.queue.clone() }))
    }
}

impl Handle for Disk {
    fn capabilities(&self) -> Result<Caps> {
        Ok(Caps::of_size(DISK).with_write(true))
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        if self.way == Way::Started
            && matches!(request.data(), Data::Read(_) | Data::Write(_))
            && let Some((pending, started)) = request.start()
        {
            self.queue.started.lock().push_back((pending, *request.call()));
            self.queue.more.notify_one();
            return Outcome::Started(started);
        }
        if request.may_wait() { request.run(self) } else { Outcome::NeedsThread }
    }

    fn pread(&self, buf: &mut [u8], _: u64) -> Result<()> {
        buf.fill(1);
        Ok(())
    }

    fn pwrite(&self, _: &[u8], _: u64, _: Flags) -> Result<()> {
        Ok::<(), Error>(())
    }
}
