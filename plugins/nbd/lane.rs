//! One connection to the server, whichever socket it has: what is to be sent, what was asked, and what became of it.
//!
//! Requests are sent by the thread that makes them while the connection is quiet, and collected for the reactor while it is
//! busy: a request by itself costs no other thread, and many together cost one send. Only the reactor receives.
//!
//! Two locks, in this order: the sender's, which is held while bytes are handed to the kernel, and that of the requests
//! under way.

use std::{
    collections::VecDeque,
    io::{self, IoSlice},
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use nbdkit_core::{Errno, Error, Memory, Result, Wakes, sync::Mutex};
use nbdkit_proto::{Replies, Request, cmd};

use super::{
    flight::{Flight, Flights},
    handshake::Agreed,
    reactor::Shared,
    receiver::{Lost, Receiver},
    remote::Remote,
    wire::Wire,
};

/// Requests that are sent by those who make them before the reactor is asked to.
const DIRECT: u32 = 2;
/// Data above this is sent from where it is.
const COPIED: usize = 16 << 10;
/// Sends in a row, before others have their turn.
const ROUNDS: usize = 16;
/// Pieces handed to the kernel at once.
const PIECES: usize = 16;
/// Requests a connection may have under way: more wait on threads, of which there are few.
pub(super) const MOST: usize = 1024;
/// To have moved so many bytes is progress.
const PROGRESS: usize = 64 << 10;

/// See the module.
pub(super) struct Lane {
    pub(super) token: u64,
    pub(super) remote: Weak<Remote>,
    pub(super) reactor: Arc<Shared>,
    sender: Mutex<Sender>,
    flights: Mutex<Flights>,
    receiver: Mutex<Option<Receiver>>,
    /// When there was progress, in milliseconds of the reactor.
    progress: AtomicU64,
}

impl std::fmt::Debug for Lane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Lane({})", self.token)
    }
}

/// A socket, or what there is in its place.
enum Link {
    Up(Arc<Wire>),
    /// There will be one: requests wait.
    Waiting,
    /// There is none, since then.
    Down(Arc<Error>, Instant),
}

struct Sender {
    link: Link,
    replies: Replies,
    pieces: VecDeque<Piece>,
    /// So much of the first one was sent.
    sent: usize,
    spare: Vec<u8>,
    /// The reactor will send.
    listed: bool,
    /// It is told when the socket takes more.
    wants_out: bool,
    direct: u32,
    moved: usize,
}

enum Piece {
    Bytes(Vec<u8>),
    Data(Arc<Memory>, usize),
}

impl Piece {
    fn bytes(&self) -> &[u8] {
        match self {
            Piece::Bytes(bytes) => bytes,
            Piece::Data(memory, length) => &memory[..*length],
        }
    }
}

/// The data of a request on its way out.
pub(super) enum Outgoing<'a> {
    None,
    /// To be copied.
    Small(&'a [u8]),
    Shared(Arc<Memory>),
}

impl Sender {
    /// Appends a request.
    fn push(&mut self, request: &Request, data: &Outgoing<'_>) {
        if !matches!(self.pieces.back(), Some(Piece::Bytes(_))) {
            let spare = std::mem::take(&mut self.spare);
            self.pieces.push_back(Piece::Bytes(spare));
        }
        if let Some(Piece::Bytes(bytes)) = self.pieces.back_mut() {
            bytes.extend_from_slice(request.encode(self.replies == Replies::Extended).as_slice());
            if let Outgoing::Small(data) = data {
                bytes.extend_from_slice(data);
            }
        }
        if let Outgoing::Shared(memory) = data {
            self.pieces.push_back(Piece::Data(memory.clone(), request.length as usize));
        }
    }

    /// Sends what it can, in so many steps. False: something is left.
    fn flush(&mut self, wire: &Wire, rounds: usize) -> io::Result<bool> {
        for _ in 0..rounds {
            if self.pieces.is_empty() {
                return wire.flush();
            }
            let mut parts = [IoSlice::new(&[]); PIECES];
            let mut count = 0;
            let mut skip = self.sent;
            for (part, piece) in parts.iter_mut().zip(&self.pieces) {
                *part = IoSlice::new(&piece.bytes()[skip..]);
                (skip, count) = (0, count + 1);
            }
            match wire.send(&parts[..count]) {
                Ok(n) => self.advance(n),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) => return Err(e),
            }
        }
        Ok(self.pieces.is_empty() && wire.flush()?)
    }

    fn advance(&mut self, mut n: usize) {
        self.moved += n;
        while let Some(piece) = self.pieces.front() {
            let left = piece.bytes().len() - self.sent;
            if n < left {
                self.sent += n;
                return;
            }
            n -= left;
            self.sent = 0;
            if let Some(Piece::Bytes(mut bytes)) = self.pieces.pop_front()
                && bytes.capacity() <= PROGRESS
            {
                bytes.clear();
                self.spare = bytes;
            }
        }
    }

    fn clear(&mut self) {
        self.pieces.clear();
        self.sent = 0;
        (self.listed, self.wants_out, self.direct) = (false, false, 0);
    }
}

impl Lane {
    /// A connection without a socket.
    pub(super) fn new(token: u64, remote: Weak<Remote>, reactor: Arc<Shared>) -> Self {
        let sender = Sender {
            link: Link::Waiting,
            replies: Replies::Simple,
            pieces: VecDeque::new(),
            sent: 0,
            spare: Vec::new(),
            listed: false,
            wants_out: false,
            direct: 0,
            moved: 0,
        };
        Lane {
            token,
            remote,
            reactor,
            sender: Mutex::new(sender),
            flights: Mutex::default(),
            receiver: Mutex::new(None),
            progress: AtomicU64::new(0),
        }
    }

    /// Whether it has no socket, nor will get one by itself.
    pub(super) fn is_down(&self) -> bool {
        matches!(self.sender.lock().link, Link::Down(..))
    }

    /// How many requests are under way.
    pub(super) fn len(&self) -> usize {
        self.flights.lock().len()
    }

    fn note_progress(&self) {
        self.progress.store(self.reactor.now(), Relaxed);
    }

    /// Makes a request. It is answered, whatever happens.
    pub(super) fn submit(self: &Arc<Self>, flight: Flight, data: Outgoing<'_>) {
        let mut sender = self.sender.lock();
        if let Link::Down(why, since) = &sender.link {
            let remote = self.remote.upgrade().filter(|remote| remote.may_retry(*since));
            let Some(remote) = remote else {
                let why = why.duplicate();
                drop(sender);
                flight.end(Err(why));
                return;
            };
            if !remote.reconnect(self) {
                let why = why.duplicate();
                drop(sender);
                flight.end(Err(why));
                return;
            }
            sender.link = Link::Waiting;
        }
        let mut request = flight.request;
        let first = {
            let mut flights = self.flights.lock();
            request.cookie = flights.insert(flight);
            flights.len() == 1
        };
        if first {
            self.note_progress();
            self.reactor.is_busy();
        }
        let Link::Up(wire) = &sender.link else { return };
        let wire = wire.clone();
        let quiet = sender.pieces.is_empty() && !sender.listed && !sender.wants_out;
        sender.push(&request, &data);
        if sender.wants_out || sender.listed {
            return;
        }
        if quiet && sender.direct < DIRECT && self.reactor.is_asleep() {
            sender.direct += 1;
            // What is wrong with the socket is the reactor's business.
            if let Ok(true) = sender.flush(&wire, 1) {
                return;
            }
        }
        sender.listed = true;
        drop(sender);
        self.reactor.list(self);
    }

    /// Gives it a socket, over which all requests that wait are made, in their order.
    pub(super) fn install(self: &Arc<Self>, wire: Wire, agreed: &Agreed) -> io::Result<()> {
        let wire = Arc::new(wire);
        let mut sender = self.sender.lock();
        if !matches!(sender.link, Link::Waiting) {
            wire.close();
            return Ok(());
        }
        *self.receiver.lock() = Some(Receiver::new(agreed));
        sender.clear();
        sender.replies = agreed.replies;
        {
            let mut flights = self.flights.lock();
            let mut waiting: Vec<&mut Flight> = flights.iter_mut().collect();
            waiting.sort_by_key(|flight| flight.number);
            for flight in waiting {
                flight.again();
                let data = match &flight.data {
                    Some(data) if flight.request.length as usize > COPIED => Outgoing::Shared(data.clone()),
                    Some(data) => Outgoing::Small(&data[..flight.request.length as usize]),
                    None => Outgoing::None,
                };
                sender.push(&flight.request, &data);
            }
        }
        self.note_progress();
        self.reactor.watch(&wire, self.token)?;
        sender.link = Link::Up(wire);
        sender.listed = true;
        drop(sender);
        self.reactor.list(self);
        Ok(())
    }

    /// On the reactor's thread: the connection was listed, or its socket takes more.
    pub(super) fn flush(self: &Arc<Self>, wakes: &mut Wakes) {
        let mut sender = self.sender.lock();
        sender.listed = false;
        sender.direct = 0;
        let Link::Up(wire) = &sender.link else { return };
        let wire = wire.clone();
        match sender.flush(&wire, ROUNDS) {
            Ok(all) => {
                if sender.moved >= PROGRESS {
                    sender.moved = 0;
                    self.note_progress();
                }
                if all == sender.wants_out {
                    sender.wants_out = !all;
                    if let Err(e) = self.reactor.rewatch(&wire, self.token, !all) {
                        drop(sender);
                        self.lose(&Lost::Io(e), wakes);
                    }
                }
            }
            Err(e) => {
                drop(sender);
                // What it said before is worth more than that it has gone.
                self.receive(wakes);
                self.lose(&Lost::Io(e), wakes);
            }
        }
    }

    fn wire(&self) -> Option<Arc<Wire>> {
        let mut sender = self.sender.lock();
        sender.direct = 0;
        match &sender.link {
            Link::Up(wire) => Some(wire.clone()),
            _ => None,
        }
    }

    /// On the reactor's thread: the socket has something. True: it may have more.
    pub(super) fn receive(self: &Arc<Self>, wakes: &mut Wakes) -> bool {
        let Some(wire) = self.wire() else { return false };
        let mut receiver = self.receiver.lock();
        let mut moved = 0;
        for _ in 0..ROUNDS {
            let Some(current) = receiver.as_mut() else { return false };
            let got = current.receive(&wire).and_then(|n| {
                while let Some(flight) = current.next(&self.flights)? {
                    moved = PROGRESS;
                    self.end(flight, wakes);
                }
                Ok(n)
            });
            match got {
                Ok(Some(n)) => {
                    moved += n;
                    // There is a next time, unless bytes are in memory that no socket tells of.
                    if n < PROGRESS && !wire.is_encrypted() {
                        break;
                    }
                }
                Ok(None) => {
                    if moved >= PROGRESS {
                        self.note_progress();
                    }
                    return false;
                }
                Err(lost) => {
                    drop(receiver);
                    drop(wire);
                    self.lose(&lost, wakes);
                    return false;
                }
            }
        }
        if moved >= PROGRESS {
            self.note_progress();
        }
        wire.is_encrypted()
    }

    /// A request was answered.
    fn end(&self, mut flight: Flight, wakes: &mut Wakes) {
        let result = flight.failure.take().map_or(Ok(()), Err);
        if let (Ok(()), Some(remote)) = (&result, self.remote.upgrade()) {
            if flight.needs_flush() {
                remote.acknowledged();
            } else if flight.request.command == cmd::FLUSH {
                remote.flushed(flight.covers);
            }
        }
        wakes.extend(flight.end(result));
    }

    /// On the reactor's thread: the connection is of no use any more.
    pub(super) fn lose(self: &Arc<Self>, why: &Lost, wakes: &mut Wakes) {
        // It lives longer than the lock: its end takes that.
        let remote = self.remote.upgrade();
        let closed = || Error::new(Errno::ESHUTDOWN, "the connection was closed");
        let error = remote.as_ref().map_or_else(closed, |remote| remote.explain(why));
        let mut sender = self.sender.lock();
        let Link::Up(wire) = &sender.link else { return };
        self.reactor.forget(wire);
        wire.close();
        sender.clear();
        if let Some(flight) = self.receiver.lock().take().and_then(Receiver::give_up) {
            self.flights.lock().put_back(flight);
        }
        let kept = remote.as_ref().filter(|remote| remote.is_kept() && remote.reconnect(self));
        let Some(remote) = kept else {
            sender.link = Link::Down(Arc::new(error.duplicate()), Instant::now());
            drop(sender);
            return self.fail_all(&error, wakes);
        };
        log::warn!("nbd: {error}: connecting again");
        sender.link = Link::Waiting;
        let untrue = match remote.lost_writes() {
            true => self.flights.lock().remove(|flight| flight.request.command == cmd::FLUSH),
            false => Vec::new(),
        };
        drop(sender);
        if !untrue.is_empty() {
            let error = remote.report_lost_writes().err().unwrap_or_else(|| error.duplicate());
            for flight in untrue {
                wakes.extend(flight.end(Err(error.duplicate())));
            }
        }
    }

    /// There will be no other socket for now.
    pub(super) fn put_down(&self, why: &Error, wakes: &mut Wakes) {
        {
            let mut sender = self.sender.lock();
            if let Link::Up(wire) = &sender.link {
                self.reactor.forget(wire);
                wire.close();
            }
            sender.clear();
            sender.link = Link::Down(Arc::new(why.duplicate()), Instant::now());
        }
        self.fail_all(why, wakes);
    }

    fn fail_all(&self, why: &Error, wakes: &mut Wakes) {
        let failed = self.flights.lock().remove(|_| true);
        for flight in failed {
            wakes.extend(flight.end(Err(why.duplicate())));
        }
    }

    /// Nobody waits for the requests of `owner` any more.
    fn abandon(&self, owner: u64, why: &Error, wakes: &mut Wakes) {
        let mut abandoned = Vec::new();
        for flight in self.flights.lock().iter_mut().filter(|flight| flight.owner == owner) {
            abandoned.push((flight.request, std::mem::replace(&mut flight.who, super::flight::Who::Nobody)));
        }
        for (request, who) in abandoned {
            wakes.extend(Flight::answer(request, who, why.duplicate()));
        }
    }

    /// On the reactor's thread, now and then: gives up servers that do not answer, and requests of clients that have gone.
    pub(super) fn tick(self: &Arc<Self>, wakes: &mut Wakes) {
        let Some(remote) = self.remote.upgrade() else { return };
        if let Some(timeout) = remote.timeout().filter(|timeout| self.is_stuck(*timeout)) {
            self.lose(&Lost::Stuck(timeout), wakes);
        }
        let why = Error::new(Errno::ESHUTDOWN, "the client is gone");
        remote.late().into_iter().for_each(|owner| self.abandon(owner, &why, wakes));
    }

    /// Whether the server has done nothing for so long, although it has something to do.
    fn is_stuck(&self, timeout: Duration) -> bool {
        let since = self.reactor.now().saturating_sub(self.progress.load(Relaxed));
        u128::from(since) > timeout.as_millis() && self.len() > 0 && self.wire().is_some()
    }

    /// Tells the server that this is the end.
    pub(super) fn disconnect(&self) {
        let mut sender = self.sender.lock();
        let Link::Up(wire) = &sender.link else { return };
        let wire = wire.clone();
        let request =
            Request { flags: 0, command: cmd::DISC, cookie: 0, offset: 0, length: 0, payload: false };
        sender.push(&request, &Outgoing::None);
        // One that takes nothing is not waited for.
        let _ = sender.flush(&wire, ROUNDS);
    }
}

/// How a write's data goes out: copied if it is little and need not be kept.
///
/// # Errors
/// `ENOMEM`.
pub(super) fn outgoing<'a>(
    data: &'a [u8],
    keep: bool,
    buffers: &nbdkit_core::Buffers,
) -> Result<(Outgoing<'a>, Option<Arc<Memory>>)> {
    let small = data.len() <= COPIED;
    if small && !keep {
        return Ok((Outgoing::Small(data), None));
    }
    let mut memory = buffers.take(data.len())?;
    memory[..data.len()].copy_from_slice(data);
    let memory = Arc::new(memory);
    Ok((if small { Outgoing::Small(data) } else { Outgoing::Shared(memory.clone()) }, Some(memory)))
}
