//! The bundled plugins: one file each, and this registry.
//!
//! To add one, write its file with a `pub(crate) fn new() -> Box<dyn Plugin>`, and put its `mod` line and its name into
//! the two lists below: rustfmt does not see modules that a macro declares.

#![deny(unsafe_code)]

use nbdkit_core::Plugin;

/// The callbacks of a disk that can do everything, as [`Plugin::callbacks`] names them.
const EVERYTHING: &[&str] = &[
    "can_write",
    "can_flush",
    "can_trim",
    "can_zero",
    "can_fast_zero",
    "can_fua",
    "can_multi_conn",
    "can_cache",
    "can_extents",
    "pwrite",
    "flush",
    "trim",
    "zero",
    "extents",
    "cache",
];
/// Those of a disk that any number of clients may read.
const READ_ONLY: &[&str] = &["can_multi_conn", "can_cache", "cache"];

mod block_file;
mod concat;
#[cfg(test)]
mod conformance;
mod curl;
mod data;
mod eval;
mod example1;
mod example2;
mod example3;
mod example4;
mod file;
mod floppy;
mod full;
mod holes;
mod image;
mod info;
mod inherit;
mod iso;
mod linuxdisk;
mod lock;
mod maker;
mod memory;
mod nbd;
mod noise;
mod null;
mod ondemand;
mod ones;
mod open_disk;
mod partitioning;
mod pattern;
mod random;
mod secret;
mod sh;
mod sparse_random;
mod split;
#[cfg(test)]
mod testkit;
mod tmpdisk;
mod waiter;
mod zero;

macro_rules! registry {
    ($($module:ident $(= $name:literal)?)*) => {
        /// Name and constructor of each bundled plugin, in alphabetical order.
        const REGISTRY: &[(&str, fn() -> Box<dyn Plugin>)] =
            &[$((registry!(@name $module $($name)?), $module::new)),*];
    };
    (@name $module:ident) => { stringify!($module) };
    (@name $module:ident $name:literal) => { $name };
}

registry! {
    curl
    data
    eval
    example1
    example2
    example3
    example4
    file
    floppy
    full
    info
    iso
    linuxdisk
    memory
    nbd
    null
    ondemand
    ones
    partitioning
    pattern
    random
    sh
    sparse_random = "sparse-random"
    split
    tmpdisk
    zero
}

/// The names of the bundled plugins, in alphabetical order.
pub fn names() -> impl Iterator<Item = &'static str> {
    REGISTRY.iter().map(|(name, _)| *name)
}

/// A new, unconfigured plugin of that name, if it is bundled.
pub fn load(name: &str) -> Option<Box<dyn Plugin>> {
    REGISTRY.iter().find(|(n, _)| *n == name).map(|(_, new)| new())
}

/// The bundled plugin that takes that URI, and the parameter that it is for.
pub fn for_uri(uri: &str) -> Option<(&'static str, &'static str)> {
    let curl = || curl::is_uri(uri).then_some(("curl", "url"));
    nbd::is_uri(uri).then_some(("nbd", "uri")).or_else(curl)
}
