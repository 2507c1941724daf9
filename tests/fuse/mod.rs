//! The FUSE door, through the kernel and its tools.

mod file;
mod filesystem;
mod life;
mod overlay;
mod stats;
mod two_doors;
