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

use anyhow::{Context, Result, bail, ensure};
use hdrhistogram::Histogram;

use crate::interrupt;

/// Distance of the stamps, and the smallest request.
pub(crate) const BLOCK: usize = 4096;
/// How long a server may stay silent before it counts as hung.
const SILENCE: Duration = Duration::from_secs(10);
const RECEIVE_BUFFER: usize = 512 << 10;

const OPT_GO: u32 = 7;
const OPT_STRUCTURED_REPLY: u32 = 8;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_ERROR: u32 = 1 << 31;
const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REQUEST_LEN: usize = 28;
const SIMPLE_MAGIC: u32 = 0x6744_6698;
const SIMPLE_LEN: usize = 16;
const CHUNK_MAGIC: u32 = 0x668e_33ef;
const CHUNK_LEN: usize = 20;
const CHUNK_DONE: u16 = 1;
const CHUNK_DATA: u16 = 1;
const CHUNK_ERROR: u16 = 1 << 15;

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
        let mut replies = Replies::new(load);
        let mut outcome = Outcome {
            requests: 0,
            elapsed: Duration::ZERO,
            latency: Histogram::new_with_bounds(1, 60_000_000_000, 2)?,
        };
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

/// A request in flight; its index is the cookie.
struct Slot {
    payload: Vec<u8>,
    offset: u64,
    sent: Instant,
    /// Bytes of data that arrived.
    received: usize,
}

/// Payload that is still to come.
struct Pending {
    slot: usize,
    left: usize,
    /// The reply is complete after it.
    done: bool,
}

/// The stream of replies: a buffer, which holds the start of a header between two calls.
struct Replies {
    buffer: Vec<u8>,
    filled: usize,
    parser: Parser,
}

impl Replies {
    fn new(load: &Load) -> Self {
        let expected = if load.op == Op::Read { load.block } else { 0 };
        Replies { buffer: vec![0; RECEIVE_BUFFER], filled: 0, parser: Parser { pending: None, expected } }
    }

    /// Receives once and takes in whatever arrived. Slots whose reply is complete become idle.
    fn receive(
        &mut self,
        stream: &mut UnixStream,
        slots: &mut [Slot],
        idle: &mut Vec<usize>,
        outcome: &mut Outcome,
    ) -> Result<()> {
        let count = stream.read(&mut self.buffer[self.filled..]).context("no reply")?;
        ensure!(count > 0, "the server closed the connection");
        let now = Instant::now();
        let end = self.filled + count;
        let mut at = 0;
        while let Step::Took(bytes, finished) = self.parser.step(&self.buffer[at..end], slots)? {
            at += bytes;
            let Some(index) = finished else { continue };
            let (sent, received) = (slots[index].sent, slots[index].received);
            let expected = self.parser.expected;
            ensure!(received == expected, "{received} bytes of data in a reply that needs {expected}");
            outcome.requests += 1;
            outcome.latency.saturating_record((now - sent).as_nanos() as u64);
            idle.push(index);
        }
        self.buffer.copy_within(at..end, 0);
        self.filled = end - at;
        Ok(())
    }
}

/// What one step of the parser did.
enum Step {
    /// Took this many bytes, which may have finished the reply to a slot.
    Took(usize, Option<usize>),
    /// Needs more bytes than there are.
    Short,
}

/// Splits the stream into replies and skips their payload, but for the stamp.
struct Parser {
    pending: Option<Pending>,
    /// Data bytes that a successful reply carries.
    expected: usize,
}

impl Parser {
    fn step(&mut self, input: &[u8], slots: &mut [Slot]) -> Result<Step> {
        if let Some(pending) = &mut self.pending {
            let taken = pending.left.min(input.len());
            pending.left -= taken;
            if pending.left > 0 {
                return Ok(if taken == 0 { Step::Short } else { Step::Took(taken, None) });
            }
            let finished = pending.done.then_some(pending.slot);
            self.pending = None;
            return Ok(Step::Took(taken, finished));
        }
        if input.len() < SIMPLE_LEN {
            return Ok(Step::Short);
        }
        let slot = be64(&input[8..16]) as usize;
        ensure!(slot < slots.len(), "a reply to a request that was never sent");
        match be32(&input[..4]) {
            SIMPLE_MAGIC => {
                let error = be32(&input[4..8]);
                ensure!(error == 0, "the server answered with error {error}");
                if self.expected == 0 {
                    return Ok(Step::Took(SIMPLE_LEN, Some(slot)));
                }
                let offset = slots[slot].offset;
                let rest = Pending { slot, left: self.expected, done: true };
                self.data(input, SIMPLE_LEN, offset, rest, slots)
            }
            CHUNK_MAGIC if input.len() < CHUNK_LEN => Ok(Step::Short),
            CHUNK_MAGIC => self.chunk(input, slot, slots),
            magic => bail!("bad magic {magic:#x} in a reply"),
        }
    }

    fn chunk(&mut self, input: &[u8], slot: usize, slots: &mut [Slot]) -> Result<Step> {
        let (flags, kind) = (be16(&input[4..6]), be16(&input[6..8]));
        let length = be32(&input[16..20]) as usize;
        let done = flags & CHUNK_DONE != 0;
        ensure!(kind & CHUNK_ERROR == 0, "the server answered with error chunk {kind:#x}");
        if length == 0 {
            return Ok(Step::Took(CHUNK_LEN, done.then_some(slot)));
        }
        ensure!(kind == CHUNK_DATA && length > 8, "a chunk of type {kind} where data was due");
        let Some(offset) = input.get(CHUNK_LEN..CHUNK_LEN + 8) else { return Ok(Step::Short) };
        self.data(input, CHUNK_LEN + 8, be64(offset), Pending { slot, left: length - 8, done }, slots)
    }

    /// Takes a header of `header` bytes before data for `offset`, and checks the stamp that the data starts with.
    fn data(
        &mut self,
        input: &[u8],
        header: usize,
        offset: u64,
        rest: Pending,
        slots: &mut [Slot],
    ) -> Result<Step> {
        let Some(start) = input.get(header..header + 8) else { return Ok(Step::Short) };
        if offset.is_multiple_of(BLOCK as u64) {
            ensure!(start == stamp(offset), "wrong data at offset {offset:#x}");
        }
        slots[rest.slot].received += rest.left;
        self.pending = Some(rest);
        Ok(Step::Took(header, None))
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

// Callers pass exactly as many bytes as the number has, which makes these total.
fn be16(bytes: &[u8]) -> u16 {
    bytes.iter().take(2).fold(0, |n, b| n << 8 | u16::from(*b))
}

fn be32(bytes: &[u8]) -> u32 {
    bytes.iter().take(4).fold(0, |n, b| n << 8 | u32::from(*b))
}

fn be64(bytes: &[u8]) -> u64 {
    bytes.iter().take(8).fold(0, |n, b| n << 8 | u64::from(*b))
}
