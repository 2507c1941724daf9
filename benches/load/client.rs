//! A batching NBD connection that costs little, so that the servers' speed shows.
//!
//! It speaks fixed newstyle and keeps `depth` requests in flight. All requests that can be sent go out in one system
//! call, and all replies that have arrived come in with one. Each 4 KiB block of a test disk starts with a stamp of
//! its own offset: writes put it there, reads check it, so a server cannot win by answering wrongly. Socket buffers
//! are left at the kernel's default, as libnbd and qemu leave them.

use std::{
    fs::File,
    io::{IoSlice, Write},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{
        SendAncillaryBuffer, SendFlags, sendmsg,
        sockopt::{Timeout, set_socket_timeout},
    },
};

use super::{
    Address, Content, Load, Mix, Op, Order, Outcome,
    handshake::handshake,
    replies::{Replies, Slot},
    stamp_blocks,
};
use crate::interrupt;

/// How long a server may stay silent before it counts as hung.
const SILENCE: Duration = Duration::from_secs(10);
/// Slices that one system call takes.
const MOST_SLICES: usize = 1024;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REQUEST_LEN: usize = 28;
const CMD_DISC: u16 = 2;

/// A connection in transmission phase.
#[derive(Debug)]
pub(super) struct Client {
    stream: File,
    size: u64,
    content: Content,
    random: u64,
    next: u64,
}

impl Client {
    /// Connects; `index` tells connections apart, so that each has its own random requests.
    pub(super) fn connect(
        address: &Address,
        index: usize,
        structured: bool,
        content: Content,
    ) -> Result<Self> {
        let socket = address.connect()?;
        set_socket_timeout(&socket, Timeout::Recv, Some(SILENCE))?;
        set_socket_timeout(&socket, Timeout::Send, Some(SILENCE))?;
        let stream = File::from(socket);
        let size = handshake(&stream, &address.export, structured).context("handshake")?;
        let random = 0x9e37_79b9_7f4a_7c15 ^ (index as u64) << 32;
        Ok(Client { stream, size, content, random, next: 0 })
    }

    /// Of the export, in bytes.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Sequential requests begin at the start of the export again.
    pub(super) fn rewind(&mut self) {
        self.next = 0;
    }

    /// Keeps `load` going until `done`, which is told how many requests were sent; then waits for the replies due.
    pub(super) fn run(&mut self, load: &Load, mut done: impl FnMut(u64) -> bool) -> Result<Outcome> {
        ensure!(self.size >= load.block as u64, "the export is smaller than one request");
        let payload = if load.mix.has(Op::Write) { load.block } else { 0 };
        let mut slots: Vec<_> = (0..load.depth).map(|_| Slot::new(payload)).collect();
        let mut idle: Vec<usize> = (0..load.depth).collect();
        let mut replies = Replies::new(self.content);
        let mut output = Output::new(load.mix);
        let mut outcome = Outcome::new()?;
        let begin = Instant::now();
        let mut sent = 0;
        loop {
            interrupt::check()?;
            if !idle.is_empty() && !done(sent) {
                sent += idle.len() as u64;
                let now = Instant::now();
                for index in idle.drain(..) {
                    let request = self.prepare(load, now, &mut slots[index], index);
                    output.push(request, index);
                }
            }
            if idle.len() == load.depth {
                break;
            }
            // A server that waits for us to take its replies takes no requests meanwhile.
            if output.send(&self.stream, &slots)? || self.can_receive()? {
                replies.receive(&mut self.stream, &mut slots, &mut idle, &mut outcome)?;
            }
        }
        outcome.elapsed = begin.elapsed();
        Ok(outcome)
    }

    /// Makes the next request in its slot, and the header for it.
    fn prepare(&mut self, load: &Load, now: Instant, slot: &mut Slot, cookie: usize) -> [u8; REQUEST_LEN] {
        let op = load.mix.pick(self.random >> 20);
        let offset = self.next_offset(load);
        if op == Op::Write {
            let origin = if let Content::Stamped(origin) = self.content { origin } else { 0 };
            stamp_blocks(&mut slot.payload, origin.wrapping_add(offset));
        }
        slot.begin(op, offset, if op == Op::Read { load.block } else { 0 }, now);
        let command = match op {
            Op::Read => 0,
            Op::Write => 1,
            Op::Trim => 4,
        };
        request(command, cookie as u64, offset, load.block as u32)
    }

    fn next_offset(&mut self, load: &Load) -> u64 {
        let blocks = self.size / load.block as u64;
        // xorshift64: the same sequence for every server.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let block = match load.order {
            Order::Random => self.random % blocks,
            Order::Sequential => {
                let block = self.next % blocks;
                self.next = block + 1;
                block
            }
        };
        block * load.block as u64
    }

    /// Waits until replies can be taken or requests sent; whether it is the former.
    fn can_receive(&self) -> Result<bool> {
        let mut ready = [PollFd::new(&self.stream, PollFlags::IN | PollFlags::OUT)];
        let limit = Timespec { tv_sec: SILENCE.as_secs().cast_signed(), tv_nsec: 0 };
        match poll(&mut ready, Some(&limit)) {
            Ok(0) => bail!("the server takes no requests"),
            Ok(_) => Ok(!ready[0].revents().difference(PollFlags::OUT).is_empty()),
            Err(Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // A polite goodbye, so that the server has nothing to complain about.
        let _ = self.stream.write_all(&request(CMD_DISC, 0, 0, 0));
    }
}

fn request(command: u16, cookie: u64, offset: u64, length: u32) -> [u8; REQUEST_LEN] {
    let mut request = [0; REQUEST_LEN];
    request[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    request[6..8].copy_from_slice(&command.to_be_bytes());
    request[8..16].copy_from_slice(&cookie.to_be_bytes());
    request[16..24].copy_from_slice(&offset.to_be_bytes());
    request[24..].copy_from_slice(&length.to_be_bytes());
    request
}

/// Requests on their way out.
#[derive(Debug)]
struct Output {
    flags: SendFlags,
    headers: Vec<u8>,
    /// The slots that the headers are for.
    queue: Vec<usize>,
    /// Bytes that are sent, payloads included.
    sent: usize,
}

impl Output {
    /// Without large requests or without large replies the two cannot wait for each other, and waiting in the kernel is
    /// quicker.
    fn new(mix: Mix) -> Self {
        let both = mix.has(Op::Read) && mix.has(Op::Write);
        let flags = SendFlags::NOSIGNAL | if both { SendFlags::DONTWAIT } else { SendFlags::empty() };
        Output { flags, headers: Vec::new(), queue: Vec::new(), sent: 0 }
    }

    fn push(&mut self, header: [u8; REQUEST_LEN], slot: usize) {
        self.headers.extend_from_slice(&header);
        self.queue.push(slot);
    }

    /// Sends as much as the socket takes; whether that was all.
    fn send(&mut self, stream: &File, slots: &[Slot]) -> Result<bool> {
        if self.queue.is_empty() {
            return Ok(true);
        }
        let mut slices = self.slices(slots);
        let mut rest = &mut slices[..];
        IoSlice::advance_slices(&mut rest, self.sent);
        let mut sent = self.sent;
        while !rest.is_empty() {
            let some = &rest[..rest.len().min(MOST_SLICES)];
            match sendmsg(stream, some, &mut SendAncillaryBuffer::default(), self.flags) {
                Ok(count) => {
                    sent += count;
                    IoSlice::advance_slices(&mut rest, count);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if self.flags.contains(SendFlags::DONTWAIT) => break,
                Err(error) => return Err(error).context("cannot send"),
            }
        }
        self.sent = sent;
        self.forget_sent(slots);
        Ok(self.queue.is_empty())
    }

    /// Drops the requests that are sent to the end: their slots may be in use again before the others are sent.
    fn forget_sent(&mut self, slots: &[Slot]) {
        let mut count = 0;
        for &slot in &self.queue {
            let slot = &slots[slot];
            let length = REQUEST_LEN + if slot.op == Op::Write { slot.payload.len() } else { 0 };
            if self.sent < length {
                break;
            }
            self.sent -= length;
            count += 1;
        }
        self.queue.drain(..count);
        self.headers.drain(..count * REQUEST_LEN);
    }

    /// All that is queued; headers of requests without payload are one slice.
    fn slices<'a>(&'a self, slots: &'a [Slot]) -> Vec<IoSlice<'a>> {
        let mut slices = Vec::with_capacity(2 * self.queue.len());
        let mut start = 0;
        for (index, &slot) in self.queue.iter().enumerate() {
            if slots[slot].op == Op::Write {
                let end = (index + 1) * REQUEST_LEN;
                slices.extend([&self.headers[start..end], &slots[slot].payload].map(IoSlice::new));
                start = end;
            }
        }
        if start < self.headers.len() {
            slices.push(IoSlice::new(&self.headers[start..]));
        }
        slices
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_follow_their_headers() {
        let mut slots: Vec<_> = (0..4).map(|_| Slot::new(8)).collect();
        let mut output = Output::new(Mix::READS);
        let ops = [Op::Read, Op::Trim, Op::Write, Op::Read];
        for (index, op) in ops.into_iter().enumerate() {
            slots[index].payload.fill(index as u8);
            slots[index].begin(op, 0, 0, Instant::now());
            output.push(request(0, index as u64, 0, 8), index);
        }
        let slices = output.slices(&slots);
        assert_eq!(slices.iter().map(|s| s.len()).collect::<Vec<_>>(), [3 * REQUEST_LEN, 8, REQUEST_LEN]);
        assert_eq!(*slices[1], [2; 8]);
        assert_eq!(slices[2][15], 3);

        // Two headers and a bit of the third, which waits for its payload.
        output.sent = 2 * REQUEST_LEN + 30;
        output.forget_sent(&slots);
        assert_eq!((&output.queue[..], output.sent), (&[2, 3][..], 30));
        let slices = output.slices(&slots);
        assert_eq!(slices.iter().map(|s| s.len()).collect::<Vec<_>>(), [REQUEST_LEN, 8, REQUEST_LEN]);
        output.sent += 6 + REQUEST_LEN;
        output.forget_sent(&slots);
        assert!(output.queue.is_empty() && output.headers.is_empty() && output.sent == 0);
    }
}
