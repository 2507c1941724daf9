//! Two clients, one after the other, whose requests are legal in form only, against a model of the disk: whatever is
//! answered is true, and what was not acknowledged is not there.

#![no_main]

use std::collections::HashMap;

use libfuzzer_sys::{arbitrary::Arbitrary, fuzz_target};
use nbdkit_fuzz::{
    Disk,
    wire::{self, Mode, Part, Replies},
};
use nbdkit_nbd::{Config, converse};

const SIZE: usize = 16 << 10;

#[derive(Arbitrary, Debug)]
struct Command {
    command: u8,
    flags: u8,
    offset: u16,
    length: u16,
    /// Adds what makes the range an odd one.
    odd: u8,
    fill: u8,
}

#[derive(Arbitrary, Debug)]
struct Client {
    mode: Mode,
    readonly: bool,
    commands: Vec<Command>,
    tail: Vec<u8>,
}

fuzz_target!(|clients: [Client; 2]| {
    let disk = Disk::new(vec![0; SIZE]);
    let chain = disk.chain(&[], &[]).expect("a chain");
    let mut model = vec![0; SIZE];
    for client in &clients {
        let (input, requests) = encode(client);
        let config =
            Config { threads: 1, readonly: client.readonly, handshake_timeout: None, ..Config::default() };
        let said = converse(&chain, &config, &input);
        check(client, &requests, &said, &mut model);
    }
    assert!(disk.contents() == model, "the disk is not what the clients were told");
});

struct Sent {
    command: u16,
    offset: u64,
    length: u64,
    fill: u8,
}

fn encode(client: &Client) -> (Vec<u8>, Vec<Sent>) {
    let (mut out, mut sent) = (wire::handshake(client.mode), Vec::new());
    for (cookie, one) in client.commands.iter().take(64).enumerate() {
        let command = [
            wire::READ,
            wire::WRITE,
            wire::FLUSH,
            wire::TRIM,
            wire::CACHE,
            wire::WRITE_ZEROES,
            wire::BLOCK_STATUS,
            99,
        ][usize::from(one.command % 8)];
        let mut offset = u64::from(one.offset) % (SIZE as u64 + 512);
        let mut length = u64::from(one.length) % (SIZE as u64 + 512);
        match one.odd {
            0 => offset = u64::MAX - offset,
            1 => length = 0,
            2 => offset |= 1 << 63,
            3 if command != wire::WRITE => length = u64::from(u32::MAX) - length,
            _ => {}
        }
        if command == wire::FLUSH {
            (offset, length) = (0, 0);
        }
        // PAYLOAD_LEN belongs to the extended headers' writes, and is in the way elsewhere.
        let mut flags = u16::from(one.flags) & 0b1_1111;
        if command == wire::WRITE && client.mode == Mode::Extended {
            flags |= 1 << 5;
        }
        wire::request(&mut out, client.mode, (flags, command), cookie as u64, (offset, length));
        if command == wire::WRITE {
            out.extend(std::iter::repeat_n(one.fill, length as usize));
        }
        sent.push(Sent { command, offset, length, fill: one.fill });
    }
    out.extend(&client.tail);
    (out, sent)
}

fn check(client: &Client, sent: &[Sent], said: &[u8], model: &mut [u8]) {
    let Some(mut replies) = Replies::new(said, client.mode) else { panic!("the handshake failed") };
    let expected = |cookie| match sent.get(cookie as usize) {
        Some(Sent { command: wire::READ, length, .. }) => *length as usize,
        _ => 0,
    };
    let mut covered: HashMap<u64, u64> = HashMap::new();
    let mut failed: HashMap<u64, bool> = HashMap::new();
    let mut ended = 0;
    while let Some(reply) = replies.next(expected) {
        let Some(request) = sent.get(reply.cookie as usize) else {
            // The tail may be requests too.
            return;
        };
        // One thread: the answers keep the order.
        assert_eq!(reply.cookie, ended, "an answer out of order");
        let (start, end) = (request.offset, request.offset.saturating_add(request.length));
        let cover = covered.entry(reply.cookie).or_default();
        match reply.part {
            Part::Nothing => {}
            Part::Error(error) => {
                assert!(error != 0);
                failed.insert(reply.cookie, true);
            }
            Part::Data(at, data) => {
                let at = at.unwrap_or(start);
                assert!(request.command == wire::READ && at >= start && at + data.len() as u64 <= end);
                assert!(model[at as usize..][..data.len()] == *data, "old data at {at}");
                *cover += data.len() as u64;
            }
            Part::Hole(at, length) => {
                assert!(request.command == wire::READ && at >= start && at + length <= end);
                assert!(
                    model[at as usize..][..length as usize].iter().all(|byte| *byte == 0),
                    "no hole at {at}"
                );
                *cover += length;
            }
            Part::Status(length) => {
                assert!(request.command == wire::BLOCK_STATUS && length > 0);
                *cover += length;
            }
        }
        if !reply.last {
            continue;
        }
        ended += 1;
        if failed.contains_key(&reply.cookie) {
            continue;
        }
        let range = start as usize..end as usize;
        match request.command {
            wire::READ => assert_eq!(*cover, request.length, "a read that is not whole"),
            wire::WRITE => model[range].fill(request.fill),
            wire::WRITE_ZEROES => model[range].fill(0),
            wire::BLOCK_STATUS => assert!(*cover > 0),
            99 => panic!("a command that is none succeeded"),
            _ => {}
        }
        assert!(!(client.readonly && matches!(request.command, wire::WRITE | wire::WRITE_ZEROES)));
    }
}
