//! The ones plugin: a disk of one repeated byte, 0xff unless told otherwise, that forgets what is written.
//!
//! All of it is data, so it shows what a copy costs that cannot skip holes.

use std::ffi::OsStr;

use nbdkit_core::{Caps, Extents, Flags, Handle, Info, Open, Outcome, Plugin, Request, Result, params};

pub(crate) fn new() -> Box<dyn Plugin> {
    Box::new(Ones { size: 0, byte: 0xff })
}

#[derive(Clone)]
struct Ones {
    size: u64,
    byte: u8,
}

impl Plugin for Ones {
    fn info(&self) -> Info {
        Info::bundled(
            "ones",
            "a disk of one repeated byte that discards writes",
            "[size=]SIZE             Size of the disk (default: 0)\n\
             byte=N                  The byte it is filled with (default: 0xff)",
        )
        .magic("size")
    }

    fn callbacks(&self) -> Option<Vec<&'static str>> {
        Some(crate::EVERYTHING.into())
    }

    fn config(&mut self, key: &str, value: &OsStr) -> anyhow::Result<bool> {
        match key {
            "size" => self.size = params::size(value)?,
            "byte" => self.byte = params::integer("byte", value)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn open(&self, _: &Open) -> Result<Box<dyn Handle>> {
        Ok(Box::new(self.clone()))
    }
}

impl Handle for Ones {
    fn capabilities(&self) -> Result<Caps> {
        Ok(Caps::native(self.size))
    }

    fn pread(&self, buf: &mut [u8], _: u64) -> Result<()> {
        buf.fill(self.byte);
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
        extents.add(offset, length, false, self.byte == 0)
    }

    fn cache(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        request.run(self)
    }
}
