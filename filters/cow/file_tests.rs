//! Tests of overlays that stay.

use std::{os::unix::fs::PermissionsExt as _, path::Path};

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
    refused(&disk, dir.path(), "4k", &[]);
    refused(&disk, &dir.path().join("missing/overlay"), "4k", &["No such file"]);
    assert!(config_error("cow", &[(FILE, "")]).contains("path"));
}

#[test]
fn a_damaged_map_is_refused() {
    use std::os::unix::fs::FileExt as _;
    let (_dir, file) = temp();
    let disk = Spec::sized(8 * BLOCK).disk();
    for byte in 0..3 {
        session(&disk, &file).pwrite(&[byte], 0, Flags::FUA).unwrap();
        session(&disk, &file).trim(BLOCK, BLOCK * u64::from(byte + 1), Flags::FUA).unwrap();
    }
    let overlay = File::options().write(true).open(&file).unwrap();
    overlay.write_all_at(&[0xff], 4096 + 100).unwrap();
    drop(session(&disk, &file));
    overlay.write_all_at(&[0xff], 8192 + 100).unwrap();
    refused(&disk, &file, "4k", &["damaged"]);
}

#[test]
fn changes_can_be_listed_and_cleared() {
    let (_dir, file) = temp();
    let disk = Spec::sized(8 * BLOCK).disk();
    let first = session(&disk, &file);
    first.pwrite(&[5; 2 * BLOCK as usize], BLOCK, Flags::empty()).unwrap();
    first.trim(3 * BLOCK, 5 * BLOCK, Flags::FUA).unwrap();
    assert!(crate::OverlayFile::open(&file).unwrap_err().to_string().contains("in use"));
    drop(first);
    let other = crate::OverlayFile::open(&file).unwrap().changes(BLOCK).unwrap_err();
    assert!(other.to_string().contains("32768"), "{other}");
    let changes = crate::OverlayFile::open(&file).unwrap().changes(8 * BLOCK).unwrap();
    let list: Vec<_> = changes.iter().map(|change| (change.offset, change.length, change.zero)).collect();
    assert_eq!(list, [(BLOCK, 2 * BLOCK, false), (5 * BLOCK, 3 * BLOCK, true)]);
    let mut buf = vec![0; 2 * BLOCK as usize];
    changes.read(&mut buf, BLOCK).unwrap();
    assert!(buf.iter().all(|byte| *byte == 5));
    changes.clear().unwrap();
    assert_eq!(changes.iter().count(), 0);
    drop(changes);
    assert_eq!(read(&session(&disk, &file), BLOCK), disk.contents()[BLOCK as usize]);
    crate::OverlayFile::open(&file).unwrap().remove().unwrap();
    assert!(!file.exists());
}
