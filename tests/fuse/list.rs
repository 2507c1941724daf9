//! `--list`: partitions and what is in them, compared with what blkid(8) and partx(8) say of the same images.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::util::{NBDKIT_MOUNT, Run, image, run, run_ok, sh, temp};

/// Images as names, sizes in MiB, and the shell commands that write to `$d`.
const IMAGES: &[(&str, u64, &str)] = &[
    ("ext2", 16, "mkfs.ext2 -q -L e-two $d"),
    ("ext3", 16, "mkfs.ext3 -q -L 'e three' $d"),
    ("ext4", 16, "mkfs.ext4 -q -L ext-four $d"),
    ("ext4-nolabel", 16, "mkfs.ext4 -q $d"),
    ("ext4-ext2feat", 16, "mkfs.ext4 -q -O ^has_journal $d"),
    ("ext-journal", 16, "mkfs.ext4 -q -O journal_dev $d"),
    ("xfs", 320, "mkfs.xfs -q -L x-label $d"),
    ("btrfs", 128, "mkfs.btrfs -q -L b-label $d"),
    ("fat12", 2, "mkfs.vfat -F 12 -n TWELVE $d"),
    ("fat16", 16, "mkfs.vfat -F 16 -n SIXTEEN $d"),
    ("fat32", 64, "mkfs.vfat -F 32 -n THIRTYTWO $d"),
    ("fat32-nolabel", 64, "mkfs.vfat -F 32 $d"),
    ("fat-4k", 64, "mkfs.vfat -S 4096 -n FOURK $d"),
    ("exfat", 16, "mkfs.exfat -L ex-label $d"),
    ("ntfs", 16, "mkntfs -q -F -f -L 'N T F S' $d"),
    ("swap", 4, "mkswap -q -L s-label $d"),
    ("swap-nolabel", 4, "mkswap -q $d"),
    ("iso", 1, "xorriso -as mkisofs -quiet -V 'A DISC' -o $d /etc/alternatives 2>/dev/null"),
    ("udf", 4, "mkudffs -b 2048 -l u-label $d"),
    ("udf-512", 4, "mkudffs -b 512 --media-type=hd -l u-five $d"),
    ("luks1", 8, "printf x | cryptsetup -q luksFormat --type luks1 --pbkdf-force-iterations 1000 $d -"),
    (
        "luks2",
        32,
        "printf x | cryptsetup -q luksFormat --type luks2 --label l-two --pbkdf pbkdf2 --pbkdf-force-iterations 1000 $d -",
    ),
    ("squashfs", 1, "mksquashfs /etc/apt $d -noappend -quiet >/dev/null"),
    ("f2fs", 64, "mkfs.f2fs -q -l f-label $d"),
    ("nilfs2", 160, "mkfs.nilfs2 -q -L n-label $d"),
    ("minix", 4, "mkfs.minix $d >/dev/null"),
    ("minix3", 4, "mkfs.minix -3 $d >/dev/null"),
    ("erofs", 1, "mkfs.erofs $d /etc/apt >/dev/null"),
    ("cramfs", 1, "mkfs.cramfs -n c-label /etc/apt $d"),
    ("empty", 4, "true"),
    ("noise", 4, "head -c 4M /dev/urandom > $d"),
    ("ext4-lost", 16, "mkfs.ext4 -q $d; dd if=/dev/zero of=$d bs=1k seek=1 count=1 conv=notrunc status=none"),
    (
        "gpt",
        40,
        "sgdisk -n 1:2048:+4M -c 1:'A name' -t 1:ef00 -n 3:0:0 -c 3:Другой $d >/dev/null; mkfs.vfat -n EFI --offset 2048 $d 4096 >/dev/null",
    ),
    (
        "gpt-no-primary",
        40,
        "sgdisk -n 1:2048:+4M -n 2:0:0 $d >/dev/null; dd if=/dev/zero of=$d bs=512 seek=1 count=33 conv=notrunc status=none",
    ),
    (
        "gpt-bad-entries",
        40,
        "sgdisk -n 1:2048:+4M -n 2:0:0 $d >/dev/null; printf x | dd of=$d bs=1 seek=1060 conv=notrunc status=none",
    ),
    (
        "gpt-no-backup",
        40,
        "sgdisk -n 1:2048:+4M -n 2:0:0 $d >/dev/null; dd if=/dev/zero of=$d bs=512 seek=81919 count=1 conv=notrunc status=none",
    ),
    ("gpt-hybrid", 40, "sgdisk -n 1:2048:+4M -n 2:0:0 -h 1 $d >/dev/null"),
    (
        "mbr",
        40,
        "printf 'label: dos\\n2048,8192,ef\\n10240,8192,83\\n18432,,E\\n' | sfdisk -q $d; printf '20480,4096\\n26624,\\n' | sfdisk -q -a $d; mkfs.ext4 -q -F -L root -E offset=5242880 $d 4096",
    ),
    ("mbr-cut", 40, "printf 'label: dos\\n2048,8192\\n10240,,83\\n' | sfdisk -q $d; truncate -s 20M $d"),
    (
        "isohybrid",
        1,
        "head -c 128K /dev/zero > $d.efi; xorriso -as mkisofs -quiet -V HYBRID -partition_offset 16 -append_partition 2 0xef $d.efi -o $d /etc/apt 2>/dev/null",
    ),
    ("mac", 40, "parted -s -a none $d mklabel mac mkpart first 1MiB 9MiB mkpart second 10MiB 20MiB"),
    ("sun", 40, "parted -s -a none $d mklabel sun mkpart 1MiB 9MiB mkpart 10MiB 20MiB"),
    (
        "gpt-many",
        40,
        "for i in $(seq 1 60); do set -- \"$@\" -n $i:0:+64K; done; sgdisk \"$@\" $d >/dev/null",
    ),
    (
        "mbr-loop",
        40,
        "printf 'label: dos\\n2048,8192\\n10240,,E\\n' | sfdisk -q $d; printf '12288,4096\\n18432,4096\\n' | sfdisk -q -a $d; dd if=$d of=$d bs=512 skip=10240 seek=16384 count=1 conv=notrunc status=none",
    ),
];

/// What `blkid` finds in a file, or in a part of it: keys and values.
fn blkid(disk: &str, part: Option<(u64, u64)>) -> BTreeMap<String, String> {
    let part = part.map_or(String::new(), |(start, size)| format!("-O {start} -S {size}"));
    let Run { stdout, .. } = run(["sh", "-c", &format!("blkid -p -o export {part} {disk}")]);
    let pairs = stdout.lines().filter_map(|line| line.split_once('='));
    // Blanks and the like have a backslash before them.
    pairs.map(|(key, value)| (key.to_owned(), value.replace('\\', ""))).collect()
}

/// The partitions that partx finds: number, start, size, name, UUID and type.
fn partx(disk: &str) -> Vec<(u64, u64, u64, String, String, String)> {
    let out = run(["sh", "-c", &format!("partx -P -o NR,START,SECTORS,NAME,UUID,TYPE {disk}")]);
    let partitions = out.stdout.lines().map(|line| {
        let mut values = line.split('"').skip(1).step_by(2).map(unescape);
        let mut next = || values.next().expect("six columns");
        let mut number = || next().parse::<u64>().expect("a number");
        (number(), number() * 512, number() * 512, next(), next(), next())
    });
    partitions.filter(|(.., kind)| !["0x5", "0xf", "Apple_Free"].contains(&kind.as_str())).collect()
}

/// Text in which bytes may be written as `\\x` and two digits.
fn unescape(text: &str) -> String {
    let mut parts = text.split("\\x");
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        bytes.push(u8::from_str_radix(&part[..2], 16).expect("two digits"));
        bytes.extend(part[2..].bytes());
    }
    String::from_utf8(bytes).expect("UTF-8")
}

fn list(words: &[&str]) -> Value {
    let out = run_ok([&[NBDKIT_MOUNT, "--list", "--json"], words].concat());
    serde_json::from_str(&out).expect("JSON")
}

fn check_content(what: &str, ours: &Value, theirs: &BTreeMap<String, String>) {
    for (key, other) in [("type", "TYPE"), ("label", "LABEL"), ("uuid", "UUID")] {
        assert_eq!(ours[key].as_str(), theirs.get(other).map(String::as_str), "{what}: {key} of {ours}");
    }
}

#[test]
fn blkid_and_partx_agree() {
    let dir = temp();
    let mut checked = 0;
    for (name, size, script) in IMAGES {
        let disk = image(dir.path(), name, size << 20).to_str().expect("UTF-8").to_owned();
        // A program that is not there leaves its image out.
        if run(["bash", "-c", &format!("set -e; d={disk}; {script}")]).code != 0 {
            eprintln!("{name} cannot be made here");
            continue;
        }
        let listed = list(&["file", &disk]);
        let found = &listed["disks"][0];
        let theirs = blkid(&disk, None);
        check_content(name, &found["content"], &theirs);
        // To blkid the boot sector of exFAT is a table too.
        if found["content"]["type"] != "exfat" {
            for (key, other) in [("table", "PTTYPE"), ("table_uuid", "PTUUID")] {
                assert_eq!(found[key].as_str(), theirs.get(other).map(String::as_str), "{name}: {found}");
            }
        }
        let partitions = found["partitions"].as_array().expect("partitions");
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let number = |value: &Value| value.as_u64().expect("a number");
        let ours: Vec<_> = partitions
            .iter()
            .map(|p| {
                let (start, size) = (number(&p["start"]), number(&p["size_in_table"]));
                (number(&p["number"]), start, size, text(&p["name"]), text(&p["uuid"]), text(&p["type"]))
            })
            .collect();
        if found["content"].is_null() || found["table"] != Value::Null {
            assert_eq!(ours, partx(&disk), "{name}");
        }
        for p in partitions.iter().filter(|p| number(&p["size"]) > 0) {
            let part = (number(&p["start"]), number(&p["size"]));
            check_content(&format!("{name}, {}", p["number"]), &p["content"], &blkid(&disk, Some(part)));
        }
        let _ = std::fs::remove_file(&disk);
        checked += 1;
    }
    assert!(checked >= 40, "only {checked} images could be made");
}

/// What is wrong is named, for people and for programs.
#[test]
fn damage_is_named() {
    let dir = temp();
    let disk = image(dir.path(), "disk", 40 << 20).to_str().expect("UTF-8").to_owned();
    sh(&format!(
        "sgdisk -n 1:2048:+4M -c 1:first -n 2:0:0 {disk} >/dev/null; truncate -s 20M {disk}; \
         mkfs.ext4 -q -F -L inside -E offset=1048576 {disk} 4096"
    ));
    let found = &list(&["file", &disk])["disks"][0];
    assert_eq!(found["partitions"][1]["clipped"], true);
    assert_eq!(found["partitions"][1]["size"], 15 << 20);
    let warnings = found["warnings"].to_string();
    assert!(warnings.contains("its end, with the backup of the GPT, is missing"), "{warnings}");
    let text = run_ok([NBDKIT_MOUNT, "--list", "file", &disk]);
    for words in ["GPT", "nbd1", "first", "ext4", "inside", "15M!", "warning: partition 2 has"] {
        assert!(text.contains(words), "no '{words}' in {text}");
    }
}

#[test]
fn the_table_fits_the_terminal() {
    let dir = temp();
    let disk = image(dir.path(), "disk", 40 << 20).to_str().expect("UTF-8").to_owned();
    let name = "a name that is very long indeed";
    sh(&format!(
        "sgdisk -n 1:2048:+4M -c 1:'{name}' -n 2:0:0 {disk} >/dev/null; \
         mkfs.ext4 -q -F -L 'a label as long' -E offset=1048576 {disk} 4096; truncate -s 20M {disk}"
    ));
    for columns in [30, 60, 80, 100] {
        let command = format!("stty cols {columns}; {NBDKIT_MOUNT} --list file {disk}");
        let out = run_ok(["script", "-qec", &command, "/dev/null"]);
        let lines: Vec<_> = out.lines().map(|line| line.trim_end_matches('\r')).collect();
        assert!(lines.len() >= 4, "{out}");
        // One word may be longer than the terminal is wide.
        let is_row =
            |line: &&&str| line.starts_with("  ") && !line.starts_with("   ") && !line.starts_with("  w");
        let table = lines.iter().filter(is_row);
        table.for_each(|line| assert!(line.chars().count() <= columns, "{columns}: {line}"));
        assert!(out.contains("nbd1") && out.contains("ext4"), "{columns}: {out}");
    }
    assert!(run_ok([NBDKIT_MOUNT, "--list", "file", &disk]).contains(name));
}

#[test]
fn a_terabyte_is_listed_at_once() {
    let dir = temp();
    let disk = image(dir.path(), "disk", 1 << 40).to_str().expect("UTF-8").to_owned();
    sh(&format!("sgdisk -n 1:0:+300G -n 2:0:0 {disk} >/dev/null"));
    let counted = run(["strace", "-f", "-c", "-S", "calls", NBDKIT_MOUNT, "--list", "file", &disk]);
    let reads: u64 = counted
        .stderr
        .lines()
        .filter(|line| line.contains("read"))
        .filter_map(|line| line.split_whitespace().nth(3)?.parse::<u64>().ok())
        .sum();
    assert!(reads < 200, "{reads} reads: {}", counted.stderr);
    // The fastest of a few, for the machine may be busy.
    let fastest = (0..10)
        .map(|_| {
            let started = std::time::Instant::now();
            run_ok([NBDKIT_MOUNT, "--list", "file", &disk]);
            started.elapsed()
        })
        .min()
        .expect("ten runs");
    assert!(fastest.as_millis() < 50, "{fastest:?}");
}

#[test]
fn images_in_other_formats_are_named() {
    let dir = temp();
    let disk = dir.path().join("disk.qcow2").to_str().expect("UTF-8").to_owned();
    run_ok(["qemu-img", "create", "-q", "-f", "qcow2", &disk, "1M"]);
    let found = run([NBDKIT_MOUNT, "--list", "--json", "file", &disk, "format=raw"]);
    let found: Value = match found.code {
        0 => serde_json::from_str(&found.stdout).expect("JSON"),
        _ => list(&["file", &disk]),
    };
    assert_eq!(found["disks"][0]["format"], "qcow2", "{found}");
}

#[test]
fn a_disk_that_is_no_file() {
    let dir = temp();
    let disk = image(dir.path(), "disk", 16 << 20).to_str().expect("UTF-8").to_owned();
    sh(&format!("mkfs.ext4 -q -L remote {disk}"));
    let script = format!(
        "{NBDKIT_MOUNT} --list --json sh - <<'EOF'\ncase $1 in\nget_size) stat -c %s {disk};;\n\
         pread) dd if={disk} iflag=skip_bytes,count_bytes skip=$4 count=$3 bs=64k status=none;;\n*) exit 2;;\nesac\nEOF"
    );
    let found: Value = serde_json::from_str(&run_ok(["bash", "-c", &script])).expect("JSON");
    assert_eq!(found["disks"][0]["content"]["label"], "remote");
}

#[test]
fn what_cannot_be_listed() {
    let line = run([NBDKIT_MOUNT, "--list", "file", "/no/such/file"]).refused();
    assert!(line.contains("/no/such/file"), "{line}");
    let line = run([NBDKIT_MOUNT, "--list", "--stats", "/x", "memory", "1M"]).refused();
    assert!(line.contains("cannot be combined"), "{line}");
}
