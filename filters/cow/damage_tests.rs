//! Overlays that were damaged or cut off: what is left is used only where it is known to be right, and never panics.

use std::{
    fs::File,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use super::*;
use crate::testing::{Disk, Spec, chain, client, open};

const BLOCK: u64 = 4096;
const SIZE: u64 = 8 * BLOCK;
/// Where the parts of the file are (`format`).
const MAP: u64 = 12 << 10;
const MAP_END: u64 = 20 << 10;
const DATA: u64 = 1 << 20;
/// Every so many bytes are damaged: a prime, so that all fields are met, and all bits of them over the copies.
const STEP: usize = 11;

/// An overlay that was flushed twice, what the disk held after each flush, and the disk below.
struct Made {
    _dir: tempfile::TempDir,
    disk: Disk,
    bytes: Vec<u8>,
    flushed: [Vec<u8>; 2],
    path: PathBuf,
}

fn contents(disk: &Disk, file: &Path) -> std::result::Result<Vec<u8>, String> {
    let params = [("cow-file", file.to_str().unwrap()), ("cow-block-size", "4k")];
    let chain = chain(disk, &["cow"], &params).map_err(|e| format!("{e:#}"))?;
    let session = open(&chain, client(), false).map_err(|e| format!("{e:#}"))?;
    let mut data = vec![0; SIZE as usize];
    session.pread(&mut data, 0).map_err(|e| format!("{e:#}"))?;
    Ok(data)
}

fn made() -> Made {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("overlay");
    let disk = Spec::sized(SIZE).disk();
    let mut flushed = [const { Vec::new() }; 2];
    let params = [("cow-file", path.to_str().unwrap()), ("cow-block-size", "4k")];
    let chain = chain(&disk, &["cow"], &params).unwrap();
    let session = open(&chain, client(), false).unwrap();
    for (number, flushed) in (1..).zip(&mut flushed) {
        session.pwrite(&[number; 100], u64::from(number) * BLOCK, Flags::empty()).unwrap();
        session.trim(BLOCK, (u64::from(number) + 4) * BLOCK, Flags::empty()).unwrap();
        session.flush().unwrap();
        flushed.resize(SIZE as usize, 0);
        session.pread(flushed, 0).unwrap();
    }
    drop((session, chain));
    let bytes = std::fs::read(&path).unwrap();
    Made { _dir: dir, disk, bytes, flushed, path }
}

impl Made {
    /// What is read of the overlay with other bytes.
    fn read(&self, bytes: &[u8]) -> std::result::Result<Vec<u8>, String> {
        // Most of the file is a hole.
        let file = File::create(&self.path).unwrap();
        file.set_len(bytes.len() as u64).unwrap();
        for (number, block) in bytes.chunks(4096).enumerate() {
            if block != &[0; 4096][..block.len()] {
                file.write_all_at(block, number as u64 * 4096).unwrap();
            }
        }
        contents(&self.disk, &self.path)
    }

    #[track_caller]
    fn assert_refused(&self, found: std::result::Result<Vec<u8>, String>, what: &str) {
        let error = found.expect_err(what);
        assert!(error.contains(self.path.to_str().unwrap()), "{what}: {error}");
        let remedies = ["another file", "newer nbdkit", "make sense", "Restore"];
        assert!(remedies.iter().any(|remedy| error.contains(remedy)), "{what}: {error}");
    }
}

#[test]
fn the_header() {
    let made = made();
    assert!(made.read(&made.bytes).unwrap() == made.flushed[1]);
    for at in (0..4096).step_by(STEP) {
        let mut bytes = made.bytes.clone();
        bytes[at] ^= 1 << (at % 8);
        made.assert_refused(made.read(&bytes), &format!("byte {at}"));
    }
}

/// The newer copy of the map is used or, if that is damaged, the older one; and what it says is all true.
#[test]
fn the_map_and_the_record_of_the_base() {
    let made = made();
    let mut older = 0;
    for at in (4096..MAP_END as usize).step_by(STEP) {
        let mut bytes = made.bytes.clone();
        bytes[at] ^= 1 << (at % 8);
        let found = made.read(&bytes).unwrap_or_else(|e| panic!("byte {at}: {e}"));
        let is_older = found == made.flushed[0];
        assert!(is_older || found == made.flushed[1], "byte {at}");
        assert!(!is_older || at >= MAP as usize, "byte {at}");
        older += usize::from(is_older);
    }
    assert!(older.abs_diff(4096 / STEP) <= 1, "the newer copy of the map");
    // Both.
    for at in (0..4096).step_by(STEP) {
        let mut bytes = made.bytes.clone();
        for copy in [MAP, MAP + 4096] {
            bytes[copy as usize + at] ^= 0x40;
        }
        made.assert_refused(made.read(&bytes), &format!("byte {at} of both copies"));
    }
}

#[test]
fn every_length() {
    let made = made();
    let steps = (0..made.bytes.len()).step_by(512);
    let edges = [4095, 4097, MAP as usize + 1, DATA as usize - 1, DATA as usize + 1, made.bytes.len() - 1];
    for length in steps.chain(edges) {
        let found = made.read(&made.bytes[..length]);
        if length == 0 {
            // As a crash leaves it that comes before there is anything in it.
            assert!(found.unwrap() == made.disk.contents());
        } else {
            made.assert_refused(found, &format!("{length} bytes"));
        }
    }
    assert!(made.read(&made.bytes).unwrap() == made.flushed[1]);
}

#[test]
fn anything_anywhere() {
    let made = made();
    let mut dice = 0x9e37_79b9_7f4a_7c15_u64;
    let mut roll = |sides: u64| {
        dice ^= dice << 13;
        dice ^= dice >> 7;
        dice ^= dice << 17;
        dice % sides
    };
    for _ in 0..400 {
        let mut bytes = made.bytes.clone();
        for _ in 0..=roll(4) {
            let (at, length) = (roll(MAP_END) as usize, 1 + roll(300) as usize);
            let from = roll(MAP_END) as usize;
            match roll(3) {
                0 => bytes[at..at + length].fill(roll(256) as u8),
                1 => bytes.copy_within(from..from + length, at),
                _ => bytes[at] = roll(256) as u8,
            }
        }
        if let Ok(found) = made.read(&bytes) {
            // Whole states only.
            assert!(made.flushed.contains(&found) || found == made.disk.contents());
        }
    }
    // An overlay of another version that says nonsense about itself, with a checksum that is right.
    for at in (8..4096).step_by(3) {
        let mut bytes = made.bytes.clone();
        bytes[at] ^= 0xff;
        let sum = {
            let mut sum = crc32fast::Hasher::new();
            sum.update(&bytes[..48]);
            sum.update(&bytes[52..4096]);
            sum.finalize()
        };
        bytes[48..52].copy_from_slice(&sum.to_le_bytes());
        let file = File::create(&made.path).unwrap();
        file.write_all_at(&bytes, 0).unwrap();
        let _ = contents(&made.disk, &made.path);
    }
}
