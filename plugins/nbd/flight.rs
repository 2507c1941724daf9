//! A request that the server has: what was asked, who waits for it, and what has come of the answer so far.

use std::{ops::Range, sync::Arc};

use nbdkit_core::{Error, Memory, Payload, Pending, Result, Status, Wake};
use nbdkit_proto::{Request, cmd, cmd_flag};

use crate::waiter::Promise;

/// Ranges of a reply that are apart from each other, at most: an honest server sends them in order, or nearly.
const SCATTERED: usize = 1024;

/// Who waits for the answer.
#[derive(Debug)]
pub(super) enum Who {
    /// A front end.
    Pending(Pending),
    /// A thread.
    Thread(Promise<Answer>),
    /// Nobody any more.
    Nobody,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) request: Request,
    /// In which order they came.
    pub(super) number: u64,
    /// On whose behalf.
    pub(super) owner: u64,
    pub(super) who: Who,
    /// Where a read goes to.
    pub(super) memory: Memory,
    /// What a write has, to be sent once more if need be.
    pub(super) data: Option<Arc<Memory>>,
    /// Writes that had been acknowledged when this flush was made.
    pub(super) covers: u64,
    /// What has come of a read.
    pub(super) received: Received,
    /// What has come of a block status, in each metadata context.
    pub(super) status: Vec<(Arc<str>, Vec<Status>)>,
    /// The server has said that it failed.
    pub(super) failure: Option<Error>,
}

/// What the server has answered.
#[derive(Debug, Default)]
pub(super) struct Answer {
    pub(super) memory: Memory,
    pub(super) status: Vec<(Arc<str>, Vec<Status>)>,
}

impl Flight {
    /// Says how it ended.
    pub(super) fn end(self, result: Result<()>) -> Option<Wake> {
        let Flight { request, who, memory, status, .. } = self;
        Self::tell(request, who, result.map(|()| Answer { memory, status }))
    }

    /// As [`end`](Self::end), for one that waits on, for an answer that nobody will look at.
    pub(super) fn answer(request: Request, who: Who, error: Error) -> Option<Wake> {
        Self::tell(request, who, Err(error))
    }

    fn tell(request: Request, who: Who, result: Result<Answer>) -> Option<Wake> {
        match who {
            Who::Pending(pending) => {
                let length = request.length as usize;
                let payload = |answer: Answer| match request.command {
                    cmd::READ => Payload::Memory(answer.memory, 0..length),
                    _ => Payload::None,
                };
                Some(pending.complete(result.map(payload)))
            }
            Who::Thread(promise) => {
                promise.answer(result);
                None
            }
            Who::Nobody => None,
        }
    }

    /// Whether it changes what is on the disk in a way that a flush has to make durable.
    pub(super) fn needs_flush(&self) -> bool {
        let changes = matches!(self.request.command, cmd::WRITE | cmd::TRIM | cmd::WRITE_ZEROES);
        changes && !self.request.has(cmd_flag::FUA)
    }

    /// Forgets what has come, for the request is sent once more.
    pub(super) fn again(&mut self) {
        self.received = Received::default();
        self.status.clear();
        self.failure = None;
    }
}

/// Which bytes of a read have come. A server may send them in any order, but each once.
#[derive(Debug, Default)]
pub(super) struct Received {
    /// All bytes up to here.
    start: u64,
    /// What came out of order: apart from each other and ascending.
    rest: Vec<Range<u64>>,
}

impl Received {
    /// Notes a range. False: it came before, or there are too many pieces.
    pub(super) fn add(&mut self, range: Range<u64>) -> bool {
        if range.start < self.start {
            return false;
        }
        if range.start == self.start && self.rest.is_empty() {
            self.start = range.end;
            return true;
        }
        let at = self.rest.partition_point(|other| other.start < range.start);
        let overlaps = self.rest.get(at).is_some_and(|next| next.start < range.end)
            || at.checked_sub(1).is_some_and(|before| self.rest[before].end > range.start);
        if overlaps || self.rest.len() == SCATTERED {
            return false;
        }
        self.rest.insert(at, range);
        let joined = |pair: [&Range<u64>; 2]| pair[0].end == pair[1].start;
        if at + 1 < self.rest.len() && joined([&self.rest[at], &self.rest[at + 1]]) {
            self.rest[at].end = self.rest.remove(at + 1).end;
        }
        if at > 0 && joined([&self.rest[at - 1], &self.rest[at]]) {
            self.rest[at - 1].end = self.rest.remove(at).end;
        }
        if self.rest[0].start == self.start {
            self.start = self.rest.remove(0).end;
        }
        true
    }

    /// Whether all of `length` bytes came.
    pub(super) fn is_complete(&self, length: u64) -> bool {
        self.start == length
    }
}

/// The requests that a connection has, by their cookies: a place, and how often it was used before, so that an old
/// cookie is none.
#[derive(Debug, Default)]
pub(super) struct Flights {
    places: Vec<(u32, Option<Flight>)>,
    free: Vec<u32>,
    count: usize,
}

impl Flights {
    pub(super) fn len(&self) -> usize {
        self.count
    }

    /// Takes a request in; it goes by this cookie.
    pub(super) fn insert(&mut self, mut flight: Flight) -> u64 {
        let place = self.free.pop().unwrap_or_else(|| {
            self.places.push((0, None));
            (self.places.len() - 1) as u32
        });
        let (used, slot) = &mut self.places[place as usize];
        *used = used.wrapping_add(1);
        let cookie = u64::from(*used) << 32 | u64::from(place);
        flight.request.cookie = cookie;
        *slot = Some(flight);
        self.count += 1;
        cookie
    }

    fn slot(&mut self, cookie: u64) -> Option<&mut Option<Flight>> {
        let (used, slot) = self.places.get_mut(cookie as u32 as usize)?;
        (*used == (cookie >> 32) as u32).then_some(slot)
    }

    /// The request of that cookie.
    pub(super) fn get(&mut self, cookie: u64) -> Option<&mut Flight> {
        self.slot(cookie)?.as_mut()
    }

    /// The request of that cookie, to be [put back](Self::put_back) or [removed](Self::free).
    pub(super) fn take(&mut self, cookie: u64) -> Option<Flight> {
        self.slot(cookie)?.take()
    }

    pub(super) fn put_back(&mut self, flight: Flight) {
        if let Some(slot) = self.slot(flight.request.cookie) {
            *slot = Some(flight);
        }
    }

    /// Its place is free again.
    pub(super) fn free(&mut self, cookie: u64) {
        self.free.push(cookie as u32);
        self.count -= 1;
    }

    /// Removes those for which `which` is true.
    pub(super) fn remove(&mut self, which: impl Fn(&Flight) -> bool) -> Vec<Flight> {
        let mut removed = Vec::new();
        for place in 0..self.places.len() {
            if let Some(flight) = self.places[place].1.take_if(|flight| which(flight)) {
                self.free(flight.request.cookie);
                removed.push(flight);
            }
        }
        removed
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Flight> {
        self.places.iter_mut().filter_map(|(_, flight)| flight.as_mut())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_come_in_any_order_and_once() {
        let mut received = Received::default();
        assert!(received.add(0..10) && received.add(20..30) && received.add(40..50));
        for twice in [5..6, 0..1, 19..21, 25..26, 29..45, 45..60] {
            assert!(!received.add(twice.clone()), "{twice:?}");
        }
        assert!(received.add(30..40) && received.add(10..20));
        assert!(received.is_complete(50) && received.rest.is_empty());
    }

    #[test]
    fn pieces_are_bounded() {
        let mut received = Received::default();
        for i in 0..SCATTERED as u64 {
            assert!(received.add(2 * i + 1..2 * i + 2));
        }
        assert!(!received.add(5000..5001));
    }
}
