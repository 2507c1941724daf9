//! A decompressed disk: which pieces are there, which are on their way, and who waits for them.
//!
//! A piece that is asked for is in the cache or has a flight, which is decoded once, whoever asks. A flight ends when its piece
//! arrives or cannot be had; its job runs by the source of the connection that asked first, and by another's if that one
//! closes.

use std::{
    any::Any,
    collections::{HashMap, hash_map::Entry},
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use nbdkit_core::{Errno, Error, Extents, Result};
use parking_lot::Mutex;

use super::{
    Format,
    cache::{Cache, Piece},
    damaged,
    pool::{Job, Pool},
    source::{Source, User},
    waiter::Waiter,
    zeroes::Zeroes,
};

/// How far ahead of a client pieces are decoded at least, in bytes.
const AHEAD: u64 = 8 << 20;
/// Pieces that are looked at for that, at most.
const MOST_AHEAD: usize = 64;

/// See the module.
pub(super) struct Disk {
    format: Box<dyn Format>,
    size: u64,
    state: Mutex<State>,
    zeroes: Zeroes,
}

struct State {
    cache: Cache,
    flights: HashMap<u64, Flight>,
}

/// A piece that is on its way.
#[derive(Default)]
struct Flight {
    waiters: Vec<Arc<Waiter>>,
    /// Nobody waited for it when it was queued.
    ahead: bool,
}

impl Disk {
    pub(super) fn new(format: Box<dyn Format>) -> Self {
        let state = State { cache: Cache::new(format.cache_size()), flights: HashMap::new() };
        Disk { size: format.size(), format, state: Mutex::new(state), zeroes: Zeroes::default() }
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn save(&self) {
        self.format.save();
    }

    pub(super) fn extents(&self, offset: u64, length: u64, extents: &mut Extents) -> Result<()> {
        self.zeroes.extents(offset, length, self.size, extents)
    }

    fn pieces(&self, range: &Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let (mut at, end) = (range.start, range.end.min(self.size));
        std::iter::from_fn(move || {
            let piece = (at < end).then(|| self.format.piece(at))?;
            at = piece.end.max(at + 1);
            Some(piece)
        })
    }

    /// Fills `buf` if all of it is in the cache.
    pub(super) fn read_cached(&self, buf: &mut [u8], offset: u64) -> bool {
        let range = offset..offset + buf.len() as u64;
        let mut pieces = self.pieces(&range);
        let (Some(first), second) = (pieces.next(), pieces.next()) else { return true };
        if second.is_none() {
            let Some(piece) = self.state.lock().cache.get(first.start) else { return false };
            piece.copy_to(buf, offset);
            return true;
        }
        let found: Option<Vec<_>> = {
            let mut state = self.state.lock();
            [Some(first), second]
                .into_iter()
                .flatten()
                .chain(pieces)
                .map(|p| state.cache.get(p.start))
                .collect()
        };
        let Some(found) = found else { return false };
        found.iter().for_each(|piece| piece.copy_to(buf, offset));
        true
    }

    /// Has the pieces come that `waiter` waits for. The jobs are to be run.
    pub(super) fn request(
        self: &Arc<Self>,
        waiter: &Arc<Waiter>,
        source: &Arc<Source>,
        pool: &Pool,
    ) -> Vec<Job> {
        let (mut found, mut jobs, mut urgent) = (Vec::new(), Vec::new(), Vec::new());
        {
            let mut state = self.state.lock();
            let State { cache, flights } = &mut *state;
            for piece in self.pieces(&waiter.range) {
                if let Some(piece) = cache.get(piece.start) {
                    found.push(piece);
                    continue;
                }
                waiter.expect();
                match flights.entry(piece.start) {
                    Entry::Occupied(mut flight) => {
                        let flight = flight.get_mut();
                        if std::mem::take(&mut flight.ahead) {
                            urgent.push(piece.start);
                        }
                        flight.waiters.push(waiter.clone());
                    }
                    Entry::Vacant(place) => {
                        place.insert(Flight { waiters: vec![waiter.clone()], ahead: false });
                        jobs.push(self.job(source, piece));
                    }
                }
            }
        }
        for start in urgent {
            pool.promote(self, start);
        }
        for piece in found {
            waiter.expect();
            waiter.supply(Ok(Some(&piece)));
        }
        waiter.release();
        jobs
    }

    /// What is likely to be read after what ends at `from`.
    pub(super) fn ahead(self: &Arc<Self>, source: &Arc<Source>, from: u64) -> Vec<Job> {
        if from >= self.size {
            return Vec::new();
        }
        let piece = self.format.piece(from);
        let window = AHEAD.max((piece.end - piece.start).saturating_mul(Pool::width() as u64));
        self.fetch(source, from..from.saturating_add(window))
    }

    /// The pieces of a range that are not there nor on their way, as far as the cache is large enough to hold them until
    /// they are used.
    pub(super) fn fetch(self: &Arc<Self>, source: &Arc<Source>, range: Range<u64>) -> Vec<Job> {
        let mut jobs = Vec::new();
        let mut state = self.state.lock();
        let State { cache, flights } = &mut *state;
        let mut left = cache.capacity() / 2;
        for piece in self.pieces(&range).take(MOST_AHEAD) {
            let Some(less) = left.checked_sub(piece.end - piece.start) else { break };
            left = less;
            if cache.contains(piece.start) {
                continue;
            }
            if let Entry::Vacant(place) = flights.entry(piece.start) {
                place.insert(Flight { waiters: Vec::new(), ahead: true });
                jobs.push(self.job(source, piece));
            }
        }
        jobs
    }

    fn job(self: &Arc<Self>, source: &Arc<Source>, piece: Range<u64>) -> Job {
        let lane = self.format.lane(&piece);
        Job { disk: self.clone(), user: User::new(source), piece, lane }
    }

    /// Decodes a piece. What is returned has to be done in its place.
    pub(super) fn run(job: Job) -> Option<Job> {
        let disk = job.disk.clone();
        if !disk.state.lock().flights.contains_key(&job.piece.start) {
            // It came along with another one.
            return None;
        }
        let decode = || {
            let mut sink = |start, bytes| disk.arrived(start, bytes);
            disk.format.decode(job.user.source(), job.piece.clone(), &mut sink)
        };
        match catch_unwind(AssertUnwindSafe(decode)).unwrap_or_else(|panic| Err(panicked(&*panic))) {
            Ok(()) => {
                let error = || damaged("a part of the data did not come out of the decoder");
                disk.fail(&job.piece, &error());
                None
            }
            Err(_) if job.user.source().is_closed() => disk.pass_on(job),
            Err(e) => {
                log::debug!("at {}: {e}", job.piece.start);
                disk.fail(&job.piece, &e.context(format_args!("at {} of the disk", job.piece.start)));
                None
            }
        }
    }

    /// Those who wait for the piece of a job whose connection closes ask by another's.
    pub(super) fn pass_on(self: &Arc<Self>, job: Job) -> Option<Job> {
        let start = job.piece.start;
        let mut state = self.state.lock();
        let flight = state.flights.remove(&start)?;
        let (stay, go): (Vec<_>, Vec<_>) =
            flight.waiters.into_iter().map(|waiter| (waiter.source(), waiter)).partition(|w| w.0.is_some());
        let source = stay.first().and_then(|(source, _)| source.clone());
        let again = source.map(|source| {
            let waiters = stay.into_iter().map(|(_, waiter)| waiter).collect();
            state.flights.insert(start, Flight { waiters, ahead: false });
            self.job(&source, job.piece.clone())
        });
        drop(state);
        for (_, waiter) in go {
            waiter.supply(Err(&Errno::ESHUTDOWN.into()));
        }
        again
    }

    /// A piece was decoded.
    fn arrived(&self, start: u64, bytes: Vec<u8>) {
        let piece = Arc::new(Piece::new(start, bytes));
        self.zeroes.learn(&piece, self.size);
        let flight = {
            let mut state = self.state.lock();
            state.cache.insert(piece.clone());
            state.flights.remove(&start)
        };
        for waiter in flight.into_iter().flat_map(|flight| flight.waiters) {
            waiter.supply(Ok(Some(&piece)));
        }
    }

    /// A piece cannot be had, unless it has arrived.
    pub(super) fn fail(&self, piece: &Range<u64>, error: &Error) {
        let flight = self.state.lock().flights.remove(&piece.start);
        for waiter in flight.into_iter().flat_map(|flight| flight.waiters) {
            waiter.supply(Err(error));
        }
    }
}

fn panicked(panic: &(dyn Any + Send)) -> Error {
    let message = panic.downcast_ref::<&str>().copied().map(str::to_owned);
    let message = message.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
    damaged(format_args!("a decoder panicked: {message}"))
}
