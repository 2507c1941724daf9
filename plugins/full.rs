//! The full plugin: a disk that reads as zeroes and has no space left, for testing how clients take `ENOSPC`.

use std::ffi::OsStr;

use anyhow::Context as _;
use nbdkit_core::{
    Caps, Errno, Extents, Flags, Handle, Info, Open, Outcome, Plugin, Request, Result, Support, params,
};

pub(crate) fn new() -> Box<dyn Plugin> {
    Box::<Full>::default()
}

#[derive(Default)]
struct Full {
    size: Option<u64>,
}

impl Plugin for Full {
    fn info(&self) -> Info {
        Info::bundled(
            "full",
            "a disk that reads as zeroes and is always full",
            "[size=]SIZE  (required) Size of the disk",
        )
        .magic("size")
    }

    fn callbacks(&self) -> Option<Vec<&'static str>> {
        let more = ["config_complete", "can_write", "can_trim", "can_extents", "pwrite", "trim", "extents"];
        Some([crate::READ_ONLY, &more].concat())
    }

    fn config(&mut self, key: &str, value: &OsStr) -> anyhow::Result<bool> {
        match key {
            "size" => self.size = Some(params::size(value)?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn config_complete(&mut self) -> anyhow::Result<()> {
        self.size.context("you must specify size=SIZE on the command line, such as size=1G")?;
        Ok(())
    }

    fn open(&self, _: &Open) -> Result<Box<dyn Handle>> {
        Ok(Box::new(NoSpace { size: self.size.unwrap_or_default() }))
    }
}

struct NoSpace {
    size: u64,
}

/// Zero is left to the glue, which tries to write: it fails alike, and at once when FAST_ZERO was asked for.
impl Handle for NoSpace {
    fn capabilities(&self) -> Result<Caps> {
        Ok(Caps::of_size(self.size)
            .with_write(true)
            .with_trim(true)
            .with_multi_conn(true)
            .with_cache(Support::Native)
            .with_extents(true))
    }

    fn pread(&self, buf: &mut [u8], _: u64) -> Result<()> {
        buf.fill(0);
        Ok(())
    }

    fn pwrite(&self, _: &[u8], _: u64, _: Flags) -> Result<()> {
        Err(Errno::ENOSPC.into())
    }

    fn trim(&self, _: u64, _: u64, _: Flags) -> Result<()> {
        Err(Errno::ENOSPC.into())
    }

    fn extents(&self, length: u64, offset: u64, _: Flags, extents: &mut Extents) -> Result<()> {
        extents.add(offset, length, true, true)
    }

    fn cache(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        request.run(self)
    }
}
