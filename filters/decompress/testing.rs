//! What the tests of the formats share: disks that are worth compressing, sessions over compressed bytes, and damage.

use std::{
    io::Write as _,
    process::{Command, Stdio},
};

use nbdkit_core::{Errno, Session};

use crate::testing::{Spec, chain, client, open};

/// A disk of text, numbers and zeroes, different everywhere: it compresses to about a third.
pub(crate) fn disk(size: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut disk = Vec::with_capacity(size + 16);
    while disk.len() < size {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        match (disk.len() >> 16) % 3 {
            0 => disk.extend(b"the quick brown fox ".iter().take(3 + (state >> 60) as usize)),
            1 => disk.extend((state >> 24).to_le_bytes()),
            _ => disk.extend([0; 64]),
        }
    }
    disk.truncate(size);
    disk
}

/// What a program makes of `input`, such as `xz --block-size=64KiB`.
#[track_caller]
pub(crate) fn pipe(command: &str, input: &[u8]) -> Vec<u8> {
    let words: Vec<_> = command.split(' ').collect();
    let mut child = Command::new(words[0])
        .args(&words[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{command}: {e}"));
    let mut stdin = child.stdin.take().unwrap();
    let out = std::thread::scope(|scope| {
        // It need not read it.
        scope.spawn(move || stdin.write_all(input));
        child.wait_with_output().unwrap()
    });
    assert!(out.status.success(), "{command}: {}", out.status);
    out.stdout
}

/// A disk with that content, compressed.
pub(crate) fn over(compressed: Vec<u8>) -> Spec {
    Spec { data: compressed, blocks: |_| true, ..Spec::default() }
}

/// A session of a filter over a compressed file.
#[track_caller]
pub(crate) fn session(spec: Spec, filter: &str, params: &[(&str, &str)]) -> Session {
    try_session(spec, filter, params).unwrap()
}

pub(crate) fn try_session(spec: Spec, filter: &str, params: &[(&str, &str)]) -> nbdkit_core::Result<Session> {
    open(&chain(&spec.disk(), &[filter], params).unwrap(), client(), true)
}

/// All of it is there, read in pieces of any length.
#[track_caller]
pub(crate) fn holds(session: &Session, expected: &[u8]) {
    assert_eq!(session.size(), expected.len() as u64);
    for length in [700, 4096, 100_000] {
        for start in (0..expected.len()).step_by(expected.len() / 50 + 1) {
            let end = (start + length).min(expected.len());
            let mut buf = vec![0xee; end - start];
            session.pread(&mut buf, start as u64).unwrap();
            assert!(buf == expected[start..end], "{length} bytes at {start}");
        }
    }
    let mut all = vec![0xee; expected.len()];
    session.pread(&mut all, 0).unwrap();
    assert!(all == expected, "all of it");
}

/// How many blocks of `block` bytes can be read; what is read is right, and the others fail with EIO.
#[track_caller]
pub(crate) fn readable(session: &Session, expected: &[u8], block: usize) -> usize {
    let blocks = expected.chunks(block).enumerate();
    blocks
        .filter(|(i, chunk)| {
            let mut buf = vec![0; chunk.len()];
            match session.pread(&mut buf, (i * block) as u64) {
                Ok(()) => {
                    assert!(buf == **chunk, "wrong data in block {i}");
                    true
                }
                Err(e) => {
                    assert_eq!(e.errno(), Errno::EIO, "{e}");
                    false
                }
            }
        })
        .count()
}

/// No damage makes a filter panic, hang or give out wrong data: one byte after the other is changed, and the file is cut.
#[track_caller]
pub(crate) fn survives_damage(compressed: &[u8], expected: &[u8], filter: &str, params: &[(&str, &str)]) {
    let step = compressed.len() / 150 + 1;
    let edges = (0..40).chain(compressed.len().saturating_sub(60)..compressed.len());
    for at in (0..compressed.len()).step_by(step).chain(edges).filter(|at| *at < compressed.len()) {
        let mut damaged = compressed.to_vec();
        damaged[at] ^= 0x55;
        check_damaged(damaged, expected, filter, params, at);
        check_damaged(compressed[..at].to_vec(), expected, filter, params, at);
    }
}

fn check_damaged(damaged: Vec<u8>, expected: &[u8], filter: &str, params: &[(&str, &str)], at: usize) {
    let Ok(session) = try_session(over(damaged), filter, params) else { return };
    for (i, chunk) in expected.chunks(50_000).enumerate() {
        let start = i as u64 * 50_000;
        if start + chunk.len() as u64 > session.size() {
            break;
        }
        let mut buf = vec![0; chunk.len()];
        if session.pread(&mut buf, start).is_ok() {
            assert!(buf == *chunk, "damage at {at}: wrong data at {start}");
        }
    }
}
