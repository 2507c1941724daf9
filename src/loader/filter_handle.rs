//! An open filter from a shared library. What it does not have passes to the layer below.

#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a call of a C function through its pointer is one step"
)]

use std::{
    ffi::{c_int, c_void},
    sync::{Arc, OnceLock},
};

use nbdkit_abi as abi;
use nbdkit_core::{BlockSize, Caps, Errno, Error, Extents, Flags, Handle, Result, Support, emulate};

use crate::{
    context::{Outcome, Scope, call},
    filter::Loaded,
    next_ops::Context,
    pieces::{self, Reads},
    plugin_handle::support,
    strings::text,
};

type Ask<T> = Option<unsafe extern "C" fn(*mut abi::NextOps, *mut c_void) -> T>;

/// An open filter. Dropping it closes it, and then the layer below.
pub(crate) struct FilterHandle {
    handle: *mut c_void,
    readonly: bool,
    /// Whether the filter says that it has these emulated, once it was asked.
    emulates_zero: OnceLock<bool>,
    emulates_cache: OnceLock<bool>,
    reads: Reads,
    loaded: Arc<Loaded>,
    context: Box<Context>,
}

// SAFETY: the handle is only given back to the filter, from whatever thread the thread model allows.
unsafe impl Send for FilterHandle {}
// SAFETY: as above.
unsafe impl Sync for FilterHandle {}

impl FilterHandle {
    pub(crate) fn new(
        handle: *mut c_void,
        readonly: bool,
        loaded: Arc<Loaded>,
        context: Box<Context>,
    ) -> Self {
        let (emulates_zero, emulates_cache) = Default::default();
        FilterHandle {
            handle,
            readonly,
            emulates_zero,
            emulates_cache,
            reads: Reads::default(),
            loaded,
            context,
        }
    }

    fn table(&self) -> &abi::FilterCallbacks {
        &self.loaded.callbacks
    }

    fn call<R>(&self, body: impl FnOnce(*mut abi::NextOps) -> R) -> Outcome<R> {
        call(Scope::of(&self.context.opened), || body(self.context.next_ptr()))
    }

    /// Makes a request of the filter; `body` gets the layer below and the place for an errno.
    fn request(&self, what: &str, body: impl FnOnce(*mut abi::NextOps, *mut c_int) -> c_int) -> Result<()> {
        let mut err = 0;
        let outcome = self.call(|next| body(next, &mut err));
        self.loaded.check(what, outcome, err).map(drop)
    }

    /// Asks a question, of a filter that has a say in it. -1 is failure.
    fn ask<T>(
        &self,
        what: &str,
        callback: Ask<c_int>,
        answer: impl FnOnce(c_int) -> Result<T>,
    ) -> Option<Result<T>> {
        let callback = callback?;
        // SAFETY: the library is loaded, and the handle and the layer below are open.
        let outcome = self.call(|next| unsafe { callback(next, self.handle) });
        Some(self.loaded.check(what, outcome, 0).and_then(answer))
    }

    fn ask_bool(&self, what: &str, callback: Ask<c_int>) -> Option<Result<bool>> {
        self.ask(what, callback, |answer| Ok(answer != 0))
    }

    fn ask_support(&self, what: &str, callback: Ask<c_int>) -> Option<Result<Support>> {
        self.ask(what, callback, |answer| support(what, answer))
    }

    fn get_size(&self) -> Option<Result<u64>> {
        let callback = self.table().get_size?;
        // SAFETY: the library is loaded, and the handle and the layer below are open.
        let outcome = self.call(|next| unsafe { callback(next, self.handle) });
        Some(match outcome.value {
            -1 => Err(outcome.error("get_size", 0)),
            size => {
                u64::try_from(size).map_err(|_| Error::new(Errno::EIO, format!("get_size returned {size}")))
            }
        })
    }

    fn block_size(&self) -> Option<Result<BlockSize>> {
        let callback = self.table().block_size?;
        let (mut minimum, mut preferred, mut maximum) = (0, 0, 0);
        // SAFETY: the library is loaded, the handle and the layer below are open, and the three outlive the call.
        let outcome = self
            .call(|next| unsafe { callback(next, self.handle, &mut minimum, &mut preferred, &mut maximum) });
        let checked = self.loaded.check("block_size", outcome, 0);
        Some(checked.map(|_| BlockSize { minimum, preferred, maximum }))
    }

    /// Whether an operation that the filter says it has emulated is to be emulated here: of the layer below, that is the
    /// layer's own matter, and a filter without a say passes the operation on.
    fn emulates(answer: Option<&Result<Support>>) -> bool {
        matches!(answer, Some(Ok(Support::Emulate)))
    }
}

impl Drop for FilterHandle {
    fn drop(&mut self) {
        if let Some(close) = self.table().close {
            // SAFETY: the library is loaded, and nobody uses the handle any more.
            self.call(|_| unsafe { close(self.handle) }).succeeded();
        }
    }
}

impl Handle for FilterHandle {
    fn is_filter(&self) -> bool {
        true
    }

    fn prepare(&self) -> Result<()> {
        let Some(callback) = self.table().prepare else { return Ok(()) };
        // SAFETY: the library is loaded, and the handle and the layer below are open.
        let outcome = self.call(|next| unsafe { callback(next, self.handle, self.readonly.into()) });
        self.loaded.check("prepare", outcome, 0).map(drop)
    }

    fn finalize(&self) -> Result<()> {
        let mut result = Ok(());
        if let Some(callback) = self.table().finalize {
            // SAFETY: the library is loaded, and the handle and the layer below are open.
            let outcome = self.call(|next| unsafe { callback(next, self.handle) });
            result = self.loaded.check("finalize", outcome, 0).map(drop);
        }
        if let Ok(layer) = self.context.next() {
            layer.finalize();
        }
        result
    }

    fn capabilities(&self) -> Result<Caps> {
        let table = self.table();
        let mut caps = match self.context.next() {
            Ok(layer) => layer.next.capabilities(),
            // A filter that opens no layer below answers by itself.
            Err(e) if table.get_size.is_none() => return Err(e),
            Err(_) => Caps::of_size(0),
        };
        if let Some(size) = self.get_size() {
            caps = caps.with_size(size?);
        }
        if let Some(block_size) = self.block_size() {
            caps = caps.with_block_size(block_size?);
        }
        macro_rules! answers {
            ($($with:ident: $ask:ident $question:ident;)*) => {
                $(if let Some(answer) = self.$ask(stringify!($question), table.$question) {
                    caps = caps.$with(answer);
                })*
            };
        }
        if self.readonly {
            caps = caps.with_write(false);
        } else {
            answers! { with_write: ask_bool can_write; }
        }
        answers! {
            with_flush: ask_bool can_flush;
            with_multi_conn: ask_bool can_multi_conn;
            with_extents: ask_bool can_extents;
            with_rotational: ask_bool is_rotational;
        }
        let cache = self.ask_support("can_cache", table.can_cache);
        let _ = self.emulates_cache.set(Self::emulates(cache.as_ref()));
        if let Some(cache) = cache {
            caps = caps.with_cache(cache);
        }
        if !caps.write {
            return Ok(caps);
        }
        answers! { with_trim: ask_bool can_trim; with_fua: ask_support can_fua; }
        let below = caps.can_fast_zero();
        let zero = self.ask_support("can_zero", table.can_zero);
        let _ = self.emulates_zero.set(Self::emulates(zero.as_ref()));
        if let Some(zero) = zero {
            caps = caps.with_zero(zero);
        }
        let fast = self.ask_bool("can_fast_zero", table.can_fast_zero);
        Ok(caps.with_fast_zero(fast.unwrap_or(below)))
    }

    fn export_description(&self) -> Result<Option<String>> {
        let Some(callback) = self.table().export_description else {
            return self.context.next()?.next.export_description();
        };
        // SAFETY: the library is loaded, and the handle and the layer below are open.
        let address = self.call(|next| unsafe { callback(next, self.handle) }).succeeded();
        // SAFETY: null, or a string that stays until the connection ends.
        Ok(unsafe { text(address) }.map(|description| description.to_string_lossy().into_owned()))
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let Some(callback) = self.table().pread else { return self.context.next()?.next.pread(buf, offset) };
        self.reads.fill(buf, |to, count, done| {
            let mut err = 0;
            // SAFETY: the library is loaded, the handle and the layer below are open, and `to` has room.
            let outcome = self
                .call(|next| unsafe { callback(next, self.handle, to, count, offset + done, 0, &mut err) });
            self.loaded.check("pread", outcome, err)
        })
    }

    fn pwrite(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
        let Some(callback) = self.table().pwrite else {
            return self.context.next()?.next.pwrite(buf, offset, flags);
        };
        let base = buf.as_ptr();
        pieces::each(buf.len() as u64, 0, |count, done| {
            // SAFETY: the pieces are within the buffer.
            let from = unsafe { base.add(done as usize) }.cast();
            // SAFETY: the library is loaded, and the handle and the layer below are open.
            self.request("pwrite", |next, err| unsafe {
                callback(next, self.handle, from, count, offset + done, flags.bits(), err)
            })
        })
    }

    fn flush(&self) -> Result<()> {
        let Some(callback) = self.table().flush else { return self.context.next()?.next.flush() };
        // SAFETY: the library is loaded, and the handle and the layer below are open.
        self.request("flush", |next, err| unsafe { callback(next, self.handle, 0, err) })
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        let Some(callback) = self.table().trim else {
            return self.context.next()?.next.trim(length, offset, flags);
        };
        pieces::each(length, offset, |count, at| {
            // SAFETY: the library is loaded, and the handle and the layer below are open.
            self.request("trim", |next, err| unsafe {
                callback(next, self.handle, count, at, flags.bits(), err)
            })
        })
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        if self.emulates_zero.get() == Some(&true) {
            return self.write_zeroes(length, offset, flags);
        }
        let Some(callback) = self.table().zero else {
            return self.context.next()?.next.zero(length, offset, flags);
        };
        pieces::each(length, offset, |count, at| {
            // SAFETY: the library is loaded, and the handle and the layer below are open.
            self.request("zero", |next, err| unsafe {
                callback(next, self.handle, count, at, flags.bits(), err)
            })
        })
    }

    fn extents(&self, length: u64, offset: u64, flags: Flags, extents: &mut Extents) -> Result<()> {
        let Some(callback) = self.table().extents else {
            return self.context.next()?.next.extents(length, offset, flags, extents);
        };
        let (count, list) = (pieces::first(length), std::ptr::from_mut(extents).cast());
        // SAFETY: the library is loaded, the handle and the layer below are open, and the list outlives the call.
        self.request("extents", |next, err| unsafe {
            callback(next, self.handle, count, offset, flags.bits(), list, err)
        })
    }

    fn cache(&self, length: u64, offset: u64) -> Result<()> {
        if self.emulates_cache.get() == Some(&true) {
            return emulate::cache(length, offset, BlockSize::default(), |buf, at| self.pread(buf, at));
        }
        let Some(callback) = self.table().cache else {
            return self.context.next()?.next.cache(length, offset);
        };
        pieces::each(length, offset, |count, at| {
            // SAFETY: the library is loaded, and the handle and the layer below are open.
            self.request("cache", |next, err| unsafe { callback(next, self.handle, count, at, 0, err) })
        })
    }
}

impl FilterHandle {
    /// Zeroes by the filter's own pwrite: it has answered that it wants to see the data.
    fn write_zeroes(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        if flags.contains(Flags::FAST_ZERO) {
            return Err(Errno::EOPNOTSUPP.into());
        }
        let block = self.context.next()?.next.caps().block_size;
        emulate::zero(length, offset, block, |zeroes, at| self.pwrite(zeroes, at, flags & Flags::FUA))
    }
}
