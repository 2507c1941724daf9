//! A disk with any partition table, through the partition filter.

#![no_main]

use std::ffi::OsStr;

use libfuzzer_sys::fuzz_target;
use nbdkit_fuzz::Disk;

fuzz_target!(|input: &[u8]| {
    let Some((which, bytes)) = input.split_first() else { return };
    let disk = Disk::new(bytes.to_vec());
    let number = (which % 9 + 1).to_string();
    if let Some(chain) = disk.chain(&["partition"], &[("partition", OsStr::new(&number))]) {
        nbdkit_fuzz::explore(&chain, 1 << 20);
    }
});
