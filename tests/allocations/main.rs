//! No request allocates memory once a connection has run for a while, and none takes more than a few locks: counted
//! exactly, over a server and a mount in this process, for requests that are answered at once, started, or on a thread.
//!
//! A program of its own, for its allocator counts. The client speaks raw bytes and allocates nothing itself.

#![allow(unsafe_code)]

mod mounted;
mod started;

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

use nbdkit_core::{Chain, Plugin, ShutdownFlag};

use crate::{
    mounted::Mounted,
    started::{Disk, Way},
};

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

/// What requests take.
#[derive(Debug)]
struct Cost {
    /// Allocations, of all of them.
    allocations: u64,
    /// Locks, in hundredths for each. 0 in builds that count none.
    locks: u64,
}

fn locks() -> u64 {
    #[cfg(debug_assertions)]
    return nbdkit_core::sync::locks_taken();
    #[cfg(not(debug_assertions))]
    return 0;
}

/// What `count` requests take, once there were some.
fn least(count: u64, mut requests: impl FnMut()) -> Cost {
    requests();
    // What happens once may happen late: a worker is started when the others are slow. What each request does, happens
    // every time.
    let measure = || {
        let before = (COUNT.load(Ordering::Relaxed), locks());
        requests();
        (COUNT.load(Ordering::Relaxed) - before.0, (locks() - before.1) * 100 / count)
    };
    let costs: Vec<_> = std::iter::repeat_with(measure).take(10).collect();
    let allocations = costs.iter().map(|cost| cost.0).min().expect("some");
    Cost { allocations, locks: costs.iter().map(|cost| cost.1).min().expect("some") }
}

/// What requests take that an NBD client sends in batches.
fn cost(chain: &Arc<Chain>, command: u16, length: u32, depth: u64) -> Cost {
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
    least(ROUNDS as u64 * depth, || {
        for _ in 0..ROUNDS {
            go.send(()).expect("the sender");
            client.read_exact(&mut replies).expect("replies");
            assert!(replies.chunks_exact(reply).all(|reply| reply[4..8] == [0; 4]), "a request failed");
        }
    })
}

fn chain(filters: &[&str], plugin: &str, params: &[(&str, &OsStr)]) -> Arc<Chain> {
    chain_over(filters, nbdkit_plugins::load(plugin).expect("a plugin"), params)
}

fn chain_over(filters: &[&str], plugin: Box<dyn Plugin>, params: &[(&str, &OsStr)]) -> Arc<Chain> {
    let filters = filters.iter().map(|name| nbdkit_filters::load(name).expect("a filter")).collect();
    let mut chain = Chain::new(plugin, filters);
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

/// Whether this machine lacks something, which `scripts/check` finds out and says.
fn is_left_out(what: &str) -> bool {
    std::env::var("NBDKIT_LEFT_OUT").unwrap_or_default().split(' ').any(|left_out| left_out == what)
}

// One test, for the counts are the process's.
#[test]
fn no_request_allocates() {
    log::set_logger(&Log).expect("the first logger");
    log::set_max_level(log::LevelFilter::Warn);
    let dir = tempfile::tempdir().expect("a directory");
    let (image, partitioned) = (image(dir.path(), "disk"), image(dir.path(), "partitioned"));
    let memory = [("size", OsStr::new("64M"))];
    let file = [("file", image.as_os_str())];
    let direct = [("file", image.as_os_str()), ("cache", OsStr::new("none"))];
    let shifted =
        [("file", partitioned.as_os_str()), ("offset", OsStr::new("0")), ("partition", OsStr::new("1"))];
    let two = ["nofilter", "noextents"];
    // The last numbers: hundredths of locks for 4 KiB at depth 64, and at depth 1 of a mount.
    let chains = [
        ("memory", chain(&[], "memory", &memory), 130, 620),
        ("file", chain(&[], "file", &file), 20, 520),
        ("three filters", chain(&["nofilter", "partition", "offset"], "file", &shifted), 20, 520),
        ("started", chain_over(&two, Box::new(Disk::new(Way::Started)), &[]), 450, 1100),
        ("on a thread", chain_over(&two, Box::new(Disk::new(Way::OnThread)), &[]), 700, 700),
        ("direct", chain(&two, "file", &direct), 900, 1900),
    ];
    let mut failed = Vec::new();
    for (name, chain, most, _) in &chains {
        for (command, length, depth) in
            [(READ, 4096, 1), (READ, 4096, 64), (WRITE, 4096, 64), (READ, 1 << 20, 4), (WRITE, 1 << 20, 4)]
        {
            let cost = cost(chain, command, length, depth);
            eprintln!("{name}: command {command} of {length} bytes, depth {depth}: {cost:?}");
            // Of memory that outlives a call no more than 1 MiB is kept.
            let may_allocate = length > 4096 && matches!(*name, "started" | "direct");
            let allocates = cost.allocations > 0 && !may_allocate;
            if allocates || (length == 4096 && depth == 64 && cost.locks > *most) {
                failed.push(format!("{name}: command {command} of {length}, depth {depth}: {cost:?}"));
            }
        }
    }
    if is_left_out("fuse") {
        eprintln!("left out: the FUSE front end");
    } else {
        for (name, chain, _, most) in &chains {
            let mounted = Mounted::new(chain);
            for write in [false, true] {
                let cost = mounted.cost(write, 4096);
                eprintln!("{name}, mounted: write {write}: {cost:?}");
                if cost.allocations > 0 || cost.locks > *most {
                    failed.push(format!("{name}, mounted: write {write}: {cost:?}"));
                }
            }
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}
