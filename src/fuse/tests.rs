//! Mounts of a disk in memory, used through the kernel. Skipped where FUSE is not usable.
//!
//! A mount whose server died on the way answers nobody; each test therefore runs under a deadline, which aborts the
//! process: the kernel then answers for it.

use std::{
    fs::{self, File, OpenOptions},
    os::fd::AsFd,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    time::Duration,
};

use nbdkit_core::{
    Call, Caps, Chain, Client, Data, Extents, Filter, Flags, Handle, Info, Loan, Op, Open, Outcome, Peer,
    Pending, Plugin, Request, Result, Session, ShutdownFlag, Support, ThreadModel,
};
use parking_lot::Mutex;
use rustix::fs::{FallocateFlags, SeekFrom};

use crate::{Config, Mount, check_mountpoint};

mod started;

const SIZE: usize = 1 << 20;

/// What the test disk was asked to do, and how it behaves.
#[derive(Default)]
struct Disk {
    data: Mutex<Vec<u8>>,
    blocking: bool,
    readonly: bool,
    model: Option<ThreadModel>,
    running: AtomicUsize,
    most: AtomicUsize,
    fua: AtomicUsize,
    flushes: AtomicUsize,
    closed: AtomicUsize,
    /// A file to lend, with other data in it than `data`.
    lent: Option<File>,
    /// Reads wait here until the sender is dropped.
    gate: Mutex<Option<mpsc::Receiver<()>>>,
    /// Reads that ran on a thread that receives.
    received: AtomicUsize,
    /// Reads and writes are started, and wait there to be completed. What is written is in `data` from the start.
    starts: Option<Mutex<mpsc::Sender<(Pending, Call)>>>,
}

impl Disk {
    fn new() -> Self {
        Disk { data: Mutex::new(vec![0; SIZE]), ..Disk::default() }
    }
}

struct Memory(Arc<Disk>);
struct MemoryHandle(Arc<Disk>);

impl Plugin for Memory {
    fn info(&self) -> Info {
        Info::bundled("test", "", "")
    }
    fn thread_model(&self) -> ThreadModel {
        self.0.model.unwrap_or(ThreadModel::Parallel)
    }
    fn open(&self, _open: &Open) -> Result<Box<dyn Handle>> {
        Ok(Box::new(MemoryHandle(self.0.clone())))
    }
}

impl MemoryHandle {
    fn count<T>(&self, call: impl FnOnce() -> T) -> T {
        let now = self.0.running.fetch_add(1, Ordering::SeqCst) + 1;
        self.0.most.fetch_max(now, Ordering::SeqCst);
        let result = call();
        self.0.running.fetch_sub(1, Ordering::SeqCst);
        result
    }
}

impl Handle for MemoryHandle {
    fn capabilities(&self) -> Result<Caps> {
        Ok(Caps::of_size(self.0.data.lock().len() as u64)
            .with_write(!self.0.readonly)
            .with_flush(true)
            .with_zero(Support::Native)
            .with_fua(Support::Native)
            .with_multi_conn(true)
            .with_extents(true))
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        let call = *request.call();
        if request.may_lend() {
            return match &self.0.lent {
                Some(file) => Outcome::Lent(Loan { fd: file.as_fd(), offset: call.offset }),
                None => Outcome::NeedsThread,
            };
        }
        if let (Some(starts), Op::Read | Op::Write) = (&self.0.starts, call.op)
            && let Some((pending, started)) = request.start()
        {
            if let Data::Write(data) = request.data() {
                let at = call.offset as usize;
                self.0.data.lock()[at..at + data.len()].copy_from_slice(data);
            }
            starts.lock().send((pending, call)).unwrap();
            return Outcome::Started(started);
        }
        if self.0.blocking && !request.may_wait() { Outcome::NeedsThread } else { request.run(self) }
    }
    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.count(|| {
            let receives = std::thread::current().name().is_some_and(|name| name.starts_with("fuser-"));
            self.0.received.fetch_add(usize::from(receives), Ordering::SeqCst);
            if let Some(gate) = &*self.0.gate.lock() {
                // An error says that the sender is gone: the gate is open.
                let _ = gate.recv();
            }
            let at = offset as usize;
            buf.copy_from_slice(&self.0.data.lock()[at..at + buf.len()]);
            Ok(())
        })
    }
    fn pwrite(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
        self.count(|| {
            let at = offset as usize;
            self.0.data.lock()[at..at + buf.len()].copy_from_slice(buf);
            self.0.fua.fetch_add(usize::from(flags.contains(Flags::FUA)), Ordering::SeqCst);
            Ok(())
        })
    }
    fn flush(&self) -> Result<()> {
        self.0.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn zero(&self, length: u64, offset: u64, _flags: Flags) -> Result<()> {
        let at = offset as usize;
        self.0.data.lock()[at..at + length as usize].fill(0);
        Ok(())
    }
    fn extents(&self, length: u64, offset: u64, _flags: Flags, extents: &mut Extents) -> Result<()> {
        let data = self.0.data.lock();
        for (i, block) in data.chunks(4096).enumerate() {
            let at = i as u64 * 4096;
            if at + 4096 > offset && at < offset + length {
                let hole = block.iter().all(|b| *b == 0);
                extents.add(at, block.len() as u64, hole, hole)?;
            }
        }
        Ok(())
    }
}

impl Drop for MemoryHandle {
    fn drop(&mut self) {
        self.0.closed.fetch_add(1, Ordering::SeqCst);
    }
}

/// Whether this process can mount: scripts/check declares it where it cannot, and elsewhere that is a failure.
fn usable() -> bool {
    !std::env::var("NBDKIT_LEFT_OUT").unwrap_or_default().split(' ').any(|left_out| left_out == "fuse")
}

/// Ends the process when the test takes too long.
fn deadline() -> impl Drop {
    struct Alarm(Arc<ShutdownFlag>);
    impl Drop for Alarm {
        fn drop(&mut self) {
            self.0.raise();
        }
    }
    let done = Arc::new(ShutdownFlag::new());
    let alarm = Alarm(done.clone());
    std::thread::spawn(move || {
        if !done.wait_for(Duration::from_secs(60)) {
            eprintln!("the test takes too long");
            std::process::abort();
        }
    });
    alarm
}

fn chain(disk: &Arc<Disk>) -> Arc<Chain> {
    chain_of(disk, Vec::new())
}

fn chain_of(disk: &Arc<Disk>, filters: Vec<Box<dyn Filter>>) -> Arc<Chain> {
    let mut chain = Chain::new(Box::new(Memory(disk.clone())), filters);
    chain.config_complete().unwrap();
    chain.get_ready().unwrap();
    let chain = Arc::new(chain);
    chain.after_fork().unwrap();
    chain
}

/// A mount that is ended and waited for at the end of the test.
struct Mounted {
    chain: Arc<Chain>,
    stop: Arc<ShutdownFlag>,
    mount: Option<Mount>,
    file: std::path::PathBuf,
    dir: tempfile::TempDir,
}

impl Mounted {
    fn with(disk: &Arc<Disk>, change: impl FnOnce(&mut Config)) -> Self {
        Self::over(chain(disk), change)
    }

    fn over(chain: Arc<Chain>, change: impl FnOnce(&mut Config)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config { mountpoint: dir.path().to_owned(), ..Config::default() };
        change(&mut config);
        let stop = Arc::new(ShutdownFlag::new());
        let mount = Mount::new(chain.clone(), config, stop.clone()).unwrap();
        let file = mount.file().to_owned();
        Mounted { chain, stop, mount: Some(mount), file, dir }
    }

    fn new(disk: &Arc<Disk>) -> Self {
        Self::with(disk, |_| {})
    }

    fn open(&self) -> File {
        OpenOptions::new().read(true).write(true).open(&self.file).unwrap()
    }

    fn open_direct(&self) -> File {
        let direct = rustix::fs::OFlags::DIRECT.bits() as i32;
        OpenOptions::new().read(true).write(true).custom_flags(direct).open(&self.file).unwrap()
    }

    /// As the server does it on SIGTERM.
    fn end(mut self) {
        self.stop.raise();
        self.mount.take().unwrap().wait().unwrap();
    }
}

fn unmounted(path: &Path) -> bool {
    crate::mountinfo::at(path).unwrap().is_empty()
}

#[test]
fn a_directory_shows_the_export_as_a_file() {
    if !usable() {
        return;
    }
    let (_deadline, disk) = (deadline(), Arc::new(Disk::new()));
    let m = Mounted::new(&disk);
    let names: Vec<_> = fs::read_dir(m.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["nbd"]);
    let meta = fs::metadata(&m.file).unwrap();
    assert_eq!((meta.len(), meta.mode(), meta.blocks()), (SIZE as u64, 0o100644, 0));
    assert!(fs::write(m.dir.path().join("other"), "x").is_err());
    assert!(fs::remove_file(&m.file).is_err());

    let file = m.open();
    file.write_all_at(b"hello", 4094).unwrap();
    assert_eq!(&disk.data.lock()[4094..4099], b"hello", "writes go through at once");
    let mut buf = [0; 5];
    file.read_exact_at(&mut buf, 4094).unwrap();
    assert_eq!(&buf, b"hello");
    assert_eq!(fs::metadata(&m.file).unwrap().blocks(), 16);

    drop(file);
    let (dir, target) = (m.dir.path().to_owned(), m.file.clone());
    m.end();
    assert!(unmounted(&dir) && !target.exists());
    assert_eq!(disk.closed.load(Ordering::SeqCst), 1);
    assert_eq!(disk.flushes.load(Ordering::SeqCst), 1);
}

#[test]
fn a_regular_file_is_covered_by_the_export() {
    if !usable() {
        return;
    }
    let (_deadline, disk) = (deadline(), Arc::new(Disk::new()));
    let below = tempfile::NamedTempFile::new().unwrap();
    fs::write(below.path(), "below").unwrap();
    let m = Mounted::with(&disk, |config| config.mountpoint = below.path().to_owned());
    assert_eq!(m.file, below.path());
    assert_eq!(fs::metadata(below.path()).unwrap().len(), SIZE as u64);
    m.open().write_all_at(b"above", 0).unwrap();
    m.end();
    assert_eq!(fs::read(below.path()).unwrap(), b"below");
    assert_eq!(&disk.data.lock()[..5], b"above");
}

#[test]
fn the_end_of_the_disk_is_the_end_of_the_file() {
    if !usable() {
        return;
    }
    let (_deadline, disk) = (deadline(), Arc::new(Disk::new()));
    disk.data.lock().truncate(SIZE - 100);
    let end = SIZE as u64 - 100;
    let m = Mounted::new(&disk);
    for flags in [0, rustix::fs::OFlags::DIRECT.bits() as i32] {
        let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(&m.file).unwrap();
        let mut buf = [0xff; 4096];
        assert_eq!(file.read_at(&mut buf, end - 10).unwrap(), 10);
        assert_eq!(file.read_at(&mut buf, end).unwrap(), 0);
        assert_eq!(file.write_at(&[1; 20], end - 10).unwrap(), 10);
        assert_eq!(file.write_at(&[1; 20], end).unwrap_err().raw_os_error(), Some(28));
        assert_eq!(file.metadata().unwrap().len(), end);
    }
    let file = m.open();
    assert!(file.set_len(end).is_ok());
    assert_eq!(file.set_len(0).unwrap_err().kind(), std::io::ErrorKind::PermissionDenied);
    assert_eq!(file.set_len(end + 1).unwrap_err().kind(), std::io::ErrorKind::PermissionDenied);
    // As with a disk, opening it for truncation changes nothing.
    File::create(&m.file).unwrap();
    assert_eq!(fs::metadata(&m.file).unwrap().len(), end);
    let mut byte = [0];
    file.read_exact_at(&mut byte, end - 1).unwrap();
    assert_eq!(byte, [1]);
    drop(file);
    m.end();
}

#[test]
fn synchronous_writes_and_fsync_reach_the_disk() {
    if !usable() {
        return;
    }
    let (_deadline, disk) = (deadline(), Arc::new(Disk::new()));
    let m = Mounted::new(&disk);
    m.open().write_all_at(b"x", 0).unwrap();
    assert_eq!(disk.fua.load(Ordering::SeqCst), 0);
    let sync = rustix::fs::OFlags::DSYNC.bits() as i32;
    let file = OpenOptions::new().write(true).custom_flags(sync).open(&m.file).unwrap();
    file.write_all_at(b"y", 0).unwrap();
    assert_eq!(disk.fua.load(Ordering::SeqCst), 1);
    let before = disk.flushes.load(Ordering::SeqCst);
    m.open().sync_all().unwrap();
    assert_eq!(disk.flushes.load(Ordering::SeqCst), before + 1);
    drop(file);
    m.end();
}

#[test]
fn holes_are_found_and_made() {
    if !usable() {
        return;
    }
    let (_deadline, disk) = (deadline(), Arc::new(Disk::new()));
    disk.data.lock()[64 << 10..128 << 10].fill(7);
    let m = Mounted::new(&disk);
    let file = m.open();
    let seek = |to| rustix::fs::seek(&file, to);
    assert_eq!(seek(SeekFrom::Data(0)), Ok(64 << 10));
    assert_eq!(seek(SeekFrom::Data(70 << 10)), Ok(70 << 10));
    assert_eq!(seek(SeekFrom::Hole(0)), Ok(0));
    assert_eq!(seek(SeekFrom::Hole(64 << 10)), Ok(128 << 10));
    assert_eq!(seek(SeekFrom::Data(128 << 10)), Err(rustix::io::Errno::NXIO));
    assert_eq!(seek(SeekFrom::Hole(SIZE as u64)), Err(rustix::io::Errno::NXIO));

    let (punch, zero, keep) =
        (FallocateFlags::PUNCH_HOLE, FallocateFlags::ZERO_RANGE, FallocateFlags::KEEP_SIZE);
    let mut buf = [1; 4096];
    file.read_exact_at(&mut buf, 64 << 10).unwrap();
    rustix::fs::fallocate(&file, punch | keep, 64 << 10, 4096).unwrap();
    file.read_exact_at(&mut buf, 64 << 10).unwrap();
    assert_eq!(buf, [0; 4096], "the kernel's copy is gone too");
    assert_eq!(seek(SeekFrom::Data(0)), Ok(68 << 10));
    rustix::fs::fallocate(&file, zero, 68 << 10, 4096).unwrap();
    rustix::fs::fallocate(&file, zero | keep, SIZE as u64 - 4096, 1 << 30).unwrap();
    assert_eq!(seek(SeekFrom::Data(0)), Ok(72 << 10));
    assert_eq!(
        rustix::fs::fallocate(&file, zero, SIZE as u64 - 4096, 1 << 30),
        Err(rustix::io::Errno::NOSPC)
    );
    assert_eq!(
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, 4096),
        Err(rustix::io::Errno::OPNOTSUPP)
    );
    assert_eq!(file.metadata().unwrap().len(), SIZE as u64);
    drop(file);
    m.end();
}

#[test]
fn a_read_only_disk_refuses_writers() {
    if !usable() {
        return;
    }
    let (_deadline, disk) = (deadline(), Arc::new(Disk { readonly: true, ..Disk::new() }));
    let m = Mounted::new(&disk);
    assert_eq!(fs::metadata(&m.file).unwrap().mode(), 0o100444);
    let e = OpenOptions::new().write(true).open(&m.file).unwrap_err();
    assert_eq!(e.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    assert_eq!(fs::read(&m.file).unwrap().len(), SIZE);
    m.end();
}

/// Reads from 16 threads at once and tells how many the disk saw at once.
fn most_at_once(disk: Disk, threads: usize) -> usize {
    let disk = Arc::new(disk);
    let m = Mounted::with(&disk, |config| config.threads = threads);
    std::thread::scope(|scope| {
        for i in 0..16 {
            let file = OpenOptions::new()
                .read(true)
                .custom_flags(rustix::fs::OFlags::DIRECT.bits() as i32)
                .open(&m.file)
                .unwrap();
            scope.spawn(move || {
                let mut buf = [0; 512];
                for j in 0..64 {
                    file.read_exact_at(&mut buf, (i * 64 + j) * 512).unwrap();
                }
            });
        }
    });
    m.end();
    disk.most.load(Ordering::SeqCst)
}

#[test]
fn thread_models_hold() {
    if !usable() {
        return;
    }
    let _deadline = deadline();
    for model in
        [ThreadModel::SerializeConnections, ThreadModel::SerializeAllRequests, ThreadModel::SerializeRequests]
    {
        for blocking in [false, true] {
            let disk = Disk { model: Some(model), blocking, ..Disk::new() };
            assert_eq!(most_at_once(disk, 16), 1, "{model}, blocking {blocking}");
        }
    }
    assert_eq!(most_at_once(Disk { blocking: true, ..Disk::new() }, 1), 1, "one thread");
}

/// As many reads as there may be wait in the disk, and others are served meanwhile.
fn blocking_reads_run_side_by_side(disk: &Disk, m: &Mounted, open: mpsc::Sender<()>) {
    std::thread::scope(|scope| {
        for i in 0..16 {
            let file = m.open_direct();
            scope.spawn(move || file.read_exact_at(&mut [0; 512], i * 512).unwrap());
        }
        // None of them can end before all have arrived.
        while disk.running.load(Ordering::SeqCst) < 16 {
            std::thread::yield_now();
        }
        // Others are served meanwhile.
        assert_eq!(fs::metadata(&m.file).unwrap().len(), SIZE as u64);
        drop(m.open());
        drop(open);
    });
}

#[test]
fn blocking_requests_run_side_by_side() {
    if !usable() {
        return;
    }
    let _deadline = deadline();
    let (open, gate) = mpsc::channel();
    let disk = Arc::new(Disk { blocking: true, gate: Mutex::new(Some(gate)), ..Disk::new() });
    let m = Mounted::new(&disk);
    blocking_reads_run_side_by_side(&disk, &m, open);
    m.end();
}

#[test]
fn quick_requests_run_where_they_are_received_and_then_block_nobody() {
    if !usable() {
        return;
    }
    let _deadline = deadline();
    let disk = Arc::new(Disk { blocking: true, ..Disk::new() });
    let m = Mounted::new(&disk);
    let file = m.open_direct();
    for at in (0..).map(|i| i % 256 * 4096) {
        file.read_exact_at(&mut [0; 4096], at).unwrap();
        if disk.received.load(Ordering::SeqCst) > 100 {
            break;
        }
    }
    let (open, gate) = mpsc::channel();
    *disk.gate.lock() = Some(gate);
    blocking_reads_run_side_by_side(&disk, &m, open);
    drop(file);
    m.end();
}

/// A disk that lends a file of `size` bytes 'L', itself full of 'D'.
fn lending(size: usize, readonly: bool) -> (tempfile::NamedTempFile, Arc<Disk>) {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), vec![b'L'; size]).unwrap();
    let lent = Some(OpenOptions::new().read(true).write(true).open(file.path()).unwrap());
    let disk = Disk { readonly, lent, data: Mutex::new(vec![b'D'; SIZE]), ..Disk::default() };
    (file, Arc::new(disk))
}

/// Whether the kernel has FUSE passthrough: Linux 6.9.
fn has_passthrough() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse::<u32>().unwrap_or(0));
    (numbers.next(), numbers.next()) >= (Some(6), Some(9))
}

#[test]
fn the_kernel_reads_a_lent_file_itself_where_that_is_the_same() {
    if !usable() || !has_passthrough() {
        return;
    }
    let _deadline = deadline();
    let first = |disk: &Arc<Disk>, passthrough| {
        let m = Mounted::with(disk, |config| config.passthrough = passthrough);
        let (one, two) = (File::open(&m.file).unwrap(), File::open(&m.file).unwrap());
        let mut bytes = [0; 2];
        one.read_exact_at(&mut bytes[..1], 0).unwrap();
        two.read_exact_at(&mut bytes[1..], SIZE as u64 - 1).unwrap();
        assert_eq!(two.read_at(&mut [0], SIZE as u64).unwrap(), 0);
        drop((one, two));
        m.end();
        bytes
    };
    let (_file, disk) = lending(SIZE, true);
    assert_eq!(&first(&disk, true), b"LL");
    assert_eq!(&first(&disk, false), b"DD", "not wanted");
    let (_file, disk) = lending(SIZE, false);
    assert_eq!(&first(&disk, true), b"DD", "a writer could grow the file");
    let (_file, disk) = lending(SIZE + 1, true);
    assert_eq!(&first(&disk, true), b"DD", "a reader could see more than the disk");
}

#[test]
fn a_mount_over_its_own_image_is_refused() {
    let (file, disk) = lending(SIZE, false);
    let refusal = |mountpoint: &Path| {
        let config = Config { mountpoint: mountpoint.to_owned(), ..Config::default() };
        format!("{:#}", Mount::new(chain(&disk), config, Arc::new(ShutdownFlag::new())).unwrap_err())
    };
    if !usable() {
        return;
    }
    assert!(refusal(file.path()).contains("is the disk image itself"));
    assert!(refusal(file.path().parent().unwrap()).contains("lies in"));
}

/// A client of the same chain that comes in by another front end.
fn other_front_end(chain: &Arc<Chain>) -> Session {
    let client = Arc::new(Client::new(1, Peer::Other, Arc::new(ShutdownFlag::new())));
    let connection = Arc::new(chain.connect(client, false).unwrap());
    connection.open("".as_ref(), false).unwrap()
}

#[test]
fn a_write_by_another_front_end_is_seen_at_once() {
    if !usable() {
        return;
    }
    let (_deadline, disk) = (deadline(), Arc::new(Disk::new()));
    let m = Mounted::new(&disk);
    let (file, other) = (m.open(), other_front_end(&m.chain));
    let mut buf = [1; 8];
    file.read_exact_at(&mut buf, 5000).unwrap();
    assert_eq!(buf, [0; 8]);
    other.pwrite(b"from nbd", 5000, Flags::empty()).unwrap();
    file.read_exact_at(&mut buf, 5000).unwrap();
    assert_eq!(&buf, b"from nbd");
    other.zero(SIZE as u64, 0, Flags::empty()).unwrap();
    file.read_exact_at(&mut buf, 5000).unwrap();
    assert_eq!(buf, [0; 8]);
    file.write_all_at(b"from us!", 5000).unwrap();
    other.pread(&mut buf, 5000).unwrap();
    assert_eq!(&buf, b"from us!");
    drop((file, other));
    m.end();
}

#[test]
fn under_a_serial_model_front_ends_do_not_wait_for_each_other() {
    if !usable() {
        return;
    }
    let model = Some(ThreadModel::SerializeAllRequests);
    let (_deadline, disk) = (deadline(), Arc::new(Disk { model, blocking: true, ..Disk::new() }));
    let m = Mounted::new(&disk);
    let (file, other, done) = (m.open(), other_front_end(&m.chain), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        // The kernel drops the page after each write, and waits for the reads that are about to fill it.
        let (done, file) = (&done, &file);
        for _ in 0..2 {
            scope.spawn(move || {
                while done.load(Ordering::SeqCst) == 0 {
                    file.read_exact_at(&mut [0], 0).unwrap();
                }
            });
        }
        (0..2000).for_each(|_| other.pwrite(b"x", 0, Flags::empty()).unwrap());
        done.store(1, Ordering::SeqCst);
    });
    drop((file, other));
    m.end();
}

#[test]
fn a_mount_in_use_ends_when_the_server_stops() {
    if !usable() {
        return;
    }
    let (_deadline, disk) = (deadline(), Arc::new(Disk::new()));
    let m = Mounted::new(&disk);
    let (file, dir) = (m.open(), m.dir.path().to_owned());
    file.write_all_at(b"kept", 0).unwrap();
    m.end();
    assert!(unmounted(&dir));
    assert!(file.write_all_at(b"lost", 1 << 16).is_err());
    assert_eq!(&disk.data.lock()[..4], b"kept");
    assert_eq!(disk.closed.load(Ordering::SeqCst), 1);
}

#[test]
fn unmounting_from_outside_ends_it() {
    if !usable() {
        return;
    }
    let (_deadline, disk) = (deadline(), Arc::new(Disk::new()));
    let mut m = Mounted::new(&disk);
    rustix::mount::unmount(m.dir.path(), rustix::mount::UnmountFlags::empty()).unwrap();
    m.mount.take().unwrap().wait().unwrap();
    assert_eq!(disk.closed.load(Ordering::SeqCst), 1);
    assert_eq!(disk.flushes.load(Ordering::SeqCst), 1);
}

#[test]
fn a_second_mount_at_the_same_place_is_refused() {
    if !usable() {
        return;
    }
    let (_deadline, disk) = (deadline(), Arc::new(Disk::new()));
    let m = Mounted::new(&disk);
    let e = check_mountpoint(m.dir.path()).unwrap_err().to_string();
    assert!(e.contains("in use") && e.contains("nbdkit-mount -u"), "{e}");
    m.end();
}

#[test]
fn a_mount_without_a_server_is_named() {
    if !usable() {
        return;
    }
    let _deadline = deadline();
    let dir = tempfile::tempdir().unwrap();
    let mountpoint = crate::mountpoint::check(dir.path()).unwrap();
    let (fd, kernel_mount) =
        crate::kernel_mount::attach(&mountpoint, &crate::options::Options::default(), "x").unwrap();
    drop(fd);
    let e = check_mountpoint(dir.path()).unwrap_err().to_string();
    assert!(e.contains("Transport endpoint") && e.contains("fusermount3 -u /"), "{e}");
    kernel_mount.unmount(crate::kernel_mount::UnmountMode::Idle).unwrap();
    assert!(unmounted(dir.path()));
}

#[test]
fn options_shape_the_mount() {
    if !usable() {
        return;
    }
    let (_deadline, disk) = (deadline(), Arc::new(Disk::new()));
    let words = "ro,noexec,noatime,allow_other,uid=12,gid=34,umask=027,fsname=my disk";
    let m = Mounted::with(&disk, |config| {
        config.options = vec![words.into()];
        config.filename = "disk.img".into();
    });
    assert_eq!(m.file.file_name().unwrap(), "disk.img");
    let meta = fs::metadata(&m.file).unwrap();
    assert_eq!((meta.uid(), meta.gid(), meta.mode()), (12, 34, 0o100440));
    let entry = crate::mountinfo::at(m.dir.path()).unwrap().pop().unwrap();
    assert_eq!((&*entry.fstype, &*entry.source), ("fuse.nbdkit-mount", "my disk"));
    assert!(OpenOptions::new().write(true).open(&m.file).is_err());
    m.end();
}

#[test]
fn a_stopped_server_does_not_mount() {
    if !usable() {
        return;
    }
    let (_deadline, disk) =
        (deadline(), Arc::new(Disk { model: Some(ThreadModel::SerializeConnections), ..Disk::new() }));
    let chain = chain(&disk);
    let other = other_front_end(&chain);
    let stop = Arc::new(ShutdownFlag::new());
    stop.raise();
    let dir = tempfile::tempdir().unwrap();
    let config = Config { mountpoint: dir.path().to_owned(), ..Config::default() };
    assert!(Mount::new(chain, config, stop).is_err());
    assert!(unmounted(dir.path()));
    drop(other);
}
