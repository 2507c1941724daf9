//! A server that is short of memory: requests fail, it lives.

use std::time::{Duration, Instant};

use crate::util::{self, Server, raw::Raw};

const WRITE: u16 = 1;
/// Such a write is not spliced into the file that memory lends, but needs a buffer.
const FUA: u16 = 1;
const LARGE: u32 = 64 << 20;
const ENOMEM: u8 = 12;

/// The address space of a server, in bytes.
fn address_space(server: &Server) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).expect("status");
    let line = status.lines().find_map(|l| l.strip_prefix("VmSize:")).expect("VmSize");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

/// As with `ulimit -v`: there is room for three large buffers and half a one.
#[test]
fn large_requests_fail_when_memory_is_short() {
    let server = Server::start(["memory", "128M"]);
    let mut honest = Raw::transmission(&server);
    let mut greedy: Vec<Raw> = (0..30).map(|_| Raw::transmission(&server)).collect();
    honest.request(0, 0, 0, 4096);
    honest.read(16 + 4096);
    let now = address_space(&server);
    let limit = now + 3 * u64::from(LARGE) + (32 << 20);
    util::run_ok(["prlimit", "--pid", &server.pid().to_string(), &format!("--as={limit}")]);

    for raw in &mut greedy {
        raw.request(FUA, WRITE, 0, LARGE);
        raw.send(&[0xee; 8]);
    }
    let deadline = Instant::now() + Duration::from_secs(30);
    while address_space(&server) < now + 3 * u64::from(LARGE) {
        assert!(Instant::now() < deadline, "the server did not take the memory");
        std::thread::yield_now();
    }
    let errors = |raw: &mut Raw| raw.read(16)[7];
    // One more is refused, behind all of its data, and so is what would read as much.
    honest.request(FUA, WRITE, 0, LARGE);
    honest.send(&vec![0xee; LARGE as usize]);
    assert_eq!(errors(&mut honest), ENOMEM);
    honest.request(0, 0, 0, LARGE);
    assert_eq!(errors(&mut honest), ENOMEM);
    // What is small goes on.
    honest.request(0, WRITE, 4096, 10);
    honest.send(b"still here");
    assert_eq!(errors(&mut honest), 0);
    honest.request(0, 0, 4096, 10);
    assert_eq!(errors(&mut honest), 0);
    assert_eq!(honest.read(10), b"still here");
    drop(greedy);
    // And when there is memory again, so does what is large.
    loop {
        assert!(Instant::now() < deadline, "the memory did not come back");
        honest.request(0, 0, 0, LARGE);
        match errors(&mut honest) {
            ENOMEM => std::thread::yield_now(),
            error => break assert_eq!(error, 0),
        }
    }
    assert_eq!(honest.read(LARGE as usize)[4096..][..10], *b"still here");
}

/// A client that asks for much and takes nothing does not fill the memory.
#[test]
fn replies_that_nobody_takes_are_bounded() {
    const REQUESTS: u64 = 200;
    let server = Server::start(["--filter=delay", "memory", "64M", "rdelay=1ms"]);
    let mut raw = Raw::transmission(&server);
    let mut other = Raw::transmission(&server);
    let resident = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).expect("status");
        let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).expect("VmHWM");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
    };
    let before = resident();
    for _ in 0..REQUESTS {
        raw.request(0, 0, 0, LARGE);
    }
    // The other one's requests are not behind those.
    for _ in 0..100 {
        other.request(0, 0, 0, 512);
        assert_eq!(other.read(16 + 512)[7], 0);
    }
    for _ in 0..4 {
        assert_eq!(raw.read(16)[7], 0);
        raw.read(LARGE as usize);
    }
    let grown = resident() - before;
    assert!(grown < 7 * u64::from(LARGE), "{} MiB for one client", grown >> 20);
}

/// Memory in kB that is nobody's file.
fn anonymous(server: &Server) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).expect("status");
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:")).expect("RssAnon");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// Clients that ask for much and take nothing, and leave: the allocator keeps little of what they were served with.
#[test]
fn the_memory_of_clients_goes_with_them() {
    let server = Server::start(["pattern", "256M"]);
    let mut stays = Raw::transmission(&server);
    let deadline = Instant::now() + Duration::from_secs(60);
    for length in [1 << 20, 300_000] {
        let mut clients: Vec<Raw> = (0..20).map(|_| Raw::transmission(&server)).collect();
        for number in 0..100 {
            for client in &mut clients {
                client.request(0, 0, number * u64::from(length), length);
            }
        }
        while anonymous(&server) < 100 << 10 {
            assert!(Instant::now() < deadline, "the server serves nobody");
            std::thread::yield_now();
        }
        drop(clients);
        // One stays, and another one comes and goes.
        while anonymous(&server) > 40 << 10 {
            assert!(Instant::now() < deadline, "{} kB are left", anonymous(&server));
            drop(Raw::transmission(&server));
        }
    }
    stays.request(0, 0, 0, 512);
    stays.read(16 + 512);
}
