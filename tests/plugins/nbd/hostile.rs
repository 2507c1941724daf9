//! Servers that lie, in raw bytes: the connection is closed and the request fails, whatever they send.

use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    thread::JoinHandle,
    time::Duration,
};

use super::listener;
use crate::util::{NBDKIT, Server, nbdsh, run, temp};

const SIZE: u64 = 1 << 20;

/// The server's end of a connection.
struct Peer(UnixStream);

impl Peer {
    fn accept(listener: &UnixListener) -> Self {
        let (stream, _) = listener.accept().expect("accept");
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
        Peer(stream)
    }

    fn send(&mut self, parts: &[&[u8]]) {
        // It may have closed already.
        let _ = self.0.write_all(&parts.concat());
    }

    /// Bytes from the client; None: it has closed.
    fn read(&mut self, length: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.0.read_exact(&mut bytes).ok().map(|()| bytes)
    }

    /// The client closes the connection.
    #[track_caller]
    fn sees_the_end(mut self) {
        let mut rest = [0; 4096];
        loop {
            match self.0.read(&mut rest) {
                Ok(0) => return,
                Ok(_) => {}
                Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => return,
                Err(e) => panic!("the connection is not closed: {e}"),
            }
        }
    }

    fn greet(&mut self) {
        self.send(&[b"NBDMAGICIHAVEOPT", &[0, 3]]);
        self.read(4).expect("flags");
    }

    /// The next option: its number.
    fn option(&mut self) -> Option<u32> {
        let head = self.read(16)?;
        let word = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().expect("4 bytes"));
        self.read(word(12) as usize)?;
        Some(word(8))
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) {
        let length = u32::try_from(data.len()).expect("a length");
        let magic = 0x0003_e889_0455_65a9_u64.to_be_bytes();
        self.send(&[&magic, &option.to_be_bytes(), &kind.to_be_bytes(), &length.to_be_bytes(), data]);
    }

    /// The handshake of a server with structured replies and extents, up to GO.
    fn negotiate(&mut self) {
        self.greet();
        while let Some(option) = self.option() {
            match option {
                8 | 9 => self.reply(option, 1, b""),
                10 => {
                    self.reply(option, 4, b"\0\0\0\x01base:allocation");
                    self.reply(option, 1, b"");
                }
                7 => {
                    let flags = 0b101_1110_1101_u16;
                    self.reply(option, 3, &[&[0, 0][..], &SIZE.to_be_bytes(), &flags.to_be_bytes()].concat());
                    self.reply(option, 1, b"");
                    return;
                }
                _ => self.reply(option, 0x8000_0001, b""),
            }
        }
    }

    /// The cookie of the next request.
    fn request(&mut self) -> Option<[u8; 8]> {
        self.read(28)?[8..16].try_into().ok()
    }
}

/// A chunk of a structured reply.
fn chunk(flags: u8, kind: u16, cookie: [u8; 8], length: u32, payload: &[u8]) -> Vec<u8> {
    let start = [0x66, 0x8e, 0x33, 0xef, 0, flags];
    [&start[..], &kind.to_be_bytes(), &cookie, &length.to_be_bytes(), payload].concat()
}

fn data(flags: u8, cookie: [u8; 8], offset: u64, length: usize) -> Vec<u8> {
    let payload = [&offset.to_be_bytes()[..], &vec![7; length]].concat();
    chunk(flags, 1, cookie, 8 + length as u32, &payload)
}

/// What a server does.
type Behaviour = fn(&mut Peer);

/// What is sent in answer to a read of 4096 bytes from 8192 on.
type Lie = fn([u8; 8]) -> Vec<u8>;

const LIES: &[(&str, Lie)] = &[
    ("wrong magic", |_| vec![0x55; 64]),
    ("simple reply", |cookie| [&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0][..], &cookie, &[1; 4096]].concat()),
    ("request that was not made", |mut cookie| {
        cookie[7] ^= 1;
        data(1, cookie, 8192, 4096)
    }),
    ("request that was not made", |mut cookie| {
        cookie[3] ^= 1;
        data(1, cookie, 8192, 4096)
    }),
    ("outside of what was asked for", |cookie| data(1, cookie, 0, 4096)),
    ("outside of what was asked for", |cookie| data(1, cookie, 8192, 4097)),
    ("outside of what was asked for", |cookie| data(1, cookie, u64::MAX - 100, 4096)),
    ("outside of what was asked for", |cookie| chunk(1, 1, cookie, u32::MAX, &8192_u64.to_be_bytes())),
    ("outside of what was asked for", |cookie| {
        chunk(1, 2, cookie, 12, &[0, 0, 0, 0, 0, 0, 0x20, 0, 0xff, 0xff, 0xff, 0xff])
    }),
    ("came twice", |cookie| [data(0, cookie, 8192, 512), data(1, cookie, 8192, 4096)].concat()),
    ("without all of its data", |cookie| data(1, cookie, 8192, 512)),
    ("without all of its data", |cookie| chunk(1, 0, cookie, 0, b"")),
    ("does not end its reply", |cookie| chunk(0, 0, cookie, 0, b"")),
    ("does not fit its type", |cookie| chunk(1, 1, cookie, 8, &8192_u64.to_be_bytes())),
    ("does not fit its request", |cookie| chunk(1, 5, cookie, 12, &[0; 12])),
    ("unknown type", |cookie| chunk(1, 77, cookie, 0, b"")),
    ("too long", |cookie| chunk(1, 0x8001, cookie, 1 << 30, b"")),
    ("malformed", |cookie| chunk(1, 0x8001, cookie, 6, &[0; 6])),
    ("too short", |cookie| chunk(1, 0x8001, cookie, 7, &[0, 0, 0, 5, 0xff, 0xff, 0])),
];

/// Starts a server in a thread; it does `behave` with its one connection, which has to be closed afterwards.
fn hostile(listener: UnixListener, behave: impl FnOnce(&mut Peer) + Send + 'static) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut peer = Peer::accept(&listener);
        behave(&mut peer);
        peer.sees_the_end();
    })
}

#[test]
fn what_was_not_asked_for_closes_the_connection() {
    for (why, lie) in LIES {
        let dir = temp();
        let (listener, socket) = listener(dir.path());
        let server = hostile(listener, |peer| {
            peer.negotiate();
            let cookie = peer.request().expect("a request");
            peer.send(&[&lie(cookie)]);
        });
        let proxy = Server::start(["nbd", &socket, "timeout=30"]);
        let script = "try:\n  h.pread(4096, 8192)\nexcept nbd.Error as e:\n  print(e.errno)";
        assert_eq!(nbdsh(&proxy.uri(), script).trim(), "EIO", "{why}");
        server.join().unwrap_or_else(|_| panic!("{why}: {}", proxy.stderr()));
        assert!(proxy.stderr().contains(why), "{why}: {}", proxy.stderr());
        let status = std::fs::read_to_string(format!("/proc/{}/status", proxy.pid())).expect("the status");
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a line");
        let peak: u64 = peak.trim().trim_end_matches(" kB").parse().expect("a number");
        assert!(peak < 200 << 10, "{why}: {peak} KiB");
    }
}

/// A lie about the map of the disk.
#[test]
fn block_status_that_makes_no_sense() {
    let lies: &[(&str, Lie)] = &[
        ("no bytes", |cookie| chunk(1, 5, cookie, 12, &[0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0])),
        ("not asked for", |cookie| chunk(1, 5, cookie, 12, &[0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 0])),
        ("wrong length", |cookie| chunk(1, 5, cookie, 13, &[0; 13])),
        ("wrong length", |cookie| chunk(1, 5, cookie, u32::MAX - 3, &[0, 0, 0, 1])),
        ("no status", |cookie| chunk(1, 0, cookie, 0, b"")),
        ("does not fit its request", |cookie| chunk(1, 6, cookie, 24, &[0; 24])),
    ];
    for (why, lie) in lies {
        let dir = temp();
        let (listener, socket) = listener(dir.path());
        let server = hostile(listener, |peer| {
            peer.negotiate();
            let cookie = peer.request().expect("a request");
            peer.send(&[&lie(cookie)]);
        });
        let proxy = Server::start(["nbd", &socket]);
        let out = run(["nbdinfo", "--map", &proxy.uri()]);
        assert_ne!(out.code, 0, "{why}: {}", out.stdout);
        assert!(proxy.stderr().contains(why), "{why}: {}", proxy.stderr());
        server.join().expect("the server");
    }
}

/// The server's error is the client's, and its text is shown, without what a terminal would obey.
#[test]
fn errors_and_their_texts_pass_through() {
    let dir = temp();
    let (listener, socket) = listener(dir.path());
    let server = hostile(listener, |peer| {
        peer.negotiate();
        let cookie = peer.request().expect("a request");
        peer.send(&[&chunk(1, 0x8001, cookie, 6 + 9, b"\0\0\0\x1c\0\x09full\x1b\x07\nup")]);
        let cookie = peer.request().expect("a request");
        // In pieces and out of order, with a hole.
        peer.send(&[&data(0, cookie, 8192 + 2048, 2048)]);
        peer.send(&[&chunk(0, 2, cookie, 12, &[0, 0, 0, 0, 0, 0, 0x24, 0, 0, 0, 4, 0])]);
        peer.send(&[&data(0, cookie, 8192, 1024), &chunk(1, 0, cookie, 0, b"")]);
    });
    let proxy = Server::start(["nbd", &socket]);
    let script = "try:\n  h.pread(4096, 8192)\nexcept nbd.Error as e:\n  print(e.errno)\n\
        print(h.pread(4096, 8192) == b'\\7' * 1024 + bytes(1024) + b'\\7' * 2048)";
    assert_eq!(nbdsh(&proxy.uri(), script), "ENOSPC\nTrue\n");
    assert!(proxy.stderr().contains("the server says: full   up"), "{}", proxy.stderr());
    server.join().expect("the server");
}

/// In the handshake a server can neither hold up the start for ever nor take memory.
#[test]
fn lies_in_the_handshake() {
    let lies: &[(&str, Behaviour)] = &[
        ("no NBD server", |peer| peer.send(&[b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n"])),
        ("unknown style", |peer| peer.send(&[b"NBDMAGICIHAVENOT", &[0, 3]])),
        ("closed the connection", |peer| {
            peer.send(&[b"NBDMAGICIHAVEOPT"]);
            peer.0.shutdown(std::net::Shutdown::Write).expect("shutdown");
        }),
        ("not sent", |peer| {
            peer.greet();
            peer.reply(4711, 1, b"");
        }),
        ("too long", |peer| {
            peer.greet();
            peer.send(&[&0x0003_e889_0455_65a9_u64.to_be_bytes(), &[0, 0, 0, 11, 0, 0, 0, 1], &[0xff; 4]]);
        }),
        ("no end of replies", |peer| {
            peer.greet();
            while let Some(option) = peer.option() {
                match option {
                    8 => peer.reply(option, 1, b""),
                    9 => (0..20_000).for_each(|_| peer.reply(9, 4, b"\0\0\0\x01x:y")),
                    _ => peer.reply(option, 0x8000_0001, b""),
                }
            }
        }),
        ("2^63", |peer| {
            peer.greet();
            while let Some(option) = peer.option() {
                if option == 7 {
                    peer.reply(7, 3, &[&[0, 0][..], &[0xff; 8], &[0, 1]].concat());
                    peer.reply(7, 1, b"");
                    return;
                }
                peer.reply(option, 0x8000_0001, b"");
            }
        }),
        ("block size", |peer| {
            peer.greet();
            while let Some(option) = peer.option() {
                if option == 7 {
                    peer.reply(7, 3, &[0, 3, 0, 0, 0, 3, 0, 0, 16, 0, 0xff, 0xff, 0xff, 0xff]);
                    peer.reply(7, 3, &[&[0, 0][..], &SIZE.to_be_bytes(), &[0, 1]].concat());
                    peer.reply(7, 1, b"");
                    return;
                }
                peer.reply(option, 0x8000_0001, b"");
            }
        }),
        ("did not finish the handshake in time", |peer| {
            peer.send(&[b"NBDMAGIC"]);
            // A byte now and then, until it has had enough.
            peer.0.set_read_timeout(Some(Duration::from_millis(400))).expect("a timeout");
            while matches!(peer.0.read(&mut [0]), Err(e) if e.kind() == std::io::ErrorKind::WouldBlock) {
                peer.send(&[b"I"]);
            }
        }),
    ];
    for (why, lie) in lies {
        let dir = temp();
        let (listener, socket) = listener(dir.path());
        let server = hostile(listener, *lie);
        let words = [NBDKIT, "-U", "-", "nbd", &socket, "shared=true", "timeout=1500ms", "--run", "true"];
        let message = run(words).refused();
        assert!(message.contains(why), "{why}: {message}");
        server.join().expect("the server");
    }
}

/// A server that does not answer is given up after `timeout=`, and one that a client leaves soon after that.
#[test]
fn a_server_that_does_not_answer() {
    let dir = temp();
    let (listener, socket) = listener(dir.path());
    let server = hostile(listener, Peer::negotiate);
    let proxy = Server::start(["nbd", &socket, "timeout=500ms"]);
    let script = "try:\n  h.pread(4096, 8192)\nexcept nbd.Error as e:\n  print(e.errno)";
    assert_eq!(nbdsh(&proxy.uri(), script).trim(), "EIO");
    assert!(proxy.stderr().contains("did nothing for"), "{}", proxy.stderr());
    server.join().expect("the server");
}

#[test]
fn a_server_that_does_not_answer_holds_up_no_end() {
    let dir = temp();
    let (listener, socket) = listener(dir.path());
    let (told, asked) = std::sync::mpsc::channel();
    let server = hostile(listener, move |peer| {
        peer.negotiate();
        peer.request().expect("a request");
        told.send(()).expect("the test");
    });
    let mut proxy = Server::start(["nbd", &socket]);
    let uri = proxy.uri();
    let client = std::thread::spawn(move || run(["nbdsh", "-u", &uri, "-c", "h.pread(4096, 8192)"]));
    asked.recv().expect("a request");
    assert_eq!(proxy.terminate(), 0);
    assert_ne!(client.join().expect("the client").code, 0);
    server.join().expect("the server");
}
