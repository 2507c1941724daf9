//! What a server costs while nobody looks: libraries, threads and memory. Counted, never timed.

use std::time::{Duration, Instant};

use crate::util::{self, NBDKIT, Server, raw::Raw, sh};

/// The files that a server has mapped.
fn mapped(server: &Server) -> String {
    std::fs::read_to_string(format!("/proc/{}/maps", server.pid())).expect("maps")
}

#[test]
fn libraries_are_loaded_when_they_are_needed() {
    let plain = Server::start(["memory", "1M"]);
    let maps = mapped(&plain);
    assert!(maps.contains("libc.so"), "{maps}");
    for library in ["libssl", "libcrypto", "libgcc_s"] {
        assert!(!maps.contains(library), "{library} costs every start");
    }
    let dir = util::temp();
    let keys = dir.path().join("keys");
    std::fs::write(&keys, "alice:0123456789abcdef\n").expect("write");
    let tls = Server::start(["--tls=on", &format!("--tls-psk={}", keys.display()), "memory", "1M"]);
    assert!(mapped(&tls).contains("libssl"));
}

#[test]
fn a_server_with_a_command_has_one_thread() {
    let threads = sh(&format!("{NBDKIT} memory 1M --run 'ls /proc/$PPID/task | wc -l'"));
    assert_eq!(threads.trim(), "1");
}

/// What the kernel keeps of a thread.
const KERNEL_STACK: u64 = 16 << 10;

/// The sum of some values in a file that the kernel has about a server.
fn sum(server: &Server, file: &str, names: &[&str]) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/{file}", server.pid())).expect("read");
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    lines
        .filter(|(name, _)| names.contains(name))
        .map(|(_, value)| value.trim().trim_end_matches(" kB").parse::<u64>().expect("a number"))
        .sum()
}

fn threads(server: &Server) -> u64 {
    sum(server, "status", &["Threads"])
}

/// Bytes that the server alone has: its memory, the page tables for it, and the kernel's stacks of its threads.
fn private(server: &Server) -> u64 {
    let memory = sum(server, "smaps_rollup", &["Private_Clean", "Private_Dirty"]);
    ((memory + sum(server, "status", &["VmPTE"])) << 10) + threads(server) * KERNEL_STACK
}

/// Many small requests at once and a few large ones, which fill all the buffers there are.
fn be_busy(raw: &mut Raw) {
    const LARGE: u32 = 512 << 10;
    (0..64).for_each(|n| raw.request(0, 0, n * 4096, 4096));
    raw.read(64 * (16 + 4096));
    raw.request(0, 1, 0, LARGE);
    raw.send(&vec![0xee; LARGE as usize]);
    raw.read(16);
    raw.request(0, 0, 0, LARGE);
    raw.read(16 + LARGE as usize);
}

/// `count` connections of a server have been busy and say nothing any more: each has at most `most` bytes.
fn idle_connections_are_small(count: u64, most: u64, words: &[&str]) {
    let file = rustix::process::Resource::Nofile;
    let mut limit = rustix::process::getrlimit(file);
    limit.current = limit.maximum;
    rustix::process::setrlimit(file, limit).expect("setrlimit");
    let server = Server::start(words);
    be_busy(&mut Raw::transmission(&server));
    let (before, alone) = (private(&server), threads(&server));
    let mut clients: Vec<_> = (0..count).map(|_| Raw::transmission(&server)).collect();
    clients.iter_mut().for_each(be_busy);
    let deadline = Instant::now() + Duration::from_secs(60);
    while threads(&server) > alone + count {
        assert!(Instant::now() < deadline, "{} threads for {count} connections", threads(&server));
        std::thread::yield_now();
    }
    let each = || private(&server).saturating_sub(before) / count;
    while each() > most {
        assert!(Instant::now() < deadline, "an idle connection keeps {} KiB", each() >> 10);
        std::thread::yield_now();
    }
    // They are all served as before.
    clients.iter_mut().for_each(be_busy);
}

#[test]
fn a_thousand_idle_connections_are_small() {
    idle_connections_are_small(1000, 64 << 10, &["memory", "1M"]);
}

#[test]
fn idle_connections_that_had_workers_are_small() {
    // What the allocator has in fragments does not grow with the connections; with 200 it is some part.
    idle_connections_are_small(200, 128 << 10, &["--filter=delay", "memory", "1M", "delay-read=1ms"]);
}
