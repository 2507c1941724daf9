//! Disks of each kind, against a simple model of the table, and what cannot be on one. fsck.fat, mtools and the kernel look
//! at them in tests/plugins/floppy.rs.

use std::{fs, path::Path};

use proptest::prelude::*;

use super::{
    layout::{Chains, Disk, Fat, Part, Wanted},
    *,
};
use crate::testkit::{config_error, disk, extents, read_all, start};

fn wanted(fat: Fat) -> Wanted {
    Wanted { fat, partitioned: false, label: *b"LABEL      ", size: None, seed: vec![1] }
}

fn made(dir: &Path, params: &[(&str, &str)]) -> Vec<u8> {
    let dir = dir.to_str().unwrap();
    read_all(&disk("floppy", &[&[("dir", dir)], params].concat()))
}

#[test]
fn a_file_is_on_the_disk_and_changes_with_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a file.txt");
    fs::write(&path, "what is in it").unwrap();
    let chain = start("floppy", &[("dir", dir.path().to_str().unwrap())]).unwrap();
    let session = crate::testkit::open(&chain).unwrap();
    let before = read_all(&session);
    let at = before.windows(13).position(|w| w == b"what is in it").unwrap();
    let mut now = [0; 13];
    fs::write(&path, "what is NEW in it, and longer").unwrap();
    session.pread(&mut now, at as u64).unwrap();
    assert_eq!(&now, b"what is NEW i");
    fs::write(&path, "short").unwrap();
    let error = session.pread(&mut now, at as u64).unwrap_err();
    assert!(error.errno() == Errno::EIO && error.to_string().contains("shorter than it was"), "{error}");
    fs::remove_file(&path).unwrap();
    // What is open stays, and in another server is an error.
    let other = start("floppy", &[("dir", dir.path().to_str().unwrap())]).unwrap();
    drop(crate::testkit::open(&other).unwrap());
}

#[test]
fn files_that_are_swapped_for_something_else() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("FILE");
    let session = |_: &()| {
        fs::write(&path, vec![7; 512]).unwrap();
        let session = disk("floppy", &[("dir", dir.path().to_str().unwrap()), ("table", "none")]);
        fs::remove_file(&path).unwrap();
        session
    };
    let read = |session: &nbdkit_core::Session| {
        let size = session.size();
        let mut all = vec![0; size as usize];
        session.pread(&mut all, 0).unwrap_err()
    };
    let gone = session(&());
    assert_eq!(read(&gone).errno(), Errno::ENOENT);
    let pipe = session(&());
    rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RWXU).unwrap();
    assert!(read(&pipe).to_string().contains("no longer a regular file"));
    fs::remove_file(&path).unwrap();
    let link = session(&());
    std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
    assert_eq!(read(&link).errno(), Errno::ELOOP);
}

#[test]
fn free_space_is_a_hole() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("F"), [1; 600]).unwrap();
    let params = [("dir", dir.path().to_str().unwrap()), ("type", "fat16"), ("size", "10M")];
    let session = disk("floppy", &params);
    assert_eq!(session.size(), 10 << 20);
    let (last_at, length, kind) = *extents(&session, 0, 10 << 20).last().unwrap();
    assert_eq!((last_at + length, kind), (10 << 20, 3));
    assert!(length > 8 << 20);
}

#[test]
fn bad_parameters_name_the_fix() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().to_str().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "x").unwrap();
    for (params, message) in [
        (&[][..], "you must supply the dir=DIRECTORY"),
        (&[("dir", "/nonexistent")], "No such file"),
        (&[("dir", file.to_str().unwrap())], "is not a directory"),
        (&[("dir", at), ("dir", at)], "twice"),
        (&[("dir", at), ("label", "twelve chars")], "longer than the 11"),
        (&[("dir", at), ("label", "a.b")], "cannot have '.'"),
        (&[("dir", at), ("type", "exfat")], "use fat12, fat16 or fat32"),
        (&[("dir", at), ("table", "gpt")], "use mbr or none"),
        (
            &[("dir", at), ("size", "1M")],
            "is too small for the files in type=fat32: leave size= out, or give at least",
        ),
        (&[("dir", at), ("type", "fat12"), ("size", "1G")], "too large for type=fat12"),
        (&[("dir", at), ("size", "4T")], "2 TiB"),
        (&[("dir", at), ("size", "10000001")], "not a multiple of 512"),
    ] {
        let error = config_error("floppy", params);
        assert!(error.contains(message), "{params:?}: {error}");
    }
    fs::write(dir.path().join("FILE"), "x").unwrap();
    let error = config_error("floppy", &[("dir", at)]);
    assert!(error.contains("cannot tell the name from another"), "{error}");
    fs::remove_file(dir.path().join("FILE")).unwrap();
    let huge = fs::File::create(dir.path().join("huge")).unwrap();
    huge.set_len(1 << 32).unwrap();
    assert!(config_error("floppy", &[("dir", at)]).contains("4 GiB at most"));
    huge.set_len((1 << 32) - 1).unwrap();
    start("floppy", &[("dir", at)]).unwrap();
}

#[test]
fn the_size_that_is_named_will_do() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("F"), vec![1; 100_000]).unwrap();
    for (fat, table) in [("fat12", "none"), ("fat16", "mbr"), ("fat32", "mbr"), ("fat32", "none")] {
        let with = |size: &str| {
            let params =
                [("dir", dir.path().to_str().unwrap()), ("type", fat), ("table", table), ("size", size)];
            start("floppy", &params).map(drop).map_err(|e| format!("{e:#}"))
        };
        let error = with("50K").unwrap_err();
        let least: u64 = error.rsplit(' ').next().unwrap().parse().unwrap();
        with(&least.to_string()).unwrap_or_else(|e| panic!("{fat} {table}: {least}: {e}"));
        assert!(with(&(least - 512 * 4).to_string()).is_err(), "{fat} {table}: {least}");
    }
}

/// What a driver makes of the sizes is the number of clusters that the table is for.
#[test]
fn every_size_has_a_table_that_fits() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("F"), vec![1; 1000]).unwrap();
    let number = |all: &[u8], at: usize, bytes: usize| {
        all[at..at + bytes].iter().rev().fold(0, |n, b| n << 8 | u64::from(*b))
    };
    for (kind, from, to, step) in
        [("fat12", 60, 9000, 13), ("fat16", 4500, 140_000, 997), ("fat32", 67_000, 500_000, 9973)]
    {
        for sectors in (from..to).step_by(step) {
            let size = (sectors * 512).to_string();
            let params =
                [("dir", dir.path().to_str().unwrap()), ("type", kind), ("table", "none"), ("size", &size)];
            let session = disk("floppy", &params);
            let mut boot = [0; 512];
            session.pread(&mut boot, 0).unwrap();
            let total = number(&boot, 19, 2).max(number(&boot, 32, 4));
            let table = number(&boot, 22, 2).max(number(&boot, 36, 4) * u64::from(kind == "fat32"));
            let data = total - number(&boot, 14, 2) - 2 * table - number(&boot, 17, 2) / 16;
            let clusters = data / u64::from(boot[13]);
            let bits = match kind {
                "fat12" => 12,
                "fat16" => 16,
                _ => 32,
            };
            let right = match kind {
                "fat12" => 1..4085,
                "fat16" => 4085..65_525,
                _ => 65_525..1 << 28,
            };
            assert!(
                right.contains(&clusters) && (clusters + 2) * bits <= table * 4096,
                "{kind} {sectors}: {clusters}"
            );
            // And little is lost.
            assert!(
                total <= sectors && sectors - total <= 2 * u64::from(boot[13]) + 2,
                "{kind} {sectors}: {total}"
            );
        }
    }
}

#[test]
fn floppy_disks_have_the_format_of_their_time() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("F"), "x").unwrap();
    for (size, media, track) in
        [("360K", 0xfd, 9), ("720K", 0xf9, 9), ("1200K", 0xf9, 15), ("1440K", 0xf0, 18), ("2880K", 0xf0, 36)]
    {
        let all = made(dir.path(), &[("type", "fat12"), ("table", "none"), ("size", size)]);
        assert_eq!((all[21], all[24], all[512]), (media, track, media), "{size}");
        let sectors = u16::from_le_bytes([all[19], all[20]]);
        assert_eq!(usize::from(sectors) * 512, all.len(), "{size}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn the_table_can_be_read_anywhere(
        lengths in prop::collection::vec(1_u32..40, 0..20),
        fat in prop::sample::select(vec![Fat::Fat12, Fat::Fat16, Fat::Fat32]),
        offset in 0_u64..600,
        length in 0_usize..400,
    ) {
        let mut next = 2;
        let ends: Vec<u32> = lengths.iter().map(|n| { next += n; next - 1 }).collect();
        // Entry by entry.
        let mut table = vec![0xf8 | 0xffff_ff00, u32::MAX];
        for n in &lengths {
            let first = table.len() as u32;
            table.extend((1..*n).map(|i| first + i).chain([u32::MAX]));
        }
        table.resize(2000, 0);
        let bytes: Vec<u8> = match fat {
            Fat::Fat12 => table.chunks(2).flat_map(|p| ((p[0] & 0xfff) | (p[1] & 0xfff) << 12).to_le_bytes()[..3].to_vec()).collect(),
            Fat::Fat16 => table.iter().flat_map(|e| e.to_le_bytes()[..2].to_vec()).collect(),
            Fat::Fat32 => table.iter().flat_map(|e| (e & 0x0fff_ffff).to_le_bytes()).collect(),
        };
        let mut buf = vec![0xaa; length];
        Chains::for_tests(fat, ends).read(&mut buf, offset);
        prop_assert_eq!(&buf[..], &bytes[offset as usize..offset as usize + length]);
    }
}

#[test]
fn the_largest_disk_takes_no_memory() {
    let mut tree = vec![tree::Directory::default()];
    let mut names = names::Names::default();
    for n in 0..500 {
        let name = names.add(&format!("F{n}")).unwrap();
        let kind = tree::Kind::File { path: PathBuf::new(), size: u64::from(u32::MAX) };
        tree[0].entries.push(tree::Entry { name, time: tree::Stamp::default(), kind });
    }
    let disk = Disk::new(tree, &wanted(Fat::Fat32)).unwrap();
    assert!(disk.parts.size() > 500 * u64::from(u32::MAX) && disk.parts.size() < 2 << 40);
    let in_memory: usize = disk
        .parts
        .as_slice()
        .iter()
        .map(|region| match &region.kind {
            Part::Bytes(bytes) => bytes.len(),
            _ => 0,
        })
        .sum();
    assert!(in_memory < 100_000);
    let mut end = [0; 4096];
    disk.chains.read(&mut end, (1 << 24) - 4096);
}
