//! The threads that receive from servers: one for each CPU at most, shared by the connections of all clients, so that no
//! thread waits for an answer.
//!
//! A reactor sleeps in epoll(7), without a timer once nothing is under way. Connections with something to send are put into
//! a list and the reactor is woken, once.

use std::{
    collections::BTreeMap,
    io,
    os::fd::OwnedFd,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Weak,
        atomic::{
            AtomicBool,
            Ordering::{Relaxed, SeqCst},
        },
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nbdkit_core::{Errno, Error, Wakes, sync::Mutex};
use rustix::{
    buffer::spare_capacity,
    event::{EventfdFlags, Timespec, epoll, eventfd},
};

use super::{lane::Lane, wire::Wire};

/// How often it looks for servers that do not answer, while something is under way.
const TICK: Duration = Duration::from_millis(250);
/// The token of the descriptor that wakes it.
const WAKE: u64 = u64::MAX;
/// Events taken at once.
const EVENTS: usize = 64;

/// The reactors of a plugin.
#[derive(Debug, Default)]
pub(super) struct Reactors(Mutex<(Vec<Weak<Reactor>>, usize)>);

impl Reactors {
    /// A reactor for one more client: the next one in turn.
    ///
    /// # Errors
    /// There can be no more threads or descriptors.
    pub(super) fn choose(&self) -> io::Result<Arc<Reactor>> {
        let cpus = thread::available_parallelism().map_or(1, usize::from);
        let (reactors, next) = &mut *self.0.lock();
        let index = *next % cpus;
        *next += 1;
        if reactors.len() <= index {
            reactors.resize_with(index + 1, Weak::new);
        }
        if let Some(reactor) = reactors[index].upgrade() {
            return Ok(reactor);
        }
        let reactor = Arc::new(Reactor::new()?);
        reactors[index] = Arc::downgrade(&reactor);
        Ok(reactor)
    }
}

/// See the module. Dropping it ends the thread.
#[derive(Debug)]
pub(super) struct Reactor {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What connections need of their reactor.
#[derive(Debug)]
pub(super) struct Shared {
    epoll: OwnedFd,
    wake: OwnedFd,
    lanes: Mutex<Lanes>,
    /// Connections with something to send.
    list: Mutex<Vec<Arc<Lane>>>,
    asleep: AtomicBool,
    /// It looks for servers that do not answer.
    ticking: AtomicBool,
    closed: AtomicBool,
    start: Instant,
}

#[derive(Debug, Default)]
struct Lanes {
    list: BTreeMap<u64, Arc<Lane>>,
    next: u64,
}

impl Reactor {
    fn new() -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &wake, epoll::EventData::new_u64(WAKE), epoll::EventFlags::IN)?;
        let shared = Arc::new(Shared {
            epoll,
            wake,
            lanes: Mutex::default(),
            list: Mutex::default(),
            asleep: AtomicBool::new(false),
            ticking: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            start: Instant::now(),
        });
        let theirs = shared.clone();
        let thread = thread::Builder::new().name("nbd".into()).spawn(move || theirs.run())?;
        Ok(Reactor { shared, thread: Some(thread) })
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

impl Drop for Reactor {
    fn drop(&mut self) {
        self.shared.closed.store(true, SeqCst);
        self.shared.wake();
        // The last owner may be a request that ends on the very thread.
        if let Some(thread) = self.thread.take().filter(|t| t.thread().id() != thread::current().id())
            && thread.join().is_err()
        {
            log::error!("nbd: the thread that receives panicked");
        }
    }
}

impl Shared {
    fn wake(&self) {
        // It can only fail when the counter is at its end, and then the thread wakes anyway.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// Milliseconds since it was made.
    pub(super) fn now(&self) -> u64 {
        self.start.elapsed().as_millis() as u64
    }

    /// Whether it waits for something to happen.
    pub(super) fn is_asleep(&self) -> bool {
        self.asleep.load(Relaxed)
    }

    /// A connection has requests under way.
    pub(super) fn is_busy(&self) {
        if !self.ticking.swap(true, SeqCst) {
            self.wake();
        }
    }

    /// Takes in a connection, which is made with its token.
    pub(super) fn add(&self, make: impl FnOnce(u64) -> Arc<Lane>) -> Arc<Lane> {
        let mut lanes = self.lanes.lock();
        let token = lanes.next;
        lanes.next += 1;
        let lane = make(token);
        lanes.list.insert(token, lane.clone());
        lane
    }

    /// A connection is no more.
    pub(super) fn remove(&self, token: u64) {
        self.lanes.lock().list.remove(&token);
    }

    /// Has a connection's output sent.
    pub(super) fn list(&self, lane: &Arc<Lane>) {
        self.list.lock().push(lane.clone());
        if self.asleep.swap(false, SeqCst) {
            self.wake();
        }
    }

    /// Receives from a socket from now on.
    ///
    /// # Errors
    /// There can be no more descriptors.
    pub(super) fn watch(&self, wire: &Wire, token: u64) -> io::Result<()> {
        epoll::add(&self.epoll, wire, epoll::EventData::new_u64(token), epoll::EventFlags::IN)?;
        Ok(())
    }

    /// Tells too when a socket takes more, or no longer.
    ///
    /// # Errors
    /// The socket is not watched.
    pub(super) fn rewatch(&self, wire: &Wire, token: u64, output: bool) -> io::Result<()> {
        let mut flags = epoll::EventFlags::IN;
        flags.set(epoll::EventFlags::OUT, output);
        epoll::modify(&self.epoll, wire, epoll::EventData::new_u64(token), flags)?;
        Ok(())
    }

    /// Receives from a socket no more.
    pub(super) fn forget(&self, wire: &Wire) {
        let _ = epoll::delete(&self.epoll, wire);
    }

    fn lanes(&self) -> Vec<Arc<Lane>> {
        self.lanes.lock().list.values().cloned().collect()
    }

    fn run(&self) {
        let end = catch_unwind(AssertUnwindSafe(|| self.drive()));
        if let Err(e) = end.unwrap_or_else(|_| Err(io::Error::other("the thread panicked"))) {
            log::error!("nbd: nothing is received any more: {e}");
            let error = Error::new(Errno::EIO, "nothing is received from the server any more");
            self.lanes().iter().for_each(|lane| lane.put_down(&error, &mut Wakes::default()));
        }
    }

    fn drive(&self) -> io::Result<()> {
        let (mut list, mut again) = (Vec::<Arc<Lane>>::new(), Vec::new());
        let mut wakes = Wakes::default();
        let mut events = Vec::with_capacity(EVENTS);
        let mut tick = Instant::now();
        while !self.closed.load(SeqCst) {
            std::mem::swap(&mut list, &mut *self.list.lock());
            list.drain(..).for_each(|lane| lane.flush(&mut wakes));
            let more: Vec<Arc<Lane>> = std::mem::take(&mut again);
            again.extend(more.into_iter().filter(|lane| lane.receive(&mut wakes)));
            wakes.clear();

            self.asleep.store(true, SeqCst);
            let work = !again.is_empty() || !self.list.lock().is_empty();
            let patience = match () {
                () if work => Some(Duration::ZERO),
                () if self.ticking.load(SeqCst) => Some(tick.saturating_duration_since(Instant::now())),
                () => None,
            };
            if work {
                self.asleep.store(false, SeqCst);
            }
            let patience = patience
                .map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() });
            let waited = epoll::wait(&self.epoll, spare_capacity(&mut events), patience.as_ref());
            self.asleep.store(false, SeqCst);
            match waited {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
            for event in events.drain(..) {
                self.happened(event, &mut again, &mut wakes);
            }
            if self.ticking.load(SeqCst) && Instant::now() >= tick {
                self.tick(&mut wakes);
                tick = Instant::now() + TICK;
            }
        }
        Ok(())
    }

    fn happened(&self, event: epoll::Event, again: &mut Vec<Arc<Lane>>, wakes: &mut Wakes) {
        let (token, flags) = (event.data.u64(), event.flags);
        if token == WAKE {
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
            return;
        }
        let Some(lane) = self.lanes.lock().list.get(&token).cloned() else { return };
        if flags != epoll::EventFlags::OUT && lane.receive(wakes) {
            again.push(lane.clone());
        }
        if flags.contains(epoll::EventFlags::OUT) {
            lane.flush(wakes);
        }
    }

    /// Looks for servers that do not answer, and for clients that have gone.
    fn tick(&self, wakes: &mut Wakes) {
        self.ticking.store(false, SeqCst);
        let lanes = self.lanes();
        lanes.iter().for_each(|lane| lane.tick(wakes));
        if lanes.iter().any(|lane| lane.len() > 0) {
            self.ticking.store(true, SeqCst);
        }
    }
}
