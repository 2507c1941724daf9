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
    pieces,
    plugin_handle::support,
    strings::text,
};

type Ask<T> = Option<unsafe extern "C" fn(*mut abi::NextOps, *mut c_void) -> T>;

/// An open filter. Dropping it closes it, and then the layer below.
pub(crate) struct FilterHandle {
    handle: *mut c_void,
    readonly: bool,
    /// The filter's own answers to what can be emulated, once they were asked.
    zero: OnceLock<Support>,
    cache: OnceLock<Support>,
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
        let (zero, cache) = Default::default();
        FilterHandle { handle, readonly, zero, cache, loaded, context }
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

    /// What the layer below can do.
    fn below<T>(&self, answer: impl FnOnce(&Caps) -> T) -> Result<T> {
        Ok(answer(self.context.next()?.next.caps()))
    }

    /// Asks a question: the filter, or the layer below for one that has no say.
    fn ask<T>(
        &self,
        what: &str,
        callback: Ask<c_int>,
        answer: impl FnOnce(c_int) -> Result<T>,
        below: impl FnOnce(&Caps) -> T,
    ) -> Result<T> {
        let Some(callback) = callback else { return self.below(below) };
        // SAFETY: the library is loaded, and the handle and the layer below are open.
        let outcome = self.call(|next| unsafe { callback(next, self.handle) });
        answer(self.loaded.check(what, outcome, 0)?)
    }

    fn ask_bool(&self, what: &str, callback: Ask<c_int>, below: impl FnOnce(&Caps) -> bool) -> Result<bool> {
        self.ask(what, callback, |answer| Ok(answer != 0), below)
    }

    fn ask_support(
        &self,
        what: &str,
        callback: Ask<c_int>,
        below: impl FnOnce(&Caps) -> Support,
    ) -> Result<Support> {
        self.ask(what, callback, |answer| support(what, answer), below)
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

    fn get_size(&self) -> Result<u64> {
        let Some(callback) = self.table().get_size else { return self.below(|caps| caps.size) };
        // SAFETY: the library is loaded, and the handle and the layer below are open.
        let outcome = self.call(|next| unsafe { callback(next, self.handle) });
        match outcome.value {
            -1 => Err(outcome.error("get_size", 0)),
            size => {
                u64::try_from(size).map_err(|_| Error::new(Errno::EIO, format!("get_size returned {size}")))
            }
        }
    }

    fn block_size(&self) -> Result<BlockSize> {
        let Some(callback) = self.table().block_size else { return self.below(|caps| caps.block_size) };
        let (mut minimum, mut preferred, mut maximum) = (0, 0, 0);
        // SAFETY: the library is loaded, the handle and the layer below are open, and the three outlive the call.
        let outcome = self
            .call(|next| unsafe { callback(next, self.handle, &mut minimum, &mut preferred, &mut maximum) });
        self.loaded.check("block_size", outcome, 0)?;
        Ok(BlockSize { minimum, preferred, maximum })
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

    fn is_rotational(&self) -> Result<bool> {
        self.ask_bool("is_rotational", self.table().is_rotational, |caps| caps.rotational)
    }

    fn can_write(&self) -> Result<bool> {
        self.ask_bool("can_write", self.table().can_write, |caps| caps.write)
    }

    fn can_flush(&self) -> Result<bool> {
        self.ask_bool("can_flush", self.table().can_flush, |caps| caps.flush)
    }

    fn can_trim(&self) -> Result<bool> {
        self.ask_bool("can_trim", self.table().can_trim, |caps| caps.trim)
    }

    fn can_zero(&self) -> Result<Support> {
        // Of the layer below, "emulated" is that layer's own matter: this one passes zero on.
        let passed_on = |caps: &Caps| caps.zero;
        let answer = self.ask_support("can_zero", self.table().can_zero, passed_on)?;
        let own = if self.table().can_zero.is_some() { answer } else { Support::Native };
        let _ = self.zero.set(own);
        Ok(answer)
    }

    fn can_fast_zero(&self) -> Result<bool> {
        self.ask_bool("can_fast_zero", self.table().can_fast_zero, |caps| caps.fast_zero)
    }

    fn can_fua(&self) -> Result<Support> {
        self.ask_support("can_fua", self.table().can_fua, |caps| caps.fua)
    }

    fn can_multi_conn(&self) -> Result<bool> {
        self.ask_bool("can_multi_conn", self.table().can_multi_conn, |caps| caps.multi_conn)
    }

    fn can_cache(&self) -> Result<Support> {
        let answer = self.ask_support("can_cache", self.table().can_cache, |caps| caps.cache)?;
        let own = if self.table().can_cache.is_some() { answer } else { Support::Native };
        let _ = self.cache.set(own);
        Ok(answer)
    }

    fn can_extents(&self) -> Result<bool> {
        self.ask_bool("can_extents", self.table().can_extents, |caps| caps.extents)
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let Some(callback) = self.table().pread else { return self.context.next()?.next.pread(buf, offset) };
        let base = buf.as_mut_ptr();
        pieces::each(buf.len() as u64, 0, |count, done| {
            // SAFETY: the pieces are within the buffer.
            let to = unsafe { base.add(done as usize) }.cast();
            // SAFETY: the library is loaded, the handle and the layer below are open, and `to` has room.
            self.request("pread", |next, err| unsafe {
                callback(next, self.handle, to, count, offset + done, 0, err)
            })
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
        if self.zero.get() == Some(&Support::Emulate) {
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
        if self.cache.get() == Some(&Support::Emulate) {
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
        let block = self.below(|caps| caps.block_size)?;
        emulate::zero(length, offset, block, |zeroes, at| self.pwrite(zeroes, at, flags & Flags::FUA))
    }
}
