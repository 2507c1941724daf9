//! Helpers that several plugins, filters and front ends share: pure data structures and formats, no I/O.
//!
//! What parses disks takes a closure that reads, so that a disk may be anything, and is bounded in time and memory whatever
//! the disk holds.

#![forbid(unsafe_code)]

mod bitmap;
mod content;
mod disk;
mod format;
mod guid;
mod layout;
pub mod lvm;
mod regions;
mod survey;
mod table;

pub use bitmap::Bitmap;
pub use content::{Content, Usage, detect_content};
pub use disk::read_aligned;
pub use format::{HEAD, ImageFormat, TAIL};
pub use guid::{Guid, LINUX};
pub use layout::{Layout, LayoutError, NewPartition};
pub use regions::{Piece, Region, Regions};
pub use survey::Survey;
pub use table::{Kind, Partition, SECTOR, SECTOR_SIZES, Scheme, Table, TableError, read_table};
