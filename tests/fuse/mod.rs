//! The FUSE front end, through the kernel and its tools.

mod file;
mod filesystem;
mod inside;
mod life;
mod list;
mod logical_volumes;
mod loop_mount;
mod overlay;
mod shared_mapping;
mod stats;
mod system;
mod tables;
mod tree;
mod two_front_ends;
