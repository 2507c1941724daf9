//! The C interface as Rust types: the structures that plugins and filters register, those they are given, and the
//! constants. Types only; what they mean is the loader's matter and nbdkit-plugin(3)'s.
//!
//! A layout here is a promise to binaries that exist: fields are never moved, and new ones come last. The loader's
//! tests compare every offset with the C headers.

#![no_std]
#![forbid(unsafe_code)]

mod constants;
mod filter;
mod plugin;

pub use constants::*;
pub use filter::{
    Export, Extent, FilterCallbacks, FilterHead, FilterV132, FilterV136, FilterV144, NextConfig,
    NextConfigComplete, NextDefaultExport, NextListExports, NextOpen, NextOps, NextPreconnect,
};
pub use plugin::{Plugin, PluginInit};
