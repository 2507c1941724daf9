//! The memory plugin: a disk in memory, sparse and shared by all connections.
//!
//! The disks themselves are here too, for the data plugin has the same: [`Allocator`] makes a [`Storage`], and [`Shared`] is
//! a connection to it.

use std::{ffi::OsStr, sync::Arc};

use anyhow::Context as _;
use nbdkit_core::{Errno, Error, Handle, Info, Open, Plugin, Result, ShutdownFlag, params};

mod allocator;
mod compressed;
mod handle;
mod mapping;
mod plain;
#[cfg(test)]
mod tests;

pub(crate) use self::{
    allocator::{Allocator, Storage},
    handle::Shared,
};

/// The lines of `config_help` for `allocator=`.
macro_rules! allocator_help {
    () => {
        "allocator=sparse|malloc[,mlock=BOOL]|zstd[,level=N]\n\
         \u{20}                       How memory is kept (default: sparse): mlock=true keeps it out of swap,\n\
         \u{20}                       zstd compresses it"
    };
}
pub(crate) use allocator_help;

pub(crate) fn new() -> Box<dyn Plugin> {
    Box::<Memory>::default()
}

#[derive(Default)]
struct Memory {
    size: Option<u64>,
    allocator: Allocator,
    /// `-D memory.dir`: see [`Storage::told`].
    tell_pages: bool,
    disk: Option<Arc<Storage>>,
}

impl Plugin for Memory {
    fn info(&self) -> Info {
        Info::bundled(
            "memory",
            "a sparse disk in memory",
            concat!("[size=]SIZE  (required) Size of the disk\n", allocator_help!()),
        )
        .magic("size")
    }

    fn callbacks(&self) -> Option<Vec<&'static str>> {
        let life = ["block_size", "config_complete", "dump_plugin", "get_ready", "after_fork"];
        Some([crate::EVERYTHING, &life].concat())
    }

    fn debug_flag(&mut self, name: &str, value: i32) -> bool {
        let known = name == "dir";
        if known {
            self.tell_pages = value != 0;
        }
        known
    }

    fn config(&mut self, key: &str, value: &OsStr) -> anyhow::Result<bool> {
        match key {
            "size" => self.size = Some(params::size(value)?),
            "allocator" => self.allocator = Allocator::parse(value)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn config_complete(&mut self) -> anyhow::Result<()> {
        self.size.context("you must specify size=SIZE on the command line, such as size=1G")?;
        Ok(())
    }

    fn dump(&self) -> Vec<(String, String)> {
        Allocator::dump()
    }

    fn get_ready(&mut self) -> anyhow::Result<()> {
        let size = self.size.context("the size is not known yet")?;
        let disk = self.allocator.make(size)?.told(self.tell_pages.then_some("memory"));
        self.disk = Some(Arc::new(disk));
        Ok(())
    }

    fn after_fork(&self, _: &Arc<ShutdownFlag>) -> anyhow::Result<()> {
        self.disk.as_ref().map_or(Ok(()), |disk| disk.after_fork())
    }

    fn open(&self, _: &Open) -> Result<Box<dyn Handle>> {
        let disk = self.disk.clone().ok_or_else(|| Error::new(Errno::EINVAL, "memory is not ready"))?;
        Ok(Box::new(Shared::new(disk)))
    }
}
