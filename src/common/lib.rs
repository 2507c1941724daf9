//! Helpers that several plugins and filters share: pure data structures and formats, no I/O.

#![forbid(unsafe_code)]

mod bitmap;

pub use bitmap::Bitmap;
