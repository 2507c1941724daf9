//! An open layer: one plugin or filter, for one connection.

use crate::{Call, Caps, Errno, Error, Extents, Flags, Next, Outcome, Request, Result, Status};

/// An open layer. Plugins and filters both implement this trait; dropping the handle closes the layer.
///
/// A filter's handle owns the [`Next`] below it and returns it from [`next`](Self::next): then every method that
/// it does not implement passes through. A plugin's handle has no next layer: then a missing method means that
/// the plugin cannot do it, and the glue in [`Next`] refuses or emulates it.
///
/// The glue has checked each call before it arrives here: ranges are within the size, the length is not 0, the
/// operation is among the capabilities and the flags are legal. Offsets and lengths are in bytes. Calls arrive in
/// parallel as far as the chain's [`ThreadModel`](crate::ThreadModel) allows.
pub trait Handle: Send + Sync {
    /// The layer below, for a filter: it is finalized after this one.
    fn next(&self) -> Option<&Next> {
        None
    }

    /// Whether there is a layer below. Then nothing is emulated at this one, but at the plugin. To be overridden
    /// only by a filter that cannot name the layer below, since it changes: such a one implements every method, and its
    /// [`finalize`](Self::finalize) finalizes the layer below.
    fn is_filter(&self) -> bool {
        self.below().is_some()
    }

    /// The layer below, whose answers this one inherits and by which requests come back that were started:
    /// [`next`](Self::next), unless the layer below is not finalized together with this one.
    fn below(&self) -> Option<&Next> {
        self.next()
    }

    /// Called once after the layer below was prepared and before [`capabilities`](Self::capabilities).
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

    /// What the layer can do. Called once, after [`prepare`](Self::prepare). Default for a filter: what the layer below
    /// can do, but it sees every read. A plugin has to answer.
    ///
    /// # Errors
    /// Any: the open fails. A failure of a single answer belongs into the value.
    fn capabilities(&self) -> Result<Caps> {
        match self.below() {
            Some(next) => Ok(next.capabilities()),
            None => Err(Error::new(Errno::EINVAL, "the plugin does not tell its size")),
        }
    }

    /// A line about the export for people, at most 4096 bytes.
    ///
    /// # Errors
    /// Any: the client gets no description.
    fn export_description(&self) -> Result<Option<String>> {
        self.below().map_or(Ok(None), Next::export_description)
    }

    /// Answers a request: the one way in. Default: it needs a thread, and there the methods below run it, one for each
    /// kind. So a layer that says nothing here is right, if not as fast as it could be.
    ///
    /// A plugin that can answer without waiting does so here ([`Request::run`] calls the methods below at once), or
    /// [starts](Request::start) the request and completes it later, or lends a file in place of the data.
    ///
    /// A filter that implements this has to deal with all kinds of requests: with [`Next::pass`] where data passes
    /// unchanged and it does not need to know how the request ends, else with [`Next::submit`], [`Next::watch`], [`Next::transform`],
    /// [`Next::shifted`] and the like. Each serves requests that end at once and those that end later alike. A request that
    /// comes back as [`Outcome::NeedsThread`] comes again, so what happens before that has no lasting effect, unless
    /// the request [may wait](Request::may_wait).
    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        if request.may_wait() { request.run(self) } else { Outcome::NeedsThread }
    }

    /// A request that this layer has [watched](Next::watch) has ended, with `result`, which it may change.
    fn ended(&self, call: &Call, token: u64, result: &mut Result<()>) {
        let _ = (call, token, result);
    }

    /// A read that this layer [transforms](Next::transform) has succeeded: `data` is what the layer below has, and becomes
    /// what this one has.
    ///
    /// # Errors
    /// Any: the read fails with it.
    fn transform(&self, call: &Call, token: u64, data: &mut [u8]) -> Result<()> {
        let _ = (call, token, data);
        Ok(())
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// Any: then the content of `buf` is not used.
    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.below().ok_or(Errno::EINVAL)?.pread(buf, offset)
    }

    /// Writes all of `buf` at `offset`. Flags: FUA.
    ///
    /// # Errors
    /// Any: then what the range holds is not defined.
    fn pwrite(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
        self.below().ok_or(Errno::EROFS)?.pwrite(buf, offset, flags)
    }

    /// Makes every write that has completed durable.
    ///
    /// # Errors
    /// Any: data may be lost, and the client must hear of it.
    fn flush(&self) -> Result<()> {
        self.below().ok_or(Errno::EINVAL)?.flush()
    }

    /// Discards a range. Flags: FUA.
    ///
    /// # Errors
    /// Any.
    fn trim(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.below().ok_or(Errno::EINVAL)?.trim(length, offset, flags)
    }

    /// Makes a range read as zeroes. Flags: MAY_TRIM, FUA, FAST_ZERO.
    ///
    /// # Errors
    /// `EOPNOTSUPP` from a plugin: the glue writes zeroes instead, unless FAST_ZERO was given; or any other. A
    /// filter must not return `EOPNOTSUPP` without FAST_ZERO.
    fn zero(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.below().ok_or(Errno::EOPNOTSUPP)?.zero(length, offset, flags)
    }

    /// Adds the extents of a range to `extents`, at least the one that covers `offset`. Flags: REQ_ONE.
    ///
    /// # Errors
    /// Any.
    fn extents(&self, length: u64, offset: u64, flags: Flags, extents: &mut Extents) -> Result<()> {
        self.below().ok_or(Errno::EINVAL)?.extents(length, offset, flags, extents)
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
        self.below().ok_or(Errno::EINVAL)?.cache(length, offset)
    }
}
