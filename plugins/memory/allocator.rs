//! Where a disk in memory keeps its data: what `allocator=` chooses.

use std::ffi::OsStr;

use anyhow::{Context as _, bail};
use nbdkit_core::{BlockSize, params};

use super::{
    compressed::{self, Compressed},
    plain::{self, Plain},
};

/// The chosen allocator.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Allocator {
    #[default]
    Sparse,
    /// `mlock`: all is allocated at the start and stays in memory.
    Malloc { mlock: bool },
    /// The level is that of zstd(1).
    Zstd { level: i32 },
}

impl Allocator {
    /// Parses the parameter `allocator=`.
    ///
    /// # Errors
    /// An allocator or an option that is not known.
    pub(crate) fn parse(value: &OsStr) -> anyhow::Result<Self> {
        let value = params::text(value)?;
        let (name, options) = match value.split_once(',') {
            Some((name, options)) => (name, options.split(',').collect()),
            None => (value, Vec::new()),
        };
        let mut allocator = match name {
            "sparse" => Self::Sparse,
            "malloc" => Self::Malloc { mlock: false },
            "zstd" => Self::Zstd { level: zstd::DEFAULT_COMPRESSION_LEVEL },
            _ => bail!("unknown allocator \"{name}\": use sparse, malloc or zstd"),
        };
        for option in options {
            match (&mut allocator, option.split_once('=')) {
                (Self::Malloc { mlock }, Some(("mlock", value))) => {
                    *mlock = params::boolean(OsStr::new(value))?;
                }
                (Self::Malloc { .. }, _) => {
                    bail!("allocator=malloc: unknown parameter {option}: use mlock=true or mlock=false")
                }
                (Self::Zstd { level }, Some(("level", value))) => {
                    *level = params::integer("level", OsStr::new(value))?;
                    let range = zstd::compression_level_range();
                    if !range.contains(level) {
                        bail!("allocator=zstd: level must be from {} to {}", range.start(), range.end());
                    }
                }
                (Self::Zstd { .. }, _) => {
                    bail!("allocator=zstd does not take extra parameters but level=N: {option}")
                }
                (Self::Sparse, _) => bail!("allocator=sparse does not take extra parameters: {option}"),
            }
        }
        Ok(allocator)
    }

    /// A new disk of `size` bytes, all zero.
    ///
    /// # Errors
    /// Those of the system.
    pub(crate) fn make(self, size: u64) -> anyhow::Result<Storage> {
        let plain =
            |mlock| Plain::new(size, mlock).with_context(|| format!("could not make a disk of {size} bytes"));
        let (data, preferred) = match self {
            Self::Sparse => (Data::Plain(plain(false)?), 32768),
            Self::Malloc { mlock } => (Data::Plain(plain(mlock)?), 512),
            Self::Zstd { level } => (Data::Compressed(Compressed::new(size, level)), 32768),
        };
        Ok(Storage { data, preferred, told: None })
    }

    /// What `--dump-plugin` tells of allocators: scripts look there before they use one.
    pub(crate) fn dump() -> Vec<(String, String)> {
        vec![("mlock".into(), "yes".into()), ("zstd".into(), "yes".into())]
    }
}

/// A disk, one for all connections.
pub(crate) struct Storage {
    pub(super) data: Data,
    preferred: u32,
    told: Option<&'static str>,
}

pub(super) enum Data {
    Plain(Plain),
    Compressed(Compressed),
}

impl Storage {
    /// The same, whose pages that are written and given up are told in the log, as those of the plugin of that name.
    pub(crate) fn told(self, plugin: Option<&'static str>) -> Self {
        Storage { told: plugin, ..self }
    }

    /// Whether all requests have to be seen here.
    pub(super) fn is_told(&self) -> bool {
        self.told.is_some()
    }

    /// Tells what becomes of the pages of a range.
    fn tell(&self, what: &str, length: u64, at: u64) {
        if let (Some(plugin), Some(last)) = (self.told, length.checked_sub(1)) {
            let (size, page) = match &self.data {
                Data::Plain(_) => (plain::PAGE, "page"),
                Data::Compressed(_) => (compressed::PAGE, "compressed page"),
            };
            let (from, to) = (at / size, (at + last) / size);
            log::debug!(
                "{plugin}: dir: {page} {from} to {to}, of {size} bytes: {what} {length} bytes at {at}"
            );
        }
    }

    /// Writes to the disk.
    ///
    /// # Errors
    /// Those of the system.
    pub(crate) fn write(&self, data: &[u8], at: u64) -> nbdkit_core::Result<()> {
        self.tell("write", data.len() as u64, at);
        match &self.data {
            Data::Plain(plain) => plain.write(data, at),
            Data::Compressed(compressed) => compressed.write(data, at),
        }
    }

    /// Makes a range read as zeroes, a hole as far as it is whole pages.
    ///
    /// # Errors
    /// Those of the system.
    pub(crate) fn clear(&self, length: u64, at: u64) -> nbdkit_core::Result<()> {
        self.tell("clear", length, at);
        match &self.data {
            Data::Plain(plain) => plain.punch(length, at),
            Data::Compressed(compressed) => compressed.zero(length, at),
        }
    }

    /// What has to be done in the process that serves: locks on memory do not survive a fork.
    ///
    /// # Errors
    /// Those of mlock(2).
    pub(crate) fn after_fork(&self) -> anyhow::Result<()> {
        match &self.data {
            Data::Plain(plain) => plain.pin(),
            Data::Compressed(_) => Ok(()),
        }
    }

    pub(super) fn size(&self) -> u64 {
        match &self.data {
            Data::Plain(plain) => plain.size(),
            Data::Compressed(compressed) => compressed.size(),
        }
    }

    pub(super) fn block_size(&self) -> BlockSize {
        BlockSize { minimum: 1, preferred: self.preferred, maximum: u32::MAX }
    }
}
