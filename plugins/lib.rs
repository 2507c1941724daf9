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

mod backing;
#[cfg(test)]
mod conformance;
mod data;
mod eval;
mod file;
mod full;
mod holes;
mod info;
mod joined;
mod memory;
mod null;
mod ones;
mod partitioning;
mod pattern;
mod sh;
mod split;
#[cfg(test)]
mod testkit;
mod zero;

macro_rules! registry {
    ($($module:ident)*) => {
        /// Name and constructor of each bundled plugin, in alphabetical order.
        const REGISTRY: &[(&str, fn() -> Box<dyn Plugin>)] = &[$((stringify!($module), $module::new)),*];
    };
}

registry! {
    data
    eval
    file
    full
    info
    memory
    null
    ones
    partitioning
    pattern
    sh
    split
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
