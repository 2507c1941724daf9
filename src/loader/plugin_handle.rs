//! An open plugin from a shared library. The defaults of missing callbacks and the differences between versions 1 and
//! 2 are here; emulation is not: that is the chain's.

#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a call of a C function through its pointer is one step"
)]

use std::{
    ffi::{c_int, c_void},
    sync::Arc,
};

use nbdkit_abi as abi;
use nbdkit_core::{BlockSize, Caps, Errno, Error, Extents, Flags, Handle, Result, Support};

use crate::{
    context::{Opened, Outcome, Scope, call},
    pieces::{self, Reads},
    plugin::Loaded,
    strings::text,
};

type Ask<T> = Option<unsafe extern "C" fn(*mut c_void) -> T>;

/// An open plugin. Dropping it closes it.
pub(crate) struct PluginHandle {
    handle: *mut c_void,
    /// Opened so: questions about writing are not asked.
    readonly: bool,
    reads: Reads,
    loaded: Arc<Loaded>,
    opened: Opened,
}

// SAFETY: the handle is only given back to the plugin, from whatever thread the thread model allows.
unsafe impl Send for PluginHandle {}
// SAFETY: as above.
unsafe impl Sync for PluginHandle {}

/// A tri-state answer.
pub(crate) fn support(what: &str, answer: c_int) -> Result<Support> {
    match answer {
        0 => Ok(Support::None),
        1 => Ok(Support::Emulate),
        2 => Ok(Support::Native),
        other => Err(Error::new(Errno::EIO, format!("{what} returned {other}, which is none of 0, 1 and 2"))),
    }
}

impl PluginHandle {
    pub(crate) fn new(handle: *mut c_void, readonly: bool, loaded: Arc<Loaded>, opened: Opened) -> Self {
        PluginHandle { handle, readonly, reads: Reads::default(), loaded, opened }
    }

    fn table(&self) -> &abi::Plugin {
        &self.loaded.table
    }

    fn call<R>(&self, body: impl FnOnce() -> R) -> Outcome<R> {
        call(Scope::of(&self.opened), body)
    }

    /// Makes a request. -1 is failure.
    fn request(&self, what: &str, body: impl FnOnce() -> c_int) -> Result<()> {
        self.loaded.check(what, self.call(body), |r| r == -1).map(drop)
    }

    /// Asks a question, if the plugin has the callback. -1 is failure.
    fn ask(&self, what: &str, callback: Ask<c_int>) -> Result<Option<c_int>> {
        let Some(callback) = callback else { return Ok(None) };
        // SAFETY: the library is loaded and the handle is open.
        let outcome = self.call(|| unsafe { callback(self.handle) });
        self.loaded.check(what, outcome, |r| r == -1).map(Some)
    }

    /// As [`ask`](Self::ask), for yes or no.
    fn ask_bool(&self, what: &str, callback: Ask<c_int>, missing: bool) -> Result<bool> {
        Ok(self.ask(what, callback)?.map_or(missing, |answer| answer != 0))
    }

    fn get_size(&self) -> Result<u64> {
        let Some(callback) = self.table().get_size else {
            return Err(Error::new(Errno::EIO, "the plugin has no get_size"));
        };
        // SAFETY: the library is loaded and the handle is open.
        let outcome = self.call(|| unsafe { callback(self.handle) });
        let size = self.loaded.check("get_size", outcome, |size| size == -1)?;
        u64::try_from(size).map_err(|_| Error::new(Errno::EIO, format!("get_size returned {size}")))
    }

    fn block_size(&self) -> Result<BlockSize> {
        let Some(callback) = self.table().block_size else { return Ok(BlockSize::default()) };
        let (mut minimum, mut preferred, mut maximum) = (0, 0, 0);
        // SAFETY: the library is loaded, the handle is open and the three outlive the call.
        self.request("block_size", || unsafe {
            callback(self.handle, &mut minimum, &mut preferred, &mut maximum)
        })?;
        Ok(BlockSize { minimum, preferred, maximum })
    }

    fn can_write(&self) -> Result<bool> {
        let has_pwrite = self.table().pwrite.is_some() || self.table().pwrite_v1.is_some();
        self.ask_bool("can_write", self.table().can_write, has_pwrite)
    }

    fn can_flush(&self) -> Result<bool> {
        let has_flush = self.table().flush.is_some() || self.table().flush_v1.is_some();
        self.ask_bool("can_flush", self.table().can_flush, has_flush)
    }

    /// The plugin's yes or no chooses between its zero and writing zeroes.
    fn can_zero(&self) -> Result<Support> {
        let native = self.ask_bool("can_zero", self.table().can_zero, self.has_zero())?;
        Ok(if native && self.has_zero() { Support::Native } else { Support::Emulate })
    }

    fn can_fua(&self) -> Result<Support> {
        match self.ask("can_fua", self.table().can_fua)? {
            Some(answer) if self.table()._api_version < 2 => support("can_fua", answer.min(abi::FUA_EMULATE)),
            // As the C nbdkit, which only asks whether it is native.
            Some(answer) if answer > abi::FUA_NATIVE => Ok(Support::Emulate),
            Some(answer) => support("can_fua", answer),
            None if self.table().flush.is_some() || self.table().flush_v1.is_some() => Ok(Support::Emulate),
            None => Ok(Support::None),
        }
    }

    fn can_cache(&self) -> Result<Support> {
        match self.ask("can_cache", self.table().can_cache)? {
            Some(answer) => support("can_cache", answer),
            None if self.table().cache.is_some() => Ok(Support::Native),
            None => Ok(Support::None),
        }
    }

    fn has_zero(&self) -> bool {
        self.table().zero.is_some() || self.table().zero_v1.is_some()
    }
}

impl Drop for PluginHandle {
    fn drop(&mut self) {
        if let Some(close) = self.table().close {
            // SAFETY: the library is loaded, and nobody uses the handle any more.
            self.call(|| unsafe { close(self.handle) }).succeeded();
        }
    }
}

impl Handle for PluginHandle {
    fn capabilities(&self) -> Result<Caps> {
        let table = self.table();
        let mut caps = Caps::of_size(self.get_size()?)
            .with_block_size(self.block_size()?)
            .with_write(if self.readonly { Ok(false) } else { self.can_write() })
            .with_flush(self.can_flush())
            .with_multi_conn(self.ask_bool("can_multi_conn", table.can_multi_conn, false))
            .with_cache(self.can_cache())
            .with_extents(self.ask_bool("can_extents", table.can_extents, table.extents.is_some()))
            .with_rotational(self.ask_bool("is_rotational", table.is_rotational, false));
        if caps.write {
            let has_trim = table.trim.is_some() || table.trim_v1.is_some();
            caps = caps
                .with_trim(self.ask_bool("can_trim", table.can_trim, has_trim))
                .with_zero(self.can_zero())
                .with_fua(self.can_fua());
            let missing = match table.can_fast_zero {
                Some(_) => false,
                // Version 1 cannot be told to be fast: the request fails fast before it is called.
                None if table.zero.is_none() => true,
                None => caps.zero != Support::Native,
            };
            caps = caps.with_fast_zero(self.ask_bool("can_fast_zero", table.can_fast_zero, missing));
        }
        Ok(caps)
    }

    fn export_description(&self) -> Result<Option<String>> {
        let Some(callback) = self.table().export_description else { return Ok(None) };
        // SAFETY: the library is loaded and the handle is open.
        let address = self.call(|| unsafe { callback(self.handle) }).succeeded();
        // SAFETY: null, or a string that stays until the connection ends.
        Ok(unsafe { text(address) }.map(|description| description.to_string_lossy().into_owned()))
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.reads.fill(buf, |to, count, done| {
            let at = offset + done;
            // SAFETY: the library is loaded, the handle is open and `to` has room for the piece.
            let outcome = self.call(|| unsafe {
                match (self.table().pread, self.table().pread_v1) {
                    (Some(pread), _) => pread(self.handle, to, count, at, 0),
                    (None, Some(pread)) => pread(self.handle, to, count, at),
                    (None, None) => -1,
                }
            });
            self.loaded.check("pread", outcome, |r| r == -1)
        })
    }

    fn pwrite(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
        let (handle, base) = (self.handle, buf.as_ptr());
        let (pwrite, pwrite_v1) = (self.table().pwrite, self.table().pwrite_v1);
        if pwrite.is_none() && pwrite_v1.is_none() {
            return Err(Errno::EROFS.into());
        }
        pieces::each(buf.len() as u64, 0, |count, done| {
            // SAFETY: the pieces are within the buffer.
            let from = unsafe { base.add(done as usize) }.cast();
            let at = offset + done;
            // SAFETY: the library is loaded, the handle is open and the piece is in the buffer.
            self.request("pwrite", || unsafe {
                match (pwrite, pwrite_v1) {
                    (Some(pwrite), _) => pwrite(handle, from, count, at, flags.bits()),
                    (None, Some(pwrite)) => pwrite(handle, from, count, at),
                    (None, None) => -1,
                }
            })
        })
    }

    fn flush(&self) -> Result<()> {
        match (self.table().flush, self.table().flush_v1) {
            // SAFETY: the library is loaded and the handle is open.
            (Some(flush), _) => self.request("flush", || unsafe { flush(self.handle, 0) }),
            // SAFETY: as above.
            (None, Some(flush)) => self.request("flush", || unsafe { flush(self.handle) }),
            (None, None) => Err(Errno::EINVAL.into()),
        }
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        pieces::each(length, offset, |count, at| match (self.table().trim, self.table().trim_v1) {
            // SAFETY: the library is loaded and the handle is open.
            (Some(trim), _) => self.request("trim", || unsafe { trim(self.handle, count, at, flags.bits()) }),
            // SAFETY: as above.
            (None, Some(trim)) => self.request("trim", || unsafe { trim(self.handle, count, at) }),
            (None, None) => Err(Errno::EINVAL.into()),
        })
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        pieces::each(length, offset, |count, at| match (self.table().zero, self.table().zero_v1) {
            // SAFETY: the library is loaded and the handle is open.
            (Some(zero), _) => self.request("zero", || unsafe { zero(self.handle, count, at, flags.bits()) }),
            (None, Some(zero)) if !flags.contains(Flags::FAST_ZERO) => {
                let may_trim = flags.contains(Flags::MAY_TRIM).into();
                // SAFETY: as above.
                self.request("zero", || unsafe { zero(self.handle, count, at, may_trim) })
            }
            _ => Err(Errno::EOPNOTSUPP.into()),
        })
    }

    fn extents(&self, length: u64, offset: u64, flags: Flags, extents: &mut Extents) -> Result<()> {
        let Some(callback) = self.table().extents else { return Err(Errno::EINVAL.into()) };
        let (count, list) = (pieces::first(length), std::ptr::from_mut(extents).cast());
        // SAFETY: the library is loaded, the handle is open and the list outlives the call.
        self.request("extents", || unsafe { callback(self.handle, count, offset, flags.bits(), list) })
    }

    fn cache(&self, length: u64, offset: u64) -> Result<()> {
        // A plugin may offer it without having it: then there is nothing to do.
        let Some(callback) = self.table().cache else { return Ok(()) };
        pieces::each(length, offset, |count, at| {
            // SAFETY: the library is loaded and the handle is open.
            self.request("cache", || unsafe { callback(self.handle, count, at, 0) })
        })
    }
}
