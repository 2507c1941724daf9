//! Reads and writes that wait in the kernel and not in a thread: an io_uring and the one thread that drives it.
//!
//! Requests put their transfers into a queue; the thread moves them into the ring, waits for whichever ends first and
//! says so. Only this thread touches the ring, and what the kernel reads and writes is memory that the ring owns until the
//! kernel has said that it is done, whatever has become of the client. This is the one module of the plugin, beside
//! `crate::inherit`, with `unsafe`: the kernel is told addresses.

#![allow(unsafe_code)]

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, OwnedFd},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Weak, mpsc},
    thread::{self, JoinHandle},
};

use io_uring::{IoUring, cqueue, opcode, squeue, types::Fd};
use nbdkit_core::{Memory, Pending, Wakes, sync::Mutex};
use rustix::{
    event::{EventfdFlags, PollFlags, eventfd},
    io::{Errno, ReadWriteFlags},
};

use super::submit::Then;

/// Transfers under way at most, of all connections that share a ring.
const DEPTH: usize = 256;
/// Largest transfer in bytes: larger ones keep a device busy from a few threads, and need memory.
pub(super) const LARGEST: usize = 128 << 10;

/// Completions dealt with before their replies are sent and what has come meanwhile is started. Devices end many
/// transfers at once; the client and the device are not to wait for each other.
const ROUND: usize = 16;
/// The completion that says that the queue has something.
const WAKE: u64 = u64::MAX;

/// What happens with a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Read,
    Write {
        /// It is durable when it has ended.
        durable: bool,
    },
}

/// A read into the first `length` bytes of a buffer, or a write of them.
pub(super) struct Transfer {
    pub(super) way: Way,
    pub(super) file: Arc<File>,
    pub(super) offset: u64,
    pub(super) memory: Memory,
    pub(super) length: usize,
    /// Whose request it is.
    pub(super) pending: Pending,
    /// What follows, on the ring's thread.
    pub(super) then: Then,
}

/// The rings of a plugin: one for each CPU at most, shared by the connections.
#[derive(Clone, Debug, Default)]
pub(super) struct Rings(Arc<Mutex<Shares>>);

#[derive(Debug, Default)]
struct Shares {
    rings: Vec<Weak<Ring>>,
    next: usize,
}

impl Rings {
    /// A ring for one more connection: the next one in turn. None: there can be none.
    pub(super) fn choose(&self) -> Option<Arc<Ring>> {
        let cpus = thread::available_parallelism().map_or(1, usize::from);
        let mut shares = self.0.lock();
        let index = shares.next % cpus;
        shares.next += 1;
        if shares.rings.len() <= index {
            shares.rings.resize_with(index + 1, Weak::new);
        }
        if let Some(ring) = shares.rings[index].upgrade() {
            return Some(ring);
        }
        let ring = Ring::new()
            .inspect_err(|e| log::debug!("file: no io_uring, so threads wait: {e}"))
            .ok()
            .map(Arc::new)?;
        shares.rings[index] = Arc::downgrade(&ring);
        Some(ring)
    }
}

/// See the module. Dropping it waits for what is under way.
pub(super) struct Ring {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    /// Ends the wait of the thread.
    wake: OwnedFd,
}

#[derive(Default)]
struct State {
    queue: Vec<Transfer>,
    /// Queued or with the kernel.
    under_way: usize,
    /// The thread waits, or is about to.
    asleep: bool,
    /// Nothing more is taken.
    closed: bool,
}

impl Shared {
    fn wake(&self) {
        // It can only fail when the counter is at its end, and then the thread wakes anyway.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }
}

impl Ring {
    /// A ring of its own.
    ///
    /// # Errors
    /// The kernel has none or does not allow it, or there can be no more threads.
    pub(super) fn new() -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let shared = Arc::new(Shared { state: Mutex::default(), wake });
        let theirs = shared.clone();
        let (tell, told) = mpsc::channel();
        // The ring is made where it will be used: it may know then that nobody else does.
        let thread = thread::Builder::new().name("io_uring".into()).spawn(move || match make() {
            Ok(ring) => {
                let _ = tell.send(Ok(()));
                Driver { ring, shared: theirs, flying: Flying::default(), wakes: Wakes::default() }.run();
            }
            Err(e) => {
                let _ = tell.send(Err(e));
            }
        })?;
        told.recv().map_err(|_| io::Error::other("the thread of the ring has ended"))??;
        Ok(Ring { shared, thread: Some(thread) })
    }

    /// A place for a transfer. None: they are all taken.
    pub(super) fn reserve(&self) -> Option<Place<'_>> {
        let mut state = self.shared.state.lock();
        if state.closed || state.under_way == DEPTH {
            return None;
        }
        state.under_way += 1;
        Some(Place(&self.shared))
    }
}

/// A place for a transfer that is about to start.
pub(super) struct Place<'a>(&'a Shared);

impl Place<'_> {
    /// Starts the transfer.
    pub(super) fn start(self, transfer: Transfer) {
        // The kernel will believe it.
        assert!(transfer.length <= transfer.memory.len(), "a transfer is longer than its buffer");
        let mut state = self.0.state.lock();
        if state.closed {
            // The ring has failed. To drop the transfer is to say so.
            return drop(state);
        }
        state.queue.push(transfer);
        let asleep = std::mem::take(&mut state.asleep);
        drop(state);
        if asleep {
            self.0.wake();
        }
        std::mem::forget(self);
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.state.lock().under_way -= 1;
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.shared.state.lock().closed = true;
        self.shared.wake();
        // The last owner of the disk may be a completion, which runs on the very thread.
        if let Some(thread) = self.thread.take().filter(|t| t.thread().id() != thread::current().id())
            && thread.join().is_err()
        {
            log::error!("file: the thread of the ring panicked");
        }
    }
}

fn make() -> io::Result<IoUring> {
    let entries = DEPTH as u32 * 2;
    // Work of the kernel for this ring waits until the thread asks for completions; since 6.1.
    let mut newest = IoUring::builder();
    newest.setup_single_issuer().setup_defer_taskrun().dontfork();
    let ring = newest.build(entries).or_else(|_| IoUring::builder().dontfork().build(entries))?;
    // It came with the poll that goes on (5.13), which nothing else tells.
    if ring.params().is_feature_resource_tagging() {
        Ok(ring)
    } else {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// The transfers that are with the kernel. Their index is what the kernel knows them by.
struct Flying {
    transfers: Vec<Option<Transfer>>,
    free: Vec<usize>,
}

impl Default for Flying {
    fn default() -> Self {
        Flying { transfers: (0..DEPTH).map(|_| None).collect(), free: (0..DEPTH).collect() }
    }
}

impl Drop for Flying {
    /// There is something left only if the ring failed. The kernel may still use the memory, so it is never given back.
    fn drop(&mut self) {
        for transfer in self.transfers.drain(..).flatten() {
            std::mem::forget(transfer.memory);
            drop(transfer.pending);
        }
    }
}

/// What the thread has.
struct Driver {
    ring: IoUring,
    shared: Arc<Shared>,
    flying: Flying,
    /// Front ends to be woken after this round.
    wakes: Wakes,
}

impl Driver {
    fn run(mut self) {
        let end = catch_unwind(AssertUnwindSafe(|| self.drive()));
        if let Err(e) = end.unwrap_or_else(|_| Err(io::Error::other("the thread panicked"))) {
            log::error!("file: io_uring: {e}");
            // What is queued has failed, and what may come is not taken.
            let queue = {
                let mut state = self.shared.state.lock();
                state.closed = true;
                std::mem::take(&mut state.queue)
            };
            for transfer in queue {
                self.end(transfer, Err(io::ErrorKind::BrokenPipe.into()));
            }
            self.wakes.clear();
        }
    }

    fn drive(&mut self) -> io::Result<()> {
        self.listen()?;
        let mut new = Vec::new();
        let mut entries = Vec::with_capacity(ROUND);
        let mut ended = 0;
        loop {
            let idle = self.ring.completion().is_empty();
            {
                let mut state = self.shared.state.lock();
                state.under_way -= std::mem::take(&mut ended);
                if state.closed && state.under_way == 0 {
                    return Ok(());
                }
                std::mem::swap(&mut new, &mut state.queue);
                state.asleep = idle;
            }
            for transfer in new.drain(..) {
                self.launch(transfer)?;
            }
            match self.ring.submit_and_wait(usize::from(idle)) {
                Ok(_) => {}
                // Interrupted, or short of memory: what has ended is dealt with first.
                Err(e) => match Errno::from_io_error(&e) {
                    Some(Errno::INTR | Errno::BUSY) => {}
                    Some(Errno::AGAIN) => thread::yield_now(),
                    _ => return Err(e),
                },
            }
            if idle {
                self.shared.state.lock().asleep = false;
            }
            entries.extend(self.ring.completion().take(ROUND));
            for entry in entries.drain(..) {
                ended += usize::from(self.note(&entry)?);
            }
            self.wakes.clear();
        }
    }

    /// Deals with a completion of the kernel; true: a transfer has ended.
    fn note(&mut self, entry: &cqueue::Entry) -> io::Result<bool> {
        let result =
            usize::try_from(entry.result()).map_err(|_| io::Error::from_raw_os_error(-entry.result()));
        if entry.user_data() == WAKE {
            result?;
            if !cqueue::more(entry.flags()) {
                self.listen()?;
            }
            return Ok(false);
        }
        let index = entry.user_data() as usize;
        let transfer = self.flying.transfers.get_mut(index).and_then(Option::take);
        let transfer = transfer.ok_or_else(|| io::Error::other("the kernel told of a transfer twice"))?;
        self.flying.free.push(index);
        self.end(transfer, result);
        Ok(true)
    }

    /// Asks to be told when the queue has something.
    fn listen(&mut self) -> io::Result<()> {
        let (fd, readable) = (Fd(self.shared.wake.as_raw_fd()), PollFlags::IN.bits().into());
        // Every write to the counter tells again; it is never read.
        let poll = opcode::PollAdd::new(fd, readable).multi(true).build().user_data(WAKE);
        // SAFETY: the entry names no memory, and the descriptor is open as long as `self.shared` lives.
        unsafe { self.push(&poll) }
    }

    /// Hands a transfer to the kernel.
    fn launch(&mut self, transfer: Transfer) -> io::Result<()> {
        let index = self.flying.free.pop().ok_or_else(|| io::Error::other("too many transfers"))?;
        let slot = self.flying.transfers[index].insert(transfer);
        let (fd, length) = (Fd(slot.file.as_raw_fd()), slot.length as u32);
        let entry = match slot.way {
            Way::Read => opcode::Read::new(fd, slot.memory.as_mut_ptr(), length).offset(slot.offset).build(),
            Way::Write { durable } => {
                let flags = if durable { ReadWriteFlags::DSYNC } else { ReadWriteFlags::empty() };
                opcode::Write::new(fd, slot.memory.as_ptr(), length)
                    .offset(slot.offset)
                    .rw_flags(flags.bits().cast_signed())
                    .build()
            }
        };
        // SAFETY: the buffer is at least `length` bytes long and its memory does not move with it. `flying` keeps it, and
        // the file, until the kernel has told the end of this transfer; after a failure it never gives it back.
        unsafe { self.push(&entry.user_data(index as u64)) }
    }

    /// # Safety
    /// What the entry names stays valid until its completion.
    unsafe fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        // SAFETY: as the caller promises.
        unsafe { self.ring.submission().push(entry) }.map_err(io::Error::other)
    }

    /// Says how a transfer ended.
    fn end(&mut self, transfer: Transfer, result: io::Result<usize>) {
        let Transfer { memory, pending, then, .. } = transfer;
        match catch_unwind(AssertUnwindSafe(|| then.end(pending, result, memory))) {
            Ok(wake) => self.wakes.extend([wake]),
            // Its request was answered when it was dropped.
            Err(_) => log::error!("file: a completion panicked"),
        }
    }
}
