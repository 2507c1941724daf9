//! The FUSE front end: exports as files.
//!
//! A mount is one connection to the chain. The kernel's requests are decoded by fuser, checked against the shape of
//! the mount and run through the same [`Session`](nbdkit_core::Session) as those of NBD clients. Requests
//! that need no wait run on the thread that received them; the others are started by the chain, or run on threads of their
//! own.
#![forbid(unsafe_code)]

use std::{ffi::OsString, path::PathBuf, time::Duration};

mod attr;
mod buffer;
mod by_name;
mod coherence;
mod contents;
mod export_file;
mod fs;
mod kernel_mount;
mod mount;
mod mountinfo;
mod mountpoint;
mod observer;
mod options;
mod partitions;
mod passthrough;
mod receivers;
mod reply;
mod request_timeout;
mod requests;
pub mod stats;
mod transfer;
mod tree;
mod volume;

#[cfg(test)]
mod tests;

pub use contents::{Contents, PartContent};
pub use fs::Cache;
pub use kernel_mount::{UnmountMode, remount, unmount};
pub use mount::Mount;
pub use mountinfo::{MountEntry, mounts};
pub use mountpoint::{check_mountpoint, is_stale, resolve};
pub use options::check_options;
pub use tree::{file_names, partition_name, split_partition_name};

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
    /// The one export to show. None: all that the plugin lists, when the mountpoint is a directory, else the
    /// default one.
    pub export: Option<OsString>,
    /// Name of the file of the default export, or of the one export, in a directory.
    pub filename: OsString,
    /// Show the partitions of each export as files beside it.
    pub partitions: bool,
    /// Bytes in a sector of their tables. None: found out.
    pub sector_size: Option<u64>,
    /// What the kernel keeps.
    pub cache: Cache,
    /// A request that takes longer fails with `EIO`.
    pub timeout: Option<Duration>,
    /// What the mount table calls the source, unless an option says so. None: the plugin's name.
    pub source: Option<String>,
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
            export: None,
            filename: "nbd".into(),
            partitions: false,
            sector_size: None,
            cache: Cache::Auto,
            timeout: None,
            source: None,
            options: Vec::new(),
            passthrough: true,
        }
    }
}
