//! The file plugin: serves a file, a block device, or every file of a directory.
//!
//! This file owns the parameters; `source` finds and opens the files, `disk` serves an open one. What goes past the page
//! cache is `direct`'s, and what waits without a thread `ring`'s.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    path::PathBuf,
};

use anyhow::{Context as _, bail, ensure};
use nbdkit_core::{Above, Errno, Exports, Handle, Info, Open, Plugin, Result, params};
use rustix::fs::Advice;

use disk::Disk;
use ranges::Files;
use source::Source;

use crate::{
    image::ImageGuard,
    lock::{Access, Lock},
    open_disk::Reach,
};

#[cfg(test)]
mod cold_tests;
mod device;
mod direct;
mod disk;

mod ranges;
mod ring;
mod source;
mod submit;
#[cfg(test)]
mod tests;

pub(crate) fn new() -> Box<dyn Plugin> {
    Box::<FilePlugin>::default()
}

#[derive(Default)]
struct FilePlugin {
    source: Option<Source>,
    follow_links: Option<bool>,
    hints: Hints,
    files: Files,
    guard: ImageGuard,
    /// Of the one file, from the start on.
    lock: Option<Lock>,
}

/// What the user tells about how the file will be used.
#[derive(Clone, Copy, Debug, Default)]
struct Hints {
    /// Advice for the kernel's read-ahead.
    advice: Option<Advice>,
    /// Past the page cache, where the file system can.
    direct: bool,
    /// Through the page cache, which drops what was used.
    dropping: bool,
    /// `-D file.zero`: how ranges are freed and zeroed is told in the log.
    tell: bool,
    /// Do without io_uring, as where the kernel does not allow it.
    no_ring: bool,
}

impl Hints {
    /// The page cache is to be free of this disk.
    fn uncached(&self) -> bool {
        self.direct || self.dropping
    }
}

impl FilePlugin {
    fn set_source(&mut self, source: Source) -> anyhow::Result<()> {
        if let Some(earlier) = &self.source {
            bail!(
                "{}= and {}= cannot be used together: give one of file=, dir=, fd= and dirfd=, once",
                earlier.key(),
                source.key()
            );
        }
        self.source = Some(source);
        Ok(())
    }

    /// Opens the file of an export: whether it can be written to, and its lock.
    fn open_file(&self, export: &OsStr, readonly: bool) -> Result<(File, bool, Option<Lock>)> {
        let source = self.source.as_ref().ok_or(Errno::EINVAL)?;
        let (file, mut writable) = source.open(export, readonly)?;
        let name = source.name(export);
        let allowed = self.guard.may_write((&file, &name), &file, writable);
        if !readonly && !writable {
            self.guard.tell_fallback(&file, &name);
        }
        writable = writable && allowed;
        let lock = self.guard.lock(&file, &name, Access::new(writable))?;
        Ok((file, writable, lock))
    }

    fn source(&self) -> anyhow::Result<&Source> {
        self.source.as_ref().context(
            "you must supply [file=]FILENAME or dir=DIRECTORY after the plugin name (fd=N and dirfd=N work too)",
        )
    }
}

impl Plugin for FilePlugin {
    fn info(&self) -> Info {
        Info::bundled(
            "file",
            "serves files and block devices",
            "[file=]FILENAME         The file or block device to serve\n\
             dir=DIRECTORY           Serve each file in this directory as an export\n\
             fd=N                    Serve this open file descriptor\n\
             dirfd=N                 As dir=, for an open file descriptor\n\
             follow-links=BOOL       Links in the directory may lead out of it (default false)\n\
             fadvise=LEVEL           How it will be read: normal, random or sequential\n\
             cache=MODE              Use of the page cache: default or none\n\
             lock=off|auto|on        Lock the file against other programs (default auto)\n\
             format=raw              Serve an image of another format as it is, for writing too\n\
             reduce-memory-pressure=BOOL  Drop from the page cache what was read or written (default false)",
        )
        .magic("file")
    }

    fn callbacks(&self) -> Option<Vec<&'static str>> {
        let more = ["block_size", "config_complete", "dump_plugin", "list_exports", "default_export"];
        Some([crate::EVERYTHING, &more].concat())
    }

    fn config(&mut self, key: &str, value: &OsStr) -> anyhow::Result<bool> {
        match key {
            "file" => self.set_source(Source::File(absolute(key, value)?))?,
            "dir" | "directory" => self.set_source(Source::dir(&absolute(key, value)?)?)?,
            "fd" => self.set_source(Source::Fd(crate::inherit::inherited(key, value)?))?,
            "dirfd" => {
                self.set_source(Source::Dir(
                    "dirfd",
                    crate::inherit::inherited(key, value)?,
                    Reach::Beneath,
                ))?;
            }
            "follow-links" => self.follow_links = Some(params::boolean(value)?),
            "fadvise" => {
                self.hints.advice = match params::text(value)? {
                    "normal" => None,
                    "random" => Some(Advice::Random),
                    "sequential" => Some(Advice::Sequential),
                    other => bail!("unknown fadvise mode '{other}': use normal, random or sequential"),
                }
            }
            "cache" => {
                self.hints.direct = match params::text(value)? {
                    "default" => false,
                    "none" => true,
                    other => bail!("unknown cache mode '{other}': use default or none"),
                }
            }
            "lock" | "format" => return self.guard.config(key, value),
            "reduce-memory-pressure" => self.hints.dropping = params::boolean(value)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn config_complete(&mut self) -> anyhow::Result<()> {
        if let (Some(source), Some(follow)) = (&mut self.source, self.follow_links) {
            let reach = if follow { Reach::Anywhere } else { Reach::Beneath };
            ensure!(source.set_reach(reach), "follow-links= is for the files of dir= and dirfd=: remove it");
        }
        self.source()?.check()
    }

    fn set_above(&mut self, above: Above) {
        self.guard.set_above(above);
    }

    fn get_ready(&mut self) -> anyhow::Result<()> {
        // Of one file, what is wrong with it is an error of the start, and a warning is seen.
        if !self.source()?.has_many() {
            let (_, _, lock) = self.open_file(OsStr::new(""), self.guard.starts_readonly())?;
            self.lock = lock;
        }
        Ok(())
    }

    fn debug_flag(&mut self, name: &str, value: i32) -> bool {
        let known = name == "zero";
        if known {
            self.hints.tell = value != 0;
        }
        known
    }

    fn dump(&self) -> Vec<(String, String)> {
        [
            "file_blkdiscard",
            "file_blkrotational",
            "file_blksszget",
            "file_blkzeroout",
            "file_block_size",
            "file_extents",
            "file_falloc_fl_punch_hole",
            "file_falloc_fl_zero_range",
        ]
        .map(|key| (key.into(), "yes".into()))
        .into()
    }

    fn list_exports(&self, _: bool, _: bool) -> Result<Exports> {
        match &self.source {
            Some(source) => source.list(),
            None => Ok(Exports::new()),
        }
    }

    fn default_export(&self, _: bool, _: bool) -> Result<Option<OsString>> {
        // No file of a directory is more the default than another.
        Ok(self.source.as_ref().is_some_and(|source| !source.has_many()).then(OsString::new))
    }

    fn open(&self, open: &Open) -> Result<Box<dyn Handle>> {
        let (file, writable, lock) = self.open_file(&open.export_name, open.readonly)?;
        Ok(Box::new(Disk::new(file, (writable, lock), self.hints, &self.files)?))
    }
}

/// The server changes to `/` before it serves.
fn absolute(key: &str, value: &OsStr) -> anyhow::Result<PathBuf> {
    if value.is_empty() {
        bail!("{key}= needs a name, such as {key}=/path/to/it");
    }
    std::path::absolute(value).with_context(|| format!("cannot find the current directory for {key}="))
}
