//! The file plugin: serves a file, a block device, or every file of a directory.
//!
//! This file owns the parameters; `source` finds and opens the files, `disk` serves an open one. What goes past the page
//! cache is `direct`'s, and what waits without a thread `ring`'s.

use std::{
    ffi::{OsStr, OsString},
    path::PathBuf,
};

use anyhow::{Context as _, bail};
use nbdkit_core::{Exports, Handle, Info, Open, Plugin, Result, params};
use rustix::fs::Advice;

use disk::Disk;
use ranges::Files;
use source::Source;

mod aligned;
#[cfg(test)]
mod cold_tests;
mod direct;
mod disk;
mod inherit;
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
    hints: Hints,
    files: Files,
}

/// What the user tells about how the file will be used.
#[derive(Clone, Copy, Debug, Default)]
struct Hints {
    /// Advice for the kernel's read-ahead.
    advice: Option<Advice>,
    /// Keep the page cache free of this disk.
    uncached: bool,
    /// Do without io_uring, as where the kernel does not allow it.
    no_ring: bool,
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
             fadvise=LEVEL           How it will be read: normal, random or sequential\n\
             cache=MODE              Use of the page cache: default or none",
        )
        .magic("file")
    }

    fn callbacks(&self) -> Vec<&'static str> {
        [crate::EVERYTHING, &["config_complete", "dump_plugin", "list_exports", "default_export"]].concat()
    }

    fn config(&mut self, key: &str, value: &OsStr) -> anyhow::Result<bool> {
        match key {
            "file" => self.set_source(Source::File(absolute(key, value)?))?,
            "dir" | "directory" => self.set_source(Source::dir(&absolute(key, value)?)?)?,
            "fd" => self.set_source(Source::Fd(inherit::inherited(key, value)?))?,
            "dirfd" => self.set_source(Source::Dir("dirfd", inherit::inherited(key, value)?))?,
            "fadvise" => {
                self.hints.advice = match params::text(value)? {
                    "normal" => None,
                    "random" => Some(Advice::Random),
                    "sequential" => Some(Advice::Sequential),
                    other => bail!("unknown fadvise mode '{other}': use normal, random or sequential"),
                }
            }
            "cache" => {
                self.hints.uncached = match params::text(value)? {
                    "default" => false,
                    "none" => true,
                    other => bail!("unknown cache mode '{other}': use default or none"),
                }
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn config_complete(&mut self) -> anyhow::Result<()> {
        self.source()?.check()
    }

    fn dump(&self) -> Vec<(String, String)> {
        ["file_extents", "file_falloc_fl_punch_hole", "file_falloc_fl_zero_range"]
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
        let source = self.source.as_ref().ok_or(nbdkit_core::Errno::EINVAL)?;
        let (file, writable) = source.open(&open.export_name, open.readonly)?;
        Ok(Box::new(Disk::new(file, writable, self.hints, &self.files)?))
    }
}

/// The server changes to `/` before it serves.
fn absolute(key: &str, value: &OsStr) -> anyhow::Result<PathBuf> {
    if value.is_empty() {
        bail!("{key}= needs a name, such as {key}=/path/to/it");
    }
    std::path::absolute(value).with_context(|| format!("cannot find the current directory for {key}="))
}
