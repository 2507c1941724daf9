//! The pattern plugin: a read-only disk whose content tells where it was read from, for testing filters and clients.
//!
//! Every 8 bytes hold their own offset as a big-endian integer, so a misplaced or torn read shows at once.

use std::ffi::OsStr;

use anyhow::Context as _;
use nbdkit_core::{Caps, Handle, Info, Open, Outcome, Plugin, Request, Result, Support, params};

pub(crate) fn new() -> Box<dyn Plugin> {
    Box::<Pattern>::default()
}

#[derive(Default)]
struct Pattern {
    size: Option<u64>,
}

impl Plugin for Pattern {
    fn info(&self) -> Info {
        Info::bundled(
            "pattern",
            "a read-only disk in which every 8 bytes hold their own offset",
            "[size=]SIZE  (required) Size of the disk",
        )
        .magic("size")
    }

    fn callbacks(&self) -> Option<Vec<&'static str>> {
        Some([crate::READ_ONLY, &["config_complete"]].concat())
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
        Ok(Box::new(Offsets { size: self.size.unwrap_or_default() }))
    }
}

struct Offsets {
    size: u64,
}

impl Handle for Offsets {
    fn capabilities(&self) -> Result<Caps> {
        Ok(Caps::of_size(self.size).with_multi_conn(true).with_cache(Support::Native))
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        fill(buf, offset);
        Ok(())
    }

    fn cache(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        request.run(self)
    }
}

/// Fills `buf` with the pattern from `offset`, which need not be a multiple of 8.
fn fill(buf: &mut [u8], offset: u64) {
    let skip = (offset % 8) as usize;
    let mut word = offset - offset % 8;
    let (head, rest) = buf.split_at_mut(buf.len().min((8 - skip) % 8));
    if !head.is_empty() {
        head.copy_from_slice(&word.to_be_bytes()[skip..skip + head.len()]);
        word += 8;
    }
    for chunk in rest.chunks_mut(8) {
        chunk.copy_from_slice(&word.to_be_bytes()[..chunk.len()]);
        word += 8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_alignment_and_length_agrees_with_the_definition() {
        let byte = |at: u64| (at - at % 8).to_be_bytes()[(at % 8) as usize];
        for base in [0, 0xfff0, (1 << 40) - 9, i64::MAX as u64 - 64] {
            for offset in base..base + 17 {
                for length in 0..35 {
                    let mut buf = vec![0xaa; length];
                    fill(&mut buf, offset);
                    let want: Vec<u8> = (offset..offset + length as u64).map(byte).collect();
                    assert_eq!(buf, want, "{length} bytes at {offset}");
                }
            }
        }
    }
}
