//! The front end over a socket pair, with raw bytes from the other side: what no well-behaved client sends, and what
//! happens to requests in flight when a connection ends.

use std::{
    io::{ErrorKind, Read, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{
        Arc, Barrier,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    thread::JoinHandle,
    time::Duration,
};

use nbdkit_core::{
    Caps, Chain, Client, Errno, Flags, Handle, Info, Op, Open, Outcome, Plugin, Request, Result,
    ShutdownFlag, Status, Support, ThreadModel,
};
use parking_lot::Mutex;

use crate::{Config, proto::cmd, serve_one};

mod large;
mod leader;

const SIZE: u64 = 1 << 20;
const DEADLINE: Duration = Duration::from_secs(20);

/// What a read does before it succeeds.
#[derive(Clone)]
enum Before {
    Nothing,
    /// Sleeps for ever, but for the client or the server going away.
    Sleep,
    /// Waits until as many are inside.
    Meet(Arc<Barrier>),
}

struct Disk {
    before: Before,
    model: ThreadModel,
    data: Arc<Mutex<Vec<u8>>>,
    inside: Arc<AtomicUsize>,
    most_inside: Arc<AtomicUsize>,
}

impl Disk {
    fn new(before: Before) -> Self {
        Disk {
            before,
            model: ThreadModel::Parallel,
            data: Arc::new(Mutex::new(vec![0; SIZE as usize])),
            inside: Arc::default(),
            most_inside: Arc::default(),
        }
    }
}

struct OpenDisk {
    before: Before,
    data: Arc<Mutex<Vec<u8>>>,
    inside: Arc<AtomicUsize>,
    most_inside: Arc<AtomicUsize>,
    client: Arc<Client>,
}

impl Plugin for Disk {
    fn info(&self) -> Info {
        Info::bundled("disk", "disk", "")
    }

    fn thread_model(&self) -> ThreadModel {
        self.model
    }

    fn meta_contexts(&self) -> Vec<String> {
        vec!["x-test:odd".into(), "x-test:none".into(), "x-more:odd".into()]
    }

    fn open(&self, open: &Open) -> Result<Box<dyn Handle>> {
        if open.export_name == "none" {
            return Err(Errno::ENOENT.into());
        }
        Ok(Box::new(OpenDisk {
            before: self.before.clone(),
            data: self.data.clone(),
            inside: self.inside.clone(),
            most_inside: self.most_inside.clone(),
            client: open.client.clone(),
        }))
    }
}

impl Handle for OpenDisk {
    fn capabilities(&self) -> Result<Caps> {
        Ok(Caps::of_size(SIZE).with_write(true).with_flush(true).with_fua(Support::Emulate))
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    /// Every second KiB is 1, in `:odd`.
    fn context_status(&self, context: &str, length: u64, offset: u64, _: Flags) -> Result<Vec<Status>> {
        if context == "x-test:none" {
            return Ok(Vec::new());
        }
        let first = Status { length: 1024 - offset % 1024, flags: (offset / 1024 % 2) as u32 };
        let more =
            (1..=length / 1024 + 10).map(|i| Status { length: 1024, flags: first.flags ^ (i % 2) as u32 });
        Ok(std::iter::once(first).chain(more).collect())
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        if request.op() == Op::Read && !matches!(self.before, Before::Nothing) && !request.may_wait() {
            return Outcome::NeedsThread;
        }
        request.run(self)
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let inside = self.inside.fetch_add(1, SeqCst) + 1;
        self.most_inside.fetch_max(inside, SeqCst);
        let slept = match &self.before {
            Before::Nothing => Ok(()),
            Before::Sleep => self.client.sleep(Duration::MAX),
            Before::Meet(barrier) => {
                barrier.wait();
                Ok(())
            }
        };
        self.inside.fetch_sub(1, SeqCst);
        slept?;
        buf.copy_from_slice(&self.data.lock()[offset as usize..][..buf.len()]);
        Ok(())
    }

    fn pwrite(&self, buf: &[u8], offset: u64, _: nbdkit_core::Flags) -> Result<()> {
        self.data.lock()[offset as usize..][..buf.len()].copy_from_slice(buf);
        Ok(())
    }
}

/// A server with one client, whose side of the connection is `socket`.
struct Served {
    socket: UnixStream,
    stop: Arc<ShutdownFlag>,
    server: JoinHandle<anyhow::Result<()>>,
}

fn serve(disk: impl Plugin + 'static, config: Config) -> Served {
    let mut chain = Chain::new(Box::new(disk), Vec::new());
    chain.config_complete().unwrap();
    let chain = Arc::new(chain);
    let (socket, theirs) = UnixStream::pair().unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    let stop = Arc::new(ShutdownFlag::new());
    let server = std::thread::spawn({
        let stop = stop.clone();
        let output = theirs.try_clone().unwrap();
        move || serve_one(chain, config, OwnedFd::from(theirs), OwnedFd::from(output), stop)
    });
    Served { socket, stop, server }
}

impl Served {
    fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }

    fn receive<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.socket.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// What is left until the server closes the connection.
    fn rest(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        match self.socket.read_to_end(&mut rest) {
            // It closed with our bytes unread.
            Err(e) if e.kind() == ErrorKind::ConnectionReset => {}
            result => drop(result.unwrap()),
        }
        rest
    }

    /// Negotiates up to the transmission phase, with simple replies.
    fn begin(mut self) -> Self {
        self.receive::<18>();
        self.send(&[0, 0, 0, 3]);
        self.send(&option(1, b""));
        self.receive::<10>();
        self
    }

    fn ended(self) {
        drop(self.socket);
        self.server.join().unwrap().unwrap();
    }
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT", &number.to_be_bytes()[..], &(data.len() as u32).to_be_bytes(), data].concat()
}

fn request(flags: u16, command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    [
        &0x2560_9513_u32.to_be_bytes()[..],
        &flags.to_be_bytes(),
        &command.to_be_bytes(),
        &cookie.to_be_bytes(),
        &offset.to_be_bytes(),
        &length.to_be_bytes(),
    ]
    .concat()
}

fn simple_reply(error: u8, cookie: u8) -> [u8; 16] {
    [0x67, 0x44, 0x66, 0x98, 0, 0, 0, error, 0, 0, 0, 0, 0, 0, 0, cookie]
}

#[test]
fn hostile_handshakes_end_the_connection() {
    let huge = [b"IHAVEOPT".as_slice(), &[0, 0, 0, 99], &[0xff; 4]].concat();
    let long_name = option(1, &[b'x'; 4097]);
    let cases: &[(&str, Vec<u8>)] = &[
        ("unknown client flags", vec![0, 0, 0, 4]),
        ("no magic", [&[0, 0, 0, 3][..], &[b'x'; 16]].concat()),
        ("an option of 4 GiB", [&[0, 0, 0, 3][..], &huge].concat()),
        ("a name of 4097 bytes", [&[0, 0, 0, 3][..], &long_name].concat()),
        ("a name with NUL", [&[0, 0, 0, 3][..], &option(1, b"a\0b")].concat()),
        ("an export that does not open", [&[0, 0, 0, 3][..], &option(1, b"none")].concat()),
    ];
    for (what, bytes) in cases {
        let mut served = serve(Disk::new(Before::Nothing), Config::default());
        served.receive::<18>();
        served.send(bytes);
        assert_eq!(served.rest(), [], "{what}");
        served.ended();
    }
}

#[test]
fn a_truncated_handshake_ends_the_connection() {
    let whole = [&[0, 0, 0, 3][..], &option(7, &[0, 0, 0, 1, b'x', 0, 0])].concat();
    for length in 0..whole.len() {
        let mut served = serve(Disk::new(Before::Nothing), Config::default());
        served.receive::<18>();
        served.send(&whole[..length]);
        served.socket.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(served.rest(), [], "after {length} bytes");
        served.ended();
    }
}

#[test]
fn options_are_bounded_in_number() {
    let mut served = serve(Disk::new(Before::Nothing), Config::default());
    served.receive::<18>();
    served.send(&[0, 0, 0, 3]);
    for _ in 0..32 {
        served.send(&option(99, b"xyz"));
        let header = served.receive::<20>();
        assert_eq!(header[12..16], [0x80, 0, 0, 1]);
        let mut text = vec![0; header[19] as usize];
        served.socket.read_exact(&mut text).unwrap();
    }
    served.send(&option(99, b""));
    assert_eq!(served.rest(), []);
    served.ended();
}

#[test]
fn malformed_options_are_refused_and_the_connection_stays() {
    let cases: &[(u32, &[u8])] = &[
        (7, b""),
        (7, &[0, 0, 0, 9, b'x', 0, 0]),
        (7, &[0, 0, 0, 1, b'x', 0, 2, 0, 0]),
        (7, &[0, 0, 0, 0, 0, 0, 0]),
        (9, &[0xff; 8]),
        (9, &[0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]),
        (10, &[0, 0, 0, 0, 0, 0, 0, 0]),
        (3, b"x"),
        (8, b"x"),
    ];
    let mut served = serve(Disk::new(Before::Nothing), Config::default());
    served.receive::<18>();
    served.send(&[0, 0, 0, 3]);
    for (number, data) in cases {
        served.send(&option(*number, data));
        let header = served.receive::<20>();
        assert_eq!(header[12..16], [0x80, 0, 0, 3], "option {number} {data:?}");
        let mut text = vec![0; header[19] as usize];
        served.socket.read_exact(&mut text).unwrap();
    }
    served.send(&option(1, b""));
    served.receive::<10>();
    served.ended();
}

#[test]
fn a_handshake_has_a_deadline() {
    let config = Config { handshake_timeout: Some(Duration::from_millis(10)), ..Config::default() };
    let mut served = serve(Disk::new(Before::Nothing), config);
    served.receive::<18>();
    assert_eq!(served.rest(), []);
    served.ended();
}

#[test]
fn bad_requests_are_refused_and_the_connection_stays() {
    const EINVAL: u8 = 22;
    const ENOSPC: u8 = 28;
    let cases: &[(&str, Vec<u8>, u8)] = &[
        ("an empty read", request(0, cmd::READ, 7, 0, 0), EINVAL),
        ("a read past the end", request(0, cmd::READ, 7, SIZE, 1), EINVAL),
        ("a read past 2^64", request(0, cmd::READ, 7, u64::MAX, 2), EINVAL),
        ("a read of 4 GiB", request(0, cmd::READ, 7, 0, u32::MAX), EINVAL),
        ("a read with DF without structured replies", request(4, cmd::READ, 7, 0, 1), EINVAL),
        ("a write past the end", [request(0, cmd::WRITE, 7, SIZE, 1), vec![1]].concat(), ENOSPC),
        ("an empty write", request(0, cmd::WRITE, 7, 0, 0), ENOSPC),
        ("a write with flags", [request(8, cmd::WRITE, 7, 0, 300_000), vec![9; 300_000]].concat(), EINVAL),
        ("too much to write", [request(0, cmd::WRITE, 7, 0, 65 << 20), vec![9; 65 << 20]].concat(), EINVAL),
        ("a flush with a range", request(0, cmd::FLUSH, 7, 0, 1), EINVAL),
        ("trim that is not offered", request(0, cmd::TRIM, 7, 0, 1), EINVAL),
        ("zero past 2^64", request(0, cmd::WRITE_ZEROES, 7, u64::MAX, u32::MAX), ENOSPC),
        ("block status that was not negotiated", request(0, cmd::BLOCK_STATUS, 7, 0, 1), EINVAL),
        ("an unknown command", request(0, 8, 7, 0, 0), EINVAL),
        ("an unknown flag", request(0x8000, cmd::FLUSH, 7, 0, 0), EINVAL),
    ];
    let mut served = serve(Disk::new(Before::Nothing), Config::default()).begin();
    for (what, bytes, error) in cases {
        served.send(bytes);
        assert_eq!(served.receive(), simple_reply(*error, 7), "{what}");
    }
    served.send(&request(0, cmd::READ, 8, 0, 4));
    assert_eq!(served.receive(), simple_reply(0, 8));
    assert_eq!(served.receive(), [0; 4], "nothing that was refused has been written");
    served.ended();
}

#[test]
fn broken_requests_end_the_connection() {
    let bad_magic = vec![0x12; 28];
    let cases = [bad_magic, request(0, cmd::WRITE, 7, 0, (128 << 20) + 1), request(0, cmd::DISC, 7, 0, 0)];
    for bytes in cases {
        let mut served = serve(Disk::new(Before::Nothing), Config::default()).begin();
        // What was in order before is answered.
        served.send(&[request(0, cmd::FLUSH, 3, 0, 0), bytes].concat());
        assert_eq!(served.rest(), simple_reply(0, 3));
        served.ended();
    }
}

#[test]
fn payloads_of_all_sizes_arrive() {
    let mut served = serve(Disk::new(Before::Nothing), Config::default()).begin();
    for (i, length) in [1, 4095, 65_536, 65_537, 262_116, 262_144, 1 << 20].into_iter().enumerate() {
        let data: Vec<u8> = (0..length).map(|b| (b * 7 + i) as u8).collect();
        let write = request(0, cmd::WRITE, 1, 0, length as u32);
        let read = request(0, cmd::READ, 2, 0, length as u32);
        // Behind a small request, so that the payload is split at odd places; in one piece and in two.
        served.send(&request(0, cmd::FLUSH, 0, 0, 0));
        served.send(&write);
        served.send(&data[..length / 3]);
        served.send(&data[length / 3..]);
        assert_eq!(served.receive(), simple_reply(0, 0));
        assert_eq!(served.receive(), simple_reply(0, 1));
        served.send(&[write, data.clone()].concat());
        assert_eq!(served.receive(), simple_reply(0, 1));
        served.send(&read);
        assert_eq!(served.receive(), simple_reply(0, 2));
        let mut got = vec![0; length];
        served.socket.read_exact(&mut got).unwrap();
        assert!(got == data, "{length} bytes");
    }
    served.ended();
}

#[test]
fn requests_that_block_run_together() {
    let disk = Disk::new(Before::Meet(Arc::new(Barrier::new(16))));
    let mut served = serve(disk, Config::default()).begin();
    for cookie in 0..16 {
        served.send(&request(0, cmd::READ, cookie, 0, 1));
    }
    // None would be answered if fewer than 16 could be inside.
    let mut cookies: Vec<u8> = (0..16).map(|_| served.receive::<17>()[15]).collect();
    cookies.sort_unstable();
    assert_eq!(cookies, (0..16).collect::<Vec<_>>());
    served.ended();
}

#[test]
fn one_thread_or_a_stricter_model_keeps_the_order() {
    let models = [
        (1, ThreadModel::Parallel),
        (16, ThreadModel::SerializeRequests),
        (16, ThreadModel::SerializeAllRequests),
        (16, ThreadModel::SerializeConnections),
    ];
    for (threads, model) in models {
        let mut disk = Disk::new(Before::Meet(Arc::new(Barrier::new(1))));
        disk.model = model;
        let most_inside = disk.most_inside.clone();
        let config = Config { threads, ..Config::default() };
        let mut served = serve(disk, config).begin();
        let bytes: Vec<u8> = (0..200)
            .flat_map(|cookie| match cookie % 2 {
                0 => request(0, cmd::READ, cookie, 0, 1),
                _ => request(0, cmd::FLUSH, cookie, 0, 0),
            })
            .collect();
        served.send(&bytes);
        for cookie in 0..200 {
            assert_eq!(served.receive(), simple_reply(0, cookie), "{model}");
            if cookie % 2 == 0 {
                served.receive::<1>();
            }
        }
        assert_eq!(most_inside.load(SeqCst), 1, "{model}");
        served.ended();
    }
}

#[test]
fn a_vanished_client_ends_its_sleeping_requests() {
    for count in [1, 64] {
        let mut served = serve(Disk::new(Before::Sleep), Config::default()).begin();
        for cookie in 0..count {
            served.send(&request(0, cmd::READ, cookie, 0, 1));
        }
        served.ended();
    }
}

#[test]
fn a_stopped_server_answers_what_is_in_flight() {
    const ESHUTDOWN: u8 = 108;
    let disk = Disk::new(Before::Sleep);
    let inside = disk.inside.clone();
    let mut served = serve(disk, Config::default()).begin();
    served.send(&request(0, cmd::READ, 5, 0, 1));
    while inside.load(SeqCst) == 0 {
        std::thread::yield_now();
    }
    served.stop.raise();
    assert_eq!(served.rest(), simple_reply(ESHUTDOWN, 5));
    served.ended();
}

#[test]
fn a_stopped_server_waits_for_what_runs() {
    let meeting = Arc::new(Barrier::new(2));
    let disk = Disk::new(Before::Meet(meeting.clone()));
    let inside = disk.inside.clone();
    let mut served = serve(disk, Config::default()).begin();
    served.send(&request(0, cmd::READ, 5, 0, 1));
    while inside.load(SeqCst) == 0 {
        std::thread::yield_now();
    }
    served.stop.raise();
    meeting.wait();
    assert_eq!(served.receive(), simple_reply(0, 5));
    assert_eq!(served.rest(), [0]);
    served.ended();
}

#[test]
fn replies_wait_for_a_client_that_sends_first() {
    let mut served = serve(Disk::new(Before::Nothing), Config::default()).begin();
    let most = SIZE as u32;
    let mut bytes: Vec<u8> = (0..12).flat_map(|cookie| request(0, cmd::READ, cookie, 0, most)).collect();
    bytes.extend(request(0, cmd::WRITE, 12, 0, most));
    bytes.extend(vec![0; SIZE as usize]);
    // More than all socket buffers hold, in both directions.
    served.send(&bytes);
    for cookie in 0..12 {
        assert_eq!(served.receive(), simple_reply(0, cookie));
        let mut data = vec![0; SIZE as usize];
        served.socket.read_exact(&mut data).unwrap();
    }
    assert_eq!(served.receive(), simple_reply(0, 12));
    served.ended();
}

/// The data of an option that lists or sets meta contexts.
fn queries(queries: &[&str]) -> Vec<u8> {
    let mut data = [&[0; 4][..], &(queries.len() as u32).to_be_bytes()].concat();
    for query in queries {
        data.extend((query.len() as u32).to_be_bytes());
        data.extend(query.as_bytes());
    }
    data
}

/// The contexts that an option is answered with: IDs and names.
fn contexts(served: &mut Served, number: u32, asked: &[&str]) -> Vec<(u8, String)> {
    served.send(&option(number, &queries(asked)));
    let mut found = Vec::new();
    loop {
        let header = served.receive::<20>();
        if header[15] == 1 {
            return found;
        }
        assert_eq!(header[15], 4, "META_CONTEXT");
        let mut data = vec![0; usize::from(header[19])];
        served.socket.read_exact(&mut data).unwrap();
        found.push((data[3], String::from_utf8(data.split_off(4)).unwrap()));
    }
}

#[test]
fn layers_have_contexts_of_their_own() {
    const LIST: u32 = 9;
    const SET: u32 = 10;
    let mut served = serve(Disk::new(Before::Nothing), Config::default());
    served.receive::<18>();
    served.send(&[0, 0, 0, 3]);
    served.send(&option(8, b""));
    served.receive::<20>();
    let named =
        |list: &[(u8, String)]| list.iter().map(|(_, name)| name.clone()).collect::<Vec<_>>().join(" ");
    let all = "base:allocation x-test:odd x-test:none x-more:odd";
    assert_eq!(named(&contexts(&mut served, LIST, &[])), all);
    assert_eq!(named(&contexts(&mut served, LIST, &["x-test:"])), "x-test:odd x-test:none");
    assert_eq!(
        named(&contexts(&mut served, LIST, &["x-more:odd", "y:", "base:"])),
        "base:allocation x-more:odd"
    );
    assert_eq!(named(&contexts(&mut served, LIST, &["x-", "odd", ":odd", "x-test:od", ""])), "");
    assert_eq!(contexts(&mut served, SET, &[]), []);
    assert_eq!(contexts(&mut served, SET, &["x-test:", "base:"]), []);
    let set = contexts(&mut served, SET, &["x-test:odd", "base:allocation", "x-test:odd"]);
    assert_eq!(set, [(1, "base:allocation".into()), (2, "x-test:odd".into())]);
    served.send(&option(1, b""));
    served.receive::<10>();

    let mut ask = |flags: u16, offset: u64, length: u32| {
        served.send(&request(flags, cmd::BLOCK_STATUS, 9, offset, length));
        [false, true].map(|last| {
            let header = served.receive::<20>();
            assert_eq!(header[4..8], [0, u8::from(last), 0, 5]);
            let mut data = vec![0; u32::from_be_bytes(header[16..].try_into().unwrap()) as usize];
            served.socket.read_exact(&mut data).unwrap();
            let words: Vec<u32> =
                data.chunks(4).map(|word| u32::from_be_bytes(word.try_into().unwrap())).collect();
            words
        })
    };
    let allocated = [1, 3000, 0].to_vec();
    assert_eq!(ask(0, 1000, 3000), [allocated.clone(), vec![2, 24, 0, 1024, 1, 1024, 0, 928, 1]]);
    assert_eq!(ask(8, 1000, 3000), [allocated, vec![2, 24, 0]]);
    assert_eq!(ask(0, SIZE - 5, 5), [vec![1, 5, 0], vec![2, 5, 1]]);
    served.ended();

    // A context without an answer is an error, and nothing of the others is sent.
    let mut served = serve(Disk::new(Before::Nothing), Config::default());
    served.receive::<18>();
    served.send(&[0, 0, 0, 3]);
    served.send(&option(8, b""));
    served.receive::<20>();
    assert_eq!(contexts(&mut served, SET, &["base:allocation", "x-test:none"]).len(), 2);
    served.send(&option(1, b""));
    served.receive::<10>();
    served.send(&request(0, cmd::BLOCK_STATUS, 9, 0, 512));
    assert_eq!(served.receive::<20>()[4..8], [0, 1, 0x80, 1]);
    served.ended();
}
