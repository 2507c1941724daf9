//! How a connection ends: said, unsaid, in the middle of anything, on one side only.

use std::{
    fs,
    time::{Duration, Instant},
};

use crate::util::{
    self, Server, image,
    raw::{Raw, go},
    temp,
};

const WRITE: u16 = 1;
const DISC: u16 = 2;

/// The files that the server has open.
fn files(server: &Server) -> usize {
    fs::read_dir(format!("/proc/{}/fd", server.pid())).expect("fds").count()
}

#[track_caller]
fn comes_back_to(server: &Server, files_before: usize) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while files(server) > files_before {
        assert!(Instant::now() < deadline, "{} files open, {files_before} before", files(server));
        std::thread::yield_now();
    }
    util::nbdsh(&server.uri(), "h.pwrite(b'still here', 0); assert h.pread(10, 0) == b'still here'");
}

/// Requests that came before it are run, sleeping ones too, and answered; those behind it are not looked at.
#[test]
fn disconnecting_lets_end_what_has_begun() {
    let dir = temp();
    let disk = image(dir.path(), "disk", 1 << 20);
    let path = disk.to_str().expect("UTF-8");
    for delay in ["wdelay=0", "wdelay=50ms"] {
        let server = Server::start(["--filter=delay", "file", path, delay]);
        let mut raw = Raw::transmission(&server);
        for i in 0..20_u8 {
            raw.request(0, WRITE, u64::from(i) * 4096, 4096);
            raw.send(&[i + 1; 4096]);
        }
        raw.request(0, DISC, 0, 0);
        raw.request(0, WRITE, 0, 4096);
        raw.send(&[0xee; 4096]);
        for _ in 0..20 {
            assert_eq!(raw.read(16)[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0], "{delay}");
        }
        assert!(raw.rest().is_empty(), "no reply to what came behind");
        let data = fs::read(&disk).expect("read");
        let written = |i: usize| data[i * 4096..][..4096].iter().all(|b| usize::from(*b) == i + 1);
        assert!((0..20).all(written), "{delay}");
        fs::write(&disk, vec![0; 1 << 20]).expect("write");
    }
}

#[test]
fn vanishing_at_any_byte() {
    let server = Server::start(["--filter=delay", "memory", "1M", "wdelay=1ms"]);
    let mut conversation = 3_u32.to_be_bytes().to_vec();
    let mut option = |number: u32, data: &[u8]| {
        conversation.extend(util::raw::OPTION_MAGIC.to_be_bytes());
        conversation.extend(number.to_be_bytes());
        conversation.extend(u32::try_from(data.len()).expect("a length").to_be_bytes());
        conversation.extend(data);
    };
    option(8, b"");
    option(10, &util::raw::contexts("", &["base:allocation"]));
    option(7, &go(""));
    for (command, length) in [(WRITE, 32_u32), (0, 70_000), (7, 1 << 20), (6, 4096), (0, 512)] {
        conversation.extend([0x25, 0x60, 0x95, 0x13, 0, 0]);
        conversation.extend(command.to_be_bytes());
        conversation.extend([7; 8]);
        conversation.extend(4096_u64.to_be_bytes());
        conversation.extend(length.to_be_bytes());
        conversation.extend(if command == WRITE { vec![5; 32] } else { vec![] });
    }
    util::nbdsh(&server.uri(), "h.pread(1, 0)");
    let before = files(&server);
    for length in 0..conversation.len() {
        let mut raw = Raw::connect(&server);
        raw.send(&conversation[..length]);
        match length % 3 {
            0 => drop(raw),
            1 => raw.vanish(),
            // It reads to the end of what it is told.
            _ => drop(raw.rest()),
        }
    }
    // And in the middle of any reply.
    for length in (0..140).chain([1000, 50_000, 70_100]) {
        let mut raw = Raw::connect(&server);
        raw.send(&conversation);
        raw.read(length);
    }
    comes_back_to(&server, before);
}

/// A client that says no more still hears what it asked for, if that takes no sleep; one that hears no more ends.
#[test]
fn half_open_sockets() {
    let server = Server::start(["memory", "1M"]);
    util::nbdsh(&server.uri(), "h.pread(1, 0)");
    let before = files(&server);
    let mut raw = Raw::transmission(&server);
    for _ in 0..100 {
        raw.request(0, 0, 0, 65_536);
    }
    assert_eq!(raw.rest().len(), 100 * (16 + 65_536));
    let mut deaf: Vec<Raw> = (0..20).map(|_| Raw::transmission(&server)).collect();
    for raw in &mut deaf {
        raw.deafen();
        raw.request(0, 0, 0, 65_536);
    }
    // Open on this side, closed on the other.
    comes_back_to(&server, before);
    drop(deaf);
}

/// SIGTERM: what runs is finished and answered; what comes then is not.
#[test]
fn a_server_that_stops_finishes_what_runs() {
    let dir = temp();
    let disk = image(dir.path(), "disk", 64 << 20);
    let mut server = Server::start(["file", disk.to_str().expect("UTF-8")]);
    let mut raw = Raw::transmission(&server);
    for i in 0..64_u64 {
        raw.request(0, WRITE, i << 20, 1 << 20);
        raw.send(&vec![i as u8 + 1; 1 << 20]);
        if i == 32 {
            util::sh(&format!("kill -TERM {}", server.pid()));
        }
    }
    let replies = raw.rest();
    assert_eq!(server.wait(), 0);
    // A reply says that the data is there, whenever the end came.
    assert_eq!(replies.len() % 16, 0, "half a reply");
    let done = replies.chunks(16).filter(|reply| reply[4..8] == [0; 4]).count();
    let data = fs::read(&disk).expect("read");
    let whole =
        (0..64).filter(|i| data[i << 20..][..1 << 20].iter().all(|b| usize::from(*b) == i + 1)).count();
    assert!(done >= 1 && whole >= done, "{done} answered, {whole} written");
}
