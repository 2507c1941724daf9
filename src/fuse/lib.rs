//! The FUSE door: an export as a file.
//!
//! A mount is one connection to the chain. The kernel's requests are decoded by fuser, checked against the shape of
//! the mount and run through the same [`Session`](nbdkit_core::Session) as those of NBD clients. Requests
//! that need no wait run on the thread that received them; the others go to a pool.
#![forbid(unsafe_code)]

use std::{ffi::OsString, path::PathBuf};

mod attr;
mod buffer;
mod device;
mod door;
mod fs;
mod mount;
mod mountinfo;
mod mountpoint;
mod observer;
mod options;
mod passthrough;
mod pool;
pub mod stats;
mod tree;

#[cfg(test)]
mod tests;

pub use mount::Mount;
pub use mountpoint::check_mountpoint;

/// What is mounted where, and how.
#[derive(Clone, Debug)]
pub struct Config {
    /// A directory, in which the export appears as a file, or a regular file, which the export covers.
    pub mountpoint: PathBuf,
    /// Refuse to write, even if the chain could.
    pub readonly: bool,
    /// Requests that may be in the chain at once, as far as the thread model allows. 0: the default, 16; 1: strictly
    /// one after the other.
    pub threads: usize,
    /// The export; empty: the default one.
    pub export_name: OsString,
    /// Name of the file in a directory.
    pub filename: OsString,
    /// Mount options, each as after `-o`.
    pub options: Vec<String>,
    /// Let the kernel read the underlying file by itself where that changes nothing.
    pub passthrough: bool,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            mountpoint: PathBuf::new(),
            readonly: false,
            threads: 0,
            export_name: OsString::new(),
            filename: "nbd".into(),
            options: Vec::new(),
            passthrough: true,
        }
    }
}
