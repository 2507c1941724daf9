//! What every end-to-end test needs: servers and mounts that clean up after themselves, and foreign clients.

pub(crate) mod raw;

mod bridge;
mod client;
pub(crate) mod examples;
mod server;

pub(crate) use bridge::bridge;
pub(crate) use client::{Run, nbdsh, qemu_io, run, run_ok, sh};
pub(crate) use server::{Mount, NBDKIT, NBDKIT_MOUNT, Server};

use std::path::{Path, PathBuf};

/// Whether this machine lacks something, which `scripts/check` finds out and says. A test that returns early does
/// so for nothing else: what is missing and was not declared fails it.
pub(crate) fn is_left_out(what: &str) -> bool {
    std::env::var("NBDKIT_LEFT_OUT").unwrap_or_default().split(' ').any(|left_out| left_out == what)
}

/// A new temporary directory.
pub(crate) fn temp() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("nbdkit-test").tempdir().expect("a temporary directory")
}

/// A sparse file of `size` bytes.
pub(crate) fn image(dir: &Path, name: &str, size: u64) -> PathBuf {
    let path = dir.join(name);
    let file = std::fs::File::create(&path).expect("create an image");
    file.set_len(size).expect("size the image");
    path
}

/// A file with bytes that tell their place: no two blocks are alike.
pub(crate) fn patterned(dir: &Path, name: &str, size: usize) -> PathBuf {
    let path = dir.join(name);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(size + 8);
    while bytes.len() < size {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(size);
    std::fs::write(&path, bytes).expect("write an image");
    path
}
