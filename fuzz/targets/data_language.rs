//! The language of the data plugin, without what it reads from files and scripts.

#![no_main]

use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _};

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    if input.contains(&b'<') || input.contains(&b'$') || input.contains(&0) {
        return;
    }
    let plugin = nbdkit_plugins::load("data").expect("the data plugin");
    let params = [("data", OsStr::from_bytes(input))];
    if let Some(chain) = nbdkit_fuzz::chain(plugin, Vec::new(), &params) {
        nbdkit_fuzz::explore(&chain, 1 << 20);
    }
});
