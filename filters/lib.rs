//! The bundled filters: one file each, and this registry.
//!
//! To add one, write its file with a `pub(crate) fn new() -> Box<dyn Filter>` and put its name into the list below.
//! A name with dashes follows its module: `multi_conn = "multi-conn"`.

#![deny(unsafe_code)]

use nbdkit_core::Filter;

pub use self::cow::export::{Change, Changes, OverlayFile};

macro_rules! registry {
    ($($module:ident $(= $name:literal)?)*) => {
        $(mod $module;)*

        /// Name and constructor of each bundled filter, in alphabetical order.
        const REGISTRY: &[(&str, fn() -> Box<dyn Filter>)] =
            &[$((registry!(@name $module $($name)?), $module::new)),*];
    };
    (@name $module:ident) => { stringify!($module) };
    (@name $module:ident $name:literal) => { $name };
}

mod contents;
#[cfg(test)]
mod flaky;
mod opened;
mod part;
#[cfg(test)]
mod testing;
mod transparent;
mod wildcard;

registry! {
    blocksize
    blocksize_policy = "blocksize-policy"
    checkwrite
    count
    cow
    delay
    error
    exitlast
    exitwhen
    exportname
    fua
    ip
    limit
    log
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
}

/// The names of the bundled filters, in alphabetical order.
pub fn names() -> impl Iterator<Item = &'static str> {
    REGISTRY.iter().map(|(name, _)| *name)
}

/// A new, unconfigured filter of that name, if it is bundled.
pub fn load(name: &str) -> Option<Box<dyn Filter>> {
    REGISTRY.iter().find(|(n, _)| *n == name).map(|(_, new)| new())
}
