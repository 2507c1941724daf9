//! A batching NBD client that costs little, so that the servers' speed shows.
//!
//! It speaks fixed newstyle over a Unix socket with one request pattern: a closed loop of `depth` requests in
//! flight. All requests that can be sent go out in one system call, and all replies that have arrived come in with
//! one. Each 4 KiB block of a test disk starts with a stamp of its own offset: writes put it there, reads check
//! it, so a server cannot win by answering wrongly. Socket buffers are left at the kernel's default, as libnbd and
//! qemu leave them.

use std::{
    io::{IoSlice, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;

use crate::{
    interrupt,
    replies::{Replies, Slot, be16, be32, be64},
};

/// Distance of the stamps, and the smallest request.
pub(crate) const BLOCK: usize = 4096;
/// How long a server may stay silent before it counts as hung.
const SILENCE: Duration = Duration::from_secs(10);

const OPT_GO: u32 = 7;
const OPT_STRUCTURED_REPLY: u32 = 8;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_ERROR: u32 = 1 << 31;
const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REQUEST_LEN: usize = 28;

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

/// The kind of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Read,
    Write,
}

/// Where the requests go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    Random,
    Sequential,
}

/// A stream of equal requests.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    pub(crate) op: Op,
    pub(crate) order: Order,
    /// Bytes a request, a multiple of [`BLOCK`].
    pub(crate) block: usize,
    /// Requests in flight.
    pub(crate) depth: usize,
}

/// What a run achieved.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) requests: u64,
    pub(crate) elapsed: Duration,
    /// Nanoseconds from sending a request to reading its reply.
    pub(crate) latency: Histogram<u64>,
}

impl Outcome {
    /// Nothing yet. Latencies up to a minute are told apart to two figures.
    pub(crate) fn new() -> Result<Self> {
        let latency = Histogram::new_with_bounds(1, 60_000_000_000, 2)?;
        Ok(Outcome { requests: 0, elapsed: Duration::ZERO, latency })
    }
}

/// A connection in transmission phase.
#[derive(Debug)]
pub(crate) struct Client {
    stream: UnixStream,
    size: u64,
    random: u64,
    next: u64,
}

impl Client {
    /// Connects to the default export; with `structured`, asks for structured replies and insists on them.
    pub(crate) fn connect(socket: &Path, structured: bool) -> Result<Self> {
        let mut stream = UnixStream::connect(socket).context("cannot connect")?;
        stream.set_read_timeout(Some(SILENCE))?;
        stream.set_write_timeout(Some(SILENCE))?;
        let size = handshake(&mut stream, structured).context("handshake")?;
        Ok(Client { stream, size, random: 0x9e37_79b9_7f4a_7c15, next: 0 })
    }

    /// Keeps `load` going for `duration`, then waits for the replies still due.
    pub(crate) fn run(&mut self, load: &Load, duration: Duration) -> Result<Outcome> {
        let begin = Instant::now();
        self.run_until(load, |_| begin.elapsed() >= duration)
    }

    /// Passes once over the whole disk with `load`.
    pub(crate) fn pass(&mut self, load: &Load) -> Result<Outcome> {
        let total = self.size / load.block as u64;
        self.next = 0;
        self.run_until(load, |sent| sent >= total)
    }

    fn run_until(&mut self, load: &Load, mut done: impl FnMut(u64) -> bool) -> Result<Outcome> {
        ensure!(self.size >= load.block as u64, "the export is smaller than one request");
        let payload = if load.op == Op::Write { load.block } else { 0 };
        let mut slots: Vec<_> = (0..load.depth)
            .map(|_| Slot { payload: vec![0x5a; payload], offset: 0, sent: Instant::now(), received: 0 })
            .collect();
        let mut idle: Vec<usize> = (0..load.depth).collect();
        let mut replies = Replies::new(if load.op == Op::Read { load.block } else { 0 });
        let mut outcome = Outcome::new()?;
        let begin = Instant::now();
        let mut sent = 0;
        loop {
            interrupt::check()?;
            if !idle.is_empty() && !done(sent) {
                sent += idle.len() as u64;
                self.send(load, &idle, &mut slots)?;
                idle.clear();
            }
            if idle.len() == load.depth {
                break;
            }
            replies.receive(&mut self.stream, &mut slots, &mut idle, &mut outcome)?;
        }
        outcome.elapsed = begin.elapsed();
        Ok(outcome)
    }

    /// Sends a request for each idle slot, all in one system call where the socket takes them.
    fn send(&mut self, load: &Load, idle: &[usize], slots: &mut [Slot]) -> Result<()> {
        let command = match load.op {
            Op::Read => CMD_READ,
            Op::Write => CMD_WRITE,
        };
        let mut headers = Vec::with_capacity(idle.len() * REQUEST_LEN);
        let now = Instant::now();
        for &index in idle {
            let offset = self.next_offset(load);
            let slot = &mut slots[index];
            slot.offset = offset;
            slot.sent = now;
            slot.received = 0;
            stamp_blocks(&mut slot.payload, offset);
            headers.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
            headers.extend_from_slice(&0_u16.to_be_bytes());
            headers.extend_from_slice(&command.to_be_bytes());
            headers.extend_from_slice(&(index as u64).to_be_bytes());
            headers.extend_from_slice(&offset.to_be_bytes());
            headers.extend_from_slice(&(load.block as u32).to_be_bytes());
        }
        if load.op == Op::Read {
            return self.stream.write_all(&headers).context("cannot send");
        }
        let mut pieces: Vec<_> = headers
            .chunks(REQUEST_LEN)
            .zip(idle)
            .flat_map(|(header, &index)| [IoSlice::new(header), IoSlice::new(&slots[index].payload)])
            .collect();
        let mut rest = &mut pieces[..];
        while !rest.is_empty() {
            let written = self.stream.write_vectored(rest).context("cannot send")?;
            IoSlice::advance_slices(&mut rest, written);
        }
        Ok(())
    }

    fn next_offset(&mut self, load: &Load) -> u64 {
        let blocks = self.size / load.block as u64;
        let block = match load.order {
            // xorshift64: the same sequence for every server.
            Order::Random => {
                self.random ^= self.random << 13;
                self.random ^= self.random >> 7;
                self.random ^= self.random << 17;
                self.random % blocks
            }
            Order::Sequential => {
                let block = self.next % blocks;
                self.next = block + 1;
                block
            }
        };
        block * load.block as u64
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // NBD_CMD_DISC, so that the server has nothing to complain about.
        let mut request = [0; REQUEST_LEN];
        request[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        request[7] = 2;
        let _ = self.stream.write_all(&request);
    }
}

/// Negotiates and opens the default export; returns its size in bytes.
fn handshake(stream: &mut UnixStream, structured: bool) -> Result<u64> {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    ensure!(greeting.starts_with(b"NBDMAGICIHAVEOPT"), "not a newstyle NBD server");
    let offered = u32::from(be16(&greeting[16..]));
    stream.write_all(&(offered & 3).to_be_bytes())?;
    if structured {
        let (kind, _) = option(stream, OPT_STRUCTURED_REPLY, &[])?;
        ensure!(kind == REP_ACK, "no structured replies");
    }
    // An empty name and no wishes for further information.
    let mut size = None;
    let (mut kind, mut data) = option(stream, OPT_GO, &[0; 6])?;
    while kind != REP_ACK {
        if kind == REP_INFO && data.len() >= 12 && be16(&data[..2]) == 0 {
            size = Some(be64(&data[2..10]));
        }
        (kind, data) = option_reply(stream)?;
    }
    size.context("the server did not tell the size")
}

fn option(stream: &mut UnixStream, option: u32, data: &[u8]) -> Result<(u32, Vec<u8>)> {
    let mut request = b"IHAVEOPT".to_vec();
    request.extend_from_slice(&option.to_be_bytes());
    request.extend_from_slice(&(data.len() as u32).to_be_bytes());
    request.extend_from_slice(data);
    stream.write_all(&request)?;
    option_reply(stream)
}

fn option_reply(stream: &mut UnixStream) -> Result<(u32, Vec<u8>)> {
    let mut header = [0; 20];
    stream.read_exact(&mut header)?;
    let (kind, length) = (be32(&header[12..16]), be32(&header[16..20]) as usize);
    ensure!(length <= 64 << 10, "an option reply of {length} bytes");
    let mut data = vec![0; length];
    stream.read_exact(&mut data)?;
    ensure!(kind & REP_ERROR == 0, "refused: {}", String::from_utf8_lossy(&data));
    Ok((kind, data))
}
