//! A compressed disk that somebody has damaged, or made, through the filter lzip.

#![no_main]

nbdkit_fuzz::format_target!("lzip");
