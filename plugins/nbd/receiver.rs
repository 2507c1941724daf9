//! What a connection receives: heads of replies are taken apart, data goes to where it was asked for.
//!
//! The server is not trusted. What it sends has to fit a request that it has, and how long it is was decided by the request:
//! anything else is a [`Violation`], after which the connection is closed.

use std::{
    io::{self, IoSliceMut},
    ops::Range,
    sync::Arc,
    time::Duration,
};

use nbdkit_core::{Error, Status, sync::Mutex};
use nbdkit_proto::{
    Fields, MAX_STRING, Replies,
    client::{Kind, ReplyHead, Violation, errno},
    cmd,
};

use super::{
    flight::{Flight, Flights},
    handshake::{Agreed, printable},
    wire::Wire,
};

/// Bytes received at once.
const INPUT: usize = 256 << 10;
/// Descriptors in the status of one request, in all its contexts: no honest server sends more.
const DESCRIPTORS: usize = 1 << 20;

/// Why nothing more is received.
#[derive(Debug)]
pub(super) enum Lost {
    /// The server has closed the connection.
    End,
    Io(io::Error),
    Broken(Violation),
    /// It has done nothing for so long.
    Stuck(Duration),
}

impl From<Violation> for Lost {
    fn from(violation: Violation) -> Self {
        Lost::Broken(violation)
    }
}

impl std::fmt::Display for Lost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Lost::End => f.write_str("the server closed the connection"),
            Lost::Io(e) => write!(f, "the connection failed: {e}"),
            Lost::Stuck(time) => {
                write!(f, "the server did nothing for {} seconds (timeout=)", time.as_secs())
            }
            Lost::Broken(why) => write!(f, "the server broke the protocol: {why}"),
        }
    }
}

/// What comes next.
#[derive(Debug)]
enum Stage {
    /// A head.
    Head,
    /// Where data of a read belongs.
    Offset(ReplyHead),
    /// Something else than data.
    Content(ReplyHead),
    /// Data of that request, for this range of its memory; the reply ends then, or not.
    Data(Box<Flight>, Range<usize>, bool),
}

/// See the module.
#[derive(Debug)]
pub(super) struct Receiver {
    replies: Replies,
    /// The metadata contexts that were agreed on.
    contexts: Vec<(u32, Arc<str>)>,
    /// What was received and not yet used is `input[start..end]`.
    input: Vec<u8>,
    start: usize,
    end: usize,
    stage: Stage,
}

impl Receiver {
    /// For a connection on which that was agreed.
    pub(super) fn new(agreed: &Agreed) -> Self {
        let contexts = agreed.contexts.iter().map(|(id, name)| (*id, name.as_str().into())).collect();
        Receiver {
            replies: agreed.replies,
            contexts,
            input: vec![0; INPUT],
            start: 0,
            end: 0,
            stage: Stage::Head,
        }
    }

    /// Receives what there is. Some: how much that was; the socket may have more if it is as much as there was room for.
    pub(super) fn receive(&mut self, wire: &Wire) -> Result<Option<usize>, Lost> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if let Stage::Content(head) = &self.stage
            && head.length as usize > self.input.len() - self.start
        {
            self.make_room(head.length as usize);
        } else if self.start > self.input.len() / 2 {
            self.make_room(0);
        }
        let (start, end) = (self.end, self.input.len());
        let received = match &mut self.stage {
            Stage::Data(flight, range, _) => {
                let mut parts =
                    [IoSliceMut::new(&mut flight.memory[range.clone()]), IoSliceMut::new(&mut self.input)];
                wire.recv(&mut parts)
            }
            _ => wire.recv(&mut [IoSliceMut::new(&mut self.input[start..end])]),
        };
        let n = match received {
            Ok(0) => return Err(Lost::End),
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(e) => return Err(Lost::Io(e)),
        };
        match &mut self.stage {
            Stage::Data(_, range, _) => {
                let direct = n.min(range.len());
                range.start += direct;
                self.end += n - direct;
            }
            _ => self.end += n,
        }
        Ok(Some(n))
    }

    /// Moves what was received to the front, and has room for `length` bytes there, as far as so many have come.
    fn make_room(&mut self, length: usize) {
        self.input.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        if self.end == self.input.len() && length > self.end {
            self.input.resize(length.min(2 * self.end), 0);
        }
    }

    /// The next request whose answer is complete. None: more has to be received.
    pub(super) fn next(&mut self, flights: &Mutex<Flights>) -> Result<Option<Flight>, Violation> {
        loop {
            let ended = match std::mem::replace(&mut self.stage, Stage::Head) {
                Stage::Head => {
                    let head = ReplyHead::decode(&self.input[self.start..self.end], self.replies)?;
                    let Some((head, length)) = head else { return Ok(None) };
                    self.start += length;
                    self.begin(head, &mut flights.lock())?
                }
                Stage::Offset(head) => {
                    let Some(offset) = self.content(8).and_then(|bytes| Fields(bytes).u64()) else {
                        self.stage = Stage::Offset(head);
                        return Ok(None);
                    };
                    self.start += 8;
                    let mut flights = flights.lock();
                    let flight = known(&mut flights, head.cookie)?;
                    let range = place(&flight.request, offset, head.length - 8)?;
                    add(flight, &range)?;
                    self.stage = Stage::Data(taken(&mut flights, head.cookie)?, range, head.done);
                    None
                }
                Stage::Content(head) => {
                    let Some(content) = self.content(head.length) else {
                        self.stage = Stage::Content(head);
                        return Ok(None);
                    };
                    let mut flights = flights.lock();
                    note(&head, &self.contexts, known(&mut flights, head.cookie)?, content)?;
                    self.start += head.length as usize;
                    if self.input.len() > INPUT && self.start == self.end {
                        (self.input, self.start, self.end) = (vec![0; INPUT], 0, 0);
                    }
                    if head.done { Some(finish(&mut flights, head.cookie)?) } else { None }
                }
                Stage::Data(mut flight, mut range, done) => {
                    let n = range.len().min(self.end - self.start);
                    flight.memory[range.start..range.start + n]
                        .copy_from_slice(&self.input[self.start..self.start + n]);
                    self.start += n;
                    range.start += n;
                    if !range.is_empty() {
                        self.stage = Stage::Data(flight, range, done);
                        return Ok(None);
                    }
                    let mut flights = flights.lock();
                    let cookie = flight.request.cookie;
                    flights.put_back(*flight);
                    if done { Some(finish(&mut flights, cookie)?) } else { None }
                }
            };
            if ended.is_some() {
                return Ok(ended);
            }
        }
    }

    /// So many bytes, if they have come.
    fn content(&self, length: u64) -> Option<&[u8]> {
        self.input[self.start..self.end].get(..usize::try_from(length).ok()?)
    }

    /// A head has come. Some: its request has ended.
    fn begin(&mut self, head: ReplyHead, flights: &mut Flights) -> Result<Option<Flight>, Violation> {
        let flight = known(flights, head.cookie)?;
        let request = flight.request;
        let is_read = request.command == cmd::READ;
        let is_status = request.command == cmd::BLOCK_STATUS;
        match head.kind {
            Kind::Simple(0) if is_read => {
                if self.replies != Replies::Simple {
                    return Err(Violation("a read was answered by a simple reply"));
                }
                let range = 0..request.length as usize;
                add(flight, &range)?;
                self.stage = Stage::Data(taken(flights, head.cookie)?, range, true);
                return Ok(None);
            }
            Kind::Simple(0) | Kind::None => return finish(flights, head.cookie).map(Some),
            Kind::Simple(number) => {
                flight.failure = Some(errno(number).into());
                return finish(flights, head.cookie).map(Some);
            }
            _ => {}
        }
        self.stage = match head.kind {
            Kind::OffsetData if is_read => Stage::Offset(head),
            Kind::OffsetHole if is_read => Stage::Content(head),
            Kind::BlockStatus if is_status && self.replies == Replies::Structured => {
                descriptors(head.length, 4, 8)?;
                Stage::Content(head)
            }
            Kind::BlockStatusExtended if is_status && self.replies == Replies::Extended => {
                descriptors(head.length, 8, 16)?;
                Stage::Content(head)
            }
            Kind::Error { .. } if head.length <= 14 + MAX_STRING as u64 => Stage::Content(head),
            Kind::Error { .. } => return Err(Violation("the text of an error is too long")),
            _ => return Err(Violation("a chunk does not fit its request")),
        };
        Ok(None)
    }

    /// Nothing more will come: the request whose data was on its way.
    pub(super) fn give_up(self) -> Option<Flight> {
        match self.stage {
            Stage::Data(flight, ..) => Some(*flight),
            _ => None,
        }
    }
}

fn known(flights: &mut Flights, cookie: u64) -> Result<&mut Flight, Violation> {
    flights.get(cookie).ok_or(Violation("a reply to a request that was not made"))
}

/// The request, to be put back.
fn taken(flights: &mut Flights, cookie: u64) -> Result<Box<Flight>, Violation> {
    flights.take(cookie).map(Box::new).ok_or(Violation("a reply to a request that was not made"))
}

/// The request, whose answer is complete.
fn finish(flights: &mut Flights, cookie: u64) -> Result<Flight, Violation> {
    let flight = known(flights, cookie)?;
    let request = &flight.request;
    let whole = request.command != cmd::READ || flight.received.is_complete(request.length);
    if flight.failure.is_none() && !whole {
        return Err(Violation("a read succeeded without all of its data"));
    }
    let flight = flights.take(cookie).ok_or(Violation("a reply to a request that was not made"))?;
    flights.free(cookie);
    Ok(flight)
}

/// Where `length` bytes from `offset` of the disk are in the memory of a read.
fn place(request: &nbdkit_proto::Request, offset: u64, length: u64) -> Result<Range<usize>, Violation> {
    let start = offset.checked_sub(request.offset);
    let range = start.and_then(|start| Some(start..start.checked_add(length)?));
    let range = range.filter(|range| length > 0 && range.end <= request.length);
    let range = range.ok_or(Violation("data outside of what was asked for"))?;
    Ok(range.start as usize..range.end as usize)
}

/// Notes what comes of a read.
fn add(flight: &mut Flight, range: &Range<usize>) -> Result<(), Violation> {
    let fresh = flight.received.add(range.start as u64..range.end as u64);
    if fresh { Ok(()) } else { Err(Violation("data of a read came twice, or in too many pieces")) }
}

/// Checks the length of a block status with so many bytes before descriptors of that size.
fn descriptors(length: u64, before: u64, size: u64) -> Result<(), Violation> {
    let fits = length > before && (length - before).is_multiple_of(size);
    if fits && (length - before) / size <= DESCRIPTORS as u64 {
        return Ok(());
    }
    Err(Violation("a block status has a wrong length"))
}

/// Notes what a chunk says that is not data.
fn note(
    head: &ReplyHead,
    contexts: &[(u32, Arc<str>)],
    flight: &mut Flight,
    content: &[u8],
) -> Result<(), Violation> {
    let mut fields = Fields(content);
    let short = Violation("a chunk is too short");
    match head.kind {
        Kind::OffsetHole => {
            let (offset, length) = (fields.u64().ok_or(short)?, fields.u32().ok_or(short)?);
            let range = place(&flight.request, offset, length.into())?;
            add(flight, &range)?;
            flight.memory[range].fill(0);
        }
        Kind::Error { offset } => {
            let (number, length) = (fields.u32().ok_or(short)?, fields.u16().ok_or(short)?);
            let text = fields.bytes(length.into()).ok_or(short)?;
            if number == 0 || fields.0.len() != if offset { 8 } else { 0 } {
                return Err(Violation("an error is malformed"));
            }
            let text = printable(text);
            flight.failure = Some(match text.is_empty() {
                true => errno(number).into(),
                false => Error::new(errno(number), format!("the server says: {text}")),
            });
        }
        _ => {
            let id = fields.u32().ok_or(short)?;
            let extended = head.kind == Kind::BlockStatusExtended;
            let count = if extended { Some(fields.u32().ok_or(short)?) } else { None };
            let known: usize = flight.status.iter().map(|(_, list)| list.len()).sum();
            let name = contexts.iter().find(|(known, _)| *known == id).map(|(_, name)| name);
            let name = name
                .filter(|name| flight.status.iter().all(|(other, _)| other != *name))
                .ok_or(Violation("a block status of a context that was not asked for, or twice"))?;
            let size = if extended { 16 } else { 8 };
            let found = fields.0.len() / size;
            if count.is_some_and(|count| count as usize != found) || known + found > DESCRIPTORS {
                return Err(Violation("a block status has a wrong number of descriptors"));
            }
            let mut list = Vec::with_capacity(found);
            while !fields.is_empty() {
                let (length, flags) = match extended {
                    true => (fields.u64().ok_or(short)?, fields.u64().ok_or(short)?),
                    false => (fields.u32().ok_or(short)?.into(), fields.u32().ok_or(short)?.into()),
                };
                if length == 0 {
                    return Err(Violation("a block status with an extent of no bytes"));
                }
                list.push(Status { length, flags: u32::try_from(flags).unwrap_or(u32::MAX) });
            }
            flight.status.push((name.clone(), list));
        }
    }
    Ok(())
}
