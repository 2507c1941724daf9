//! The FUSE front end, through the kernel and its tools.

mod file;
mod filesystem;
mod life;
mod loop_mount;
mod overlay;
mod shared_mapping;
mod stats;
mod system;
mod tables;
mod tree;
mod two_front_ends;
