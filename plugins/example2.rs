//! The example2 plugin: a file, for reading. It shows what a plugin with a parameter is made of; for work there is file.

use std::{
    ffi::OsStr,
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use nbdkit_core::{Caps, Error, Handle, Info, Open, Plugin, Result, ThreadModel};
use rustix::fs::CWD;

use crate::open_disk::{self, Reach};

pub(crate) fn new() -> Box<dyn Plugin> {
    Box::<Example>::default()
}

#[derive(Default)]
struct Example {
    /// Absolute: the server changes its directory.
    file: Option<PathBuf>,
}

impl Plugin for Example {
    fn info(&self) -> Info {
        Info::bundled("example2", "a file, for reading", "file=FILENAME  (required) The file to serve")
    }

    fn callbacks(&self) -> Option<Vec<&'static str>> {
        Some(vec!["config_complete", "dump_plugin", "unload", "close"])
    }

    fn config(&mut self, key: &str, value: &OsStr) -> anyhow::Result<bool> {
        if key != "file" {
            return Ok(false);
        }
        let fail = |e| Error::from(e).context(Path::new(value).display());
        self.file = Some(Path::new(value).canonicalize().map_err(fail)?);
        Ok(true)
    }

    fn config_complete(&mut self) -> anyhow::Result<()> {
        let missing =
            "you must supply the file=<FILENAME> parameter after the plugin name on the command line";
        self.file.as_ref().context(missing).map(drop)
    }

    fn dump(&self) -> Vec<(String, String)> {
        vec![("example2_extra".into(), "hello".into())]
    }

    fn thread_model(&self) -> ThreadModel {
        ThreadModel::SerializeAllRequests
    }

    fn open(&self, _: &Open) -> Result<Box<dyn Handle>> {
        let path = self.file.as_deref().unwrap_or(Path::new(""));
        let fail = |e| Error::from(e).context(path.display());
        let (file, _) = open_disk::open(CWD, path, false, Reach::Anywhere).map_err(|e| fail(e.into_io()))?;
        let size = file.metadata().map_err(fail)?.len();
        Ok(Box::new(Opened { file, size }))
    }
}

struct Opened {
    file: File,
    size: u64,
}

impl Handle for Opened {
    fn capabilities(&self) -> Result<Caps> {
        Ok(Caps::of_size(self.size))
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        Ok(self.file.read_exact_at(buf, offset)?)
    }
}
