//! Which export has which overlay, and where those lie.
//!
//! Each export has its own, for their disks have nothing to do with each other. All connections to an export share it.

use std::{
    collections::HashMap,
    ffi::{OsStr, OsString},
    fs::File,
    ops::Deref,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, ensure};
use nbdkit_core::{Errno, Error, Next, Result};
use parking_lot::Mutex;

use super::{
    DEFAULT_BLOCK_SIZE,
    overlay::Overlay,
    store::{Claimed, Store, wrong_export},
};
use crate::cow::directory;

/// Where the overlay goes unless TMPDIR says otherwise: it may be too large for a disk in memory.
const DEFAULT_TMPDIR: &str = "/var/tmp";

/// See the module.
pub(super) struct Overlays {
    place: Place,
    block_size: Option<u64>,
    /// Take another base, or one that has changed.
    force: bool,
    exports: Mutex<HashMap<OsString, Arc<Slot>>>,
}

/// The overlay of an export; None: nobody has it open, or it is being opened under the lock.
type Slot = Mutex<Option<Arc<Overlay>>>;

/// What the overlays lie in.
enum Place {
    /// Temporary files in a directory. The first one was opened early, so that it is an error of the start when none can be.
    Temporary(PathBuf, Mutex<Option<Arc<File>>>),
    /// A file, for one export.
    File(PathBuf, Mutex<Early>),
    /// A directory with a file for each export.
    Directory(PathBuf),
}

/// How far an overlay's only file is.
enum Early {
    /// It was opened early; the first client tells the size of the disk.
    New(Claimed),
    /// The same, for one that has something in it.
    Loaded(Arc<Overlay>),
    /// This export has it.
    Taken(OsString),
    /// It could not be opened.
    Lost,
}

impl Overlays {
    /// Overlays in temporary files, or in `path`, which is a file or a directory. A path that ends in a slash is a directory
    /// that is made where there is none.
    ///
    /// # Errors
    /// No overlay, damaged, in use; those of open(2).
    pub(super) fn new(
        path: Option<&Path>,
        block_size: Option<u64>,
        force: bool,
    ) -> anyhow::Result<Arc<Self>> {
        let place = match path {
            None => {
                let dir = std::env::var_os("TMPDIR").filter(|dir| !dir.is_empty());
                // The server may leave its directory.
                let dir = std::path::absolute(dir.unwrap_or(DEFAULT_TMPDIR.into()))?;
                let first = temporary_file(&dir)?;
                Place::Temporary(dir, Mutex::new(Some(Arc::new(first))))
            }
            Some(path) if directory::is_meant(path) => {
                directory::prepare(path)?;
                Place::Directory(path.to_owned())
            }
            Some(path) => Place::File(path.to_owned(), Mutex::new(Early::claim(path, block_size)?)),
        };
        Ok(Arc::new(Overlays { place, block_size, force, exports: Mutex::default() }))
    }

    /// The overlay of an export whose disk is `next`.
    ///
    /// # Errors
    /// `EINVAL`: it is another export's, or another disk's, or the disk has too many blocks; those of the file.
    pub(super) fn open(self: &Arc<Self>, export: &OsStr, next: &Next) -> Result<Lease> {
        let slot = self.exports.lock().entry(export.to_owned()).or_default().clone();
        let lease = |overlay: &Arc<Overlay>| Lease {
            overlay: Some(overlay.clone()),
            export: export.to_owned(),
            overlays: self.clone(),
        };
        let mut held = slot.lock();
        if let Some(overlay) = &*held {
            overlay.check_size(next.caps().size)?;
            return Ok(lease(overlay));
        }
        let opened = self.open_first(export, next.caps().size).and_then(|overlay| {
            overlay.check_size(next.caps().size)?;
            overlay.identify(next, self.force)?;
            Ok(overlay)
        });
        match opened {
            Ok(overlay) => Ok(lease(held.insert(overlay))),
            Err(e) => {
                drop(held);
                self.forget(export);
                Err(e)
            }
        }
    }

    fn open_first(&self, export: &OsStr, size: u64) -> Result<Arc<Overlay>> {
        let block_size = self.block_size.unwrap_or(DEFAULT_BLOCK_SIZE);
        match &self.place {
            Place::Temporary(dir, spare) => {
                let file = match spare.lock().take() {
                    Some(file) => file,
                    None => Arc::new(temporary_file(dir).map_err(|e| io_error(&e))?),
                };
                Overlay::temporary(file.clone(), size, block_size).map(Arc::new).inspect_err(|_| {
                    spare.lock().get_or_insert(file);
                })
            }
            Place::File(path, early) => early.lock().take(path, export, size, block_size),
            Place::Directory(dir) => {
                let path = dir.join(directory::file_name(export));
                let claimed = Claimed::open(&path, true).map_err(|e| io_error(&e))?;
                let block_size = fitting_block_size(&claimed, self.block_size).map_err(|e| io_error(&e))?;
                let store = Store::new(claimed, export, size, block_size).map_err(|(_, e)| e)?;
                Overlay::persistent(store).map(Arc::new)
            }
        }
    }

    /// Removes the slot of an export that has no overlay.
    fn forget(&self, export: &OsStr) {
        let mut exports = self.exports.lock();
        if exports.get(export).is_some_and(|slot| {
            Arc::strong_count(slot) == 1 && slot.try_lock().is_some_and(|overlay| overlay.is_none())
        }) {
            exports.remove(export);
        }
    }

    /// Closes an overlay that nobody uses and that has no changes: clients choose the names of exports, so what each name
    /// costs must not stay.
    fn release(&self, export: &OsStr) {
        let mut exports = self.exports.lock();
        let Some(slot) = exports.get(export) else { return };
        // Else it is being opened again.
        let Some(mut held) = slot.try_lock() else { return };
        let unused = |overlay: &Arc<Overlay>| Arc::strong_count(overlay) == 1 && overlay.is_unchanged();
        if matches!(self.place, Place::File(..)) || !held.as_ref().is_some_and(unused) {
            return;
        }
        let Some(overlay) = held.take().and_then(Arc::into_inner) else { return };
        if let (Place::Temporary(_, spare), Some(file)) = (&self.place, overlay.close()) {
            spare.lock().get_or_insert(file);
        }
        // After that, for who opens it anew makes a file of the same name.
        drop(held);
        if Arc::strong_count(slot) == 1 {
            exports.remove(export);
        }
    }

    /// Saves what only memory has of overlays that stay, at the end of their use.
    pub(super) fn save(&self) {
        let exports: Vec<_> = self.exports.lock().values().cloned().collect();
        for overlay in exports.iter().filter_map(|slot| slot.lock().clone()) {
            if let Err(e) = overlay.save() {
                log::error!("cow: {e}: what was written since the last flush is lost");
            }
        }
    }
}

impl Early {
    fn claim(path: &Path, block_size: Option<u64>) -> anyhow::Result<Self> {
        let claimed = Claimed::open(path, true)?;
        let Some(header) = claimed.header.clone() else { return Ok(Early::New(claimed)) };
        let block_size = fitting_block_size(&claimed, block_size)?;
        let export = header.export.as_deref().unwrap_or_default();
        let export: &OsStr = std::os::unix::ffi::OsStrExt::from_bytes(export);
        let store = Store::new(claimed, export, header.size, block_size).map_err(|(_, e)| e)?;
        Ok(Early::Loaded(Arc::new(Overlay::persistent(store)?)))
    }

    fn take(&mut self, path: &Path, export: &OsStr, size: u64, block_size: u64) -> Result<Arc<Overlay>> {
        match std::mem::replace(self, Early::Lost) {
            Early::New(claimed) => match Store::new(claimed, export, size, block_size) {
                Ok(store) => {
                    *self = Early::Loaded(Arc::new(Overlay::persistent(store)?));
                    self.take(path, export, size, block_size)
                }
                Err((claimed, e)) => {
                    *self = Early::New(claimed);
                    Err(e)
                }
            },
            Early::Loaded(overlay) => {
                let checked = overlay.check_export(export);
                // Only who fits takes it: until then it waits for the export that it belongs to.
                match checked.and_then(|()| overlay.check_size(size)) {
                    Ok(()) => {
                        *self = Early::Taken(export.to_owned());
                        Ok(overlay)
                    }
                    Err(e) => {
                        *self = Early::Loaded(overlay);
                        Err(e)
                    }
                }
            }
            Early::Taken(by) => {
                let error = wrong_export(path, &by, export);
                *self = Early::Taken(by);
                Err(error)
            }
            Early::Lost => Err(Error::new(Errno::EIO, "the overlay could not be opened")),
        }
    }
}

/// The block size for an overlay: its own if it has one.
fn fitting_block_size(claimed: &Claimed, wanted: Option<u64>) -> anyhow::Result<u64> {
    let Some(header) = &claimed.header else { return Ok(wanted.unwrap_or(DEFAULT_BLOCK_SIZE)) };
    let wanted = wanted.unwrap_or(header.block_size);
    ensure!(
        header.block_size == wanted,
        "{} has blocks of {} bytes, but cow-block-size={wanted} was given: leave that out, or give another cow-file",
        claimed.path.display(),
        header.block_size
    );
    Ok(wanted)
}

fn temporary_file(dir: &Path) -> anyhow::Result<File> {
    tempfile::tempfile_in(dir).with_context(|| {
        format!("cannot make a temporary file in {} (set TMPDIR to another directory)", dir.display())
    })
}

/// An error of the start that happens when a client comes.
fn io_error(error: &anyhow::Error) -> Error {
    let errno = error.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>()?.raw_os_error());
    Error::new(errno.map_or(Errno::EINVAL, Errno::from_raw), format!("{error:#}"))
}

/// An overlay in use by a connection.
pub(super) struct Lease {
    /// Always there, but while it is dropped.
    overlay: Option<Arc<Overlay>>,
    export: OsString,
    overlays: Arc<Overlays>,
}

impl Deref for Lease {
    type Target = Overlay;

    fn deref(&self) -> &Overlay {
        match &self.overlay {
            Some(overlay) => overlay,
            None => unreachable!("it is there until it is dropped"),
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.overlay = None;
        self.overlays.release(&self.export);
    }
}
