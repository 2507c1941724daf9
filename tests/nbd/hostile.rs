//! Clients that break the protocol, vanish or stall: their connection ends, nobody else notices.

use std::time::{Duration, Instant};

use crate::util::{
    self, Server,
    raw::{OPTION_MAGIC, Raw},
};

/// Asks the server to do honest work.
#[track_caller]
fn serves(server: &Server) {
    util::nbdsh(&server.uri(), "h.pwrite(b'still here', 0); assert h.pread(10, 0) == b'still here'");
}

#[test]
fn broken_negotiations_end_with_a_reason() {
    let server = Server::start(["-v", "memory", "1M"]);
    let ends = |what: &str, act: &dyn Fn(&mut Raw)| {
        eprintln!("{what}");
        let before = server.stderr().len();
        let mut raw = Raw::connect(&server);
        act(&mut raw);
        raw.ends();
        let said = server.stderr()[before..].to_owned();
        assert!(said.contains("debug:"), "no reason for {what}: {said}");
    };
    let flags = |raw: &mut Raw| raw.send(&3_u32.to_be_bytes());
    ends("unknown client flags", &|raw| raw.send(&0x8000_0003_u32.to_be_bytes()));
    ends("bad option magic", &|raw| {
        flags(raw);
        raw.send(&[0xee; 16]);
    });
    ends("an option of 4 GiB", &|raw| {
        flags(raw);
        raw.send(&[&OPTION_MAGIC.to_be_bytes()[..], &7_u32.to_be_bytes(), &u32::MAX.to_be_bytes()].concat());
    });
    ends("33 options", &|raw| {
        flags(raw);
        for _ in 0..40 {
            raw.option(99, b"");
        }
    });
    ends("a long EXPORT_NAME", &|raw| {
        flags(raw);
        raw.option(1, &[b'x'; 4097]);
    });
    ends("a vanished client", &|raw| {
        flags(raw);
        raw.send(&OPTION_MAGIC.to_be_bytes());
        raw.vanish();
    });
    serves(&server);
}

#[test]
fn bad_options_are_answered() {
    const ERR_UNSUP: u32 = 1 << 31 | 1;
    const ERR_POLICY: u32 = 1 << 31 | 2;
    const ERR_INVALID: u32 = 1 << 31 | 3;
    const ERR_UNKNOWN: u32 = 1 << 31 | 6;
    let server = Server::start(["file", "dir=/proc/self/fdinfo"]);
    let mut raw = Raw::options(&server);
    let mut answer = |option: u32, payload: &[u8]| {
        raw.option(option, payload);
        raw.reply()
    };
    assert_eq!(answer(99, &[1; 1000]), ERR_UNSUP);
    assert_eq!(answer(5, b""), ERR_POLICY); // STARTTLS
    for payload in [
        &b""[..],
        b"\0\0\0",
        b"\0\0\0\x05abc\0\0",
        b"\0\0\0\0\0\x01",
        b"\xff\xff\xff\xff\0\0",
        b"\0\0\0\0\0\0x",
    ] {
        assert_eq!(answer(7, payload), ERR_INVALID, "GO {payload:?}");
        assert_eq!(answer(6, payload), ERR_INVALID, "INFO {payload:?}");
    }
    assert_eq!(answer(8, b"x"), ERR_INVALID); // STRUCTURED_REPLY with a payload
    assert_eq!(answer(8, b""), 1);
    assert_eq!(answer(8, b""), ERR_INVALID); // twice
    for payload in
        [&b""[..], b"\0\0\0\0\xff\xff\xff\xff", b"\0\0\0\0\0\0\0\x01\0\0\0\xff", b"\0\0\0\0\0\0\0\x01"]
    {
        assert_eq!(answer(10, payload), ERR_INVALID, "SET_META_CONTEXT {payload:?}");
    }
    assert_eq!(answer(7, b"\0\0\0\x04none\0\0"), ERR_UNKNOWN);
    assert_eq!(answer(3, b"x"), ERR_INVALID); // LIST with a payload
    raw.option(2, b"");
    assert_eq!(raw.reply(), 1);
    raw.ends();
}

#[test]
fn broken_requests() {
    let server = Server::start(["-v", "memory", "1M"]);
    let mut raw = Raw::transmission(&server);
    raw.send(&[0xee; 28]);
    raw.ends();
    // A write too large to skip: the client is dropped.
    let mut raw = Raw::transmission(&server);
    raw.request(0, 1, 0, 200 << 20);
    raw.ends();
    // An unknown command is an error, and the connection lives.
    let mut raw = Raw::transmission(&server);
    for command in [77, u16::MAX] {
        raw.request(0, command, 0, 512);
        let reply = raw.read(16);
        assert_eq!(u32::from_be_bytes(reply[4..8].try_into().expect("4 bytes")), 22);
    }
    raw.request(0, 0, u64::MAX - 10, u32::MAX);
    assert_eq!(raw.read(16)[7], 22);
    raw.request(0, 2, 0, 0);
    raw.ends();
    serves(&server);
}

#[test]
fn a_client_that_dies_with_64_requests_in_flight() {
    let mut server = Server::start(["--filter=delay", "memory", "1M", "rdelay=60"]);
    let uri = server.uri();
    let script = "import os
for i in range(64): h.aio_pread(nbd.Buffer(4096), i * 4096)
while h.aio_get_direction() & nbd.AIO_DIRECTION_WRITE: h.poll(-1)
os.kill(os.getpid(), 9)";
    let run = util::run(["nbdsh", "-u", &uri, "-c", script]);
    assert_eq!(run.code, 137, "{}", run.stderr);
    util::nbdsh(&uri, "h.pwrite(b'still here', 0)");
    // And with another 64 in flight the server still ends at once.
    let client = std::thread::spawn(move || {
        let script = "import threading
for i in range(64): h.aio_pread(nbd.Buffer(4096), i * 4096)
while h.aio_in_flight() > 0: h.poll(-1)";
        util::run(["nbdsh", "-u", &uri, "-c", script])
    });
    let start = Instant::now();
    assert_eq!(server.terminate(), 0);
    assert!(start.elapsed() < Duration::from_secs(30), "the delay was waited for");
    client.join().expect("the client");
}

#[test]
fn five_hundred_dropped_handshakes() {
    let server = Server::start(["memory", "1M"]);
    let files = || std::fs::read_dir(format!("/proc/{}/fd", server.pid())).expect("fds").count();
    serves(&server);
    let before = files();
    let mut kept = Vec::new();
    for i in 0..500 {
        let mut raw = Raw::connect(&server);
        match i % 4 {
            0 => {}
            1 => raw.send(&[0, 0]),
            2 => raw.send(&3_u32.to_be_bytes()),
            _ => {
                raw.send(&3_u32.to_be_bytes());
                raw.send(&OPTION_MAGIC.to_be_bytes()[..5]);
            }
        }
        if i % 50 == 0 {
            kept.push(raw);
        }
    }
    // Ten of them are still stalled.
    serves(&server);
    drop(kept);
    let deadline = Instant::now() + Duration::from_secs(30);
    while files() > before {
        assert!(Instant::now() < deadline, "{} files open, {before} before", files());
        std::thread::yield_now();
    }
    serves(&server);
}

/// In the C nbdkit 1.32.5 a handshake holds the request lock of serialized plugins.
#[test]
fn a_stalled_handshake_blocks_nobody() {
    let server = Server::start(["--filter=noparallel", "memory", "1M", "serialize=all-requests"]);
    let stalled = Raw::options(&server);
    serves(&server);
    drop(stalled);
    let server =
        Server::start(["--timeout=1s", "--filter=noparallel", "memory", "1M", "serialize=connections"]);
    let stalled = Raw::options(&server);
    serves(&server);
    stalled.ends();
}

/// A question that is asked thirty thousand times in one option is one question: a layer may run a script for it.
#[test]
fn an_option_that_repeats_itself_is_answered_once() {
    let dir = util::temp();
    let calls = dir.path().join("calls");
    let server = Server::start([
        "eval".to_owned(),
        "get_size=echo 1M".into(),
        "pread=head -c $3 /dev/zero".into(),
        format!("export_description=echo call >> {}; echo text", calls.display()),
    ]);
    let mut raw = Raw::options(&server);
    let kinds = [1_u16, 2, 3].map(u16::to_be_bytes).concat().repeat(10_000);
    raw.option(7, &[&[0; 4][..], &30_000_u16.to_be_bytes(), &kinds].concat());
    let mut told = Vec::new();
    loop {
        match raw.whole_reply() {
            (3, data) => told.push(data[1]),
            (kind, _) => break assert_eq!(kind, 1),
        }
    }
    // The export itself, its name and its description.
    assert_eq!(told, [0, 1, 2]);
    assert_eq!(std::fs::read_to_string(calls).expect("calls"), "call\n");
}

/// Strangers may try what they like, as often as they like, and the log stays short.
#[test]
fn a_flood_of_refusals_does_not_flood_the_log() {
    let dir = util::temp();
    let server = Server::start(["file", &format!("dir={}", dir.path().display())]);
    let mut clients: Vec<Raw> = (0..20).map(|_| Raw::options(&server)).collect();
    let began = Instant::now();
    for _ in 0..20 {
        for raw in &mut clients {
            raw.option(7, &crate::util::raw::go("secret"));
            assert_eq!(raw.reply() >> 31, 1);
        }
    }
    let lines = server.stderr().lines().filter(|line| line.contains("open: ")).count() as u64;
    let most = 20 + began.elapsed().as_secs() + 1;
    assert!((20..=most).contains(&lines), "{lines} lines: {}", server.stderr());
}
