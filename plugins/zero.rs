//! The zero plugin: a read-only disk of no bytes, for testing what clients make of it.

use nbdkit_core::{Caps, Errno, Handle, Info, Open, Outcome, Plugin, Request, Result, Support};

pub(crate) fn new() -> Box<dyn Plugin> {
    Box::new(Zero)
}

struct Zero;

impl Plugin for Zero {
    fn info(&self) -> Info {
        Info::bundled("zero", "an empty disk", "")
    }

    fn callbacks(&self) -> Option<Vec<&'static str>> {
        Some(crate::READ_ONLY.into())
    }

    fn open(&self, _: &Open) -> Result<Box<dyn Handle>> {
        Ok(Box::new(Zero))
    }
}

impl Handle for Zero {
    fn capabilities(&self) -> Result<Caps> {
        Ok(Caps::of_size(0).with_multi_conn(true).with_cache(Support::Native))
    }

    fn pread(&self, buf: &mut [u8], _: u64) -> Result<()> {
        // Only a read of nothing lies within the disk.
        if buf.is_empty() { Ok(()) } else { Err(Errno::EINVAL.into()) }
    }

    fn cache(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        request.run(self)
    }
}
