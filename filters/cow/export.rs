//! Persistent overlays for programs: what `nbdkit-mount --commit` and `--discard` need of one.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _, path::Path};

use nbdkit_core::{Error, Result, Session};

use super::{
    directory,
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
    /// Opens an overlay: the file `path`, or that of `export` in the directory `path`. Without an export it is the only
    /// one in there.
    ///
    /// # Errors
    /// No such file, no overlay, damaged, in use by another process; another export's; several in a directory.
    pub fn open(path: &Path, export: Option<&OsStr>) -> anyhow::Result<Self> {
        let claimed = Claimed::open(&directory::find(path, export)?, false)?;
        let overlay = OverlayFile(claimed);
        anyhow::ensure!(
            overlay.0.header.is_some(),
            "{} is an empty file and not yet an overlay: there is nothing in it",
            overlay.path().display()
        );
        if let (Some(name), Some(export)) = (overlay.export(), export)
            && name != export
        {
            anyhow::bail!(
                "{} holds the changes of export '{}', not those of '{}'",
                overlay.path().display(),
                name.display(),
                export.display()
            );
        }
        Ok(overlay)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// The export whose changes are in it. None: it was made by a version that did not note it.
    pub fn export(&self) -> Option<&OsStr> {
        self.0.header.as_ref()?.export.as_deref().map(OsStr::from_bytes)
    }

    /// Removes the file, and with it all changes.
    ///
    /// # Errors
    /// Those of unlink(2).
    pub fn remove(self) -> anyhow::Result<()> {
        Store::remove(&self.0)
    }

    /// Reads which parts of the disk have changed, and checks that `disk` is the one that it was made over, as it was then
    /// or as an interrupted commit has left it. With `force` it may be any of the same size.
    ///
    /// # Errors
    /// The overlay was made for another disk, or is damaged.
    pub fn changes(self, disk: &Session, force: bool) -> Result<Changes> {
        let export = self.export().unwrap_or_default().to_owned();
        // The block size is that of the file.
        let store = Store::new(self.0, &export, disk.size(), super::DEFAULT_BLOCK_SIZE)
            .map_err(|(_, e): (_, Error)| e)?;
        let overlay = Overlay::persistent(store)?;
        overlay.identify(disk, force)?;
        Ok(Changes(overlay))
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

    /// To be called before the first change goes to the disk, which differs from what the overlay knows from then on.
    ///
    /// # Errors
    /// Those of the file.
    pub fn begin(&self) -> Result<()> {
        self.0.begin_commit()
    }

    /// Forgets all changes, durably, for they are on the disk. A crash on the way leaves some of them, each of them whole.
    ///
    /// # Errors
    /// Those of the file.
    pub fn finish(&self, disk: &Session) -> Result<()> {
        self.0.end_commit(disk)?;
        self.0.clear()
    }
}
