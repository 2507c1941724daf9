//! `file cache=none`: past the page cache, at any alignment, any depth and any end.

use std::fs;

use crate::util::{self, Server, image, patterned, raw::Raw, sh, temp};

const READ: u16 = 0;
const WRITE: u16 = 1;
const MIB: u64 = 1 << 20;

fn start(disk: &std::path::Path) -> Server {
    Server::start([
        "-v",
        "-D",
        "nbdkit.backend.datapath=0",
        "file",
        disk.to_str().expect("UTF-8"),
        "cache=none",
    ])
}

/// Names of the server's threads, without those that the kernel lends it.
fn threads(server: &Server) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{}/task", server.pid())).expect("tasks");
    let names = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names.filter(|name| !name.starts_with("iou-")).collect()
}

#[test]
fn fio_verifies_at_any_alignment() {
    let dir = temp();
    for (size, blocks) in [(32 * MIB, "bs=4k"), (32 * MIB + 777, "bsrange=300-100k --bs_unaligned")] {
        let server = start(&image(dir.path(), "disk", size));
        sh(&format!(
            "fio --name=v --ioengine=nbd --uri='{}' --rw=randrw --{blocks} --size={size} --io_size=24m --iodepth=64 \
             --verify=crc32c --verify_fatal=1 --verify_state_save=0 --output-format=terse",
            server.uri()
        ));
    }
}

#[test]
fn qemu_and_a_copy_agree() {
    let dir = temp();
    let disk = patterned(dir.path(), "disk", 3 * MIB as usize + 1000);
    let copy = dir.path().join("copy");
    fs::copy(&disk, &copy).expect("copy");
    let server = start(&disk);
    for target in [&server.uri(), copy.to_str().expect("UTF-8")] {
        let end = 3 * MIB;
        util::qemu_io(
            target,
            &[
                "write -P 1 100 5000",
                "write -P 2 4096 512",
                "write -z 5000 9000",
                "write -z -u 100000 70000",
                "discard 1M 64k",
                &format!("write -P 3 {} 1500", end - 512),
                "read -P 1 100 3996",
                "read -P 2 4096 512",
                "read -P 0 5000 9000",
                &format!("read -P 3 {} 1500", end - 512),
                "flush",
            ],
        );
    }
    let ours = format!("nbdcopy '{}' - | head -c 3146728", server.uri());
    sh(&format!("cmp <({ours}) <(head -c 3146728 {})", copy.display()));
}

/// Four clients write small pieces of the same blocks, none of which is another's.
#[test]
fn neighbours_lose_nothing() {
    let dir = temp();
    let server = start(&image(dir.path(), "disk", MIB));
    let uri = server.uri();
    util::nbdsh(
        &uri,
        &format!(
            "
clients = [nbd.NBD() for _ in range(4)]
for c in clients: c.connect_uri('{uri}')
piece, blocks = 100, 2000
for lap in range(2):
    for i in range(blocks):
        clients[i % 4].aio_pwrite(nbd.Buffer.from_bytearray(bytearray([1 + lap * 4 + i % 4]) * piece), i * piece)
    for c in clients:
        while c.aio_in_flight() > 0: c.poll(-1)
want = b''.join(bytes([5 + i % 4]) * piece for i in range(blocks))
assert h.pread(piece * blocks, 0) == want
for c in clients: c.shutdown()"
        ),
    );
}

#[test]
fn deep_queues_need_no_threads() {
    let dir = temp();
    let server = start(&patterned(dir.path(), "disk", MIB as usize));
    let mut raw = Raw::transmission(&server);
    for i in 0..100 {
        raw.request(0, READ, i * 8192, 4096);
    }
    for _ in 0..100 {
        assert_eq!(raw.read(16 + 4096)[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0]);
    }
    let rings = threads(&server).iter().filter(|name| name.trim() == "io_uring").count();
    if util::is_left_out("io_uring") {
        assert_eq!(rings, 0);
        return;
    }
    assert_eq!(rings, 1, "{:?} {}", threads(&server), server.stderr());
    // One more than that for the connection, and those that the server has anyway.
    let before = threads(&server).len();
    let mut other = Raw::transmission(&server);
    for i in 0..100 {
        other.request(0, WRITE, i * 8192, 4096);
        other.send(&[1; 4096]);
    }
    for _ in 0..100 {
        assert_eq!(other.read(16)[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0]);
    }
    assert_eq!(threads(&server).len(), before + 2, "{:?}", threads(&server));
}

#[test]
fn clients_that_vanish_and_servers_that_stop_leave_nothing() {
    let dir = temp();
    let disk = patterned(dir.path(), "disk", 4 * MIB as usize);
    let mut server = start(&disk);
    let deep = |raw: &mut Raw| {
        for i in 0..64_u64 {
            raw.request(0, READ, i * 65536, 65536);
            raw.request(0, WRITE, i * 65536, 4096);
            raw.send(&[i as u8; 4096]);
        }
    };
    for _ in 0..10 {
        let mut raw = Raw::transmission(&server);
        deep(&mut raw);
        raw.vanish();
        // One that hears nothing any more.
        let mut raw = Raw::transmission(&server);
        deep(&mut raw);
        raw.deafen();
        drop(raw);
    }
    util::nbdsh(&server.uri(), "h.pwrite(b'still here', 1); assert h.pread(10, 1) == b'still here'");
    let mut raw = Raw::transmission(&server);
    deep(&mut raw);
    assert_eq!(server.terminate(), 0);
    raw.rest();
    assert_eq!(fs::metadata(&disk).expect("stat").len(), 4 * MIB);
}

#[test]
fn block_devices_and_files_in_memory() {
    let dir = temp();
    let backing = image(dir.path(), "backing", 16 * MIB);
    let device = sh(&format!("losetup --find --show {}", backing.display()));
    let device = std::path::PathBuf::from(device.trim());
    let detach = Detach(device.clone());
    let memory = tempfile::Builder::new().prefix("nbdkit-test").tempdir_in("/dev/shm").expect("a directory");
    // A device tells its sectors, and fio keeps to them.
    let sizes = ["--bsrange=512-100k", "--bsrange=300-100k --bs_unaligned"];
    for (disk, sizes) in [device, image(memory.path(), "disk", 16 * MIB)].iter().zip(sizes) {
        let server = start(disk);
        sh(&format!(
            "fio --name=v --ioengine=nbd --uri='{}' --rw=randrw {sizes} --size=16m \
             --iodepth=64 --verify=crc32c --verify_fatal=1 --verify_state_save=0 --output-format=terse",
            server.uri()
        ));
    }
    drop(detach);
}

/// A loop device that goes with the test.
struct Detach(std::path::PathBuf);

impl Drop for Detach {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").arg("-d").arg(&self.0).output();
    }
}

/// Between the two: the page cache is used, and lets go of what was read and written.
#[test]
fn reduce_memory_pressure() {
    let dir = temp();
    let disk = patterned(dir.path(), "disk", 4 * MIB as usize);
    let disk = disk.to_str().expect("UTF-8");
    sh(&format!("sync {disk}; dd if={disk} iflag=nocache count=0 status=none"));
    let pages = || sh(&format!("fincore -n -b -o RES {disk}")).trim().parse::<u64>().expect("a number");
    if pages() > 0 {
        return; // A file system in memory.
    }
    for (value, few) in [("true", true), ("false", false)] {
        let words = ["file", disk, &format!("reduce-memory-pressure={value}")];
        let server = Server::start(words);
        let open = sh(&format!("grep -h ^flags: /proc/{}/fdinfo/*", server.pid()));
        let direct = open.lines().filter(|line| {
            let flags = line.split_whitespace().last().and_then(|flags| u32::from_str_radix(flags, 8).ok());
            flags.is_some_and(|flags| flags & 0o40000 != 0)
        });
        assert_eq!(direct.count(), 0, "no direct I/O");
        // The last pages go with the client, which does not wait for that.
        let are_few = || (0..if few { 200 } else { 1 }).any(|_| pages() <= MIB / 4);
        sh(&format!("nbdcopy '{}' null:", server.uri()));
        assert_eq!(are_few(), few, "{value}: {} bytes after reading", pages());
        util::nbdsh(&server.uri(), "h.pwrite(b'x' * 1000000, 0); h.flush()");
        assert_eq!(are_few(), few, "{value}: {} bytes after writing", pages());
    }
}
