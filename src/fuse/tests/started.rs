//! Requests that the disk has started: they end when the test says so.

use nbdkit_core::{Below, Buffers, Errno, Error, Next, Payload};

use super::*;

/// What the disk has started.
type Under = mpsc::Receiver<(Pending, Call)>;

fn starting(change: impl FnOnce(&mut Disk)) -> (Arc<Disk>, Under) {
    let (starts, under) = mpsc::channel();
    let mut disk = Disk { starts: Some(Mutex::new(starts)), blocking: true, ..Disk::new() };
    change(&mut disk);
    (Arc::new(disk), under)
}

/// Ends a request well; a read with `byte`s.
fn end(pending: Pending, call: Call, byte: u8) {
    let payload = match call.op {
        Op::Read => {
            let length = call.length as usize;
            let mut memory = Buffers::default().take(length).unwrap();
            memory[..length].fill(byte);
            Payload::Memory(memory, 0..length)
        }
        _ => Payload::None,
    };
    drop(pending.complete(Ok(payload)));
}

#[test]
fn many_are_under_way_without_threads_and_end_in_any_order() {
    const MANY: u64 = 48;
    if !usable() {
        return;
    }
    let (_deadline, (disk, under)) = (deadline(), starting(|_| ()));
    let m = Mounted::new(&disk);
    let file = m.open_direct();
    for _ in 0..2 {
        std::thread::scope(|scope| {
            for i in 0..MANY {
                let file = &file;
                scope.spawn(move || {
                    let (mut buf, at) = ([0; 512], i * 512);
                    if i % 2 == 0 {
                        file.read_exact_at(&mut buf, at).unwrap();
                        assert_eq!(buf, [i as u8; 512]);
                    } else {
                        file.write_all_at(&[i as u8; 512], at).unwrap();
                    }
                });
            }
            // None of them ends before all were started: that is more than there are threads.
            let mut all: Vec<_> = (0..MANY).map(|_| under.recv().unwrap()).collect();
            all.reverse();
            assert_eq!(fs::metadata(&m.file).unwrap().len(), SIZE as u64, "others are served");
            for (pending, call) in all {
                end(pending, call, (call.offset / 512) as u8);
            }
        });
    }
    assert_eq!(disk.data.lock()[3 * 512], 3);
    assert_eq!(disk.running.load(Ordering::SeqCst), 0);
    drop(file);
    m.end();
}

#[test]
fn failures_reach_the_caller_and_forgotten_ones_are_failures() {
    if !usable() {
        return;
    }
    let (_deadline, (disk, under)) = (deadline(), starting(|_| ()));
    let m = Mounted::new(&disk);
    let file = m.open_direct();
    let ends: [(fn(Pending), i32); 3] = [
        (|pending| drop(pending.complete(Err(Errno::ENOSPC.into()))), 28),
        (drop, 5),
        // A read without data.
        (|pending| drop(pending.complete(Ok(Payload::None))), 5),
    ];
    for (fail, errno) in ends {
        std::thread::scope(|scope| {
            let read = scope.spawn(|| file.read_exact_at(&mut [0; 512], 0));
            fail(under.recv().unwrap().0);
            assert_eq!(read.join().unwrap().unwrap_err().raw_os_error(), Some(errno));
        });
    }
    std::thread::scope(|scope| {
        let write = scope.spawn(|| file.write_all_at(&[1; 512], 0));
        drop(under.recv().unwrap());
        assert_eq!(write.join().unwrap().unwrap_err().raw_os_error(), Some(5));
    });
    drop(file);
    m.end();
}

#[test]
fn one_that_takes_too_long_is_answered_once() {
    if !usable() {
        return;
    }
    let (_deadline, (disk, under)) = (deadline(), starting(|_| ()));
    let m = Mounted::with(&disk, |config| config.timeout = Some(Duration::from_millis(20)));
    let file = m.open_direct();
    assert_eq!(file.read_exact_at(&mut [0; 512], 0).unwrap_err().raw_os_error(), Some(5));
    assert_eq!(file.write_all_at(&[7; 512], 0).unwrap_err().raw_os_error(), Some(5));
    // They end all the same, and nobody hears of it.
    for _ in 0..2 {
        let (pending, call) = under.recv().unwrap();
        end(pending, call, 1);
    }
    drop(file);
    m.end();
    assert_eq!(disk.closed.load(Ordering::SeqCst), 1);
}

/// A filter that panics when a read at offset 0 has ended.
struct Panics;
struct PanicsHandle(Next);

impl Filter for Panics {
    fn info(&self) -> Info {
        Info::bundled("panics", "", "")
    }
    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        Ok(Box::new(PanicsHandle(next.open(open)?)))
    }
}

impl Handle for PanicsHandle {
    fn next(&self) -> Option<&Next> {
        Some(&self.0)
    }
    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        self.0.watch(self, request, 0)
    }
    fn ended(&self, call: &Call, _token: u64, result: &mut Result<()>) {
        assert!(call.offset > 0 || call.op != Op::Read, "as the test wants it");
        if call.offset == 512 {
            *result = Err(Error::new(Errno::ENXIO, "as the test wants it"));
        }
    }
}

#[test]
fn a_layer_that_panics_when_one_has_ended_fails_that_one() {
    if !usable() {
        return;
    }
    let (_deadline, (disk, under)) = (deadline(), starting(|_| ()));
    let m = Mounted::over(chain_of(&disk, vec![Box::new(Panics)]), |_| ());
    let file = m.open_direct();
    for (offset, errno) in [(0, Some(5)), (512, Some(6)), (1024, None)] {
        std::thread::scope(|scope| {
            let read = scope.spawn(|| file.read_exact_at(&mut [0; 512], offset));
            let (pending, call) = under.recv().unwrap();
            end(pending, call, 1);
            let failed = read.join().unwrap().err().map(|e| e.raw_os_error().unwrap());
            assert_eq!(failed, errno, "at {offset}");
        });
    }
    drop(file);
    m.end();
}

#[test]
fn the_kernel_does_not_read_by_itself_what_a_layer_wants_to_know() {
    if !usable() || !has_passthrough() {
        return;
    }
    let _deadline = deadline();
    let (_file, disk) = lending(SIZE, true);
    let m = Mounted::over(chain_of(&disk, vec![Box::new(Panics)]), |_| ());
    let mut byte = [0];
    File::open(&m.file).unwrap().read_exact_at(&mut byte, 1 << 16).unwrap();
    assert_eq!(&byte, b"D");
    m.end();
}

#[test]
fn a_write_through_a_partition_is_started_too_and_the_disk_shows_it() {
    if !usable() {
        return;
    }
    let (_deadline, (disk, under)) = (deadline(), starting(|_| ()));
    {
        // One partition from sector 8 on.
        let mut data = disk.data.lock();
        let start = u32::from_le_bytes([8, 0, 0, 0]);
        data[446 + 4] = 0x83;
        data[446 + 8..446 + 12].copy_from_slice(&start.to_le_bytes());
        data[446 + 12..446 + 16].copy_from_slice(&1024_u32.to_le_bytes());
        data[510..512].copy_from_slice(&[0x55, 0xaa]);
    }
    let m = Mounted::with(&disk, |config| config.partitions = true);
    let ending = Arc::downgrade(&disk);
    // What is read is what the disk has.
    let ender = std::thread::spawn(move || {
        for (pending, call) in under {
            let disk = ending.upgrade().unwrap();
            let (at, length) = (call.offset as usize, call.length as usize);
            let payload = (call.op == Op::Read).then(|| {
                let mut memory = Buffers::default().take(length).unwrap();
                memory[..length].copy_from_slice(&disk.data.lock()[at..at + length]);
                Payload::Memory(memory, 0..length)
            });
            drop(pending.complete(Ok(payload.unwrap_or_default())));
        }
    });
    let (whole, part) = (m.open(), m.dir.path().join("nbd1"));
    let part = OpenOptions::new().read(true).write(true).open(part).unwrap();
    for word in [b"first", b"other"] {
        part.write_all_at(word, 0).unwrap();
        let mut seen = [0; 5];
        whole.read_exact_at(&mut seen, 8 * 512).unwrap();
        assert_eq!(&seen, word);
    }
    drop((whole, part));
    m.end();
    drop(disk);
    ender.join().unwrap();
}

#[test]
fn a_mount_ends_after_those_that_are_under_way() {
    if !usable() {
        return;
    }
    let (_deadline, (disk, under)) = (deadline(), starting(|_| ()));
    let m = Mounted::new(&disk);
    let (file, dir) = (m.open_direct(), m.dir.path().to_owned());
    std::thread::scope(|scope| {
        let read = scope.spawn(move || file.read_exact_at(&mut [0; 512], 0));
        let (pending, call) = under.recv().unwrap();
        let ended = scope.spawn(|| m.end());
        while !unmounted(&dir) {
            std::thread::yield_now();
        }
        assert_eq!(disk.closed.load(Ordering::SeqCst), 0, "it is still used");
        assert!(!ended.is_finished());
        end(pending, call, 1);
        // The kernel may have answered for us.
        let _ = read.join().unwrap();
        ended.join().unwrap();
    });
    assert_eq!(disk.closed.load(Ordering::SeqCst), 1);
}
