//! Exports and partitions as files of a directory.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
};

use crate::util::{self, Mount, image, patterned, sh, temp};

const MIB: u64 = 1 << 20;

fn names(mount: &Mount) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(mount.path())
        .expect("list")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"))
        .collect();
    names.sort_unstable();
    names
}

#[test]
fn every_export_is_a_file_with_its_size() {
    let dir = temp();
    let images = dir.path().join("images");
    fs::create_dir(&images).expect("mkdir");
    for (name, size) in [("a.img", MIB), ("100%", 2 * MIB), ("nbd", 3 * MIB)] {
        image(&images, name, size);
    }
    let mut mount = Mount::start(["file", &format!("dir={}", images.display())]);
    assert_eq!(names(&mount), ["100%25", "a.img", "nbd"]);
    for (name, size) in [("a.img", MIB), ("100%25", 2 * MIB), ("nbd", 3 * MIB)] {
        assert_eq!(fs::metadata(mount.path().join(name)).expect("stat").len(), size);
    }
    let file = File::options().read(true).write(true).open(mount.path().join("a.img")).expect("open");
    file.write_all_at(b"in a", 7).expect("write");
    file.sync_all().expect("fsync");
    drop(file);
    let mut found = [0; 4];
    File::open(images.join("a.img")).expect("open").read_exact_at(&mut found, 7).expect("read");
    assert_eq!(&found, b"in a");
    assert_eq!(mount.unmount(), 0);
}

#[test]
fn listing_opens_nothing_and_a_look_opens_one() {
    let dir = temp();
    for name in ["a", "b", "c"] {
        image(dir.path(), name, MIB);
    }
    let mount = Mount::start(["-v", "file", &format!("dir={}", dir.path().display())]);
    let opened = || mount.stderr().lines().filter(|line| line.contains("file: open ")).count();
    assert_eq!(names(&mount).len(), 3);
    assert_eq!(opened(), 0, "{}", mount.stderr());
    fs::metadata(mount.path().join("b")).expect("stat");
    fs::metadata(mount.path().join("b")).expect("stat");
    assert_eq!(opened(), 1, "{}", mount.stderr());
    assert!(mount.stderr().contains("exportname=\"b\""), "{}", mount.stderr());
}

#[test]
fn an_export_that_does_not_open_spoils_no_other() {
    let dir = temp();
    image(dir.path(), "good", MIB);
    image(dir.path(), "gone", MIB);
    let mount = Mount::start(["file", &format!("dir={}", dir.path().display())]);
    fs::remove_file(dir.path().join("gone")).expect("rm");
    assert!(fs::metadata(mount.path().join("gone")).is_err());
    assert_eq!(fs::metadata(mount.path().join("good")).expect("stat").len(), MIB);
    image(dir.path(), "gone", 2 * MIB);
    assert_eq!(fs::metadata(mount.path().join("gone")).expect("it is back").len(), 2 * MIB);
}

#[test]
fn one_export_alone() {
    let dir = temp();
    image(dir.path(), "a", MIB);
    image(dir.path(), "b", 2 * MIB);
    let words = format!("dir={}", dir.path().display());
    let mount = Mount::start(["-e", "b", "--filename", "disk", "file", &words]);
    assert_eq!(names(&mount), ["disk"]);
    assert_eq!(fs::metadata(mount.path().join("disk")).expect("stat").len(), 2 * MIB);
}

/// A mount covers the directory that the plugin serves.
#[test]
fn a_mount_over_the_files_themselves() {
    let dir = temp();
    let path = dir.path().join("images");
    fs::create_dir(&path).expect("mkdir");
    image(&path, "a", MIB);
    let mut mount = Mount::on(path.clone(), ["file", &format!("dir={}", path.display())], dir);
    assert_eq!(names(&mount), ["a"]);
    let file = path.join("a");
    assert_eq!(fs::metadata(&file).expect("stat").len(), MIB);
    fs::OpenOptions::new().write(true).open(&file).expect("open").write_all_at(b"below", 0).expect("write");
    assert_eq!(mount.unmount(), 0);
    assert_eq!(&fs::read(&file).expect("read")[..5], b"below");
}

/// An MBR with two primary partitions and a logical one.
fn with_mbr(dir: &std::path::Path) -> std::path::PathBuf {
    let disk = image(dir, "disk.img", 64 * MIB);
    sh(&format!(
        "printf 'label: dos\\n2048,20480\\n22528,20480\\n43008,,E\\n' | sfdisk -q {0} && \
         printf '45056,+,L\\n' | sfdisk -q -a {0}",
        disk.display()
    ));
    disk
}

#[test]
fn partitions_are_files() {
    let dir = temp();
    let disk = with_mbr(dir.path());
    for words in [&[][..], &["--no-passthrough"], &["--filter=delay"]] {
        let file = format!("file={}", disk.display());
        let mut mount = Mount::start(["--partitions"].iter().chain(words).copied().chain(["file", &file]));
        assert_eq!(names(&mount), ["nbd", "nbd1", "nbd2", "nbd5"]);
        let size = |name: &str| fs::metadata(mount.path().join(name)).expect("stat").len();
        assert_eq!((size("nbd1"), size("nbd5")), (20480 * 512, 64 * MIB - 45056 * 512));
        // A file system in one of them is within its bounds, and the table is as it was.
        sh(&format!(
            "mkfs.ext4 -q -F {0}/nbd1 && e2fsck -fn {0}/nbd1 && \
             dd if={0}/nbd bs=512 skip=2048 count=20480 status=none | cmp - {0}/nbd1 && sfdisk -V -q {0}/nbd",
            mount.path().display()
        ));
        let end = File::options().write(true).open(mount.path().join("nbd1")).expect("open");
        assert_eq!(end.write_at(b"x", 20480 * 512).expect_err("the end").raw_os_error(), Some(28));
        drop(end);
        assert_eq!(mount.unmount(), 0);
    }
}

#[test]
fn all_files_of_a_disk_show_the_same() {
    let dir = temp();
    let disk = with_mbr(dir.path());
    let mount = Mount::start(["--partitions", "file", &format!("file={}", disk.display())]);
    let open = |name: &str| {
        let path = mount.path().join(name);
        File::options().read(true).write(true).open(path).expect("open")
    };
    let (whole, part) = (open("nbd"), open("nbd2"));
    let start = 22528 * 512;
    let read = |file: &File, at: u64| {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).expect("read");
        byte[0]
    };
    for round in 0_u8..50 {
        let at = u64::from(round) * 4099;
        // Both are in the page cache, so that stale pages would be read.
        let _ = (read(&whole, start + at), read(&part, at));
        whole.write_all_at(&[round + 1], start + at).expect("write");
        assert_eq!(read(&part, at), round + 1);
        part.write_all_at(&[round + 101], at).expect("write");
        assert_eq!(read(&whole, start + at), round + 101);
    }
    let zero = rustix::fs::FallocateFlags::ZERO_RANGE;
    rustix::fs::fallocate(&whole, zero, start, 4096).expect("fallocate");
    assert_eq!(read(&part, 0), 0);
}

/// Two writers at the same place by two files must not wait for each other for ever.
#[test]
fn writers_by_both_files_get_along() {
    let dir = temp();
    let disk = with_mbr(dir.path());
    let mount = Mount::start(["--partitions", "file", &format!("file={}", disk.display())]);
    let run = |name: &str, offset: &str| {
        let script = format!(
            "fio --name=v --filename={}/{name} --rw=randrw --bs=4k --size=8m --offset={offset} --ioengine=psync \
             --numjobs=4 --output-format=terse --allow_file_create=0",
            mount.path().display()
        );
        std::thread::spawn(move || util::run(["bash", "-c", &script]).ok())
    };
    let writers = [run("nbd", "11m"), run("nbd2", "0"), run("nbd", "11m"), run("nbd2", "0")];
    writers.into_iter().for_each(|writer| drop(writer.join().expect("fio")));
    sh(&format!(
        "dd if={0}/nbd bs=512 skip=22528 count=20480 status=none | cmp - {0}/nbd2",
        mount.path().display()
    ));
}

#[test]
fn a_new_table_shows_new_partitions() {
    let mount = Mount::start(["--partitions", "memory", "64M"]);
    assert_eq!(names(&mount), ["nbd"]);
    let disk = mount.file();
    let label = |script: &str| sh(&format!("printf '{script}' | sfdisk -q --wipe=never {}", disk.display()));
    label("label: gpt\\n2048,8192\\n10240,8192\\n");
    assert_eq!(names(&mount), ["nbd", "nbd1", "nbd2"]);
    let size = |name: &str| fs::metadata(mount.path().join(name)).expect("stat").len();
    assert_eq!(size("nbd1"), 4 * MIB);
    let (kept, moved) = (
        File::open(mount.path().join("nbd1")).expect("open"),
        File::open(mount.path().join("nbd2")).expect("open"),
    );
    label("label: gpt\\n2048,8192\\n20480,16384\\n");
    assert_eq!(size("nbd2"), 8 * MIB);
    assert_eq!(names(&mount).len(), 3);
    kept.read_exact_at(&mut [0], 0).expect("it has not moved");
    assert_eq!(
        moved.read_exact_at(&mut [0; 4096], MIB).expect_err("gone").raw_os_error(),
        Some(116),
        "ESTALE"
    );
    sh(&format!(
        "wipefs -qaf {0} && dd if=/dev/zero of={0} bs=1M count=1 conv=notrunc status=none",
        disk.display()
    ));
    assert_eq!(names(&mount), ["nbd"]);
}

#[test]
fn partitions_need_a_directory() {
    let dir = temp();
    let point = image(dir.path(), "point", 0);
    let words = [util::NBDKIT_MOUNT, "--partitions", "memory", "1M", point.to_str().expect("UTF-8")];
    let line = util::run(words).refused_with(4);
    assert!(line.contains("directory"), "{line}");
}

/// What is copied from the source through the mount is there.
#[test]
fn partitions_carry_data() {
    let dir = temp();
    let disk = with_mbr(dir.path());
    let source = patterned(dir.path(), "source", 3 << 20);
    let mut mount = Mount::start(["--partitions", "file", &format!("file={}", disk.display())]);
    sh(&format!(
        "dd if={} of={}/nbd5 bs=64k conv=notrunc status=none",
        source.display(),
        mount.path().display()
    ));
    assert_eq!(mount.unmount(), 0);
    sh(&format!(
        "dd if={} bs=512 skip=45056 count=6144 status=none | cmp - {}",
        disk.display(),
        source.display()
    ));
}
