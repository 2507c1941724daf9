//! The example3 plugin: each connection has an empty disk of its own, which is gone when the client leaves.

use std::{ffi::OsStr, fs::File, os::unix::fs::FileExt};

use nbdkit_core::{Caps, Error, Flags, Handle, Info, Open, Plugin, Result, Support, ThreadModel, params};

pub(crate) fn new() -> Box<dyn Plugin> {
    Box::new(Example { size: 100 << 20 })
}

struct Example {
    size: u64,
}

impl Plugin for Example {
    fn info(&self) -> Info {
        Info::bundled(
            "example3",
            "a temporary disk for each connection",
            "size=SIZE               Size of the disk (default: 100M)",
        )
    }

    fn callbacks(&self) -> Option<Vec<&'static str>> {
        Some(vec!["dump_plugin", "close", "pwrite", "flush"])
    }

    fn config(&mut self, key: &str, value: &OsStr) -> anyhow::Result<bool> {
        match key {
            "size" => self.size = params::size(value)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn dump(&self) -> Vec<(String, String)> {
        vec![("example3_extra".into(), "hello".into())]
    }

    fn thread_model(&self) -> ThreadModel {
        ThreadModel::SerializeAllRequests
    }

    /// The file has no name: nothing is left of it, whatever ends the server.
    fn open(&self, _: &Open) -> Result<Box<dyn Handle>> {
        let fail = |e| Error::from(e).context("cannot make a temporary file ($TMPDIR says where)");
        let file = tempfile::tempfile().map_err(fail)?;
        file.set_len(self.size).map_err(fail)?;
        Ok(Box::new(Temporary { file, size: self.size }))
    }
}

struct Temporary {
    file: File,
    size: u64,
}

impl Handle for Temporary {
    fn capabilities(&self) -> Result<Caps> {
        Ok(Caps::of_size(self.size).with_write(true).with_flush(true).with_fua(Support::Emulate))
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        Ok(self.file.read_exact_at(buf, offset)?)
    }

    fn pwrite(&self, buf: &[u8], offset: u64, _: Flags) -> Result<()> {
        Ok(self.file.write_all_at(buf, offset)?)
    }

    fn flush(&self) -> Result<()> {
        Ok(self.file.sync_data()?)
    }
}
