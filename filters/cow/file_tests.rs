//! Tests of overlays that stay.

use std::{
    fs::File,
    os::unix::fs::{FileExt as _, PermissionsExt as _},
    path::Path,
};

use nbdkit_core::Session;

use super::*;
use crate::testing::{Disk, Spec, chain, client, config_error, open};

const BLOCK: u64 = 4096;
const FILE: &str = "cow-file";

fn params<'a>(file: &'a Path, block_size: &'a str) -> [(&'a str, &'a str); 2] {
    [(FILE, file.to_str().unwrap()), ("cow-block-size", block_size)]
}

/// A session whose end is that of a killed server, unless the chain is cleaned up.
fn session(disk: &Disk, file: &Path) -> Session {
    open(&chain(disk, &["cow"], &params(file, "4k")).unwrap(), client(), false).unwrap()
}

fn read(session: &Session, offset: u64) -> u8 {
    let mut buf = [0xaa];
    session.pread(&mut buf, offset).unwrap();
    buf[0]
}

fn temp() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("overlay");
    (dir, file)
}

#[test]
fn what_was_flushed_is_there_after_a_crash() {
    let (_dir, file) = temp();
    let disk = Spec::sized(8 * BLOCK + 100).disk();
    let before = disk.contents();
    let first = session(&disk, &file);
    first.pwrite(&[1; 100], 10, Flags::empty()).unwrap();
    first.trim(BLOCK, BLOCK, Flags::empty()).unwrap();
    first.flush().unwrap();
    first.pwrite(&[2; 100], 8 * BLOCK, Flags::FUA).unwrap();
    first.zero(BLOCK, 3 * BLOCK, Flags::FUA | Flags::MAY_TRIM).unwrap();
    first.pwrite(&[3; 10], 5 * BLOCK, Flags::empty()).unwrap();
    drop(first);
    let again = session(&disk, &file);
    let got = [10, BLOCK + 1, 8 * BLOCK, 3 * BLOCK + 5].map(|at| read(&again, at));
    assert_eq!(got, [1, 0, 2, 0]);
    assert_eq!(read(&again, 7), before[7], "the rest of the block came up with it");
    assert_eq!(read(&again, 5 * BLOCK), before[5 * BLOCK as usize], "was not flushed");
    assert_eq!(disk.contents(), before);
}

#[test]
fn a_server_that_ends_in_peace_keeps_all() {
    let (_dir, file) = temp();
    let disk = Spec::sized(8 * BLOCK).disk();
    let chain = chain(&disk, &["cow"], &params(&file, "4k")).unwrap();
    open(&chain, client(), false).unwrap().pwrite(&[7], 0, Flags::empty()).unwrap();
    chain.cleanup();
    drop(chain);
    assert_eq!(read(&session(&disk, &file), 0), 7);
}

#[test]
fn the_map_may_have_many_pages() {
    let (_dir, file) = temp();
    let disk = Spec::default().disk();
    let truncate = [("truncate", "1T")];
    let params = [&truncate[..], &params(&file, "4k")].concat();
    let places = [0, 1 << 28, 1 << 33, (1 << 40) - BLOCK];
    for round in 1..4 {
        let chain = chain(&disk, &["cow", "truncate"], &params).unwrap();
        let session = open(&chain, client(), false).unwrap();
        for place in places {
            assert_eq!(
                read(&session, place + round - 1),
                if round > 1 { round as u8 - 1 } else { read(&session, place) }
            );
            session.pwrite(&[round as u8], place + round, Flags::empty()).unwrap();
        }
        session.flush().unwrap();
        assert_eq!(read(&session, 1 << 34), 0);
    }
    let used = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&file).unwrap()) * 512;
    assert!(used < 1 << 20, "{used} bytes for four blocks");
}

#[test]
fn it_is_made_for_its_owner_alone_and_only_if_it_gets_used() {
    let (_dir, file) = temp();
    let disk = Spec::default().disk();
    drop(chain(&disk, &["cow"], &params(&file, "4k")).unwrap());
    assert!(!file.exists(), "nobody came");
    drop(session(&disk, &file));
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
}

#[track_caller]
fn refused(disk: &Disk, file: &Path, block_size: &str, words: &[&str]) {
    let error = match chain(disk, &["cow"], &params(file, block_size)) {
        Ok(chain) => open(&chain, client(), false).unwrap_err().to_string(),
        Err(e) => format!("{e:#}"),
    };
    for word in words.iter().copied().chain([file.to_str().unwrap()]) {
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let (dir, file) = temp();
    let disk = Spec::sized(8 * BLOCK).disk();
    session(&disk, &file).pwrite(&[1], 0, Flags::FUA).unwrap();
    refused(&disk, &file, "8k", &["4096", "8192"]);
    refused(&Spec::sized(9 * BLOCK).disk(), &file, "4k", &["32768", "36864"]);
    // Without a block size that of the overlay is taken.
    let again = chain(&disk, &["cow"], &params(&file, "4k")[..1]).unwrap();
    assert_eq!(read(&open(&again, client(), false).unwrap(), 0), 1);
    refused(&disk, &file, "4k", &["in use"]);
    drop(again);

    let image = dir.path().join("disk.img");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    refused(&disk, &image, "4k", &["not an overlay"]);
    refused(&disk, &dir.path().join("missing/overlay"), "4k", &["No such file"]);
    assert!(config_error("cow", &[(FILE, "")]).contains("path"));
}

#[test]
fn a_damaged_map_is_refused() {
    let (_dir, file) = temp();
    let disk = Spec::sized(8 * BLOCK).disk();
    for byte in 0..3 {
        session(&disk, &file).pwrite(&[byte], 0, Flags::FUA).unwrap();
        session(&disk, &file).trim(BLOCK, BLOCK * u64::from(byte + 1), Flags::FUA).unwrap();
    }
    let overlay = File::options().write(true).open(&file).unwrap();
    overlay.write_all_at(&[0xff], 3 * 4096 + 100).unwrap();
    drop(session(&disk, &file));
    overlay.write_all_at(&[0xff], 4 * 4096 + 100).unwrap();
    refused(&disk, &file, "4k", &["damaged"]);
}

/// The disk itself, as a commit opens it.
fn plain(disk: &Disk) -> Session {
    open(&chain(disk, &[], &[]).unwrap(), client(), false).unwrap()
}

fn overlay(file: &Path) -> crate::OverlayFile {
    crate::OverlayFile::open(file, None).unwrap()
}

#[test]
fn changes_can_be_listed_and_cleared() {
    let (_dir, file) = temp();
    let disk = Spec::sized(8 * BLOCK).disk();
    let first = session(&disk, &file);
    first.pwrite(&[5; 2 * BLOCK as usize], BLOCK, Flags::empty()).unwrap();
    first.trim(3 * BLOCK, 5 * BLOCK, Flags::FUA).unwrap();
    assert!(crate::OverlayFile::open(&file, None).unwrap_err().to_string().contains("in use"));
    drop(first);
    let other = overlay(&file).changes(&plain(&Spec::sized(BLOCK).disk()), true).unwrap_err();
    assert!(other.to_string().contains("32768"), "{other}");
    let base = plain(&disk);
    let changes = overlay(&file).changes(&base, false).unwrap();
    let list: Vec<_> = changes.iter().map(|change| (change.offset, change.length, change.zero)).collect();
    assert_eq!(list, [(BLOCK, 2 * BLOCK, false), (5 * BLOCK, 3 * BLOCK, true)]);
    let mut buf = vec![0; 2 * BLOCK as usize];
    changes.read(&mut buf, BLOCK).unwrap();
    assert!(buf.iter().all(|byte| *byte == 5));
    changes.finish(&base).unwrap();
    assert_eq!(changes.iter().count(), 0);
    drop(changes);
    assert_eq!(read(&session(&disk, &file), BLOCK), disk.contents()[BLOCK as usize]);
    overlay(&file).remove().unwrap();
    assert!(!file.exists());
}

/// Eight blocks with nothing but `byte` in them.
fn filled(byte: u8) -> Disk {
    Spec { data: vec![byte; 8 * BLOCK as usize], ..Spec::default() }.disk()
}

#[test]
fn another_base_is_refused_and_a_copy_is_not() {
    let (_dir, file) = temp();
    let disk = filled(1);
    session(&disk, &file).pwrite(&[5], 0, Flags::FUA).unwrap();
    assert_eq!(read(&session(&filled(1), &file), 0), 5, "a copy");
    refused(&filled(2), &file, "4k", &["sampled blocks differ, the first at offset 0"]);
    let error = overlay(&file).changes(&plain(&filled(2)), false).unwrap_err();
    assert!(error.to_string().contains("another disk"), "{error}");
    assert_eq!(read(&session(&disk, &file), 0), 5);

    let forced = [&params(&file, "4k")[..], &[("cow-force", "true")]].concat();
    let other = filled(2);
    let chain = chain(&other, &["cow"], &forced).unwrap();
    assert_eq!(read(&open(&chain, client(), false).unwrap(), 1), 1, "the rest of the block");
    drop(chain);
    assert_eq!(read(&session(&other, &file), BLOCK), 2, "it is the base from now on");
    refused(&disk, &file, "4k", &["differ"]);
}

#[test]
fn a_base_that_was_written_to_is_refused_unless_a_commit_has_done_it() {
    let (_dir, file) = temp();
    let disk = filled(1);
    session(&disk, &file).pwrite(&[5; 2 * BLOCK as usize], 0, Flags::FUA).unwrap();
    let base = plain(&disk);
    let changes = overlay(&file).changes(&base, false).unwrap();
    changes.begin().unwrap();
    base.pwrite(&[5; BLOCK as usize], 0, Flags::empty()).unwrap();
    drop(changes);
    // It was interrupted: it can be run again, and the overlay can be used.
    assert_eq!(read(&session(&disk, &file), 0), 5);
    refused(&filled(2), &file, "4k", &["differ"]);
    let changes = overlay(&file).changes(&base, false).unwrap();
    changes.begin().unwrap();
    base.pwrite(&[5; 2 * BLOCK as usize], 0, Flags::empty()).unwrap();
    changes.finish(&base).unwrap();
    drop(changes);
    session(&disk, &file).pwrite(&[6], 0, Flags::FUA).unwrap();
    base.pwrite(&[7], 7 * BLOCK, Flags::empty()).unwrap();
    refused(&disk, &file, "4k", &["the first at offset 28672"]);
}

#[test]
fn an_overlay_without_changes_gets_along_with_any_base() {
    let (_dir, file) = temp();
    drop(session(&filled(1), &file));
    session(&filled(2), &file).pwrite(&[5], 0, Flags::FUA).unwrap();
    refused(&filled(1), &file, "4k", &["differ"]);
}

#[test]
fn a_base_that_cannot_be_read_is_known_by_its_file() {
    let (_dir, file) = temp();
    let broken = || Spec { fail_after: Some(0), data: vec![0; 8 * BLOCK as usize], ..Spec::default() }.disk();
    let first = session(&broken(), &file);
    first.pwrite(&[5; BLOCK as usize], 0, Flags::FUA).unwrap();
    drop(first);
    // The test disks all lend the same file.
    assert_eq!(read(&session(&broken(), &file), 0), 5);
}

#[test]
fn an_overlay_of_the_older_format_still_opens() {
    let (_dir, file) = temp();
    let disk = Spec::sized(8 * BLOCK).disk();
    let header = format::Header::nameless(8 * BLOCK, BLOCK, 77);
    let mut page = format::Page::EMPTY;
    page.changed[0] = 0b110;
    page.discarded[0] = 0b100;
    let old = File::create(&file).unwrap();
    old.write_all_at(&header.encode(), 0).unwrap();
    // The slot of the odd numbers of its first page.
    old.write_all_at(&page.encode(&header, 0, 1), 8192).unwrap();
    old.write_all_at(&[9; BLOCK as usize], (1 << 20) + BLOCK).unwrap();
    old.set_len((1 << 20) + 8 * BLOCK).unwrap();
    for round in 0..2 {
        let session = session(&disk, &file);
        let got = [7, BLOCK, 2 * BLOCK + 1, 3 * BLOCK].map(|at| read(&session, at));
        let contents = disk.contents();
        assert_eq!(got, [contents[7], 9, 0, contents[3 * BLOCK as usize]], "{round}");
        session.pwrite(&[8], 5 * BLOCK, Flags::FUA).unwrap();
    }
    let base = plain(&disk);
    let changes = overlay(&file).changes(&base, false).unwrap();
    assert_eq!(changes.iter().count(), 3);
    changes.begin().unwrap();
    changes.finish(&base).unwrap();
    drop(changes);
    assert_eq!(overlay(&file).export(), None);
    assert_eq!(read(&session(&disk, &file), BLOCK), disk.contents()[BLOCK as usize]);
}

#[test]
fn a_file_belongs_to_one_export_and_a_directory_has_one_for_each() {
    let (dir, file) = temp();
    let disk = filled(1);
    let connect = |params: &[(&str, &str)]| {
        let chain = chain(&disk, &["cow"], params).unwrap();
        Arc::new(chain.connect(client(), false).unwrap())
    };
    for names in [["a", "b"], ["b", "a"]] {
        let connection = connect(&params(&file, "4k"));
        for name in names {
            match connection.open(OsStr::new(name), false) {
                Ok(session) => {
                    assert_eq!(name, "a");
                    session.pwrite(&[5], 0, Flags::FUA).unwrap();
                }
                Err(e) => {
                    assert_eq!(name, "b");
                    assert!(e.to_string().contains("a directory to keep those of several"), "{e}");
                }
            }
        }
    }
    let overlays = dir.path().join("overlays/");
    let connection = connect(&params(&overlays, "4k"));
    for (name, byte) in [("a", 5), ("b/c", 6), ("", 7)] {
        connection.open(OsStr::new(name), false).unwrap().pwrite(&[byte], 0, Flags::FUA).unwrap();
    }
    drop(connection);
    let connection = connect(&params(&overlays, "4k"));
    for (name, byte) in [("a", 5), ("b/c", 6), ("", 7), ("d", 1)] {
        assert_eq!(read(&connection.open(OsStr::new(name), false).unwrap(), 0), byte, "{name}");
    }
    drop(connection);
    let error = crate::OverlayFile::open(&overlays, None).unwrap_err().to_string();
    assert!(error.contains("-e ('', 'a', 'b/c'"), "{error}");
    let one = crate::OverlayFile::open(&overlays, Some(OsStr::new("b/c"))).unwrap();
    assert_eq!(one.export(), Some(OsStr::new("b/c")));
    let none = crate::OverlayFile::open(&overlays, Some(OsStr::new("e"))).unwrap_err();
    assert!(none.to_string().contains("no overlay of export 'e'"), "{none}");
}
