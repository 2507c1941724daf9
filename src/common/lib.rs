//! Helpers that several plugins and filters share: pure data structures and formats, no I/O.

#![forbid(unsafe_code)]

mod bitmap;
mod format;
mod gpt;
mod guid;
mod mbr;
mod partition;
mod regions;

pub use bitmap::Bitmap;
pub use format::{HEAD, ImageFormat, TAIL};
pub use guid::{Guid, LINUX};
pub use partition::{
    Kind, Layout, LayoutError, NewPartition, Partition, SECTOR, Scheme, Table, TableError, read_table,
};
pub use regions::{Piece, Region, Regions};
