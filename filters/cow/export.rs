//! Persistent overlays for programs: what `nbdkit-mount --commit` and `--discard` need of one.

use std::path::Path;

use nbdkit_core::{Error, Result};

use super::{
    overlay::{Overlay, State},
    store::{Claimed, Store},
};

/// A persistent overlay of the cow filter, opened by this process alone.
pub struct OverlayFile(Claimed);

/// What an overlay holds in place of a range of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// Start on the disk, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
    /// It reads as zeroes; else [`Changes::read`] tells the data.
    pub zero: bool,
}

impl OverlayFile {
    /// Opens an overlay.
    ///
    /// # Errors
    /// No such file, no overlay, damaged, in use by another process.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let claimed = Claimed::open(path, false)?;
        anyhow::ensure!(
            claimed.header.is_some(),
            "{} is an empty file and not yet an overlay: there is nothing in it",
            path.display()
        );
        Ok(OverlayFile(claimed))
    }

    /// Removes the file, and with it all changes.
    ///
    /// # Errors
    /// Those of unlink(2).
    pub fn remove(self) -> anyhow::Result<()> {
        Store::remove(&self.0)
    }

    /// Reads which parts of a disk of `size` bytes have changed.
    ///
    /// # Errors
    /// The overlay was made for another disk, or is damaged.
    pub fn changes(self, size: u64) -> Result<Changes> {
        // The block size is that of the file.
        let store = Store::new(self.0, size, super::DEFAULT_BLOCK_SIZE).map_err(|(_, e): (_, Error)| e)?;
        Ok(Changes(Overlay::persistent(store)?))
    }
}

impl std::fmt::Debug for OverlayFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "OverlayFile({})", self.0.path.display())
    }
}

/// The changes in an overlay.
pub struct Changes(Overlay);

impl std::fmt::Debug for Changes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Changes(of {} bytes)", self.0.size())
    }
}

impl Changes {
    /// The changes in order; neighbours differ in kind.
    pub fn iter(&self) -> impl Iterator<Item = Change> {
        self.0.spans(0, self.0.size()).filter_map(|span| {
            let zero = match span.state {
                State::Below => return None,
                State::Stored => false,
                State::Discarded => true,
            };
            Some(Change { offset: span.offset, length: span.length, zero })
        })
    }

    /// Reads changed data, all of it within one change that is not zero.
    ///
    /// # Errors
    /// Those of the file.
    pub fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.0.read(buf, offset)
    }

    /// Forgets all changes, durably. A crash on the way leaves some of them, each of them whole.
    ///
    /// # Errors
    /// Those of the file.
    pub fn clear(&self) -> Result<()> {
        self.0.clear()
    }
}
