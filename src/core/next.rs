//! The glue between two layers: the contract is checked here, once for each layer and never in a layer, and what
//! the plugin lacks is emulated here.
//!
//! Emulation happens at the plugin only: a filter above sees one call for one request, so a delay filter over a
//! plugin without zero delays once, however many writes the zero becomes.

use std::sync::Arc;

use log::{Level, debug, log_enabled};

use crate::{
    BlockSize, Caps, Completion, Errno, Error, Extents, Flags, Handle, Io, Loan, Op, Result, Status, Support,
    emulate,
    stats::{Counters, timed, timed_at_once, timed_later},
};

/// The log target of calls that open, ask and close.
pub(crate) const CONTROLPATH: &str = "nbdkit::controlpath";
/// The log target of requests.
pub(crate) const DATAPATH: &str = "nbdkit::datapath";

/// An open layer, seen from above.
pub struct Next {
    name: Arc<str>,
    handle: Box<dyn Handle>,
    caps: Caps,
    /// No layer below: the plugin.
    last: bool,
    counters: Option<Arc<Counters>>,
}

impl Next {
    /// Prepares the layer and asks it what it can do.
    pub(crate) fn new(
        name: Arc<str>,
        handle: Box<dyn Handle>,
        readonly: bool,
        counters: Option<Arc<Counters>>,
    ) -> Result<Self> {
        debug!(target: CONTROLPATH, "{name}: prepare readonly={}", i32::from(readonly));
        handle.prepare()?;
        let caps = ask(&name, &*handle, readonly)?;
        let last = !handle.is_filter();
        Ok(Next { name, handle, caps, last, counters })
    }

    /// What the layer can do.
    pub fn caps(&self) -> &Caps {
        &self.caps
    }

    /// Name of the layer.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A line about the export for people.
    ///
    /// # Errors
    /// Those of the layer.
    pub fn export_description(&self) -> Result<Option<String>> {
        debug!(target: CONTROLPATH, "{}: export_description", self.name);
        Ok(self.handle.export_description()?.filter(|d| d.len() <= crate::Exports::MAX_STRING))
    }

    /// Tells the layers, the outermost first, that they will be closed. Whoever opened the layers outside a
    /// session calls this once before dropping them.
    pub fn finalize(&self) {
        debug!(target: CONTROLPATH, "{}: finalize", self.name);
        if let Err(e) = self.handle.finalize() {
            log::error!("{}: finalize: {e}", self.name);
        }
        if let Some(next) = self.handle.next() {
            next.finalize();
        }
    }

    fn check(&self, op: Op, length: u64, offset: u64, flags: Flags, legal: Flags) -> Result<()> {
        if offset.checked_add(length).is_none_or(|end| end > self.caps.size) {
            return Err(self.broken(op, format!("{offset}+{length} is past the size {}", self.caps.size)));
        }
        let able = match op {
            Op::Read => true,
            Op::Write => self.caps.write,
            Op::Flush => self.caps.flush,
            Op::Trim => self.caps.trim,
            Op::Zero => self.caps.zero != Support::None,
            Op::Cache => self.caps.cache != Support::None,
            Op::Extents => true,
        };
        if !able {
            return Err(self.broken(op, "the layer does not offer it".into()));
        }
        if !legal.contains(flags)
            || (flags.contains(Flags::FUA) && self.caps.fua == Support::None)
            || (flags.contains(Flags::FAST_ZERO) && !self.caps.fast_zero)
        {
            return Err(self.broken(op, format!("illegal flags {flags:?}")));
        }
        Ok(())
    }

    #[cold]
    fn broken(&self, op: Op, why: String) -> Error {
        Error::new(Errno::EINVAL, format!("{}: bad {op:?} request: {why}", self.name))
    }

    /// Splits FUA off when it is this layer that must emulate it: flags for the layer, and "flush after".
    fn split_fua(&self, flags: Flags) -> (Flags, bool) {
        if self.last && flags.contains(Flags::FUA) && self.caps.fua == Support::Emulate {
            (flags - Flags::FUA, true)
        } else {
            (flags, false)
        }
    }

    fn flush_if(&self, wanted: bool) -> Result<()> {
        if wanted { self.handle.flush() } else { Ok(()) }
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// Those of the layer; `EINVAL` out of range.
    pub fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.check(Op::Read, buf.len() as u64, offset, Flags::empty(), Flags::empty())?;
        if log_enabled!(target: DATAPATH, Level::Debug) {
            debug!(target: DATAPATH, "{}: pread count={} offset={offset}", self.name, buf.len());
        }
        timed(self.counters.as_ref(), Op::Read, buf.len() as u64, || self.handle.pread(buf, offset))
    }

    /// As [`pread`](Self::pread), unless it would have to wait: then `Ok(false)`.
    ///
    /// # Errors
    /// As `pread`.
    pub fn pread_nowait(&self, buf: &mut [u8], offset: u64) -> Result<bool> {
        self.check(Op::Read, buf.len() as u64, offset, Flags::empty(), Flags::empty())?;
        let done = timed_at_once(self.counters.as_ref(), buf.len() as u64, || {
            self.handle.pread_nowait(buf, offset)
        })?;
        if done && log_enabled!(target: DATAPATH, Level::Debug) {
            debug!(target: DATAPATH, "{}: pread count={} offset={offset}", self.name, buf.len());
        }
        Ok(done)
    }

    /// Writes all of `buf` at `offset`. Flags: FUA.
    ///
    /// # Errors
    /// Those of the layer; `EINVAL` out of range.
    pub fn pwrite(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
        self.check(Op::Write, buf.len() as u64, offset, flags, Flags::FUA)?;
        if log_enabled!(target: DATAPATH, Level::Debug) {
            let fua = i32::from(flags.contains(Flags::FUA));
            debug!(target: DATAPATH, "{}: pwrite count={} offset={offset} fua={fua}", self.name, buf.len());
        }
        let (flags, flush) = self.split_fua(flags);
        timed(self.counters.as_ref(), Op::Write, buf.len() as u64, || {
            self.handle.pwrite(buf, offset, flags)?;
            self.flush_if(flush)
        })
    }

    /// Starts a read or a write that calls `done` when it has ended, or gives it back; see
    /// [`Handle::submit`].
    pub fn submit(&self, io: Io<'_>, offset: u64, mut done: Completion) -> Option<Completion> {
        let (op, length, flags) = (io.op(), io.length(), io.flags());
        // What is wrong with it, and a flush that has to follow, is for whoever runs it.
        if self.check(op, length, offset, flags, Flags::FUA).is_err() || self.split_fua(flags).1 {
            return Some(done);
        }
        if let Some(counters) = &self.counters {
            done.look(timed_later(counters, op, length));
        }
        match self.handle.submit(io, offset, done) {
            Some(mut done) => {
                if self.counters.is_some() {
                    done.unlook();
                }
                Some(done)
            }
            None => {
                if log_enabled!(target: DATAPATH, Level::Debug) {
                    let what = if op == Op::Read { "pread" } else { "pwrite" };
                    debug!(target: DATAPATH, "{}: {what} count={length} offset={offset} later", self.name);
                }
                None
            }
        }
    }

    /// Makes every completed write durable.
    ///
    /// # Errors
    /// Those of the layer.
    pub fn flush(&self) -> Result<()> {
        self.check(Op::Flush, 0, 0, Flags::empty(), Flags::empty())?;
        debug!(target: DATAPATH, "{}: flush", self.name);
        timed(self.counters.as_ref(), Op::Flush, 0, || self.handle.flush())
    }

    /// Discards a range. Flags: FUA.
    ///
    /// # Errors
    /// Those of the layer; `EINVAL` out of range.
    pub fn trim(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.check(Op::Trim, length, offset, flags, Flags::FUA)?;
        if log_enabled!(target: DATAPATH, Level::Debug) {
            let fua = i32::from(flags.contains(Flags::FUA));
            debug!(target: DATAPATH, "{}: trim count={length} offset={offset} fua={fua}", self.name);
        }
        let (flags, flush) = self.split_fua(flags);
        timed(self.counters.as_ref(), Op::Trim, length, || {
            if length > 0 {
                self.handle.trim(length, offset, flags)?;
            }
            self.flush_if(flush)
        })
    }

    /// Makes a range read as zeroes, by writing them when the plugin cannot. Flags: MAY_TRIM, FUA, FAST_ZERO.
    ///
    /// # Errors
    /// Those of the layer; `EOPNOTSUPP` when FAST_ZERO was given and it would be slow; `EINVAL` out of range.
    pub fn zero(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.check(Op::Zero, length, offset, flags, Flags::MAY_TRIM | Flags::FUA | Flags::FAST_ZERO)?;
        if log_enabled!(target: DATAPATH, Level::Debug) {
            debug!(
                target: DATAPATH,
                "{}: zero count={length} offset={offset} may_trim={} fua={} fast={}",
                self.name,
                i32::from(flags.contains(Flags::MAY_TRIM)),
                i32::from(flags.contains(Flags::FUA)),
                i32::from(flags.contains(Flags::FAST_ZERO))
            );
        }
        if length == 0 {
            return Ok(());
        }
        if !self.last {
            return timed(self.counters.as_ref(), Op::Zero, length, || {
                self.handle.zero(length, offset, flags)
            });
        }
        let (flags, flush) = self.split_fua(flags);
        timed(self.counters.as_ref(), Op::Zero, length, || {
            let done = match self.caps.zero {
                Support::Native => self.handle.zero(length, offset, flags),
                _ => Err(Errno::EOPNOTSUPP.into()),
            };
            match done {
                Err(e) if e.is_unsupported() && !flags.contains(Flags::FAST_ZERO) => {
                    let block = self.caps.block_size;
                    emulate::zero(length, offset, block, |zeroes, at| {
                        self.handle.pwrite(zeroes, at, flags & Flags::FUA)
                    })?;
                }
                done => done?,
            }
            self.flush_if(flush)
        })
    }

    /// Adds the extents of a range, at least one that covers `offset`. Flags: REQ_ONE.
    ///
    /// # Errors
    /// Those of the layer; `EINVAL` out of range; `EIO` when the layer left the answer empty.
    pub fn extents(&self, length: u64, offset: u64, flags: Flags, extents: &mut Extents) -> Result<()> {
        self.check(Op::Extents, length, offset, flags, Flags::REQ_ONE)?;
        if log_enabled!(target: DATAPATH, Level::Debug) {
            let one = i32::from(flags.contains(Flags::REQ_ONE));
            debug!(target: DATAPATH, "{}: extents count={length} offset={offset} req_one={one}", self.name);
        }
        if !self.caps.extents {
            return extents.add_data(offset, length);
        }
        timed(self.counters.as_ref(), Op::Extents, 0, || {
            self.handle.extents(length, offset, flags, extents)
        })?;
        extents.clip(self.caps.size);
        if extents.as_slice().is_empty() && length > 0 {
            return Err(Error::new(
                Errno::EIO,
                format!("{}: the layer told no extent at {offset}", self.name),
            ));
        }
        Ok(())
    }

    /// The status of a range in a context of the layer's: at least one descriptor.
    ///
    /// # Errors
    /// Those of the layer; `EINVAL` out of range; `EIO` when there is no descriptor.
    pub fn context_status(
        &self,
        context: &str,
        length: u64,
        offset: u64,
        flags: Flags,
    ) -> Result<Vec<Status>> {
        self.check(Op::Extents, length, offset, flags, Flags::REQ_ONE)?;
        debug!(target: DATAPATH, "{}: context_status {context} count={length} offset={offset}", self.name);
        let list = self.handle.context_status(context, length, offset, flags)?;
        if list.first().is_none_or(|status| status.length == 0) {
            return Err(Error::new(
                Errno::EIO,
                format!("{}: {context} has no status at {offset}", self.name),
            ));
        }
        Ok(list)
    }

    /// Reads a range ahead.
    ///
    /// # Errors
    /// Those of the layer; `EINVAL` out of range.
    pub fn cache(&self, length: u64, offset: u64) -> Result<()> {
        self.check(Op::Cache, length, offset, Flags::empty(), Flags::empty())?;
        debug!(target: DATAPATH, "{}: cache count={length} offset={offset}", self.name);
        timed(self.counters.as_ref(), Op::Cache, length, || {
            if self.last && self.caps.cache == Support::Emulate {
                return emulate::cache(length, offset, self.caps.block_size, |buf, at| {
                    self.handle.pread(buf, at)
                });
            }
            self.handle.cache(length, offset)
        })
    }

    /// Whether a request of this kind may sleep.
    pub fn may_block(&self, op: Op) -> bool {
        self.handle.may_block(op)
    }

    /// Whether a door may ask for extents before it reads, and not read what reads as zeroes.
    pub fn may_skip_holes(&self) -> bool {
        self.caps.extents && self.handle.may_skip_holes()
    }

    /// Lends a range, if the layer can.
    pub fn loan(&self, offset: u64, length: u64) -> Option<Loan<'_>> {
        let end = offset.checked_add(length)?;
        if end > self.caps.size {
            return None;
        }
        let loan = self.handle.loan(offset, length)?;
        Some(Loan { writable: loan.writable && self.caps.write, ..loan })
    }
}

impl Drop for Next {
    fn drop(&mut self) {
        debug!(target: CONTROLPATH, "{}: close", self.name);
    }
}

/// Asks a layer each question once and applies the rules between the answers.
fn ask(name: &str, handle: &dyn Handle, readonly: bool) -> Result<Caps> {
    macro_rules! ask {
        ($method:ident) => {{
            debug!(target: CONTROLPATH, "{name}: {}", stringify!($method));
            handle.$method()?
        }};
    }
    let size = ask!(get_size);
    if size > i64::MAX as u64 {
        return Err(Error::new(Errno::EIO, format!("{name}: the size {size} is over 2^63-1")));
    }
    let block_size: BlockSize = ask!(block_size).validate().map_err(|e| e.context(name))?;
    let write = !readonly && ask!(can_write);
    let flush = ask!(can_flush);
    let trim = write && ask!(can_trim);
    let zero = if write { ask!(can_zero) } else { Support::None };
    let fast_zero = zero != Support::None && ask!(can_fast_zero);
    let fua = if write { ask!(can_fua) } else { Support::None };
    let fua = if fua == Support::Emulate && !flush { Support::None } else { fua };
    Ok(Caps {
        size,
        block_size,
        write,
        flush,
        trim,
        zero,
        fast_zero,
        fua,
        multi_conn: ask!(can_multi_conn),
        cache: ask!(can_cache),
        extents: ask!(can_extents),
        rotational: ask!(is_rotational),
    })
}
