//! Partition tables of all kinds, damaged ones too, as files of a mount and through the partition filter.

use std::fs;

use crate::util::{Mount, NBDKIT, NBDKIT_MOUNT, image, run, run_ok, sh, temp};

const MIB: u64 = 1 << 20;

/// A disk of 40 MiB that a shell script has written to as `$d`.
fn made(dir: &std::path::Path, script: &str) -> String {
    let disk = image(dir, "disk.img", 40 * MIB).to_str().expect("UTF-8").to_owned();
    sh(&format!("set -e; d={disk}; {script}"));
    disk
}

/// Names and sizes of the files beside `nbd`.
fn partitions(mount: &Mount) -> Vec<(String, u64)> {
    let entries = fs::read_dir(mount.path()).expect("list").map(|entry| entry.expect("an entry"));
    let mut found: Vec<_> = entries
        .map(|entry| (entry.file_name().into_string().expect("UTF-8"), entry.metadata().expect("stat").len()))
        .filter(|(name, _)| name != "nbd")
        .collect();
    found.sort();
    found
}

#[test]
fn tables_of_all_kinds() {
    let two = "mkpart PRIMARY 1MiB 9MiB mkpart PRIMARY 10MiB 20MiB";
    for (label, parts, numbers) in [
        ("gpt", two, [1, 2]),
        ("mac", two, [2, 3]),
        ("bsd", "mkpart 1MiB 9MiB mkpart 10MiB 20MiB", [1, 2]),
        ("sun", "mkpart 1MiB 9MiB mkpart 10MiB 20MiB", [1, 2]),
        ("amiga", two, [1, 2]),
    ] {
        let dir = temp();
        let disk = made(dir.path(), &format!("parted -s -a none $d mklabel {label} {parts}"));
        let mut mount = Mount::start(["--partitions", "file", &disk, "lock=off"]);
        let place = mount.path().display();
        for number in numbers {
            // Where parted says that it is, the file's bytes are; the partition filter shows the same.
            sh(&format!(
                "set -e; echo text-{number} | dd of={place}/nbd{number} conv=notrunc status=none; \
                 set -- $(parted -sm {disk} unit B print | grep ^{number}: | tr -d B | tr : ' '); \
                 test $(stat -c %s {place}/nbd{number}) = $4; \
                 dd if={disk} bs=1 skip=$2 count=6 status=none | grep -q text-{number}; \
                 {NBDKIT} -r --filter=partition file {disk} lock=off partition={number} \
                 --run 'nbdcopy \"$uri\" - | cmp - {place}/nbd{number}'"
            ));
        }
        assert_eq!(mount.unmount(), 0, "{label}");
    }
}

#[test]
fn a_damaged_gpt_is_shown_by_its_backup() {
    let dir = temp();
    let disk = made(dir.path(), "sgdisk -n 1:2048:+4M -n 2:0:0 $d >/dev/null");
    let all = {
        let mount = Mount::start(["--partitions", "file", &disk]);
        let all = partitions(&mount);
        assert_eq!(mount.stderr(), "");
        all
    };
    assert_eq!(all.len(), 2);
    sh(&format!("dd if=/dev/urandom of={disk} bs=512 seek=1 count=1 conv=notrunc status=none"));
    let mount = Mount::start(["--partitions", "file", &disk]);
    assert_eq!(partitions(&mount), all);
    assert_eq!(partitions(&mount), all);
    let said = mount.stderr();
    assert_eq!(said.matches("warning").count(), 1, "{said}");
    assert!(said.contains("there is none at the start of the disk: the backup"), "{said}");
    drop(mount);
    let out =
        run([NBDKIT, "--filter=partition", "file", &disk, "partition=2", "--run", "nbdinfo --size \"$uri\""]);
    assert_eq!(out.stdout.trim(), all[1].1.to_string(), "{}", out.stderr);
    assert!(out.stderr.contains("the backup at the end of the disk is used"), "{}", out.stderr);
    // Without any copy, nothing is taken from the MBR that protects it.
    sh(&format!("dd if=/dev/zero of={disk} bs=512 seek=$((40 * 2048 - 1)) count=1 conv=notrunc status=none"));
    let mount = Mount::start(["--partitions", "-r", "file", &disk]);
    assert_eq!(partitions(&mount), []);
    assert!(mount.stderr().contains("no partitions are shown"), "{}", mount.stderr());
    let out = run([
        NBDKIT,
        "-r",
        "--filter=partition",
        "file",
        &disk,
        "partition=1",
        "--run",
        "nbdinfo --size \"$uri\"",
    ]);
    assert!(out.stderr.contains("and so is its backup"), "{}", out.stderr);
}

#[test]
fn what_an_image_was_cut_off_of_is_told() {
    let dir = temp();
    let disk = made(dir.path(), "sgdisk -n 1:2048:+4M -n 2:0:+8M -n 3:0:0 $d >/dev/null; truncate -s 10M $d");
    let mount = Mount::start(["--partitions", "file", &disk]);
    assert_eq!(partitions(&mount), [("nbd1".into(), 4 * MIB), ("nbd2".into(), 5 * MIB)]);
    let said = mount.stderr();
    for line in [
        "nbd: partition 2 has 8388608 bytes in the table, but the disk ends after 5242880 of them",
        "nbd: partition 3 starts at byte 13631488, past the end of the disk of 10485760 bytes",
        "nbd: the disk has 10485760 bytes, but 41943040 when the GPT was made",
    ] {
        assert!(said.contains(line), "no '{line}' in {said}");
    }
}

#[test]
fn loop_devices_have_the_sectors_of_the_table() {
    let dir = temp();
    let mnt = dir.path().join("mnt");
    fs::create_dir(&mnt).expect("mkdir");
    let mnt = mnt.to_str().expect("UTF-8");
    for size in ["512", "4096"] {
        let commands = "g\\nn\\n1\\n\\n+8M\\nw\\n";
        let disk = made(dir.path(), &format!("printf '{commands}' | fdisk -b {size} $d >/dev/null"));
        let device = run_ok([NBDKIT_MOUNT, "--loop", "file", &disk, mnt]);
        let found = run_ok(["blockdev", "--getss", device.trim()]);
        run_ok([NBDKIT_MOUNT, "-u", mnt]);
        assert_eq!(found.trim(), size);
        let mount = Mount::start(["--partitions", "-r", "file", &disk]);
        assert_eq!(partitions(&mount), [("nbd1".into(), 8 * MIB)]);
        // The other size finds nothing.
        let other = if size == "512" { "4096" } else { "512" };
        let mount = Mount::start(["--partitions", "--sector-size", other, "-r", "file", &disk]);
        assert_eq!(partitions(&mount), []);
    }
}
