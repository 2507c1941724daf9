//! A compressed disk that somebody has damaged, or made, through the filter xz.

#![no_main]

nbdkit_fuzz::format_target!("xz");
