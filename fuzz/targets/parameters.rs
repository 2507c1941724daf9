//! What people write on the command line: sizes, delays, probabilities, ranges, rules. One that is taken means what it
//! says a second time too.

#![no_main]

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;

use libfuzzer_sys::fuzz_target;
use nbdkit_core::params;
use nbdkit_fuzz::Disk;

/// Filters with a language of their own in a parameter.
const RULES: &[(&str, &str)] = &[
    ("ip", "allow"),
    ("ip", "deny"),
    ("map", "map"),
    ("protect", "protect"),
    ("delay", "rdelay"),
    ("error", "error-rate"),
    ("rate", "rate"),
    ("offset", "offset"),
    ("truncate", "round-up"),
    ("blocksize", "maxlen"),
    ("blocksize-policy", "blocksize-minimum"),
    ("retry", "retry-delay"),
    ("swab", "swab-bits"),
    ("limit", "limit"),
    ("partition", "partition"),
];

fuzz_target!(|input: &[u8]| {
    let Some((which, text)) = input.split_first() else { return };
    if text.contains(&0) {
        return;
    }
    let value = OsStr::from_bytes(text);
    let _ = params::size(value);
    let _ = params::delay(value);
    let _ = params::probability(value);
    let _ = params::boolean(value);
    let _ = params::integer::<u32>("number", value);
    let (filter, key) = RULES[usize::from(*which) % RULES.len()];
    if let Some(chain) = Disk::readonly(vec![7; 4096]).chain(&[filter], &[(key, value)])
        && !matches!(filter, "delay" | "rate" | "retry")
    {
        let _ = nbdkit_fuzz::open(&chain, true).map(|session| {
            let mut buf = [0; 64];
            let length = session.size().min(64);
            if length > 0 {
                let _ = session.pread(&mut buf[..length as usize], 0);
            }
        });
    }
});
