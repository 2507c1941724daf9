//! What the requests of a chain cost: counts, bytes, errors and latencies, for the front ends together and for each
//! layer.
//!
//! Counting must not slow down what it counts. So it is off unless a program asks for it, a counter is one atomic add,
//! threads count in shards of their own, and once there are many requests only some of them are timed: to look at the
//! clock twice takes longer than all the rest. A latency is a step in a histogram with four steps to a power of two, so
//! a percentile is off by a tenth at most.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{Call, Errno, Error, Op};

/// Every kind of request, in the order of their counters.
pub const OPS: [Op; 7] = [Op::Read, Op::Write, Op::Flush, Op::Trim, Op::Zero, Op::Cache, Op::Extents];

/// The errors that are counted apart, by their names; all others are counted together.
pub const ERRNOS: [(&str, Errno); 9] = [
    ("EPERM", Errno::EPERM),
    ("EIO", Errno::EIO),
    ("ENOMEM", Errno::ENOMEM),
    ("EINVAL", Errno::EINVAL),
    ("ENOSPC", Errno::ENOSPC),
    ("EROFS", Errno::EROFS),
    ("ETIMEDOUT", Errno::ETIMEDOUT),
    ("EOPNOTSUPP", Errno::EOPNOTSUPP),
    ("ESHUTDOWN", Errno::ESHUTDOWN),
];

/// Threads spread over this many copies of the counters.
const SHARDS: usize = 8;
/// Steps of a histogram: up to some minutes.
const STEPS: usize = 124;
/// That many requests of a kind are all timed, later ones now and then: one of `TIMED`.
const ALL_TIMED: u64 = 64;
const TIMED: u64 = 8;
/// The first steps are this wide, in nanoseconds as a power of two.
const UNIT: u32 = 6;

/// The counters of a chain.
#[derive(Debug)]
pub struct Stats {
    since: Instant,
    requests: Arc<Counters>,
    /// Innermost first, as in the chain.
    layers: Vec<(Arc<str>, Arc<Counters>)>,
    connections: Arc<Connections>,
}

/// Clients that came, and those that are there.
#[derive(Debug, Default)]
struct Connections {
    total: AtomicU64,
    open: AtomicU64,
}

/// A client that is counted while it is there.
#[derive(Debug)]
pub(crate) struct CountedConnection(Arc<Connections>);

impl Drop for CountedConnection {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Stats {
    pub(crate) fn new(names: &[Arc<str>]) -> Self {
        Stats {
            since: Instant::now(),
            requests: Arc::default(),
            layers: names.iter().map(|name| (name.clone(), Arc::default())).collect(),
            connections: Arc::default(),
        }
    }

    pub(crate) fn requests(&self) -> &Arc<Counters> {
        &self.requests
    }

    pub(crate) fn layer(&self, index: usize) -> Option<&Arc<Counters>> {
        self.layers.get(index).map(|(_, counters)| counters)
    }

    /// Counts a client that has come.
    pub(crate) fn connection(&self) -> CountedConnection {
        self.connections.total.fetch_add(1, Ordering::Relaxed);
        self.connections.open.fetch_add(1, Ordering::Relaxed);
        CountedConnection(self.connections.clone())
    }

    /// How many clients have come, and how many of them are there now. A mount is one.
    pub fn connections(&self) -> (u64, u64) {
        (self.connections.total.load(Ordering::Relaxed), self.connections.open.load(Ordering::Relaxed))
    }

    /// How long they have been counting.
    pub fn age(&self) -> Duration {
        self.since.elapsed()
    }

    /// The requests of all clients, with the time that they wait for their turn.
    pub fn total(&self) -> Totals {
        self.requests.totals()
    }

    /// The name and the requests of a layer, the outermost first. The time of the layers below it is part of its own.
    pub fn of_layer(&self, index: usize) -> Option<(&str, Totals)> {
        let (name, counters) = self.layers.iter().rev().nth(index)?;
        Some((name, counters.totals()))
    }
}

/// The counters of one place in the chain.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    shards: [Shard; SHARDS],
}

/// On cache lines of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Shard {
    ops: [Counter; OPS.len()],
    at_once: AtomicU64,
    /// As in [`ERRNOS`], and all others.
    errnos: [AtomicU64; ERRNOS.len() + 1],
}

#[derive(Debug)]
struct Counter {
    count: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    steps: [AtomicU64; STEPS],
}

impl Default for Counter {
    fn default() -> Self {
        Counter {
            count: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            steps: [const { AtomicU64::new(0) }; STEPS],
        }
    }
}

impl Counter {
    /// A request begins. Returns the time if it is to be timed.
    fn begin(&self) -> Option<Instant> {
        let count = self.count.load(Ordering::Relaxed);
        (count < ALL_TIMED || count.is_multiple_of(TIMED)).then(Instant::now)
    }

    /// The request has ended.
    fn end(&self, started: Option<Instant>, bytes: u64, failure: Option<&Error>) {
        if let Some(started) = started {
            let took = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
            self.steps[step(took)].fetch_add(1, Ordering::Relaxed);
        }
        self.count.fetch_add(1, Ordering::Relaxed);
        match failure {
            None => self.bytes.fetch_add(bytes, Ordering::Relaxed),
            // That is an answer: "not fast".
            Some(e) if e.is_unsupported() => 0,
            Some(_) => self.errors.fetch_add(1, Ordering::Relaxed),
        };
    }
}

impl Counters {
    fn shard(&self) -> &Shard {
        // Each thread has a stack of its own, some megabytes from the next: no identity is cheaper to come by.
        let on_stack = 0_u8;
        let address = &raw const on_stack as usize;
        &self.shards[((address >> 21) ^ (address >> 24)) % SHARDS]
    }

    fn counter(&self, op: Op) -> &Counter {
        &self.shard().ops[op as usize]
    }

    /// A request begins. Returns the time if it is to be timed.
    pub(crate) fn begin(&self, op: Op) -> Option<Instant> {
        self.counter(op).begin()
    }

    /// A request has ended that began at `began`; `inline` says that it did not wait.
    pub(crate) fn end(&self, call: &Call, began: Option<Instant>, failure: Option<&Error>, inline: bool) {
        let bytes = match call.op {
            Op::Extents => 0,
            _ => call.length,
        };
        let shard = self.shard();
        if let Some(failure) = failure.filter(|failure| !failure.is_unsupported()) {
            let known = ERRNOS.iter().position(|(_, errno)| *errno == failure.errno());
            shard.errnos[known.unwrap_or(ERRNOS.len())].fetch_add(1, Ordering::Relaxed);
        }
        shard.ops[call.op as usize].end(began, bytes, failure);
        if inline && call.op == Op::Read && failure.is_none() {
            shard.at_once.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn totals(&self) -> Totals {
        let mut totals = Totals::default();
        for shard in &self.shards {
            totals.at_once += shard.at_once.load(Ordering::Relaxed);
            for (sum, count) in totals.errnos.iter_mut().zip(&shard.errnos) {
                *sum += count.load(Ordering::Relaxed);
            }
            for (sum, counter) in totals.ops.iter_mut().zip(&shard.ops) {
                sum.count += counter.count.load(Ordering::Relaxed);
                sum.bytes += counter.bytes.load(Ordering::Relaxed);
                sum.errors += counter.errors.load(Ordering::Relaxed);
                for (count, step) in sum.latency.0.iter_mut().zip(&counter.steps) {
                    *count += step.load(Ordering::Relaxed);
                }
            }
        }
        totals
    }
}

/// What was counted in one place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Reads that needed no wait, since the data were in memory.
    pub at_once: u64,
    /// Those that failed, by error: in the order of [`ERRNOS`], then all others.
    pub errnos: [u64; ERRNOS.len() + 1],
    /// By kind, in the order of [`OPS`].
    pub ops: [OpTotals; OPS.len()],
}

impl Totals {
    /// What was counted since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Totals) -> Totals {
        let mut since = self.clone();
        for (count, earlier) in since.errnos.iter_mut().zip(earlier.errnos) {
            *count = count.saturating_sub(earlier);
        }
        since.at_once = since.at_once.saturating_sub(earlier.at_once);
        for (op, earlier) in since.ops.iter_mut().zip(&earlier.ops) {
            op.bytes = op.bytes.saturating_sub(earlier.bytes);
            op.count = op.count.saturating_sub(earlier.count);
            op.errors = op.errors.saturating_sub(earlier.errors);
            for (count, earlier) in op.latency.0.iter_mut().zip(earlier.latency.0) {
                *count = count.saturating_sub(earlier);
            }
        }
        since
    }

    /// What was counted for one kind of request.
    pub fn of(&self, op: Op) -> &OpTotals {
        &self.ops[op as usize]
    }
}

/// What was counted for one kind of request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpTotals {
    /// How many there were, failed ones included.
    pub count: u64,
    /// Bytes of those that succeeded.
    pub bytes: u64,
    /// How many failed.
    pub errors: u64,
    /// How long those that were timed took.
    pub latency: Histogram,
}

/// Latencies, counted in steps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Histogram([u64; STEPS]);

impl Default for Histogram {
    fn default() -> Self {
        Histogram([0; STEPS])
    }
}

impl Histogram {
    /// The steps that are not empty: number and count.
    pub fn steps(&self) -> impl Iterator<Item = (usize, u64)> {
        self.0.iter().copied().enumerate().filter(|(_, count)| *count > 0)
    }

    /// Adds to a step; numbers that do not exist are passed over.
    pub fn add(&mut self, step: usize, count: u64) {
        if let Some(sum) = self.0.get_mut(step) {
            *sum = sum.saturating_add(count);
        }
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.0.iter().sum()
    }

    /// How many took at most about so many nanoseconds: exact where a step begins there, as powers of two do from 256.
    pub fn at_most(&self, nanoseconds: u64) -> u64 {
        self.0[..step(nanoseconds)].iter().sum()
    }

    /// About how many nanoseconds all of them took together: the middle of its step for each.
    pub fn sum(&self) -> f64 {
        self.steps().map(|(step, count)| count as f64 * (lower(step) + lower(step + 1)) as f64 / 2.0).sum()
    }

    /// The latency, in nanoseconds, that the share `part` (0 to 1) of the requests did not exceed. None: there were no
    /// requests.
    pub fn percentile(&self, part: f64) -> Option<u64> {
        let total: u64 = self.0.iter().sum();
        let rank = ((total as f64 * part).ceil() as u64).clamp(1, total.max(1));
        let mut below = 0;
        for (step, count) in self.steps() {
            if below + count >= rank {
                // As if they were spread evenly over the step.
                let (from, to) = (lower(step), lower(step + 1));
                let share = (rank - below) as f64 / count as f64;
                return Some(from + ((to - from) as f64 * share) as u64);
            }
            below += count;
        }
        None
    }
}

/// The step of a latency in nanoseconds.
fn step(nanoseconds: u64) -> usize {
    let units = nanoseconds >> UNIT;
    if units < 4 {
        return units as usize;
    }
    let power = units.ilog2();
    let quarter = (units >> (power - 2)) & 3;
    ((power - 1) as usize * 4 + quarter as usize).min(STEPS - 1)
}

/// Where a step begins, in nanoseconds.
fn lower(step: usize) -> u64 {
    let units = match step {
        0..4 => step as u64,
        _ => (4 + step as u64 % 4) << (step / 4 - 1),
    };
    units << UNIT
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Errno;

    #[test]
    fn steps_are_a_quarter_of_a_power_of_two_wide() {
        for n in 0..STEPS {
            assert_eq!(step(lower(n)), n);
            assert_eq!(step(lower(n + 1) - 1), n);
            assert!(n < 4 || lower(n + 1) - lower(n) <= lower(n) / 4, "{n}");
        }
        assert_eq!(step(u64::MAX), STEPS - 1);
        assert!(lower(STEPS) > 180_000_000_000, "three minutes");
    }

    #[test]
    fn percentiles() {
        let mut latency = Histogram::default();
        assert_eq!(latency.percentile(0.5), None);
        for microseconds in 1..=1000 {
            latency.add(step(microseconds * 1000), 1);
        }
        for (part, microseconds) in [(0.5, 500), (0.95, 950), (0.99, 990), (0.001, 1)] {
            let found = latency.percentile(part).unwrap() as f64 / 1000.0;
            assert!((found / f64::from(microseconds) - 1.0).abs() < 0.15, "{part}: {found}");
        }
    }

    #[test]
    fn sums_of_a_histogram() {
        let mut latency = Histogram::default();
        for nanoseconds in [100, 1000, 1500, 5000] {
            latency.add(step(nanoseconds), 1);
        }
        let at_most = [64, 1 << 10, 1 << 11, 1 << 30].map(|bound| latency.at_most(bound));
        assert_eq!((at_most, latency.count()), ([0, 2, 3, 4], 4));
        assert!((latency.sum() / 7600.0 - 1.0).abs() < 0.2, "{}", latency.sum());
    }

    #[test]
    fn threads_lose_no_count() {
        let counters = Arc::<Counters>::default();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..1000 {
                        let call = Call::new(Op::Write, 0, 3);
                        counters.end(&call, counters.begin(call.op), None, false);
                    }
                });
            }
        });
        let before = counters.totals();
        assert_eq!((before.of(Op::Write).count, before.of(Op::Write).bytes), (4000, 12_000));
        let count = |op, bytes, errno: Option<Errno>, inline| {
            let (call, failure) = (Call::new(op, 0, bytes), errno.map(Error::from));
            counters.end(&call, counters.begin(op), failure.as_ref(), inline);
        };
        count(Op::Zero, 5, Some(Errno::EIO), false);
        count(Op::Zero, 5, Some(Errno::EOPNOTSUPP), false);
        count(Op::Read, 7, None, true);
        let after = counters.totals().since(&before);
        let zero = after.of(Op::Zero);
        assert_eq!((zero.count, zero.errors, zero.bytes), (2, 1, 0));
        let eio = ERRNOS.iter().position(|(name, _)| *name == "EIO").unwrap();
        assert_eq!((after.errnos[eio], after.errnos.iter().sum::<u64>()), (1, 1));
        assert_eq!((after.of(Op::Read).bytes, after.at_once, after.of(Op::Write).count), (7, 1, 0));
    }
}
