//! The null plugin: a disk that reads as zeroes and forgets what is written.
//!
//! It does nothing as fast as possible, so it measures the rest: front ends, filters and clients.

use std::ffi::OsStr;

use nbdkit_core::{Caps, Extents, Flags, Handle, Info, Open, Outcome, Plugin, Request, Result, params};

pub(crate) fn new() -> Box<dyn Plugin> {
    Box::<Null>::default()
}

#[derive(Default)]
struct Null {
    size: u64,
}

impl Plugin for Null {
    fn info(&self) -> Info {
        Info::bundled(
            "null",
            "a disk that reads as zeroes and discards writes",
            "[size=]SIZE             Size of the disk (default: 0)",
        )
        .magic("size")
    }

    fn callbacks(&self) -> Option<Vec<&'static str>> {
        Some(crate::EVERYTHING.into())
    }

    fn config(&mut self, key: &str, value: &OsStr) -> anyhow::Result<bool> {
        match key {
            "size" => self.size = params::size(value)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn open(&self, _: &Open) -> Result<Box<dyn Handle>> {
        Ok(Box::new(Nothing { size: self.size }))
    }
}

struct Nothing {
    size: u64,
}

impl Handle for Nothing {
    fn capabilities(&self) -> Result<Caps> {
        Ok(Caps::native(self.size))
    }

    fn pread(&self, buf: &mut [u8], _: u64) -> Result<()> {
        buf.fill(0);
        Ok(())
    }

    fn pwrite(&self, _: &[u8], _: u64, _: Flags) -> Result<()> {
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn trim(&self, _: u64, _: u64, _: Flags) -> Result<()> {
        Ok(())
    }

    fn zero(&self, _: u64, _: u64, _: Flags) -> Result<()> {
        Ok(())
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
