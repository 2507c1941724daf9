//! The bundled plugins: one file each, and this registry.
//!
//! To add one, write its file with a `pub(crate) fn new() -> Box<dyn Plugin>` and put its name into the list below.

#![deny(unsafe_code)]

use nbdkit_core::Plugin;

mod backing;
#[cfg(test)]
mod conformance;
mod holes;
mod joined;
#[cfg(test)]
mod testkit;

macro_rules! registry {
    ($($module:ident)*) => {
        $(mod $module;)*

        /// Name and constructor of each bundled plugin, in alphabetical order.
        const REGISTRY: &[(&str, fn() -> Box<dyn Plugin>)] = &[$((stringify!($module), $module::new)),*];
    };
}

registry! {
    data
    file
    full
    info
    memory
    null
    ones
    partitioning
    pattern
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
