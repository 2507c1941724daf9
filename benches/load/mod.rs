//! The load generator: what is asked of a server, and what came of it.
//!
//! * [`client`] is one connection and its requests in flight.
//! * [`replies`] takes the replies apart.
//! * [`handshake`] is everything before them.
//! * [`address`] says where the server is.
//! * [`command`] is the generator as a program of its own.

mod address;
mod client;
pub(crate) mod command;
mod handshake;
mod mix;
mod replies;

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};
use hdrhistogram::Histogram;

use self::client::Client;
pub(crate) use self::{
    address::Address,
    mix::{Mix, Op},
};

/// Distance of the stamps, and the smallest request.
pub(crate) const BLOCK: usize = 4096;

/// What the block at `offset` starts with. Never zero, so that a hole is not mistaken for data.
pub(crate) fn stamp(offset: u64) -> [u8; 8] {
    (offset ^ 0x6e62_646b_6974_4d54).to_le_bytes()
}

/// Stamps every block of `data`, which is meant for `offset` on.
pub(crate) fn stamp_blocks(data: &mut [u8], offset: u64) {
    for (index, block) in data.chunks_mut(BLOCK).enumerate() {
        if let Some(start) = block.first_chunk_mut() {
            *start = stamp(offset + (index * BLOCK) as u64);
        }
    }
}

/// What reads should find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// Anything.
    Unknown,
    /// Stamped blocks, of which the export starts with the one for this offset.
    Stamped(u64),
    /// Nothing but zeroes.
    Zeroes,
}

impl Content {
    /// Whether data for `offset` may start like that.
    fn allows(self, offset: u64, start: &[u8]) -> bool {
        match self {
            Content::Stamped(origin) if offset.is_multiple_of(BLOCK as u64) => {
                start == stamp(origin.wrapping_add(offset))
            }
            Content::Zeroes => start.iter().all(|byte| *byte == 0),
            Content::Unknown | Content::Stamped(_) => true,
        }
    }
}

/// Where the requests go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Order {
    Random,
    Sequential,
}

/// A closed loop of requests of one size.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    pub(crate) mix: Mix,
    pub(crate) order: Order,
    /// Bytes a request.
    pub(crate) block: usize,
    /// Requests in flight on each connection.
    pub(crate) depth: usize,
    pub(crate) connections: usize,
}

/// What a run achieved.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) elapsed: Duration,
    /// Nanoseconds from sending a request to reading its reply, for each [`Op`].
    latency: [Histogram<u64>; Op::ALL.len()],
}

impl Outcome {
    /// Nothing yet. Latencies up to a minute are told apart to two figures.
    fn new() -> Result<Self> {
        let histogram = || Histogram::new_with_bounds(1, 60_000_000_000, 2);
        Ok(Outcome { elapsed: Duration::ZERO, latency: [histogram()?, histogram()?, histogram()?] })
    }

    fn record(&mut self, op: Op, latency: Duration) {
        self.latency[op as usize].saturating_record(latency.as_nanos() as u64);
    }

    /// Latencies of one kind of request.
    pub(crate) fn latency(&self, op: Op) -> &Histogram<u64> {
        &self.latency[op as usize]
    }

    /// Latencies of all requests.
    pub(crate) fn all(&self) -> Result<Histogram<u64>> {
        let [first, rest @ ..] = &self.latency;
        let mut all = first.clone();
        rest.iter().try_for_each(|other| all.add(other))?;
        Ok(all)
    }

    /// Takes in what another connection achieved in the same time.
    fn merge(&mut self, other: &Outcome) -> Result<()> {
        self.elapsed = self.elapsed.max(other.elapsed);
        for (mine, theirs) in self.latency.iter_mut().zip(&other.latency) {
            mine.add(theirs)?;
        }
        Ok(())
    }
}

/// Connections to one export, each with a thread of its own while a load runs.
#[derive(Debug)]
pub(crate) struct Clients(Vec<Client>);

impl Clients {
    /// Opens `count` connections, at least one; with `structured`, asks for structured replies and insists on them.
    pub(crate) fn connect(
        address: &Address,
        count: usize,
        structured: bool,
        content: Content,
    ) -> Result<Self> {
        let clients = (0..count.max(1)).map(|index| Client::connect(address, index, structured, content));
        Ok(Clients(clients.collect::<Result<_>>()?))
    }

    /// Of the export, in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.0.first().map_or(0, Client::size)
    }

    /// Keeps `load` going for `duration`, then waits for the replies still due.
    pub(crate) fn run(&mut self, load: &Load, duration: Duration) -> Result<Outcome> {
        let begin = Instant::now();
        let done = |_| begin.elapsed() >= duration;
        let [first, others @ ..] = &mut self.0[..] else { return Outcome::new() };
        thread::scope(|scope| {
            let others: Vec<_> =
                others.iter_mut().map(|client| scope.spawn(move || client.run(load, done))).collect();
            let mut outcome = first.run(load, done)?;
            for other in others {
                let other = other.join().map_err(|_| anyhow!("a connection's thread panicked"))??;
                outcome.merge(&other)?;
            }
            Ok(outcome)
        })
    }

    /// Passes once over the whole export, on the first connection.
    pub(crate) fn pass(&mut self, load: &Load) -> Result<Outcome> {
        let first = self.0.first_mut().context("no connection")?;
        let total = first.size() / load.block as u64;
        first.rewind();
        first.run(load, |sent| sent >= total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_are_told_apart() {
        let mut data = vec![0; 2 * BLOCK];
        stamp_blocks(&mut data, 1 << 20);
        let second = &data[BLOCK..BLOCK + 8];
        assert!(Content::Stamped(0).allows((1 << 20) + 4096, second));
        assert!(Content::Stamped(1 << 20).allows(4096, second));
        assert!(!Content::Stamped(0).allows(4096, second));
        assert!(!Content::Zeroes.allows(4096, second) && Content::Zeroes.allows(0, &[0; 8]));
        assert!(Content::Unknown.allows(4096, second));
    }

    #[test]
    fn outcomes_add_up() {
        let mut one = Outcome::new().unwrap();
        one.record(Op::Read, Duration::from_micros(10));
        let mut other = Outcome::new().unwrap();
        other.record(Op::Read, Duration::from_micros(30));
        other.record(Op::Trim, Duration::from_micros(90));
        other.elapsed = Duration::from_secs(2);
        one.merge(&other).unwrap();
        assert_eq!(one.elapsed, Duration::from_secs(2));
        assert_eq!((one.latency(Op::Read).len(), one.latency(Op::Write).len()), (2, 0));
        let all = one.all().unwrap();
        assert_eq!(all.len(), 3);
        assert!(all.max() >= 90_000, "{}", all.max());
    }
}
