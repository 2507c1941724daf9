//! The bundled filters: one file each, and this registry.
//!
//! To add one, write its file with a `pub(crate) fn new() -> Box<dyn Filter>`, and put its `mod` line and its name into
//! the two lists below: rustfmt does not see modules that a macro declares. A name with dashes follows its module:
//! `multi_conn = "multi-conn"`.

#![deny(unsafe_code)]

use nbdkit_core::Filter;

pub use self::cow::export::{Change, Changes, OverlayFile};

mod blocksize;
mod blocksize_policy;
mod bzip2;
mod checkwrite;
mod compare;
mod count;
mod cow;
mod decompress;
mod delay;
mod error;
mod exitlast;
mod exitwhen;
mod exportname;
#[cfg(test)]
mod exports_tests;
mod finalize_on_drop;
#[cfg(test)]
mod flaky;
mod fua;
mod gzip;
mod indexed_gzip;
mod ip;
mod limit;
mod log;
mod luks;
mod lzip;
mod map;
mod multi_conn;
mod nocache;
mod noextents;
mod nofilter;
mod noparallel;
mod nozero;
mod offset;
mod openonce;
mod partition;
mod passthrough;
mod pause;
mod protect;
mod rate;
mod readonly;
mod retry;
mod retry_request;
mod rotational;
mod stats;
mod subrange;
mod swab;
#[cfg(test)]
mod testing;
mod time_limit;
mod tls_fallback;
mod truncate;
mod wildcard;
mod xz;
mod zstd;

macro_rules! registry {
    ($($module:ident $(= $name:literal)?)*) => {
        /// Name and constructor of each bundled filter, in alphabetical order.
        const REGISTRY: &[(&str, fn() -> Box<dyn Filter>)] =
            &[$((registry!(@name $module $($name)?), $module::new)),*];
    };
    (@name $module:ident) => { stringify!($module) };
    (@name $module:ident $name:literal) => { $name };
}

registry! {
    blocksize
    blocksize_policy = "blocksize-policy"
    bzip2
    checkwrite
    count
    cow
    delay
    error
    exitlast
    exitwhen
    exportname
    fua
    gzip
    indexed_gzip = "indexed-gzip"
    ip
    limit
    log
    luks
    lzip
    map
    multi_conn = "multi-conn"
    nocache
    noextents
    nofilter
    noparallel
    nozero
    offset
    openonce
    partition
    pause
    protect
    rate
    readonly
    retry
    retry_request = "retry-request"
    rotational
    stats
    swab
    time_limit = "time-limit"
    tls_fallback = "tls-fallback"
    truncate
    xz
    zstd
}

/// The names of the bundled filters, in alphabetical order.
pub fn names() -> impl Iterator<Item = &'static str> {
    REGISTRY.iter().map(|(name, _)| *name)
}

/// A new, unconfigured filter of that name, if it is bundled.
pub fn load(name: &str) -> Option<Box<dyn Filter>> {
    REGISTRY.iter().find(|(n, _)| *n == name).map(|(_, new)| new())
}
