//! No request allocates memory once a connection has run for a while: counted exactly, over a server in this process.
//!
//! A program of its own, for its allocator counts. The client speaks raw bytes and allocates nothing itself.

#![allow(unsafe_code)]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    ffi::OsStr,
    io::{Read, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use nbdkit_core::{Chain, ShutdownFlag};

/// Counts every allocation of the process.
struct Counting;

static COUNT: AtomicU64 = AtomicU64::new(0);

// SAFETY: all is passed on to the system's allocator, unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, old: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.realloc(old, layout, size) }
    }

    unsafe fn dealloc(&self, old: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(old, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const DISK: u64 = 64 << 20;
const READ: u16 = 0;
const WRITE: u16 = 1;
/// Rounds before counting, and rounds that are counted.
const ROUNDS: usize = 50;

/// A connection in its transmission phase, without structured replies.
fn connect(chain: &Arc<Chain>) -> UnixStream {
    let (mut client, server) = UnixStream::pair().expect("a pair");
    let chain = chain.clone();
    std::thread::spawn(move || {
        let input = OwnedFd::from(server);
        let output = input.try_clone().expect("dup");
        let config = nbdkit_nbd::Config::default();
        nbdkit_nbd::serve_one(chain, config, input, output, Arc::new(ShutdownFlag::new())).expect("serve");
    });
    let mut greeting = [0; 18];
    client.read_exact(&mut greeting).expect("a greeting");
    let export_name = [&3_u32.to_be_bytes()[..], b"IHAVEOPT", &1_u32.to_be_bytes(), &[0; 4]].concat();
    client.write_all(&export_name).expect("send");
    client.read_exact(&mut greeting[..10]).expect("an export");
    client
}

/// `depth` requests, as they are sent at once.
fn batch(command: u16, length: u32, depth: u64) -> Vec<u8> {
    let request = |n: u64| {
        let head = [
            &0x2560_9513_u32.to_be_bytes()[..],
            &0_u16.to_be_bytes(),
            &command.to_be_bytes(),
            &n.to_be_bytes(),
            &(n * u64::from(length) % DISK).to_be_bytes(),
            &length.to_be_bytes(),
        ]
        .concat();
        [head, vec![n as u8; if command == WRITE { length as usize } else { 0 }]].concat()
    };
    (0..depth).flat_map(request).collect()
}

/// How many allocations `rounds` of batches take, once there were some.
fn allocations(chain: &Arc<Chain>, command: u16, length: u32, depth: u64) -> u64 {
    let requests = batch(command, length, depth);
    let reply = 16 + if command == READ { length as usize } else { 0 };
    let mut replies = vec![0; reply * depth as usize];
    let before = COUNT.load(Ordering::Relaxed);
    let mut client = connect(chain);
    assert!(COUNT.load(Ordering::Relaxed) > before, "nothing is counted");
    let mut sender = client.try_clone().expect("dup");
    let (go, start) = std::sync::mpsc::sync_channel::<()>(1);
    // Another thread sends, for a server that is stuck with its replies receives no more.
    std::thread::spawn(move || {
        while start.recv().is_ok() {
            sender.write_all(&requests).expect("send");
        }
    });
    let mut rounds = || {
        for _ in 0..ROUNDS {
            go.send(()).expect("the sender");
            client.read_exact(&mut replies).expect("replies");
            assert!(replies.chunks_exact(reply).all(|reply| reply[4..8] == [0; 4]), "a request failed");
        }
    };
    rounds();
    // What happens once may happen late: a worker is started when the others are slow. What each request does, happens
    // every time.
    let count = || {
        let before = COUNT.load(Ordering::Relaxed);
        rounds();
        COUNT.load(Ordering::Relaxed) - before
    };
    std::iter::repeat_with(count).take(10).min().expect("some")
}

fn chain(filters: &[&str], plugin: &str, params: &[(&str, &OsStr)]) -> Arc<Chain> {
    let filters = filters.iter().map(|name| nbdkit_filters::load(name).expect("a filter")).collect();
    let mut chain = Chain::new(nbdkit_plugins::load(plugin).expect("a plugin"), filters);
    for (key, value) in params {
        chain.config(key, value).expect("config");
    }
    chain.config_complete().expect("config_complete");
    chain.get_ready().expect("get_ready");
    let chain = Arc::new(chain);
    chain.after_fork().expect("after_fork");
    chain
}

/// A disk in the page cache, behind a sector with the table of its one partition.
fn image(dir: &Path, name: &str) -> std::path::PathBuf {
    let mut image = vec![1; 512 + DISK as usize];
    let sectors = u32::try_from(DISK / 512).expect("a small disk").to_le_bytes();
    // One entry.
    image[446..510].fill(0);
    image[450] = 0x83;
    image[454] = 1;
    image[458..462].copy_from_slice(&sectors);
    image[510..512].copy_from_slice(&[0x55, 0xaa]);
    let path = dir.join(name);
    std::fs::write(&path, image).expect("write");
    path
}

/// What the server has to say if the test fails.
struct Log;

impl log::Log for Log {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Warn
    }

    fn log(&self, record: &log::Record<'_>) {
        eprintln!("{}", record.args());
    }

    fn flush(&self) {}
}

// One test, for the count is the process's.
#[test]
fn no_request_allocates() {
    log::set_logger(&Log).expect("the first logger");
    log::set_max_level(log::LevelFilter::Warn);
    let dir = tempfile::tempdir().expect("a directory");
    let (image, partitioned) = (image(dir.path(), "disk"), image(dir.path(), "partitioned"));
    let memory = [("size", OsStr::new("64M"))];
    let file = [("file", image.as_os_str())];
    let shifted =
        [("file", partitioned.as_os_str()), ("offset", OsStr::new("0")), ("partition", OsStr::new("1"))];
    let chains = [
        ("memory", chain(&[], "memory", &memory)),
        ("file", chain(&[], "file", &file)),
        ("three filters", chain(&["nofilter", "partition", "offset"], "file", &shifted)),
    ];
    for (name, chain) in &chains {
        for (command, length, depth) in
            [(READ, 4096, 1), (READ, 4096, 64), (WRITE, 4096, 64), (READ, 1 << 20, 4), (WRITE, 1 << 20, 4)]
        {
            let count = allocations(chain, command, length, depth);
            assert_eq!(count, 0, "{name}: command {command} of {length} bytes, depth {depth}");
        }
    }
}
