//! The replies of an NBD server: simple ones and structured ones, taken from a stream in whatever pieces it comes.

use std::{io::Read, time::Instant};

use anyhow::{Context, Result, bail, ensure};

use super::{Content, Op, Outcome};

const RECEIVE_BUFFER: usize = 512 << 10;
const SIMPLE_MAGIC: u32 = 0x6744_6698;
const SIMPLE_LEN: usize = 16;
const CHUNK_MAGIC: u32 = 0x668e_33ef;
const CHUNK_LEN: usize = 20;
const CHUNK_DONE: u16 = 1;
const CHUNK_DATA: u16 = 1;
const CHUNK_ERROR: u16 = 1 << 15;

/// A request in flight; its index is the cookie.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) op: Op,
    /// What a write sends.
    pub(super) payload: Vec<u8>,
    offset: u64,
    sent: Instant,
    /// Bytes of data that the reply carries.
    expected: usize,
    /// Bytes of data that arrived.
    received: usize,
}

impl Slot {
    /// An idle one.
    pub(super) fn new(payload: usize) -> Self {
        let payload = vec![0x5a; payload];
        Slot { op: Op::Read, payload, offset: 0, sent: Instant::now(), expected: 0, received: 0 }
    }

    /// A new request starts its way.
    pub(super) fn begin(&mut self, op: Op, offset: u64, expected: usize, now: Instant) {
        (self.op, self.offset, self.expected) = (op, offset, expected);
        (self.sent, self.received) = (now, 0);
    }
}

/// Payload that is still to come.
#[derive(Debug)]
struct Pending {
    slot: usize,
    left: usize,
    /// The reply is complete after it.
    done: bool,
}

/// The stream of replies: a buffer, which holds the start of a header between two calls.
#[derive(Debug)]
pub(super) struct Replies {
    buffer: Vec<u8>,
    filled: usize,
    parser: Parser,
}

impl Replies {
    /// Before the first reply.
    pub(super) fn new(content: Content) -> Self {
        Replies { buffer: vec![0; RECEIVE_BUFFER], filled: 0, parser: Parser { pending: None, content } }
    }

    /// Receives once and takes in whatever arrived. Slots whose reply is complete become idle.
    pub(super) fn receive(
        &mut self,
        stream: &mut impl Read,
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
            let Slot { op, sent, expected, received, .. } = slots[index];
            ensure!(received == expected, "{received} bytes of data in a reply that needs {expected}");
            outcome.record(op, now - sent);
            idle.push(index);
        }
        self.buffer.copy_within(at..end, 0);
        self.filled = end - at;
        Ok(())
    }
}

/// What one step of the parser did.
#[derive(Debug)]
enum Step {
    /// Took this many bytes, which may have finished the reply to a slot.
    Took(usize, Option<usize>),
    /// Needs more bytes than there are.
    Short,
}

/// Splits the stream into replies and skips their payload, but for the stamp.
#[derive(Debug)]
struct Parser {
    pending: Option<Pending>,
    content: Content,
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
                let Slot { offset, expected, .. } = slots[slot];
                if expected == 0 {
                    return Ok(Step::Took(SIMPLE_LEN, Some(slot)));
                }
                let rest = Pending { slot, left: expected, done: true };
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
        ensure!(self.content.allows(offset, start), "wrong data at offset {offset:#x}");
        slots[rest.slot].received += rest.left;
        self.pending = Some(rest);
        Ok(Step::Took(header, None))
    }
}

// Callers pass exactly as many bytes as the number has, which makes these total.
pub(super) fn be16(bytes: &[u8]) -> u16 {
    bytes.iter().take(2).fold(0, |n, b| n << 8 | u16::from(*b))
}

pub(super) fn be32(bytes: &[u8]) -> u32 {
    bytes.iter().take(4).fold(0, |n, b| n << 8 | u32::from(*b))
}

pub(super) fn be64(bytes: &[u8]) -> u64 {
    bytes.iter().take(8).fold(0, |n, b| n << 8 | u64::from(*b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::{BLOCK, stamp_blocks};

    const BYTES: usize = 8192;

    fn slot(offset: u64, expected: usize) -> Slot {
        let mut slot = Slot::new(0);
        slot.begin(Op::Read, offset, expected, Instant::now());
        slot
    }

    fn data(offset: u64) -> Vec<u8> {
        let mut data = vec![0; BYTES];
        stamp_blocks(&mut data, offset);
        data
    }

    fn simple(cookie: u64, error: u32, data: &[u8]) -> Vec<u8> {
        [&SIMPLE_MAGIC.to_be_bytes()[..], &error.to_be_bytes(), &cookie.to_be_bytes(), data].concat()
    }

    fn chunk(cookie: u64, flags: u16, kind: u16, content: &[u8]) -> Vec<u8> {
        let length = content.len() as u32;
        let head = [&CHUNK_MAGIC.to_be_bytes()[..], &flags.to_be_bytes(), &kind.to_be_bytes()].concat();
        [&head[..], &cookie.to_be_bytes(), &length.to_be_bytes(), content].concat()
    }

    /// A stream that gives `piece` bytes at a time.
    struct Trickle<'a>(&'a [u8], usize);

    impl Read for Trickle<'_> {
        fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
            let count = self.1.min(buf.len());
            self.0.read(&mut buf[..count])
        }
    }

    /// The slots in the order in which they finish, when the stream comes in pieces of that size.
    fn finished(stream: &[u8], piece: usize, expected: usize) -> Result<Vec<usize>> {
        let mut stream = Trickle(stream, piece);
        let mut slots = [slot(0, expected), slot(1 << 20, expected)];
        let (mut replies, mut idle) = (Replies::new(Content::Stamped(0)), Vec::new());
        let mut outcome = Outcome::new()?;
        while !stream.0.is_empty() {
            replies.receive(&mut stream, &mut slots, &mut idle, &mut outcome)?;
        }
        assert_eq!(outcome.latency(Op::Read).len(), idle.len() as u64);
        Ok(idle)
    }

    #[test]
    fn simple_replies_in_any_pieces() {
        let stream = [simple(1, 0, &data(1 << 20)), simple(0, 0, &data(0))].concat();
        for piece in [1, 7, 16, 28, 4096, 1 << 20] {
            assert_eq!(finished(&stream, piece, BYTES).unwrap(), [1, 0]);
        }
        assert_eq!(finished(&[simple(0, 0, &[]), simple(1, 0, &[])].concat(), 5, 0).unwrap(), [0, 1]);
    }

    #[test]
    fn interleaved_chunks_in_any_pieces() {
        let part = |offset: u64, data: &[u8]| [&offset.to_be_bytes()[..], data].concat();
        let (first, second) = (data(0), data(1 << 20));
        let stream = [
            chunk(0, 0, CHUNK_DATA, &part(0, &first[..BLOCK])),
            chunk(1, CHUNK_DONE, CHUNK_DATA, &part(1 << 20, &second)),
            chunk(0, 0, CHUNK_DATA, &part(BLOCK as u64, &first[BLOCK..])),
            chunk(0, CHUNK_DONE, 0, &[]),
        ];
        for piece in [1, 7, 20, 28, 4096, 1 << 20] {
            assert_eq!(finished(&stream.concat(), piece, BYTES).unwrap(), [1, 0]);
        }
    }

    #[test]
    fn bad_replies_are_noticed() {
        let message = |stream: &[u8]| finished(stream, 1 << 20, BYTES).unwrap_err().to_string();
        assert!(message(&simple(0, 0, &data(4096))).contains("wrong data"));
        assert!(message(&simple(0, 5, &[])).contains("error 5"));
        assert!(message(&simple(2, 0, &data(0))).contains("never sent"));
        assert!(message(&chunk(0, CHUNK_DONE, 0, &[])).contains("0 bytes of data"));
        assert!(message(&[0; 16]).contains("bad magic"));
    }
}
