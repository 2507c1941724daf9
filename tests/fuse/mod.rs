//! The FUSE door, through the kernel and its tools.

mod file;
mod filesystem;
mod inside;
mod life;
mod overlay;
mod stats;
mod system;
mod tree;
mod two_doors;
