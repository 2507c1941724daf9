//! An open layer: one plugin or filter, for one connection.

use crate::{
    BlockSize, Completion, Errno, Error, Extents, Flags, Io, Loan, Next, Op, Result, Status, Support,
};

/// An open layer. Plugins and filters both implement this trait; dropping the handle closes the layer.
///
/// A filter's handle owns the [`Next`] below it and returns it from [`next`](Self::next): then every method that
/// it does not implement passes through. A plugin's handle has no next layer: then a missing method means that
/// the plugin cannot do it, and the glue in [`Next`] refuses or emulates it.
///
/// The glue has checked each call before it arrives here: ranges are within the size, the length is not 0, the
/// matching `can_` method said yes and the flags are legal. Offsets and lengths are in bytes. Calls arrive in
/// parallel as far as the chain's [`ThreadModel`](crate::ThreadModel) allows.
pub trait Handle: Send + Sync {
    /// The layer below, for a filter.
    fn next(&self) -> Option<&Next> {
        None
    }

    /// Whether there is a layer below. Then nothing is emulated at this one, but at the plugin. To be overridden
    /// only by a filter that cannot lend out the layer below through [`next`](Self::next): such a one implements
    /// every method, and its [`finalize`](Self::finalize) finalizes the layer below.
    fn is_filter(&self) -> bool {
        self.next().is_some()
    }

    /// Called once after the layer below was prepared and before any question about capabilities.
    ///
    /// # Errors
    /// Any: the open fails.
    fn prepare(&self) -> Result<()> {
        Ok(())
    }

    /// Called once before the layers are closed, the outermost first.
    ///
    /// # Errors
    /// Any: logged, the close goes on.
    fn finalize(&self) -> Result<()> {
        Ok(())
    }

    /// Size in bytes, at most `i64::MAX`.
    ///
    /// # Errors
    /// Any: the open fails.
    fn get_size(&self) -> Result<u64> {
        match self.next() {
            Some(next) => Ok(next.caps().size),
            None => Err(Error::new(Errno::EINVAL, "the plugin does not tell its size")),
        }
    }

    /// Limits on requests. Default: those below; none.
    ///
    /// # Errors
    /// Any: the open fails. So do all errors of the `can_` methods.
    fn block_size(&self) -> Result<BlockSize> {
        Ok(self.next().map_or_else(BlockSize::default, |n| n.caps().block_size))
    }

    /// A line about the export for people, at most 4096 bytes.
    ///
    /// # Errors
    /// Any: the client gets no description.
    fn export_description(&self) -> Result<Option<String>> {
        self.next().map_or(Ok(None), Next::export_description)
    }

    /// The disk behaves like a spinning one. Default: no.
    fn is_rotational(&self) -> Result<bool> {
        Ok(self.next().is_some_and(|n| n.caps().rotational))
    }

    /// Data can be changed. Default: no.
    fn can_write(&self) -> Result<bool> {
        Ok(self.next().is_some_and(|n| n.caps().write))
    }

    /// [`flush`](Self::flush) works. Default: no.
    fn can_flush(&self) -> Result<bool> {
        Ok(self.next().is_some_and(|n| n.caps().flush))
    }

    /// [`trim`](Self::trim) works. Default: no.
    fn can_trim(&self) -> Result<bool> {
        Ok(self.next().is_some_and(|n| n.caps().trim))
    }

    /// [`zero`](Self::zero) works. Default for a plugin: emulate it by writing.
    fn can_zero(&self) -> Result<Support> {
        Ok(self.next().map_or(Support::Emulate, |n| n.caps().zero))
    }

    /// [`Flags::FAST_ZERO`] is understood. Default for a plugin: yes when zero is emulated, for then it fails
    /// fast.
    fn can_fast_zero(&self) -> Result<bool> {
        match self.next() {
            Some(next) => Ok(next.caps().fast_zero),
            None => Ok(self.can_zero()? != Support::Native),
        }
    }

    /// How [`Flags::FUA`] is handled. Default for a plugin: by a flush, if it has one.
    fn can_fua(&self) -> Result<Support> {
        match self.next() {
            Some(next) => Ok(next.caps().fua),
            None if self.can_flush()? => Ok(Support::Emulate),
            None => Ok(Support::None),
        }
    }

    /// Several connections see one disk. Default: no.
    fn can_multi_conn(&self) -> Result<bool> {
        Ok(self.next().is_some_and(|n| n.caps().multi_conn))
    }

    /// How [`cache`](Self::cache) is offered. Default: not.
    fn can_cache(&self) -> Result<Support> {
        Ok(self.next().map_or(Support::None, |n| n.caps().cache))
    }

    /// [`extents`](Self::extents) works. Default: no, everything is data.
    fn can_extents(&self) -> Result<bool> {
        Ok(self.next().is_some_and(|n| n.caps().extents))
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// Any: then the content of `buf` is not used.
    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.next().ok_or(Errno::EINVAL)?.pread(buf, offset)
    }

    /// As [`pread`](Self::pread), but only if that needs no wait: `Ok(false)` says that it would, and `buf` may
    /// have been written to. Default: by [`may_block`](Self::may_block).
    ///
    /// # Errors
    /// As `pread`.
    fn pread_nowait(&self, buf: &mut [u8], offset: u64) -> Result<bool> {
        if self.may_block(Op::Read) {
            return Ok(false);
        }
        self.pread(buf, offset).map(|()| true)
    }

    /// Writes all of `buf` at `offset`. Flags: FUA.
    ///
    /// # Errors
    /// Any: then what the range holds is not defined.
    fn pwrite(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
        self.next().ok_or(Errno::EROFS)?.pwrite(buf, offset, flags)
    }

    /// Starts a read or a write that need not hold a thread while it waits, and calls `done` on another thread when it
    /// has ended. The door asks this only under [`ThreadModel::Parallel`](crate::ThreadModel::Parallel). Default: does
    /// not want it, even for a filter, as for [`loan`](Self::loan); one that only looks on or shifts may pass it on. One
    /// whose layer below serves several clients must not: who waits for one of them would hold up the others.
    ///
    /// If `done` comes back, the request was not taken, and has to be run by [`pread`](Self::pread) or
    /// [`pwrite`](Self::pwrite).
    fn submit(&self, io: Io<'_>, offset: u64, done: Completion) -> Option<Completion> {
        let _ = (io, offset);
        Some(done)
    }

    /// Makes every write that has completed durable.
    ///
    /// # Errors
    /// Any: data may be lost, and the client must hear of it.
    fn flush(&self) -> Result<()> {
        self.next().ok_or(Errno::EINVAL)?.flush()
    }

    /// Discards a range. Flags: FUA.
    ///
    /// # Errors
    /// Any.
    fn trim(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.next().ok_or(Errno::EINVAL)?.trim(length, offset, flags)
    }

    /// Makes a range read as zeroes. Flags: MAY_TRIM, FUA, FAST_ZERO.
    ///
    /// # Errors
    /// `EOPNOTSUPP` from a plugin: the glue writes zeroes instead, unless FAST_ZERO was given; or any other. A
    /// filter must not return `EOPNOTSUPP` without FAST_ZERO.
    fn zero(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.next().ok_or(Errno::EOPNOTSUPP)?.zero(length, offset, flags)
    }

    /// Adds the extents of a range to `extents`, at least the one that covers `offset`. Flags: REQ_ONE.
    ///
    /// # Errors
    /// Any.
    fn extents(&self, length: u64, offset: u64, flags: Flags, extents: &mut Extents) -> Result<()> {
        self.next().ok_or(Errno::EINVAL)?.extents(length, offset, flags, extents)
    }

    /// The status of a range in a metadata context that
    /// [`Plugin::meta_contexts`](crate::Plugin::meta_contexts) has named: at least one descriptor, the first for what
    /// begins at `offset`. Flags: REQ_ONE. Default: not known, even for a filter.
    ///
    /// # Errors
    /// Any.
    fn context_status(&self, context: &str, length: u64, offset: u64, flags: Flags) -> Result<Vec<Status>> {
        let _ = (length, offset, flags);
        Err(Error::new(Errno::EINVAL, format!("the layer does not know the context {context}")))
    }

    /// Reads a range ahead.
    ///
    /// # Errors
    /// Any.
    fn cache(&self, length: u64, offset: u64) -> Result<()> {
        self.next().ok_or(Errno::EINVAL)?.cache(length, offset)
    }

    /// Whether a request of this kind may sleep for longer than a copy takes. A door runs the others inline, so
    /// "no" must be right even for hostile requests. Default for a plugin: yes.
    fn may_block(&self, op: Op) -> bool {
        self.next().is_none_or(|n| n.may_block(op))
    }

    /// Whether a door may ask for extents before it reads, and not read what reads as zeroes: it costs next to
    /// nothing to ask (a system call or two, nothing that is far away), and no layer has to see every read. Default:
    /// no, even for a filter, as for [`loan`](Self::loan); one that does not look at reads may pass the question on.
    fn may_skip_holes(&self) -> bool {
        false
    }

    /// Lends a range of the disk. Default: no, even for a filter, since a filter that changes data must not
    /// lend what is below; one that does not may pass the call on.
    fn loan(&self, offset: u64, length: u64) -> Option<Loan<'_>> {
        let _ = (offset, length);
        None
    }
}
