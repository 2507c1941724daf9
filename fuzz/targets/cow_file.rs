//! An overlay file that somebody has damaged, or made.

#![no_main]

use std::{ffi::OsStr, io::Write as _};

use libfuzzer_sys::fuzz_target;
use nbdkit_fuzz::Disk;

fuzz_target!(|input: &[u8]| {
    let Ok(mut file) = tempfile::NamedTempFile::new_in("/dev/shm") else { return };
    let _ = file.write_all(input);
    let path: &OsStr = file.path().as_os_str();
    if let Some(chain) = Disk::readonly(vec![3; 256 << 10]).chain(&["cow"], &[("cow-file", path)]) {
        nbdkit_fuzz::explore(&chain, 256 << 10);
    }
});
