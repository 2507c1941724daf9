//! A compressed disk that somebody has damaged, or made, through the filter bzip2.

#![no_main]

nbdkit_fuzz::format_target!("bzip2");
