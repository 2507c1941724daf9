//! The four thread models, the same through both front ends.
//!
//! The plugin counts the calls that are inside it at once. Where calls must overlap, each waits for the others, so
//! that a missing overlap fails at a deadline; where they must not, each lingers long enough to be caught.

use std::{
    collections::HashMap,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use nbdkit_core::{Caps, Chain, Errno, Error, Handle, Info, Open, Plugin, Result, ShutdownFlag, ThreadModel};
use parking_lot::{Condvar, Mutex};

use crate::util;

/// Requests that each client has in flight.
const DEPTH: usize = 16;
const SIZE: u64 = 1 << 20;

/// Who is inside the plugin.
#[derive(Default)]
struct Census {
    now: Mutex<Inside>,
    changed: Condvar,
}

#[derive(Default)]
struct Inside {
    /// Calls, by handle.
    calls: HashMap<usize, usize>,
    /// Open handles.
    handles: usize,
    /// The most that were ever inside: in all, in one handle, and open handles.
    most: usize,
    most_in_one: usize,
    most_handles: usize,
}

impl Inside {
    fn total(&self) -> usize {
        self.calls.values().sum()
    }
}

struct Counting {
    model: ThreadModel,
    /// A call ends once this many were inside at once.
    overlap: usize,
    census: Arc<Census>,
}

struct Counted {
    number: usize,
    overlap: usize,
    census: Arc<Census>,
}

impl Plugin for Counting {
    fn info(&self) -> Info {
        Info::bundled("counting", "counts concurrent calls", "")
    }

    fn thread_model(&self) -> ThreadModel {
        self.model
    }

    fn open(&self, _: &Open) -> Result<Box<dyn Handle>> {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let mut now = self.census.now.lock();
        now.handles += 1;
        now.most_handles = now.most_handles.max(now.handles);
        Ok(Box::new(Counted {
            number: NUMBER.fetch_add(1, Ordering::Relaxed),
            overlap: self.overlap,
            census: self.census.clone(),
        }))
    }
}

impl Handle for Counted {
    fn capabilities(&self) -> Result<Caps> {
        Ok(Caps::of_size(SIZE))
    }

    fn pread(&self, buf: &mut [u8], _: u64) -> Result<()> {
        let mut now = self.census.now.lock();
        *now.calls.entry(self.number).or_default() += 1;
        now.most = now.most.max(now.total());
        now.most_in_one = now.most_in_one.max(now.calls[&self.number]);
        self.census.changed.notify_all();
        if self.overlap > 1 {
            let deadline = Instant::now() + Duration::from_secs(30);
            while now.most < self.overlap {
                if self.census.changed.wait_until(&mut now, deadline).timed_out() {
                    return Err(Error::new(Errno::ETIMEDOUT, "the calls do not overlap"));
                }
            }
        }
        drop(now);
        std::thread::sleep(Duration::from_millis(1));
        let mut now = self.census.now.lock();
        *now.calls.entry(self.number).or_default() -= 1;
        buf.fill(7);
        Ok(())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.census.now.lock().handles -= 1;
    }
}

/// A chain over the counting plugin.
fn chain(model: ThreadModel, overlap: usize) -> (Arc<Chain>, Arc<Census>) {
    let census = Arc::new(Census::default());
    let plugin = Counting { model, overlap, census: census.clone() };
    let mut chain = Chain::new(Box::new(plugin), Vec::new());
    chain.config_complete().expect("config_complete");
    (Arc::new(chain), census)
}

/// Two libnbd clients, each with 16 reads in flight, against an NBD server in this process.
fn over_nbd(model: ThreadModel, overlap: usize) -> Arc<Census> {
    let (chain, census) = chain(model, overlap);
    let dir = util::temp();
    let socket = dir.path().join("sock");
    let listener = nbdkit_nbd::listen::unix(&socket).expect("listen");
    let stop = Arc::new(ShutdownFlag::new());
    std::thread::scope(|scope| {
        let server = scope.spawn({
            let stop = stop.clone();
            move || nbdkit_nbd::serve(chain, nbdkit_nbd::Config::default(), vec![listener], stop, None)
        });
        let uri = format!("nbd+unix://?socket={}", socket.display());
        let script = format!(
            "bufs = [nbd.Buffer(512) for i in range({DEPTH})]\n\
             todo = {{h.aio_pread(b, i * 512) for i, b in enumerate(bufs)}}\n\
             while todo:\n    h.poll(-1)\n    todo = {{c for c in todo if not h.aio_command_completed(c)}}\n\
             assert all(b.to_bytearray() == b'\\x07' * 512 for b in bufs)\n"
        );
        let clients = [(); 2].map(|()| {
            let words = ["nbdsh".to_owned(), "-u".into(), uri.clone(), "-c".into(), script.clone()];
            scope.spawn(move || util::run(words))
        });
        let ends = clients.map(|client| client.join().expect("a client"));
        stop.raise();
        server.join().expect("the server").expect("serve");
        for end in ends {
            end.ok();
        }
    });
    census
}

/// 16 threads that read a mount in this process, past the page cache.
fn over_fuse(model: ThreadModel, overlap: usize) -> Arc<Census> {
    let (chain, census) = chain(model, overlap);
    let dir = util::temp();
    let config = nbdkit_fuse::Config {
        mountpoint: dir.path().to_owned(),
        threads: DEPTH,
        passthrough: false,
        ..nbdkit_fuse::Config::default()
    };
    let stop = Arc::new(ShutdownFlag::new());
    let mount = nbdkit_fuse::Mount::new(chain, config, stop.clone()).expect("mount");
    let file = mount.file().to_owned();
    let server = std::thread::spawn(move || mount.wait());
    std::thread::scope(|scope| {
        for i in 0..DEPTH {
            let file = &file;
            scope.spawn(move || read_block(file, i));
        }
    });
    stop.raise();
    server.join().expect("the mount").expect("unmount");
    census
}

fn read_block(file: &Path, index: usize) {
    let o_direct = i32::try_from(rustix::fs::OFlags::DIRECT.bits()).expect("a flag");
    let file = std::fs::File::options().read(true).custom_flags(o_direct).open(file).expect("open");
    let mut buf = [0; 512];
    file.read_exact_at(&mut buf, 512 * index as u64).expect("read");
    assert_eq!(buf, [7; 512]);
}

/// A mount and libnbd's Python module must be there; without them these tests cannot tell anything.
static FRONT_ENDS: LazyLock<()> = LazyLock::new(|| {
    assert!(Path::new("/dev/fuse").exists(), "/dev/fuse is missing: modprobe fuse");
    util::run_ok(["nbdsh", "-c", "pass"]);
});

#[test]
fn parallel_runs_all_at_once() {
    LazyLock::force(&FRONT_ENDS);
    let most = over_nbd(ThreadModel::Parallel, 2 * DEPTH).now.lock().most;
    assert_eq!(most, 2 * DEPTH);
    assert_eq!(over_fuse(ThreadModel::Parallel, DEPTH).now.lock().most, DEPTH);
}

#[test]
fn serialize_requests_runs_one_for_each_connection() {
    LazyLock::force(&FRONT_ENDS);
    let census = over_nbd(ThreadModel::SerializeRequests, 2);
    let now = census.now.lock();
    assert_eq!((now.most, now.most_in_one), (2, 1));
    assert_eq!(over_fuse(ThreadModel::SerializeRequests, 1).now.lock().most, 1);
}

#[test]
fn serialize_all_requests_runs_one() {
    LazyLock::force(&FRONT_ENDS);
    let census = over_nbd(ThreadModel::SerializeAllRequests, 1);
    assert_eq!(census.now.lock().most, 1);
    assert_eq!(over_fuse(ThreadModel::SerializeAllRequests, 1).now.lock().most, 1);
}

#[test]
fn serialize_connections_has_one_open() {
    LazyLock::force(&FRONT_ENDS);
    let census = over_nbd(ThreadModel::SerializeConnections, 1);
    let now = census.now.lock();
    assert_eq!((now.most, now.most_handles), (1, 1));
    let census = over_fuse(ThreadModel::SerializeConnections, 1);
    let now = census.now.lock();
    assert_eq!((now.most, now.most_handles), (1, 1));
}
