//! Sparse reads: holes are not sent, and what the client puts together is what is on the disk.

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::unix::{
        fs::FileExt,
        net::{UnixListener, UnixStream},
    },
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
};

use crate::util::{self, Server, image, patterned, raw::Raw, temp};

const DATA: u16 = 1;
const HOLE: u16 = 2;
const ERROR: u16 = 1 << 15 | 1;
const ERROR_OFFSET: u16 = 1 << 15 | 2;
const DF: u16 = 1 << 2;
const EIO: u32 = 5;
const K: u64 = 1 << 10;

/// A socket that leads to a server and counts what comes from there.
struct Counted {
    socket: PathBuf,
    bytes: Arc<AtomicU64>,
    _dir: tempfile::TempDir,
}

impl Counted {
    fn new(server: &Server) -> Self {
        let dir = temp();
        let socket = dir.path().join("counted");
        let listener = UnixListener::bind(&socket).expect("bind");
        let (bytes, to) = (Arc::new(AtomicU64::new(0)), server.socket().to_owned());
        let total = bytes.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let Ok(server) = UnixStream::connect(&to) else { return };
                let (from, back) = (client.try_clone().expect("clone"), server.try_clone().expect("clone"));
                let total = total.clone();
                std::thread::spawn(move || pass(from, server, &AtomicU64::new(0)));
                std::thread::spawn(move || pass(back, client, &total));
            }
        });
        Counted { socket, bytes, _dir: dir }
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    /// The bytes since the last call.
    fn bytes(&self) -> u64 {
        self.bytes.swap(0, SeqCst)
    }
}

fn pass(mut from: UnixStream, mut to: UnixStream, count: &AtomicU64) {
    let mut buf = vec![0; 1 << 20];
    while let Ok(n @ 1..) = from.read(&mut buf) {
        // Before the client can know of them.
        count.fetch_add(n as u64, SeqCst);
        if to.write_all(&buf[..n]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(std::net::Shutdown::Both);
}

/// The chunks of a READ, as their kinds, offsets and lengths.
fn shape(raw: &mut Raw, flags: u16, offset: u64, length: u64) -> Vec<(u16, u64, u64)> {
    raw.request(flags, 0, offset, u32::try_from(length).expect("a length"));
    let chunks = raw.chunks();
    let shape = |c: &util::raw::Chunk| match c.kind {
        DATA => (DATA, c.u64(0), c.payload.len() as u64 - 8),
        HOLE => (HOLE, c.u64(0), c.u32(8).into()),
        kind => (kind, 0, 0),
    };
    chunks.iter().map(shape).collect()
}

/// Serves a disk of `size` bytes with three pieces of data, and copies it with each of `clients`: what comes over the
/// wire is the data and a little more.
fn copies_cost_the_data(size: u64, clients: &[&[&str]]) {
    let dir = temp();
    let disk = image(dir.path(), "disk", size);
    let pieces = [(0, 1 << 20), (size / 2, 3 << 20), (size - 65_536, 65_536)];
    let data = fs::read(patterned(dir.path(), "data", 3 << 20)).expect("read");
    let file = File::options().write(true).open(&disk).expect("open");
    for (at, length) in pieces {
        file.write_all_at(&data[..length], at).expect("write");
    }
    let total = pieces.iter().map(|(_, length)| *length as u64).sum::<u64>();
    let server = Server::start(["-r", "file", disk.to_str().expect("UTF-8")]);

    // Read from the first to the last byte, by a client who knows nothing of holes.
    let raw = &mut Raw::structured(&server);
    let mut wire = 0;
    for at in (0..size).step_by(32 << 20) {
        raw.request(0, 0, at, 32 << 20);
        wire += raw.chunks().iter().map(|chunk| 20 + chunk.payload.len() as u64).sum::<u64>();
    }
    assert!((total..total + (1 << 20)).contains(&wire), "{wire} bytes for {total}");

    let counted = Counted::new(&server);
    let copy = dir.path().join("copy");
    let copy = copy.to_str().expect("UTF-8");
    for words in clients {
        let _ = fs::remove_file(copy);
        image(dir.path(), "copy", size);
        util::run_ok(words.iter().copied().chain([counted.uri().as_str(), copy]));
        let bytes = counted.bytes();
        assert!((total..total + (1 << 20)).contains(&bytes), "{words:?}: {bytes} bytes for {total}");
        let copied = File::open(copy).expect("open");
        for (at, length) in pieces {
            let mut got = vec![0; length];
            copied.read_exact_at(&mut got, at).expect("read");
            assert!(got == data[..length], "{words:?}: wrong data at {at}");
        }
    }
}

#[test]
fn a_mostly_empty_disk_costs_its_data_only() {
    let qemu = ["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "--target-is-zero"];
    copies_cost_the_data(10 << 30, &[&["nbdcopy"], &qemu]);
}

#[test]
fn nobody_has_to_ask_for_the_map() {
    copies_cost_the_data(
        256 << 20,
        &[&["nbdcopy", "--no-extents"], &["nbdcopy", "--no-extents", "--connections=4"]],
    );
}

#[test]
fn chunks_follow_the_holes() {
    let dir = temp();
    let disk = image(dir.path(), "disk", 1 << 20);
    let file = File::options().write(true).open(&disk).expect("open");
    for at in [128 * K, 512 * K] {
        file.write_all_at(&[0xa5; 65_536], at).expect("write");
    }
    let path = disk.to_str().expect("UTF-8");
    let overlaid = ["-r", "--filter=cow", "file", path];
    let partly = ["--filter=offset", "file", path, "offset=65536"];
    for (words, start) in [(&["file", path][..], 0), (&overlaid, 0), (&partly, 64 * K)] {
        let server = Server::start(words);
        let raw = &mut Raw::structured(&server);
        let at = |offset: u64| offset - start;
        let all = [
            (HOLE, 0, at(128 * K)),
            (DATA, at(128 * K), 64 * K),
            (HOLE, at(192 * K), 320 * K),
            (DATA, at(512 * K), 64 * K),
            (HOLE, at(576 * K), 448 * K),
        ];
        let length = at(1 << 20);
        assert_eq!(shape(raw, 0, 0, length), all, "{words:?}");
        assert_eq!(shape(raw, DF, 0, length), [(DATA, 0, length)], "{words:?}: do not fragment");
        assert_eq!(shape(raw, 0, 0, 32 * K), [(DATA, 0, 32 * K)], "{words:?}: small");
        assert_eq!(shape(raw, 0, 0, 64 * K), [(HOLE, 0, 64 * K)], "{words:?}: all hole");
        let data = at(128 * K);
        assert_eq!(shape(raw, 0, data, 64 * K), [(DATA, data, 64 * K)], "{words:?}: all data");
        let simple = &mut Raw::transmission(&server);
        simple.request(0, 0, 0, u32::try_from(length).expect("a length"));
        assert_eq!(simple.read(16)[4..8], [0; 4]);
        let bytes = simple.read(usize::try_from(length).expect("a length"));
        let written = |at: u64| (128 * K..192 * K).contains(&at) || (512 * K..576 * K).contains(&at);
        let right = |(i, byte): (u64, &u8)| *byte == if written(start + i) { 0xa5 } else { 0 };
        assert!((0..).zip(&bytes).all(right), "{words:?}: simple replies");
    }
}

/// What sees or delays each read still does.
#[test]
fn filters_that_look_at_reads_see_them() {
    let dir = temp();
    let log = dir.path().join("log");
    let logfile = format!("logfile={}", log.display());
    let server = Server::start(["--filter=log", "memory", "1M", &logfile]);
    assert_eq!(shape(&mut Raw::structured(&server), 0, 0, 128 * K), [(DATA, 0, 128 * K)]);
    drop(server);
    let log = fs::read_to_string(log).expect("the log");
    assert!(log.contains("Read id=") && log.contains("count=0x20000") && !log.contains("Extents"), "{log}");
    let server = Server::start(["--filter=error", "memory", "1M", "error-pread-rate=1"]);
    assert_eq!(shape(&mut Raw::structured(&server), 0, 0, 128 * K), [(ERROR, 0, 0)]);
    let server = Server::start(["--filter=noextents", "memory", "1M"]);
    assert_eq!(shape(&mut Raw::structured(&server), 0, 0, 128 * K), [(DATA, 0, 128 * K)]);
}

/// Whatever layers there are, a read with holes left out is the same as one in a single chunk.
#[test]
fn sparse_and_whole_reads_agree() {
    let dir = temp();
    let disk = |name: &str| {
        let path = image(dir.path(), name, 1 << 20);
        let file = File::options().write(true).open(&path).expect("open");
        for at in [64 * K, 300 * K, 901 * K] {
            file.write_all_at(&[0xa5; 70_000], at).expect("write");
        }
        path.to_str().expect("UTF-8").to_owned()
    };
    let (one, two) = (disk("one"), disk("two"));
    let (one, two) = (one.as_str(), two.as_str());
    for words in [
        &["--filter=truncate", "file", one, "round-up=2M"][..],
        &["--filter=truncate", "--filter=offset", "file", one, "truncate=600001", "offset=1001"],
        &["--filter=cow", "--filter=truncate", "file", one, "round-up=4M"],
        &["--filter=cow", "file", one, "cow-block-size=4096", "cow-on-read=true"],
        &["--filter=nozero", "--filter=fua", "--filter=nocache", "memory", "1M", "zeromode=emulate"],
        &["--filter=openonce", "--filter=limit", "--filter=nofilter", "file", one],
        &["--filter=protect", "--filter=noparallel", "memory", "1M", "serialize=requests", "protect=0-511"],
        &["split", one, two],
        &["--filter=map", "file", one, "map=0-524287:524288"],
        &["-t", "1", "file", two],
    ] {
        let server = Server::start(words);
        util::nbdsh(
            &server.uri(),
            "import random
random.seed(9)
size = h.get_size()
for i in range(60):
    start = random.randrange(size - 1) & random.choice([-1, -512, -65536])
    length = min(size - start, random.randrange(1, 200000))
    try: random.choice([h.zero, h.trim, lambda n, at: h.pwrite(random.randbytes(n), at)])(length, start)
    except nbd.Error as e: assert e.errno in ('EPERM', 'ENOSPC'), e
    start = random.randrange(size - 1) & random.choice([-1, -512, -65536])
    length = min(size - start, random.randrange(1, 1000000))
    whole = h.pread_structured(length, start, lambda *chunk: 0, nbd.CMD_FLAG_DF)
    assert h.pread(length, start) == whole, (i, start, length)",
        );
    }
}

/// Two clients: what one has written, or freed, before the other asks is there when it reads.
#[test]
fn what_was_written_before_a_read_is_read() {
    let dir = temp();
    let disk = image(dir.path(), "disk", 4 << 20);
    let path = disk.to_str().expect("UTF-8");
    let cow = ["--filter=cow", "--filter=multi-conn", "file", path, "multi-conn-mode=unsafe"];
    for words in [&["memory", "4M"][..], &cow, &["file", path]] {
        let server = Server::start(words);
        let script = format!(
            "import random
random.seed(5)
other = nbd.NBD()
other.connect_uri('{}')
model = bytearray(4 << 20)
for i in range(250):
    start, length = random.randrange(64) << 16, random.randrange(1, 5) << 16
    length = min(length, len(model) - start)
    what, writer = random.randrange(3), random.choice([h, other])
    if what == 0:
        data = random.randbytes(4096) * (length >> 12)
        writer.pwrite(data, start)
    elif what == 1:
        data = bytes(length)
        writer.zero(length, start)
    else:
        length = 0
        data = b''
    model[start:start + length] = data
    start, length = random.randrange(64) << 16, random.randrange(1, 17) << 16
    start -= random.choice([0, 0, min(start, 1000)])
    length = min(length, len(model) - start)
    got = random.choice([h, other]).pread(length, start)
    assert got == model[start:start + length], f'{{i}}: {{length}} at {{start}}'",
            server.uri()
        );
        util::nbdsh(&server.uri(), &script);
    }
}

/// A writer fills holes while a reader reads them: each block is as it was before, or as it is after.
#[test]
fn a_hole_that_is_filled_meanwhile() {
    let server = Server::start(["memory", "16M"]);
    let uri = server.uri();
    let writer = std::thread::spawn({
        let uri = uri.clone();
        move || {
            let script = "for turn in range(4):
    for at in range(0, 16 << 20, 1 << 18): h.pwrite(b'w' * (1 << 18), at)
    h.trim(16 << 20, 0)
for at in range(0, 16 << 20, 1 << 18): h.pwrite(b'w' * (1 << 18), at)";
            util::nbdsh(&uri, script)
        }
    });
    let script = "clean = 0
while clean < 16:
    clean = 0
    for at in range(0, 16 << 20, 1 << 20):
        got = h.pread(1 << 20, at)
        for page in range(0, 1 << 20, 1 << 18):
            assert got[page] in (0, 119)
        clean += got == b'w' * (1 << 20)";
    util::nbdsh(&uri, script);
    writer.join().expect("the writer");
}

#[test]
fn a_read_that_fails_in_the_middle_gives_what_came_before() {
    let dir = temp();
    let disk = patterned(dir.path(), "disk", 1 << 20);
    let bytes = fs::read(&disk).expect("read");
    let server = Server::start(["file", disk.to_str().expect("UTF-8")]);
    let raw = &mut Raw::structured(&server);
    assert_eq!(shape(raw, 0, 0, 1 << 20), [(DATA, 0, 1 << 20)]);
    // The second half is gone, and the place is not one of those at which a search stops by itself.
    let end = 512 * K + 3 * 4096;
    File::options().write(true).open(&disk).expect("open").set_len(end).expect("truncate");
    let tmpfs = util::sh(&format!("stat -f -c %T '{}'", disk.display())).trim() == "tmpfs";
    for (offset, length) in [(0, 1 << 20), (384 * K, 256 * K), (end - 512, 4096)] {
        raw.request(0, 0, offset, u32::try_from(length).expect("a length"));
        let chunks = raw.chunks();
        let error = chunks.last().expect("a chunk");
        assert_eq!(error.u32(0), EIO);
        if tmpfs {
            // There a read at the end fails, which ends the search early.
            continue;
        }
        assert_eq!(chunks.iter().map(|c| c.kind).collect::<Vec<_>>(), [DATA, ERROR_OFFSET]);
        let text = usize::from(u16::from_be_bytes([error.payload[4], error.payload[5]]));
        assert!(text > 0, "no message");
        assert_eq!(error.u64(6 + text), end);
        assert_eq!(chunks[0].u64(0), offset);
        let range = usize::try_from(offset).expect("an offset")..usize::try_from(end).expect("an offset");
        assert!(chunks[0].payload[8..] == bytes[range], "what came before is wrong");
    }
    // Nothing came before; or all has to come in one chunk; or there is no chunk.
    assert_eq!(shape(raw, 0, end, 64 * K), [(ERROR, 0, 0)]);
    assert_eq!(shape(raw, DF, 0, 1 << 20), [(ERROR, 0, 0)]);
    let script = format!(
        "import os
def chunk(data, offset, status, error): seen.append((len(data), offset, status))
path, seen = '{}', []
os.truncate(path, 1 << 20)
h.connect_uri('{}')
os.truncate(path, {end})
try:
    h.pread_structured(1 << 20, 0, chunk)
    assert False
except nbd.Error as e:
    assert e.errno == 'EIO', e
assert {tmpfs} or seen == [({end}, 0, nbd.READ_DATA), (0, {end}, nbd.READ_ERROR)], seen
assert h.pread(4096, 0) == open(path, 'rb').read(4096)
os.truncate(path, 1 << 20)",
        disk.display(),
        server.uri(),
        tmpfs = if tmpfs { "True" } else { "False" }
    );
    util::run_ok(["nbdsh", "-c", &script]);
    let simple = &mut Raw::transmission(&server);
    File::options().write(true).open(&disk).expect("open").set_len(end).expect("truncate");
    simple.request(0, 0, 0, 1 << 20);
    assert_eq!(simple.read(16)[7], 5);
}
