//! The disk as a file: every system call that a program may make on it.

use std::{
    fs::{self, File},
    io::{ErrorKind, Read, Seek, SeekFrom, Write},
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
};

use rustix::fs::{FallocateFlags, OFlags, fallocate};

use crate::util::{self, Mount, image, patterned, sh, temp};

const MIB: u64 = 1 << 20;

fn open(mount: &Mount) -> File {
    File::options().read(true).write(true).open(mount.file()).expect("open the disk")
}

fn open_with(mount: &Mount, flags: OFlags) -> File {
    let flags = i32::try_from(flags.bits()).expect("flags");
    File::options().read(true).write(true).custom_flags(flags).open(mount.file()).expect("open the disk")
}

#[track_caller]
fn errno<T>(result: std::io::Result<T>) -> i32 {
    result.err().and_then(|e| e.raw_os_error()).expect("an errno")
}

const EPERM: i32 = 1;
const ENOSPC: i32 = 28;
const EROFS: i32 = 30;

#[test]
fn reads_and_writes_at_every_boundary() {
    for words in [&["memory", "1M"][..], &["--filter=delay", "memory", "1M", "rdelay=1us", "wdelay=1us"]] {
        let mount = Mount::start(words);
        let file = open(&mount);
        assert_eq!(file.metadata().expect("stat").len(), MIB);
        for (at, n) in [(0, 1), (0, 4096), (MIB - 1, 1), (4095, 4098), (511, 2), (0, MIB), (777, 333_333)] {
            let data: Vec<u8> = (0..n).map(|i| ((at + i * 7) % 251) as u8).collect();
            file.write_all_at(&data, at).expect("write");
            let mut back = vec![0; data.len()];
            file.read_exact_at(&mut back, at).expect("read");
            assert!(back == data, "{n} at {at}");
        }
        file.sync_all().expect("fsync");
        file.sync_data().expect("fdatasync");
    }
}

#[test]
fn the_end_of_the_disk() {
    let mount = Mount::start(["memory", "1M"]);
    let file = open(&mount);
    let mut buf = [1; 100];
    assert_eq!(file.read_at(&mut buf, MIB - 10).expect("read"), 10);
    assert_eq!(file.read_at(&mut buf, MIB).expect("read"), 0);
    assert_eq!(file.read_at(&mut buf, 5 * MIB).expect("read"), 0);
    assert_eq!(errno(file.write_at(&buf, MIB)), ENOSPC);
    assert_eq!(errno(file.write_all_at(&buf, MIB - 10)), ENOSPC);
    assert_eq!(file.metadata().expect("stat").len(), MIB);
    file.set_len(MIB).expect("the same size");
    assert_eq!(errno(file.set_len(MIB + 1)), EPERM);
    assert_eq!(errno(file.set_len(0)), EPERM);
}

#[test]
fn direct_synchronous_and_mapped() {
    let dir = temp();
    let disk = patterned(dir.path(), "disk", 1 << 20);
    let before = fs::read(&disk).expect("read");
    let mount = Mount::start(["file", disk.to_str().expect("UTF-8")]);
    // Any alignment, for FUSE asks for none.
    let file = open_with(&mount, OFlags::DIRECT);
    let mut buf = vec![0; 10_001];
    file.read_exact_at(&mut buf, 12_345).expect("read");
    assert!(buf == before[12_345..22_346]);
    file.write_all_at(b"direct", 99).expect("write");
    open_with(&mount, OFlags::SYNC).write_all_at(b"synced", 5000).expect("write");
    sh(&format!(
        "python3 -c \"
import mmap
with open('{}', 'r+b') as f:
    m = mmap.mmap(f.fileno(), 0)
    assert m[99:105] == b'direct' and m[5000:5006] == b'synced'
    m[70000:70006] = b'mapped'
    m.flush()
\"",
        mount.file().display()
    ));
    drop(file);
    let after = fs::read(&disk).expect("read");
    for (text, at) in [(b"direct", 99), (b"synced", 5000), (b"mapped", 70000)] {
        assert_eq!(&after[at..at + 6], text);
    }
}

#[test]
fn holes() {
    let dir = temp();
    let disk = image(dir.path(), "disk", 8 * MIB);
    File::options().write(true).open(&disk).expect("open").write_all_at(&[7; 65536], 3 * MIB).expect("write");
    for words in [
        &["file", disk.to_str().expect("UTF-8")][..],
        &["--filter=log", "file", disk.to_str().expect("UTF-8")],
        &["--no-passthrough", "file", disk.to_str().expect("UTF-8")],
    ] {
        let mount = Mount::start(words);
        let mut file = open(&mount);
        let seek = |file: &mut File, whence: fn(&File, u64) -> std::io::Result<u64>, at| whence(file, at);
        let data =
            |file: &File, at| rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)).map_err(Into::into);
        let hole =
            |file: &File, at| rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(at)).map_err(Into::into);
        assert_eq!(seek(&mut file, data, 0).expect("SEEK_DATA"), 3 * MIB);
        assert_eq!(seek(&mut file, hole, 0).expect("SEEK_HOLE"), 0);
        assert_eq!(seek(&mut file, hole, 3 * MIB + 100).expect("SEEK_HOLE"), 3 * MIB + 65536);
        assert_eq!(errno(seek(&mut file, data, 4 * MIB)), 6, "ENXIO: no data after it");
        assert_eq!(errno(seek(&mut file, data, 8 * MIB)), 6);
        assert_eq!(file.seek(SeekFrom::End(0)).expect("SEEK_END"), 8 * MIB);
        let map = |path: &std::path::Path| {
            util::run_ok(["qemu-img", "map", "--output=json", "-f", "raw", path.to_str().expect("UTF-8")])
        };
        let without_offsets = |json: String| json.replace(", \"offset\": ", "").len();
        assert_eq!(without_offsets(map(&mount.file())), without_offsets(map(&disk)));
    }
}

#[test]
fn sparse_copies_of_a_terabyte() {
    let mount = Mount::start(["memory", "1T"]);
    open(&mount).write_all_at(b"needle", 700 << 30).expect("write");
    let dir = temp();
    let copy = dir.path().join("copy");
    util::run_ok([
        "cp",
        "--sparse=always",
        mount.file().to_str().expect("UTF-8"),
        copy.to_str().expect("UTF-8"),
    ]);
    let mut found = [0; 6];
    File::open(&copy).expect("open").read_exact_at(&mut found, 700 << 30).expect("read");
    assert_eq!(&found, b"needle");
    assert!(fs::metadata(&copy).expect("stat").blocks() < 1024);
}

#[test]
fn punching_and_zeroing_give_zeroes() {
    let dir = temp();
    let disk = image(dir.path(), "disk", 2 * MIB);
    let disk = disk.to_str().expect("UTF-8");
    for words in [
        &["memory", "2M"][..],
        &["file", disk],
        &["--no-passthrough", "file", disk],
        &["--filter=cow", "file", disk],
        &["--filter=nozero", "memory", "2M", "zeromode=emulate"],
    ] {
        let mount = Mount::start(words);
        let file = open(&mount);
        file.write_all_at(&vec![0xff; 2 << 20], 0).expect("write");
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let mut expected = vec![0xff_u8; 2 << 20];
        for (flags, at, n) in [
            (punch, 4096, 65536),
            (punch, 1_000_001, 777),
            (FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, 500_000, 100_003),
            (FallocateFlags::ZERO_RANGE, 0, 10),
        ] {
            fallocate(&file, flags, at, n).expect("fallocate");
            expected[at as usize..(at + n) as usize].fill(0);
            let mut now = vec![1; 2 << 20];
            file.read_exact_at(&mut now, 0).expect("read");
            assert!(now == expected, "{words:?}: {flags:?} {n} at {at}");
        }
        assert!(fallocate(&file, FallocateFlags::INSERT_RANGE, 0, 4096).is_err());
    }
}

#[test]
fn read_only() {
    for words in
        [&["-r", "memory", "1M"][..], &["-o", "ro", "memory", "1M"], &["--filter=readonly", "memory", "1M"]]
    {
        let mount = Mount::start(words);
        assert_eq!(fs::metadata(mount.file()).expect("stat").mode() & 0o777, 0o444, "{words:?}");
        let mut all = Vec::new();
        File::open(mount.file()).expect("open").read_to_end(&mut all).expect("read");
        assert!(all == vec![0; 1 << 20]);
        assert_eq!(errno(File::options().write(true).open(mount.file())), EROFS, "{words:?}");
        let chmod = util::run(["chmod", "+w", mount.file().to_str().expect("UTF-8")]);
        assert_ne!(chmod.code, 0);
    }
}

#[test]
fn the_directory_holds_only_the_disk() {
    let mount = Mount::start(["--filename", "disk.img", "memory", "1M"]);
    let names: Vec<_> =
        fs::read_dir(mount.path()).expect("list").map(|e| e.expect("an entry").file_name()).collect();
    assert_eq!(names, ["disk.img"]);
    assert!(File::create(mount.path().join("new")).is_err());
    assert!(fs::remove_file(mount.path().join("disk.img")).is_err());
    assert!(fs::rename(mount.path().join("disk.img"), mount.path().join("x")).is_err());
    assert_eq!(fs::metadata(mount.path().join("nbd")).expect_err("no such file").kind(), ErrorKind::NotFound);
}

#[test]
fn errors_of_the_disk_reach_the_caller() {
    let mount = Mount::start(["--filter=error", "memory", "1M", "error-pread=EIO", "error-pread-rate=100%"]);
    let mut buf = [0; 512];
    assert_eq!(errno(open(&mount).read_at(&mut buf, 0)), 5);
    let mount = Mount::start(["full", "1M"]);
    assert_eq!(errno(open(&mount).write_at(b"x", 0)), ENOSPC);
}

#[test]
fn fio_verifies_with_sixteen_jobs() {
    let dir = temp();
    let disk = image(dir.path(), "disk", 64 * MIB);
    for words in [
        &["memory", "64M"][..],
        &["--no-passthrough", "file", disk.to_str().expect("UTF-8")],
        &["--filter=cow", "memory", "64M"],
    ] {
        let mount = Mount::start(words);
        for direct in [0, 1] {
            sh(&format!(
                "fio --name=v --filename={} --rw=randwrite --bs=4k --size=4m --offset_increment=4m --numjobs=16 \
                 --direct={direct} --ioengine=libaio --iodepth=4 --verify=crc32c --verify_fatal=1 \
                 --verify_state_save=0 --output-format=terse --allow_file_create=0",
                mount.file().display()
            ));
        }
    }
}

#[test]
fn fio_verifies_past_the_page_cache() {
    let dir = temp();
    let disk = image(dir.path(), "disk", 16 * MIB + 700);
    for filters in [&[][..], &["--filter=offset"]] {
        let file = ["file", disk.to_str().expect("UTF-8"), "cache=none"];
        let mount = Mount::start([filters, &file[..]].concat());
        for (engine, blocks) in [("io_uring", "bs=4k"), ("libaio", "bsrange=1k-100k")] {
            sh(&format!(
                "fio --name=v --filename={} --rw=randrw --{blocks} --size=16m --io_size=8m --direct=1 \
                 --ioengine={engine} --iodepth=64 --verify=crc32c --verify_fatal=1 --verify_state_save=0 \
                 --output-format=terse --allow_file_create=0",
                mount.file().display()
            ));
        }
    }
}

/// The file system exerciser: reads, writes, maps and punches at random, and compares with a model.
#[test]
fn fsx() {
    let dir = temp();
    let disk = image(dir.path(), "disk", MIB);
    let config = dir.path().join("fsx.toml");
    let weights = "flen = 1048576\nblockmode = true\n[weights]\nread = 10\nwrite = 10\nmapread = 5\nmapwrite = 5\ntruncate = 0\n\
                   punch_hole = 2\nfsync = 1\nfdatasync = 1\nsendfile = 2\nposix_fadvise = 1\ncopy_file_range = 2\n";
    std::fs::write(&config, weights).expect("write the configuration");
    for words in [
        &["memory", "1M"][..],
        &["--no-passthrough", "file", disk.to_str().expect("UTF-8")],
        &["--filter=cow", "file", disk.to_str().expect("UTF-8")],
        &["--filter=blocksize", "file", disk.to_str().expect("UTF-8"), "minblock=512", "maxdata=64K"],
    ] {
        let mut mount = Mount::start(words);
        sh(&format!(
            "fsx -q -N 20000 -S 7 -P {} -f {} {}",
            dir.path().display(),
            config.display(),
            mount.file().display()
        ));
        assert_eq!(mount.unmount(), 0);
    }
}

#[test]
fn programs_that_write_in_their_own_ways() {
    let dir = temp();
    let source = patterned(dir.path(), "source", 3 << 20);
    let mount = Mount::start(["memory", "4M"]);
    sh(&format!(
        "dd if={0} of={1} bs=64k oflag=direct conv=notrunc status=none && cmp -n 3145728 {0} {1} && \
         dd if={0} of={1} bs=100001 conv=notrunc,fsync status=none && cmp -n 3145728 {0} {1} && \
         tar -C {2} -Scf {3}/t.tar nbd && tar -C {3} -xf {3}/t.tar && cmp {3}/nbd {1}",
        source.display(),
        mount.file().display(),
        mount.path().display(),
        dir.path().display()
    ));
    let mut file = open(&mount);
    file.seek(SeekFrom::Start(10)).expect("seek");
    file.write_all(b"by its position").expect("write");
    let mut back = [0; 15];
    file.read_exact_at(&mut back, 10).expect("read");
    assert_eq!(&back, b"by its position");
}
