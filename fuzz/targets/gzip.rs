//! A compressed disk that somebody has damaged, or made, through the filter gzip.

#![no_main]

nbdkit_fuzz::format_target!("gzip");
