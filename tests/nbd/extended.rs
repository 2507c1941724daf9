//! Extended headers: 64-bit requests, by bytes of our own and by qemu, whose client negotiates them.

use crate::util::{
    self, Server, qemu_io,
    raw::{Raw, contexts, go},
};

const ACK: u32 = 1;
const ERR_UNSUP: u32 = 1 << 31 | 1;
const ERR_INVALID: u32 = 1 << 31 | 3;
const ERR_EXT_HEADER_REQD: u32 = 1 << 31 | 10;

const READ: u16 = 0;
const WRITE: u16 = 1;
const TRIM: u16 = 4;
const CACHE: u16 = 5;
const ZERO: u16 = 6;
const BLOCK_STATUS: u16 = 7;
const PAYLOAD: u16 = 1 << 5;

const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;

/// A client in the transmission phase, with `base:allocation`.
fn extended(server: &Server) -> Raw {
    let mut raw = Raw::options(server);
    let answers = [(11, vec![]), (10, contexts("", &["base:allocation"]))].map(|(option, data)| {
        raw.option(option, &data);
        raw.reply()
    });
    assert_eq!(answers, [ACK, 4]);
    assert_eq!(raw.reply(), ACK);
    raw.option(7, &go(""));
    assert_eq!([raw.reply(), raw.reply()], [3, ACK]);
    raw
}

/// Sends a request with its payload, and returns the kind and the payload of the only chunk of the reply.
fn ask(raw: &mut Raw, flags: u16, command: u16, offset: u64, length: u64, payload: &[u8]) -> (u16, Vec<u8>) {
    let head = [&0x21e4_1c71_u32.to_be_bytes()[..], &flags.to_be_bytes(), &command.to_be_bytes()].concat();
    let cookie = 7_u64.to_be_bytes();
    raw.send(&[&head[..], &cookie, &offset.to_be_bytes(), &length.to_be_bytes(), payload].concat());
    let reply = raw.read(32);
    assert_eq!(reply[..6], [0x6e, 0x8a, 0x27, 0x8c, 0, 1], "not a single chunk");
    assert_eq!(reply[8..16], cookie);
    assert_eq!(reply[16..24], offset.to_be_bytes(), "the offset of the request");
    let length = u64::from_be_bytes(reply[24..].try_into().expect("8 bytes"));
    let kind = u16::from_be_bytes([reply[6], reply[7]]);
    (kind, raw.read(usize::try_from(length).expect("a length")))
}

/// The error number of a reply that must be an error.
#[track_caller]
fn error((kind, payload): (u16, Vec<u8>)) -> u32 {
    assert_eq!(kind, 1 << 15 | 1, "{payload:?}");
    let text = &payload[6..];
    assert_eq!(usize::from(u16::from_be_bytes([payload[4], payload[5]])), text.len());
    assert!(!text.is_empty(), "no message");
    u32::from_be_bytes(payload[..4].try_into().expect("4 bytes"))
}

#[test]
fn they_take_precedence_over_structured_replies() {
    let server = Server::start(["memory", "1M"]);
    let mut raw = Raw::options(&server);
    let mut answer = |option: u32, payload: &[u8]| {
        raw.option(option, payload);
        raw.reply()
    };
    assert_eq!(answer(11, b"x"), ERR_INVALID);
    assert_eq!(answer(8, b""), ACK);
    assert_eq!(answer(11, b""), ACK);
    assert_eq!(answer(11, b""), ERR_INVALID);
    assert_eq!(answer(8, b""), ERR_EXT_HEADER_REQD);
    let server = Server::start(["--no-sr", "memory", "1M"]);
    let mut raw = Raw::options(&server);
    raw.option(11, b"");
    assert_eq!(raw.reply(), ERR_UNSUP);
}

#[test]
fn one_request_covers_a_tebibyte() {
    const TIB: u64 = 1 << 40;
    let dir = util::temp();
    let disk = util::image(dir.path(), "disk", 3 << 40);
    let server = Server::start(["file", disk.to_str().expect("UTF-8")]);
    let raw = &mut extended(&server);
    assert_eq!(ask(raw, PAYLOAD, WRITE, TIB, 4, b"data"), (0, vec![]));
    assert_eq!(ask(raw, 0, READ, TIB, 4, b"").1[8..], *b"data");
    let (kind, status) = ask(raw, 0, BLOCK_STATUS, TIB + (1 << 20), TIB, b"");
    assert_eq!(kind, 6);
    assert_eq!(status[..8], [0, 0, 0, 1, 0, 0, 0, 1]);
    assert_eq!(status[8..16], (2 * TIB - (1 << 20)).to_be_bytes(), "to the end of the disk");
    assert_eq!(status[16..], 3_u64.to_be_bytes());
    assert_eq!(ask(raw, 0, TRIM, TIB, TIB, b""), (0, vec![]));
    assert_eq!(ask(raw, 0, READ, TIB, 4, b"").1[8..], [0; 4]);
    assert_eq!(ask(raw, PAYLOAD, WRITE, TIB, 4, b"data"), (0, vec![]));
    assert_eq!(ask(raw, 0, ZERO, 4096, 2 * TIB, b""), (0, vec![]));
    assert_eq!(ask(raw, 0, READ, TIB, 4, b"").1[8..], [0; 4]);
    for (command, errno) in [(TRIM, EINVAL), (ZERO, ENOSPC), (BLOCK_STATUS, EINVAL), (READ, EINVAL)] {
        for (offset, length) in [(TIB, 3 * TIB), (0, u64::MAX), (u64::MAX, u64::MAX), (0, 0)] {
            assert_eq!(
                error(ask(raw, 0, command, offset, length, b"")),
                errno,
                "{command} {offset} {length}"
            );
        }
    }
    // The limit for data stays.
    assert_eq!(error(ask(raw, 0, READ, 0, (64 << 20) + 1, b"")), EINVAL);
    assert_eq!(error(ask(raw, 0, READ, 0, TIB, b"")), EINVAL);
}

#[test]
fn a_tebibyte_in_memory_and_from_nowhere() {
    for words in [&["null", "2T"][..], &["memory", "2T"], &["--filter=offset", "memory", "3T", "offset=1T"]] {
        let server = Server::start(words);
        let raw = &mut extended(&server);
        for command in [TRIM, ZERO] {
            assert_eq!(ask(raw, 0, command, 512, 1 << 40, b""), (0, vec![]), "{words:?} {command}");
        }
        // Where the plugin knows, to the end of the disk.
        let told = if words[0] == "null" { 1_u64 << 40 } else { 2 << 40 };
        let (kind, status) = ask(raw, 0, BLOCK_STATUS, 0, 1 << 40, b"");
        assert_eq!((kind, status.len(), &status[8..16]), (6, 24, &told.to_be_bytes()[..]));
    }
    let server = Server::start(["--filter=nocache", "null", "2T", "cachemode=nop"]);
    assert_eq!(ask(&mut extended(&server), 0, CACHE, 0, 1 << 40, b""), (0, vec![]));
}

#[test]
fn payloads_stay_in_step() {
    let server = Server::start(["memory", "1M"]);
    let raw = &mut extended(&server);
    // As qemu 10 does it.
    assert_eq!(ask(raw, 0, WRITE, 0, 3, b"xyz"), (0, vec![]));
    assert_eq!(ask(raw, 0, READ, 0, 3, b"").1[8..], *b"xyz");
    for command in [READ, TRIM, ZERO, BLOCK_STATUS, 99] {
        // The payload is taken off the stream: the next request is understood.
        assert_eq!(error(ask(raw, PAYLOAD, command, 0, 8, &[0xee; 8])), EINVAL, "{command}");
    }
    assert_eq!(error(ask(raw, PAYLOAD, WRITE, 1 << 20, 512, &[1; 512])), ENOSPC);
    assert_eq!(ask(raw, PAYLOAD, WRITE, 0, 3, b"abc"), (0, vec![]));
    assert_eq!(ask(raw, 0, READ, 0, 3, b""), (1, [&[0; 8][..], b"abc"].concat()));
    let mut broken = extended(&server);
    broken.send(&[&0x21e4_1c71_0020_0001_u64.to_be_bytes()[..], &[0; 16], &[0xff; 8]].concat());
    broken.ends();
    // A request with the header of old.
    let mut broken = extended(&server);
    broken.request(0, READ, 0, 512);
    broken.send(&[0; 4]);
    broken.ends();
}

#[test]
fn qemu_uses_them() {
    let server = Server::start(["-v", "memory", "8G"]);
    qemu_io(
        &server.uri(),
        &["write -P 0x55 5G 64k", "read -P 0x55 5G 64k", "discard 4G 2047M", "read -P 0 5G 64k"],
    );
    qemu_io(&server.uri(), &["write -P 1 1G 1M", "write -z 0 2047M", "read -P 0 1G 1M"]);
    assert!(server.stderr().contains("NBD_OPT_EXTENDED_HEADERS"), "{}", server.stderr());
    let map = util::run_ok(["qemu-img", "map", "--output=json", "-f", "raw", &server.uri()]);
    let list: serde_json::Value = serde_json::from_str(&map).expect("JSON");
    assert_eq!(list[0]["length"], 8_u64 << 30, "{map}");
    assert_eq!(list.as_array().expect("a list").len(), 1);
}
