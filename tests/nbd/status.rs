//! Block status: bounded, contiguous, never empty, and together the whole disk.

use std::{fs::File, os::unix::fs::FileExt};

use crate::util::{
    self, Server, image,
    raw::{Chunk, Raw},
    temp,
};

const STATUS: u16 = 5;
const REQ_ONE: u16 = 1 << 3;
/// Most descriptors in one reply.
const MOST: usize = 1 << 16;

/// The descriptors of a reply: lengths and flags.
fn status(raw: &mut Raw, flags: u16, offset: u64, length: u32) -> Vec<(u64, u32)> {
    raw.request(flags, 7, offset, length);
    let chunks = raw.chunks();
    assert_eq!(chunks.len(), 1, "one chunk for the one context");
    let Chunk { kind, payload } = &chunks[0];
    assert_eq!((*kind, chunks[0].u32(0)), (STATUS, 1));
    let word = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().expect("4 bytes"));
    let list: Vec<_> = payload[4..].chunks(8).map(|d| (word(&d[..4]).into(), word(&d[4..]))).collect();
    assert!(!list.is_empty() && list.len() <= MOST, "{} descriptors", list.len());
    assert!(list.iter().all(|(length, _)| *length > 0), "an empty one");
    // What lies before the last one is within the range.
    let before: u64 = list[..list.len() - 1].iter().map(|(length, _)| length).sum();
    assert!(before < length.into());
    list
}

#[test]
fn a_disk_of_more_extents_than_fit() {
    const BLOCK: u64 = 4096;
    const BLOCKS: u64 = 140_000;
    let dir = temp();
    let disk = image(dir.path(), "disk", BLOCKS * BLOCK);
    let file = File::options().write(true).open(&disk).expect("open");
    for block in (1..BLOCKS).step_by(2) {
        file.write_all_at(&[1; BLOCK as usize], block * BLOCK).expect("write");
    }
    let server = Server::start(["file", disk.to_str().expect("UTF-8")]);
    let raw = &mut Raw::structured(&server);
    let (mut at, mut replies) = (0, 0);
    while at < BLOCKS * BLOCK {
        let left = u32::try_from(BLOCKS * BLOCK - at).expect("a length");
        for (length, flags) in status(raw, 0, at, left) {
            // One block each, by turns.
            assert_eq!(
                (length, flags),
                (BLOCK, if (at / BLOCK).is_multiple_of(2) { 3 } else { 0 }),
                "at {at}"
            );
            at += length;
        }
        replies += 1;
    }
    assert_eq!(at, BLOCKS * BLOCK);
    assert!(replies >= 3, "{replies} replies cannot have been bounded");
    // One is one, and no longer than asked for.
    for (offset, length) in [(0, u32::MAX / 8), (BLOCK, 5), (7, 512), (BLOCKS * BLOCK - 1, 1)] {
        let one = status(raw, REQ_ONE, offset, length);
        assert_eq!(one.len(), 1);
        assert!(one[0].0 <= length.into());
    }
    let map = util::run_ok(["nbdinfo", "--map", "--totals", &server.uri()]);
    let half = (BLOCKS / 2 * BLOCK).to_string();
    assert_eq!(map.matches(&half).count(), 2, "{map}");
}

#[test]
fn lengths_near_the_largest_number() {
    let server = Server::start(["memory", "16G"]);
    let raw = &mut Raw::structured(&server);
    for (offset, length) in [(0, u32::MAX), (1 << 32, u32::MAX - 511), ((16 << 30) - 512, 512), (12_345, 1)] {
        // To the end of the disk, as far as 32 bits can tell.
        let told = ((16_u64 << 30) - offset).min(u32::MAX.into());
        assert_eq!(status(raw, 0, offset, length), [(told, 3)]);
        assert_eq!(status(raw, REQ_ONE, offset, length), [(length.into(), 3)]);
    }
    let server = Server::start(["--filter=noextents", "memory", "16G"]);
    assert_eq!(status(&mut Raw::structured(&server), 0, 0, u32::MAX), [(u32::MAX.into(), 0)]);
}
