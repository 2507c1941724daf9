use std::{fs, path::Path, process::Command};

use nbdkit_core::{Flags, Session};

use super::*;
use crate::testkit::{check_model, config_error, disk, extents, file, read_all};

/// Files of odd sizes whose bytes tell them apart.
fn files(dir: &tempfile::TempDir, count: u8) -> Vec<PathBuf> {
    (1..=count).map(|i| file(dir, &format!("p{i}"), &vec![i; 300_000 + 1000 * usize::from(i)])).collect()
}

fn params<'a>(paths: &'a [PathBuf], rest: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    let paths = paths.iter().map(|path| ("file", path.to_str().unwrap()));
    rest.iter().copied().chain(paths).collect()
}

/// What sfdisk thinks of the disk: the label, then start, size and type of each partition.
fn sfdisk(dir: &Path, disk: &Session) -> (String, Vec<(u64, u64, String)>) {
    let image = dir.join("image");
    fs::write(&image, read_all(disk)).unwrap();
    let verify = Command::new("sfdisk").arg("--verify").arg(&image).output().expect("sfdisk is installed");
    assert!(verify.status.success(), "{verify:?}");
    let json = Command::new("sfdisk").arg("--dump").arg(&image).output().unwrap();
    let dump = String::from_utf8(json.stdout).unwrap();
    let field = |line: &str, name: &str| {
        let rest = line.split_once(name).unwrap_or_else(|| panic!("{name} in {line}")).1;
        rest.split(',').next().unwrap().trim().to_owned()
    };
    let label = dump.lines().find_map(|line| line.strip_prefix("label: ")).unwrap().to_owned();
    let partitions = dump
        .lines()
        .filter(|line| line.contains("start="))
        .map(|line| {
            let number = |name| field(line, name).parse().unwrap();
            (number("start="), number("size="), field(line, "type="))
        })
        .collect();
    (label, partitions)
}

fn list(partitions: &[(u64, u64, &str)]) -> Vec<(u64, u64, String)> {
    partitions.iter().map(|(start, size, kind)| (*start, *size, (*kind).to_owned())).collect()
}

#[test]
fn sfdisk_agrees_with_an_mbr() {
    let dir = tempfile::tempdir().unwrap();
    let paths = files(&dir, 2);
    let (label, partitions) =
        sfdisk(dir.path(), &disk("partitioning", &params(&paths, &[("mbr-id", "0x7")])));
    assert_eq!(label, "dos");
    assert_eq!(partitions, list(&[(2048, 588, "7"), (4096, 590, "7")]));
}

#[test]
fn sfdisk_agrees_with_logical_partitions() {
    let dir = tempfile::tempdir().unwrap();
    let paths = files(&dir, 6);
    let disk = disk("partitioning", &params(&paths, &[("partition-type", "mbr"), ("alignment", "4k")]));
    let (label, partitions) = sfdisk(dir.path(), &disk);
    assert_eq!(label, "dos");
    // Before each logical partition there is a sector that says where it is; the extended one ends with the last.
    let expected = [
        (8, 588, "83"),
        (600, 590, "83"),
        (1192, 592, "83"),
        (1784, 2992 + 598 - 1784, "f"),
        (1792, 594, "83"),
        (2392, 596, "83"),
        (2992, 598, "83"),
    ];
    assert_eq!(partitions, list(&expected));
}

#[test]
fn sfdisk_agrees_with_a_gpt() {
    let dir = tempfile::tempdir().unwrap();
    let paths = files(&dir, 5);
    let esp = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B";
    let (label, partitions) =
        sfdisk(dir.path(), &disk("partitioning", &params(&paths, &[("type-guid", esp)])));
    assert_eq!(label, "gpt");
    let expected =
        [(2048, 588, esp), (4096, 590, esp), (6144, 592, esp), (8192, 594, esp), (10240, 596, esp)];
    assert_eq!(partitions, list(&expected));
}

#[test]
fn options_hold_for_the_files_that_follow() {
    let dir = tempfile::tempdir().unwrap();
    let paths = files(&dir, 3);
    let path = |i: usize| ("file", paths[i].to_str().unwrap());
    let params = [path(0), ("mbr-id", "0x82"), ("alignment", "512"), path(1), ("mbr-id", "default"), path(2)];
    let (_, partitions) = sfdisk(dir.path(), &disk("partitioning", &params));
    assert_eq!(partitions, list(&[(2048, 588, "83"), (2636, 590, "82"), (3226, 592, "83")]));
}

#[test]
fn guids_stay_the_same_and_differ_between_partitions() {
    let dir = tempfile::tempdir().unwrap();
    let paths = files(&dir, 2);
    let params = params(&paths, &[("partition-type", "gpt")]);
    let image = read_all(&disk("partitioning", &params));
    assert!(image == read_all(&disk("partitioning", &params)));
    assert_ne!(image[1024 + 16..1024 + 32], image[1152 + 16..1152 + 32]);
}

#[test]
fn files_are_written_through_and_the_table_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let paths = files(&dir, 2);
    let disk = disk("partitioning", &params(&paths, &[]));
    let (first, end) = (2048 * 512, 2048 * 512 + 301_000);
    disk.pwrite(b"start", first, Flags::FUA).unwrap();
    assert_eq!(fs::read(&paths[0]).unwrap()[..6], *b"start\x01");

    let image = read_all(&disk);
    disk.pwrite(&image[..4096], 0, Flags::empty()).unwrap();
    disk.pwrite(&[0; 100], end, Flags::empty()).unwrap();
    disk.zero(100, end, Flags::MAY_TRIM).unwrap();
    disk.trim(512, 0, Flags::empty()).unwrap();
    for refused in [
        disk.pwrite(&[1; 512], 0, Flags::empty()),
        disk.zero(512, 0, Flags::empty()),
        disk.pwrite(b"x", first - 1, Flags::empty()),
        // Data and padding: nothing of it is written.
        disk.pwrite(&[9; 2], end - 1, Flags::empty()),
    ] {
        assert_eq!(refused.unwrap_err().errno(), Errno::EIO);
    }
    assert!(read_all(&disk) == image);
    assert_eq!(fs::metadata(&paths[0]).unwrap().len(), 301_000);
    let lend = |offset, length| crate::testkit::lend(&disk, nbdkit_core::Op::Read, offset, length);
    assert!(lend(first, 301_000).is_some_and(|(_, offset)| offset == 0));
    assert!(lend(0, 512).is_none() && lend(first, 301_001).is_none());
}

#[test]
fn model_within_a_partition() {
    let dir = tempfile::tempdir().unwrap();
    let paths = files(&dir, 2);
    let params = params(&paths, &[("alignment", "512")]);
    let (first, second) = (512..301_512, 301_568..603_568);
    check_model(&disk("partitioning", &params), |byte| first.contains(&byte) || second.contains(&byte));
}

#[test]
fn padding_is_a_hole() {
    let dir = tempfile::tempdir().unwrap();
    let paths = files(&dir, 1);
    let disk = disk("partitioning", &params(&paths, &[]));
    let found = extents(&disk, 0, disk.size());
    assert_eq!(found[..2], [(0, 512, 0), (512, 2047 * 512, 3)]);
    assert_eq!(found.last(), Some(&(2048 * 512 + 301_000, 56, 3)));
}

#[test]
fn a_large_file_gets_a_gpt() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(&dir, "large", b"");
    fs::File::options().write(true).open(&path).unwrap().set_len(3 << 40).unwrap();
    let disk = disk("partitioning", &params(std::slice::from_ref(&path), &[]));
    let mut header = [0; 8];
    disk.pread(&mut header, 512).unwrap();
    assert_eq!(&header, b"EFI PART");
    let error = config_error("partitioning", &params(&[path], &[("partition-type", "mbr")]));
    assert!(error.contains("use partition-type=gpt"), "{error}");
}

#[test]
fn bad_parameters_name_the_fix() {
    let dir = tempfile::tempdir().unwrap();
    let empty = file(&dir, "empty", b"");
    for (params, message) in [
        (&[][..], "at least one file="),
        (&[("file", "/")], "/: is a directory"),
        (&[("file", "/nonexistent")], "/nonexistent: No such file"),
        (&[("file", empty.to_str().unwrap())], "cannot be empty"),
        (&[("partition-type", "foo")], "use mbr or gpt"),
        (&[("alignment", "100")], "not a multiple of the sector size"),
        (&[("alignment", "0")], "not a multiple of the sector size"),
        (&[("mbr-id", "300")], "out of range"),
        (&[("mbr-id", "0")], "not used"),
        (&[("type-guid", "foo")], "could not parse GUID 'foo'"),
    ] {
        let error = config_error("partitioning", params);
        assert!(error.contains(message), "{params:?}: {error}");
    }
}
