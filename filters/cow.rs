//! Makes any disk writable: changes go into a file, the disk below is only read. The file is a temporary one, or with
//! `cow-file` one that stays.
//!
//! Each export has an overlay of its own. All connections to it share that, so they see each other's changes at once.

mod base;
mod directory;
pub(crate) mod export;
mod format;
mod overlay;
mod overlays;
mod store;

use std::{
    ffi::OsStr,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, ensure};
use nbdkit_core::{
    Below, BlockSize, Call, Caps, Data, Errno, Error, Extents, Filter, Flags, Handle, Info, Next, NextConfig,
    Op, Open, Outcome, Request, Result, Support, ThreadModel, params,
};

use self::{
    overlay::{Patch, Span, State},
    overlays::{Lease, Overlays},
};
use crate::blocksize::{self, Limits, read_fitted, read_inline, read_within_limits, tried};

const HELP: &str = "\
cow-block-size=<N>              Unit of the overlay, a power of 2 from 4k to 2G (default 64k).
cow-file=<PATH>                 Keep the changes in this file, or of each export in a file in this directory (default:
                                in a temporary one).
cow-force=<BOOL>                Use the cow-file with a disk that is not, or no longer, the one it was made over (default
                                false).
cow-on-cache=<BOOL>             Cache requests copy data into the overlay (default false).
cow-on-read=<BOOL>|/PATH        Reads copy data into the overlay: always, never (default), or while PATH exists.";

/// Unless the parameter or an overlay says otherwise.
const DEFAULT_BLOCK_SIZE: u64 = 64 << 10;

const BLOCK_SIZES: std::ops::RangeInclusive<u64> = 4096..=2 << 30;

pub(crate) fn new() -> Box<dyn Filter> {
    Box::new(Cow {
        block_size: None,
        on_cache: false,
        on_read: OnRead::Never,
        path: None,
        force: false,
        overlays: None,
    })
}

struct Cow {
    block_size: Option<u64>,
    on_cache: bool,
    on_read: OnRead,
    /// Where the changes stay; None: nowhere.
    path: Option<PathBuf>,
    /// Take another disk below than that of the overlay.
    force: bool,
    /// None: the server has not started.
    overlays: Option<Arc<Overlays>>,
}

/// When reads copy what they read.
#[derive(Clone)]
enum OnRead {
    Never,
    Always,
    /// While the file exists.
    While(PathBuf),
}

impl OnRead {
    fn is_on(&self) -> bool {
        match self {
            OnRead::Never => false,
            OnRead::Always => true,
            OnRead::While(path) => path.exists(),
        }
    }
}

impl Filter for Cow {
    fn info(&self) -> Info {
        Info::bundled("cow", "nbdkit copy-on-write (COW) filter", HELP)
    }

    fn config(&mut self, key: &str, value: &OsStr, next: &mut NextConfig<'_>) -> anyhow::Result<()> {
        match key {
            "cow-block-size" => {
                let block_size = params::size(value)?;
                ensure!(
                    BLOCK_SIZES.contains(&block_size) && block_size.is_power_of_two(),
                    "cow-block-size is out of range (4096..2G) or not a power of 2"
                );
                self.block_size = Some(block_size);
            }
            "cow-file" => {
                ensure!(!value.is_empty(), "cow-file needs the path of a file");
                // This keeps the slash that says that it is a directory.
                self.path = Some(std::path::absolute(value)?);
            }
            "cow-force" => self.force = params::boolean(value)?,
            "cow-on-cache" => self.on_cache = params::boolean(value)?,
            "cow-on-read" if Path::new(value).is_absolute() => self.on_read = OnRead::While(value.into()),
            "cow-on-read" => {
                let on = params::boolean(value).context("cow-on-read is a boolean or an absolute path")?;
                self.on_read = if on { OnRead::Always } else { OnRead::Never };
            }
            _ => return next(key, value),
        }
        Ok(())
    }

    fn get_ready(&mut self, _: ThreadModel) -> anyhow::Result<()> {
        self.overlays = Some(Overlays::new(self.path.as_deref(), self.block_size, self.force)?);
        Ok(())
    }

    fn opens_readonly(&self) -> bool {
        true
    }

    fn cleanup(&self, _: &Below) {
        // What clients wrote and did not flush is still the server's to keep: it ends in peace.
        if let Some(overlays) = &self.overlays {
            overlays.save();
        }
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        let next = next.open(&Open { readonly: true, ..open.clone() })?;
        let overlays = self.overlays.as_ref().ok_or(Errno::EIO)?;
        let overlay = overlays.open(&open.export_name, &next)?;
        let preferred = overlay.block_size().min(32 << 20) as u32;
        Ok(Box::new(Overlaid {
            overlay,
            preferred,
            on_cache: self.on_cache,
            on_read: self.on_read.clone(),
            next,
        }))
    }
}

struct Overlaid {
    overlay: Lease,
    preferred: u32,
    on_cache: bool,
    on_read: OnRead,
    next: Next,
}

impl Overlaid {
    fn read_below(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        read_within_limits(&self.next, buf, offset)
    }

    /// What the disk below takes.
    fn limits(&self) -> Limits {
        Limits::of(self.next.caps().block_size)
    }

    /// Aligns a range outwards, as the disk below takes it: start and length.
    fn widen(&self, offset: u64, length: u64) -> (u64, u64) {
        let (start, length) = self.limits().widen(offset, length);
        (start, length.min(self.overlay.size() - start))
    }

    fn flush_if(&self, flags: Flags) -> Result<()> {
        if flags.contains(Flags::FUA) { self.overlay.flush() } else { Ok(()) }
    }

    /// Whether a range is wholly as on the disk below.
    fn is_below(&self, call: &Call) -> bool {
        let span = self.overlay.span(call.offset, call.length);
        span.state == State::Below && span.length == call.length
    }

    /// Reads what needs no wait; false: that is not all.
    fn read_inline(&self, buf: &mut [u8], offset: u64) -> Result<bool> {
        let copy = self.on_read.is_on();
        let length = buf.len() as u64;
        let mut rest = buf;
        for span in self.overlay.spans(offset, length) {
            let (part, after) = rest.split_at_mut(span.length as usize);
            rest = after;
            let done = match span.state {
                State::Discarded => {
                    part.fill(0);
                    true
                }
                State::Stored => self.overlay.read_nowait(part, span.offset)?,
                State::Below if copy => false,
                State::Below => {
                    read_fitted(part, span.offset, self.limits(), |buf, at| read_inline(&self.next, buf, at))?
                }
            };
            if !done {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn store(&self, patch: Patch<'_>, offset: u64) -> Result<()> {
        self.overlay.store(patch, offset, |buf, at| self.read_below(buf, at))
    }

    /// Copies the blocks of a range into the overlay.
    fn copy_up(&self, length: u64, offset: u64) -> Result<()> {
        for (at, _) in self.overlay.blocks(offset, length) {
            self.overlay.copy_up(at, |buf, at| self.read_below(buf, at))?;
        }
        Ok(())
    }

    /// Makes whole blocks read as zeroes. Those that do already are passed over, so that a disk of 8 EiB of nothing
    /// is done at once.
    fn discard(&self, range: Range<u64>) -> Result<()> {
        for span in self.overlay.spans(range.start, range.end - range.start) {
            match span.state {
                State::Discarded => {}
                State::Stored => self.discard_blocks(span.offset, span.length),
                State::Below if self.next.caps().extents => self.discard_below(span)?,
                State::Below => self.discard_blocks(span.offset, span.length),
            }
        }
        Ok(())
    }

    fn discard_blocks(&self, offset: u64, length: u64) {
        self.overlay.blocks(offset, length).for_each(|(at, _)| self.overlay.discard(at));
    }

    /// Discards the blocks of a span that is as on the disk below, but for those in its zeroes.
    fn discard_below(&self, span: Span) -> Result<()> {
        let end = span.offset + span.length;
        // All blocks up to here are done.
        let mut done = span.offset;
        let mut at = span.offset;
        while at < end {
            let mut extents = Extents::new(at, end);
            self.extents_below(end - at, at, Flags::empty(), true, &mut extents)?;
            for zeroes in extents.as_slice().iter().filter(|extent| extent.zero) {
                let whole = self.overlay.whole_blocks(zeroes.offset, zeroes.length);
                if whole.start < whole.end {
                    self.discard_blocks(done, whole.start - done);
                    done = whole.end;
                }
            }
            at = extents.covered_to();
        }
        self.discard_blocks(done, end - done);
        Ok(())
    }
}

// A temporary overlay dies with the server, so there is nothing to make durable: flush and FUA have nothing to do.
impl Handle for Overlaid {
    fn next(&self) -> Option<&Next> {
        Some(&self.next)
    }

    fn capabilities(&self) -> Result<Caps> {
        let below = self.next.capabilities();
        let caps = if self.on_cache { below.with_cache(Support::Native) } else { below };
        Ok(caps
            .with_block_size(BlockSize { minimum: 1, preferred: self.preferred, maximum: u32::MAX })
            .with_native_writes()
            .with_multi_conn(true)
            .with_extents(true)
            .with_skip_holes(!self.on_read.is_on() && self.next.caps().skip_holes))
    }

    /// A range that is wholly as on the disk below goes there, started or lent for too; nothing that changes the overlay, which
    /// is on a real disk, runs without a wait.
    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        let (call, may_wait) = (*request.call(), request.may_wait());
        let goes_below = match call.op {
            Op::Read => !self.on_read.is_on(),
            Op::Cache => !self.on_cache,
            _ => false,
        };
        if goes_below && self.is_below(&call) && self.limits().take(&call) {
            // Watched, for a loan must not be used for other requests unseen: what it holds may have changed by then.
            return self.next.watch(self, request, 0);
        }
        match (call.op, request.data()) {
            (Op::Flush, _) if !self.overlay.is_persistent() => Outcome::Done(Ok(())),
            (Op::Extents, Data::Extents(extents)) => {
                let mut found = Extents::new(call.offset, call.end());
                let told = self.overlaid_extents(&call, may_wait, &mut found);
                tried(told.and_then(|told| {
                    if told {
                        extents.add_shifted(&found, call.offset, true)?;
                    }
                    Ok(told)
                }))
            }
            _ if may_wait => request.run(self),
            (_, Data::Read(buf)) => tried(self.read_inline(buf, call.offset)),
            _ => Outcome::NeedsThread,
        }
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let length = buf.len() as u64;
        let copy = self.on_read.is_on();
        let mut rest = buf;
        for span in self.overlay.spans(offset, length) {
            let (part, after) = rest.split_at_mut(span.length as usize);
            rest = after;
            match span.state {
                State::Discarded => part.fill(0),
                State::Stored => self.overlay.read(part, span.offset)?,
                State::Below => {
                    self.read_below(part, span.offset)?;
                    if copy {
                        self.copy_up(span.length, span.offset)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn pwrite(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
        let patch = Patch::Data(buf);
        let length = buf.len() as u64;
        // A run of stored blocks takes one write; others are stored one by one, each under its own lock.
        for span in self.overlay.spans(offset, length) {
            let part = patch.part(span.offset - offset, span.length);
            if span.state == State::Stored {
                self.overlay.write(part, span.offset)?;
                continue;
            }
            for (at, length) in self.overlay.blocks(span.offset, span.length) {
                self.store(patch.part(at - offset, length), at)?;
            }
        }
        self.flush_if(flags)
    }

    fn flush(&self) -> Result<()> {
        self.overlay.flush()
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.discard(self.overlay.whole_blocks(offset, length))?;
        self.flush_if(flags)
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        let may_trim = flags.contains(Flags::MAY_TRIM);
        let whole = if may_trim { self.overlay.whole_blocks(offset, length) } else { offset..offset };
        let ends = [offset..whole.start, whole.end..offset + length];
        let parts = || ends.iter().flat_map(|end| self.overlay.blocks(end.start, end.end - end.start));
        let state = |at, length| self.overlay.span(at, length).state;
        if flags.contains(Flags::FAST_ZERO)
            && (!may_trim || parts().any(|(at, length)| state(at, length) == State::Below))
        {
            return Err(Error::new(Errno::EOPNOTSUPP, "a zero of these blocks would not be fast"));
        }
        for (at, length) in parts() {
            if !may_trim || state(at, length) != State::Discarded {
                self.store(Patch::Zeroes(length), at)?;
            }
        }
        self.discard(whole)?;
        self.flush_if(flags)
    }

    fn cache(&self, length: u64, offset: u64) -> Result<()> {
        for span in self.overlay.spans(offset, length).filter(|span| span.state == State::Below) {
            if self.on_cache {
                self.copy_up(span.length, span.offset)?;
            } else {
                let (start, length) = self.widen(span.offset, span.length);
                self.next.cache(length, start)?;
            }
        }
        Ok(())
    }
}

impl Overlaid {
    /// The extents of a range; false: they are not known without a wait.
    fn overlaid_extents(&self, call: &Call, may_wait: bool, extents: &mut Extents) -> Result<bool> {
        for span in self.overlay.spans(call.offset, call.length) {
            match span.state {
                State::Stored => extents.add_data(span.offset, span.length)?,
                State::Discarded => extents.add(span.offset, span.length, true, true)?,
                State::Below => {
                    if !self.extents_below(span.length, span.offset, call.flags, may_wait, extents)? {
                        return Ok(false);
                    }
                    // The disk below may answer for less than it was asked.
                    if extents.covered_to() < span.offset + span.length {
                        break;
                    }
                }
            }
            if extents.is_complete() || call.flags.contains(Flags::REQ_ONE) {
                break;
            }
        }
        Ok(true)
    }

    /// Adds the extents that the disk below has in a range; false: they are not known without a wait.
    fn extents_below(
        &self,
        length: u64,
        offset: u64,
        flags: Flags,
        may_wait: bool,
        extents: &mut Extents,
    ) -> Result<bool> {
        let (start, wide) = self.widen(offset, length);
        let found = blocksize::extents_below(&self.next, (start, start + wide), flags, may_wait)?;
        let Some(found) = found else { return Ok(false) };
        for extent in found.as_slice() {
            let (from, to) = (extent.offset.max(offset), extent.end().min(offset + length));
            extents.add(from, to.saturating_sub(from), extent.hole, extent.zero)?;
        }
        Ok(true)
    }
}

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod damage_tests;
#[cfg(test)]
mod file_tests;
#[cfg(test)]
mod tests;
