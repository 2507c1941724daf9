//! Protects the user's image files from damage by mistake, for the plugins that serve them: locks the files, reports when a
//! file holds a disk packed in some format, and serves such a file read-only unless `format=raw` is given.

use std::{
    ffi::OsStr,
    fs::File,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::Path,
};

use anyhow::bail;
use nbdkit_common::{HEAD, ImageFormat, TAIL};
use nbdkit_core::{Above, Result, params};
use parking_lot::Mutex;

use crate::lock::{self, Access, Lock, Mode};

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct ImageGuard {
    lock: Mode,
    raw: bool,
    above: Above,
    /// What each file was when it was first opened, by device and inode: a client may well write an image of another
    /// format to a disk, and goes on writing to it when he comes again.
    formats: Mutex<Vec<(FileId, Option<ImageFormat>)>>,
    /// Files of which it was said that they are served read-only.
    told_readonly: Mutex<Vec<FileId>>,
}

/// Device and inode.
type FileId = (u64, u64);

/// More are not remembered.
const MOST: usize = 10_000;

impl ImageGuard {
    /// Takes a parameter; false: it is another's.
    ///
    /// # Errors
    /// An unknown value.
    pub(crate) fn config(&mut self, key: &str, value: &OsStr) -> anyhow::Result<bool> {
        match key {
            "lock" => self.lock = Mode::parse(value)?,
            "format" => match params::text(value)? {
                "raw" => self.raw = true,
                other => bail!(
                    "format={other} is not known here: files are served raw, filters look into other formats"
                ),
            },
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// What stands above the plugin.
    pub(crate) fn set_above(&mut self, above: Above) {
        self.above = above;
    }

    /// Whether the plugin is opened read-only at the start: for sure it is going to be opened for writing otherwise.
    pub(crate) fn starts_readonly(&self) -> bool {
        self.above.written != Some(true)
    }

    /// Whether somebody may write.
    pub(crate) fn may_be_written(&self) -> bool {
        self.above.written != Some(false)
    }

    /// Locks a file that was opened for `access`.
    ///
    /// # Errors
    /// Another program uses it.
    pub(crate) fn lock(&self, file: &File, name: &Path, access: Access) -> Result<Option<Lock>> {
        lock::lock(file, name, access, self.lock)
    }

    /// Whether a disk may be written to, as far as its format is concerned: `first` and `last` are the files that it
    /// begins and ends with, often the same. Says in one line what it is if that is another format, and, where it is
    /// `wanted` for writing, that it is read-only.
    pub(crate) fn may_write(&self, first: (&File, &Path), last: &File, wanted: bool) -> bool {
        if self.raw {
            return true;
        }
        let known = first.0.metadata().is_ok_and(|metadata| {
            let id = (metadata.dev(), metadata.ino());
            self.formats.lock().iter().any(|(other, _)| *other == id)
        });
        let Some((id, format)) = self.format(first.0, last) else { return true };
        let Some(format) = format.filter(|format| !self.is_read_by_filter(format)) else { return true };
        let mut refused = false;
        if wanted && self.may_be_written() {
            self.tell_once(id, || refused = true);
        }
        let (name, kind) = (first.1.display(), format.name);
        let inside = match format.filter {
            Some(filter) => format!("to serve the disk in it add --filter={filter} or {}", format.instead),
            None => format!("to serve the disk in it {}", format.instead),
        };
        const AS_IT_IS: &str = "to write to it as it is add format=raw";
        match (known, refused) {
            (false, false) => log::warn!("{name} is a {kind} image and is served as it is: {inside}"),
            (false, true) => {
                log::warn!(
                    "{name} is a {kind} image and is served as it is, read-only: {inside}; {AS_IT_IS}"
                );
            }
            (true, true) => log::warn!("{name} is served read-only, for it is a {kind} image: {AS_IT_IS}"),
            (true, false) => {}
        }
        false
    }

    /// Says that a disk is read-only although somebody wanted to write, once for each file.
    pub(crate) fn tell_fallback(&self, file: &File, name: &Path) {
        if let Ok(metadata) = file.metadata() {
            self.tell_once((metadata.dev(), metadata.ino()), || {
                log::warn!("{} cannot be written to, and is served read-only", name.display());
            });
        }
    }

    fn tell_once(&self, id: FileId, tell: impl FnOnce()) {
        let mut told = self.told_readonly.lock();
        if !told.contains(&id) && told.len() < MOST {
            told.push(id);
            tell();
        }
    }

    fn is_read_by_filter(&self, format: &ImageFormat) -> bool {
        // The filter that reads indexed files of the format has a longer name.
        format.filter.is_some_and(|name| self.above.filters.iter().any(|filter| filter.ends_with(name)))
    }

    /// The format of a file as it was when it was first opened. None: it cannot be read.
    fn format(&self, first: &File, last: &File) -> Option<(FileId, Option<ImageFormat>)> {
        let metadata = first.metadata().ok()?;
        let id = (metadata.dev(), metadata.ino());
        let mut formats = self.formats.lock();
        if let Some((_, format)) = formats.iter().find(|(known, _)| *known == id) {
            return Some((id, *format));
        }
        let format = ImageFormat::detect(&head(first), &tail(last));
        if formats.len() < MOST {
            formats.push((id, format));
        }
        Some((id, format))
    }
}

/// The first bytes of a file, as many as there are and can be read.
fn head(file: &File) -> Vec<u8> {
    read(file, 0, HEAD)
}

fn tail(file: &File) -> Vec<u8> {
    // A block device has no length, but its end can be sought.
    let length = rustix::fs::seek(file, rustix::fs::SeekFrom::End(0)).unwrap_or(0);
    read(file, length.saturating_sub(TAIL as u64), TAIL)
}

fn read(file: &File, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    let mut done = 0;
    while let Ok(n @ 1..) = file.read_at(&mut bytes[done..], offset + done as u64) {
        done += n;
    }
    bytes.truncate(done);
    bytes
}
