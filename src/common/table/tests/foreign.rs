//! Tables that other programs have made, compared with what these say about them.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
};

use super::*;

fn sh(script: &str, disk: &Path) -> String {
    let out = Command::new("sh").args(["-ec", script]).env("d", disk).output().unwrap();
    assert!(out.status.success(), "{script}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// A sparse disk that a script has written to.
fn made(dir: &tempfile::TempDir, megabytes: u64, script: &str) -> PathBuf {
    let path = dir.path().join("disk");
    File::create(&path).unwrap().set_len(megabytes << 20).unwrap();
    sh(script, &path);
    path
}

fn table(path: &Path, sector_size: Option<u64>) -> Table {
    let file = File::open(path).unwrap();
    let read = |buf: &mut [u8], offset| -> io::Result<()> { file.read_exact_at(buf, offset) };
    read_table(file.metadata().unwrap().len(), sector_size, read).unwrap()
}

/// Number, start and length in bytes.
fn places(table: &Table) -> Vec<(u32, u64, u64)> {
    table.partitions.iter().map(|p| (p.number, p.start, p.length)).collect()
}

/// The label and the partitions that parted finds.
fn parted(path: &Path) -> (String, Vec<(u32, u64, u64)>) {
    let text = sh("parted -sm \"$d\" unit B print", path);
    let mut lines = text.lines().skip(1);
    let label = lines.next().unwrap().split(':').nth(5).unwrap().to_owned();
    let bytes = |field: &str| field.trim_end_matches('B').parse().unwrap();
    let partitions = lines.map(|line| {
        let fields: Vec<_> = line.split(':').collect();
        (fields[0].parse().unwrap(), bytes(fields[1]), bytes(fields[3]))
    });
    (label, partitions.collect())
}

#[test]
fn parted_agrees() {
    let dir = tempfile::tempdir().unwrap();
    let two = "mkpart PRIMARY 1MiB 9MiB mkpart PRIMARY 10MiB 20MiB";
    let unnamed = "mkpart 1MiB 9MiB mkpart 10MiB 20MiB";
    for (label, parts, scheme) in [
        (
            "msdos",
            "mkpart primary 1MiB 9MiB mkpart extended 10MiB 30MiB mkpart logical 11MiB 15MiB",
            Scheme::Mbr,
        ),
        ("gpt", two, Scheme::Gpt),
        ("mac", two, Scheme::Apm),
        ("bsd", unnamed, Scheme::Bsd),
        ("sun", unnamed, Scheme::Sun),
        ("amiga", two, Scheme::Amiga),
    ] {
        let disk = made(&dir, 40, &format!("parted -s -a none \"$d\" mklabel {label} {parts}"));
        let (name, mut expected) = parted(&disk);
        assert_eq!(name, label);
        let found = table(&disk, None);
        assert_eq!((found.scheme, &found.warnings[..]), (scheme, &[][..]), "{label}");
        if scheme == Scheme::Mbr {
            expected.retain(|(number, ..)| *number != 2);
        }
        assert!(expected.len() >= 2, "{label}");
        assert_eq!(places(&found), expected, "{label}");
    }
}

#[test]
fn a_bsd_label_in_a_slice() {
    let dir = tempfile::tempdir().unwrap();
    for (kind, shift) in [("a5", 0), ("a6", 2048 * 512), ("a9", 2048 * 512)] {
        // The label is made on a disk of the size of the slice. Systems but FreeBSD count from the start of the disk.
        let script = format!(
            "printf 'label: dos\n2048,40960,{kind}\n43008,,83\n' | sfdisk -q $d; truncate -s 20M $d.slice; \
             parted -s -a none $d.slice mklabel bsd mkpart 1MiB 9MiB mkpart 10MiB 19MiB; \
             dd if=$d.slice of=$d bs=512 seek=2048 conv=notrunc status=none"
        );
        let disk = made(&dir, 40, &script);
        let file = File::options().read(true).write(true).open(&disk).unwrap();
        let label_at = 2048 * 512 + 64;
        let mut label = [0; 512];
        file.read_exact_at(&mut label, label_at).unwrap();
        for entry in 0..8 {
            let at = 148 + 16 * entry;
            let start = u32_at(&label, at + 4);
            if u32_at(&label, at) > 0 && entry != 2 {
                put(&mut label, at + 4, &(start + shift as u32 / 512).to_le_bytes());
            }
            if entry == 2 {
                put(&mut label, at + 4, &(shift as u32 / 512).to_le_bytes());
            }
        }
        file.write_all_at(&label, label_at).unwrap();
        let found = table(&disk, None);
        assert_eq!(found.warnings, [""; 0], "{kind}");
        let expected = [(1, 1, 20), (2, 21, 19), (5, 2, 8), (6, 11, 9)];
        assert_eq!(
            places(&found),
            expected.map(|(n, start, length)| (n, start << 20, length << 20)),
            "{kind}"
        );
        assert_eq!(found.partitions[2].slice, Some(1));
    }
}

#[test]
fn all_sizes_of_sectors() {
    let dir = tempfile::tempdir().unwrap();
    for size in SECTOR_SIZES {
        let commands = "g\\nn\\n1\\n\\n+8M\\nn\\n2\\n\\n\\nw\\n";
        let disk = made(&dir, 64, &format!("printf '{commands}' | fdisk -b {size} $d >/dev/null"));
        let found = table(&disk, None);
        assert_eq!((found.scheme, found.sector_size), (Scheme::Gpt, size));
        assert_eq!(found.warnings, [""; 0]);
        assert_eq!(places(&found)[0], (1, 1 << 20, 8 << 20), "{size}");
        // Of an MBR only what is in the partitions tells.
        let commands = "o\\nn\\np\\n1\\n\\n+8M\\nn\\ne\\n2\\n\\n\\nn\\n\\n\\nw\\n";
        let disk = made(&dir, 64, &format!("printf '{commands}' | fdisk -b {size} $d >/dev/null"));
        let found = table(&disk, None);
        assert_eq!((found.scheme, found.sector_size), (Scheme::Mbr, size));
        assert_eq!(places(&found)[0], (1, 1 << 20, 8 << 20), "{size}");
        assert_eq!(found.partitions[1].number, 5);
    }
}

#[test]
fn an_isohybrid() {
    let dir = tempfile::tempdir().unwrap();
    let script = "mkdir $d.tree; head -c 300000 /dev/urandom > $d.tree/file; head -c 64k /dev/zero > $d.efi; \
                  xorriso -as mkisofs -quiet -o $d -V 'A DISC' -partition_offset 16 \
                  -append_partition 2 0xef $d.efi $d.tree 2>/dev/null";
    let disk = made(&dir, 1, script);
    let found = table(&disk, None);
    assert_eq!((found.scheme, found.sector_size), (Scheme::Mbr, 512));
    let sfdisk =
        sh("sfdisk -d $d | sed -n 's/.*start= *\\([0-9]*\\), size= *\\([0-9]*\\).*/\\1 \\2/p'", &disk);
    let ours: String =
        found.partitions.iter().map(|p| format!("{} {}\n", p.start / 512, p.length / 512)).collect();
    assert_eq!(ours, sfdisk);
}

#[test]
fn a_disk_that_sgdisk_repairs() {
    let dir = tempfile::tempdir().unwrap();
    let disk = made(&dir, 40, "sgdisk -n 1:2048:+4M -c 1:'A name' -n 5:0:0 $d >/dev/null");
    let sound = table(&disk, None);
    assert_eq!((sound.partitions[0].name.as_str(), sound.partitions[1].number), ("A name", 5));
    let id = sh("sgdisk -i 1 $d | sed -n 's/Partition unique GUID: //p'", &disk);
    assert_eq!(sound.partitions[0].uuid.as_deref(), Some(id.trim().to_lowercase().as_str()));
    sh("dd if=/dev/urandom of=$d bs=512 seek=1 count=33 conv=notrunc status=none", &disk);
    let damaged = table(&disk, None);
    assert_eq!(damaged.partitions, sound.partitions);
    assert_eq!(damaged.warnings.len(), 1, "{:?}", damaged.warnings);
}
