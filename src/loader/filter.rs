//! A filter from a shared library: loaded, configured, asked for exports.

#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a call of a C function through its pointer is one step"
)]

use std::{
    ffi::{CString, OsStr, OsString, c_char, c_int, c_void},
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::Path,
    ptr,
    sync::Arc,
};

use anyhow::{Context as _, Result, ensure};
use nbdkit_abi as abi;
use nbdkit_core::{
    Below, Errno, Error, Exports, Filter, Handle, Info, NextConfig, NextConfigComplete, Open, ThreadModel,
};

use crate::{
    DebugFlags,
    context::{Opened, Outcome, Scope, call, current, serve},
    exports::{self, ExportList, note},
    filter_handle::FilterHandle,
    layout::{self, Layout, Model},
    module::{self, Module},
    next_ops::{Backend, Context, next_open},
    panic::boundary,
    plugin,
    strings::{GLOBAL, c_string, os, text},
};

/// What a filter registered, with the library it is in.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) callbacks: abi::FilterCallbacks,
    layout: Layout,
    name: String,
    backend: Arc<Backend>,
    /// Unloaded by the last who lets go of this.
    _module: Module,
}

// SAFETY: the tables are never written to; their strings and functions belong to the library, which lives as long.
// That the functions may be called from any thread, as the thread model allows, is the filter's part of the
// interface.
unsafe impl Send for Loaded {}
// SAFETY: as above.
unsafe impl Sync for Loaded {}

/// A filter from a shared library.
#[derive(Debug)]
struct CFilter {
    loaded: Arc<Loaded>,
    info: Info,
}

/// Loads a filter from a shared library and calls its `load`.
///
/// # Errors
/// If it cannot be loaded, is not a filter, or was built for a version of nbdkit whose layout is not known; the
/// error names the file and the reason.
pub fn load_filter(path: &Path, flags: &mut DebugFlags) -> Result<Box<dyn Filter>> {
    let mut module = Module::open("filter", path)?;
    let init: layout::Init = module.entry("filter", c"filter_init")?;
    // SAFETY: the entry point takes nothing and returns a pointer.
    let registered = call(Scope::start(), || unsafe { init() });
    ensure!(
        !registered.value.is_null(),
        registered.failure("filter_init").context(path.display().to_string())
    );
    // SAFETY: not null; what filter_init returns stays as long as the library.
    let layout =
        unsafe { layout::read(registered.succeeded()) }.with_context(|| path.display().to_string())?;
    let head = layout.head;
    // SAFETY: the strings and functions are the library's.
    let name = unsafe { module.load("filter", head.name, head.load, head.unload, flags, false) }?;
    // SAFETY: as above.
    let info =
        unsafe { module::info(&module, head._version, head.longname, head.description, head.config_help) };
    let backend = Arc::default();
    let loaded = Arc::new(Loaded { callbacks: layout.callbacks, layout, name, backend, _module: module });
    Ok(Box::new(CFilter { loaded, info }))
}

impl Loaded {
    /// The value of a call, unless it is -1.
    pub(crate) fn check(
        &self,
        what: &str,
        outcome: Outcome<c_int>,
        err: c_int,
    ) -> nbdkit_core::Result<c_int> {
        if outcome.value == -1 { Err(outcome.error(what, err)) } else { Ok(outcome.succeeded()) }
    }

    fn step(&self, what: &str, outcome: Outcome<c_int>) -> Result<()> {
        if outcome.value == -1 {
            return Err(outcome.failure(&format!("{}: {what}", self.name)));
        }
        outcome.succeeded();
        Ok(())
    }

    /// The circumstances of a call outside a connection's open layers.
    fn scope<'a>(&self, below: &'a Below, tls: bool) -> Scope<'a> {
        self.backend.learn(below);
        Scope { client: below.client(), below: Some(below), tls, ..Scope::default() }
    }
}

/// Passes a step of the start on: `call` is the Rust closure behind the `nbdkit_backend *` of that step.
fn pass_on(call: impl FnOnce() -> Option<Result<()>>) -> c_int {
    boundary(-1, || match call() {
        Some(Ok(())) => 0,
        Some(Err(e)) => {
            current(|frame| frame.map_or((), |frame| frame.note_failure(&e)));
            -1
        }
        None => -1,
    })
}

unsafe extern "C" fn next_config(backend: *mut c_void, key: *const c_char, value: *const c_char) -> c_int {
    // SAFETY: the filter gives what its config was given, within that call, and terminated strings.
    pass_on(|| unsafe {
        let next = backend.cast::<&mut NextConfig<'_>>().as_mut()?;
        let (key, value) = (text(key)?, text(value)?);
        Some(key.to_str().map_err(Into::into).and_then(|key| next(key, os(value))))
    })
}

unsafe extern "C" fn next_config_complete(backend: *mut c_void) -> c_int {
    // SAFETY: the filter gives what its config_complete was given, within that call.
    pass_on(|| unsafe { backend.cast::<&mut NextConfigComplete<'_>>().as_mut() }.map(|next| next()))
}

/// Calls the layers below on behalf of the call that this thread is in.
fn below<T>(ask: impl FnOnce(&Below, bool) -> nbdkit_core::Result<T>) -> nbdkit_core::Result<T> {
    current(|frame| {
        let scope = frame.map(|frame| frame.scope);
        match scope.and_then(|scope| scope.below.map(|below| (below, scope.tls))) {
            Some((below, tls)) => ask(below, tls),
            None => Err(Error::new(Errno::EINVAL, "the filter called next outside its callback")),
        }
    })
}

unsafe extern "C" fn next_preconnect(_backend: *mut c_void, readonly: c_int) -> c_int {
    boundary(-1, || match below(|below, _| below.preconnect(readonly != 0)) {
        Ok(()) => 0,
        Err(e) => note(&e),
    })
}

unsafe extern "C" fn next_list_exports(_backend: *mut c_void, readonly: c_int, list: *mut c_void) -> c_int {
    boundary(-1, || {
        let listed = below(|below, tls| below.list_exports(readonly != 0, tls)).and_then(|exports| {
            // SAFETY: the filter gives a list that nobody else uses.
            match unsafe { ExportList::from_ptr(list) } {
                Some(list) => list.extend(&exports),
                None => Err(Error::new(Errno::EINVAL, "the filter gave no list of exports")),
            }
        });
        match listed {
            Ok(()) => 0,
            Err(e) => note(&e),
        }
    })
}

unsafe extern "C" fn next_default_export(_backend: *mut c_void, readonly: c_int) -> *const c_char {
    boundary(ptr::null(), || match below(|below, tls| below.default_export(readonly != 0, tls)) {
        Ok(Some(name)) => GLOBAL.keep(c_string(name.as_bytes())),
        Ok(None) => ptr::null(),
        Err(e) => {
            note(&e);
            ptr::null()
        }
    })
}

impl Filter for CFilter {
    fn info(&self) -> Info {
        self.info.clone()
    }

    fn config(&mut self, key: &str, value: &OsStr, mut next: &mut NextConfig<'_>) -> Result<()> {
        let Some(callback) = self.loaded.layout.head.config else { return next(key, value) };
        // The filter may keep both for as long as it likes.
        let key = GLOBAL.keep(CString::new(key)?);
        let value = GLOBAL.keep(CString::new(value.as_bytes())?);
        let backend = ptr::from_mut(&mut next).cast();
        // SAFETY: the library is loaded; the strings are terminated; `next` outlives the call.
        let outcome = call(Scope::start(), || unsafe { callback(next_config, backend, key, value) });
        self.loaded.step("config", outcome)
    }

    fn config_complete(&mut self, mut next: &mut NextConfigComplete<'_>) -> Result<()> {
        let Some(callback) = self.loaded.layout.head.config_complete else { return next() };
        let backend = ptr::from_mut(&mut next).cast();
        // SAFETY: the library is loaded; `next` outlives the call.
        let outcome = call(Scope::start(), || unsafe { callback(next_config_complete, backend) });
        self.loaded.step("config_complete", outcome)
    }

    fn thread_model(&self, next: ThreadModel) -> ThreadModel {
        let outcome = match self.loaded.layout.thread_model {
            Model::Unset => return next,
            // SAFETY: the library is loaded.
            Model::Alone(callback) => call(Scope::default(), || unsafe { callback() }),
            // SAFETY: as above.
            Model::Over(callback) => call(Scope::default(), || unsafe { callback(next as c_int) }),
        };
        match plugin::thread_model(outcome.value) {
            Some(model) => model.min(next),
            None => {
                let reason = outcome.failure("thread_model");
                log::error!("{}: {reason}: requests are serialized", self.loaded.name);
                ThreadModel::SerializeConnections
            }
        }
    }

    fn dump(&self) -> Vec<(String, String)> {
        if let Some(dump) = self.loaded.layout.dump_plugin {
            // SAFETY: the library is loaded.
            call(Scope::start(), || unsafe { dump() }).succeeded();
            exports::flush_stdio();
        }
        Vec::new()
    }

    fn get_ready(&mut self, model: ThreadModel) -> Result<()> {
        let Some(callback) = self.loaded.callbacks.get_ready else { return Ok(()) };
        // SAFETY: the library is loaded.
        let outcome = call(Scope::start(), || unsafe { callback(model as c_int) });
        self.loaded.step("get_ready", outcome)
    }

    fn after_fork(&self, next: &Below) -> Result<()> {
        serve(next.server());
        let backend = self.loaded.backend.as_ptr();
        let scope = Scope { say: Scope::start().say, ..self.loaded.scope(next, false) };
        let Some(callback) = self.loaded.callbacks.after_fork else { return Ok(()) };
        // SAFETY: the library is loaded, and the backend stays as long.
        let outcome = call(scope, || unsafe { callback(backend) });
        self.loaded.step("after_fork", outcome)
    }

    fn cleanup(&self, next: &Below) {
        if let Some(callback) = self.loaded.callbacks.cleanup {
            let backend = self.loaded.backend.as_ptr();
            // SAFETY: the library is loaded, and the backend stays as long.
            call(self.loaded.scope(next, false), || unsafe { callback(backend) }).succeeded();
        }
        self.loaded.backend.forget();
    }

    fn preconnect(&self, next: &Below, readonly: bool) -> nbdkit_core::Result<()> {
        let Some(callback) = self.loaded.callbacks.preconnect else { return next.preconnect(readonly) };
        let backend = self.loaded.backend.as_ptr();
        // SAFETY: the library is loaded, and the backend stays as long.
        let outcome = call(self.loaded.scope(next, false), || unsafe {
            callback(next_preconnect, backend, readonly.into())
        });
        self.loaded.check("preconnect", outcome, 0).map(drop)
    }

    fn list_exports(&self, next: &Below, readonly: bool, tls: bool) -> nbdkit_core::Result<Exports> {
        let Some(callback) = self.loaded.callbacks.list_exports else {
            return next.list_exports(readonly, tls);
        };
        let mut list = ExportList::default();
        let (backend, address) = (self.loaded.backend.as_ptr(), list.as_ptr());
        // SAFETY: the library is loaded, the backend stays as long, and the list outlives the call.
        let outcome = call(self.loaded.scope(next, tls), || unsafe {
            callback(next_list_exports, backend, readonly.into(), tls.into(), address)
        });
        self.loaded.check("list_exports", outcome, 0)?;
        Ok(list.finish())
    }

    fn default_export(
        &self,
        next: &Below,
        readonly: bool,
        tls: bool,
    ) -> nbdkit_core::Result<Option<OsString>> {
        let Some(callback) = self.loaded.callbacks.default_export else {
            return next.default_export(readonly, tls);
        };
        let backend = self.loaded.backend.as_ptr();
        // SAFETY: the library is loaded, and the backend stays as long.
        let outcome = call(self.loaded.scope(next, tls), || unsafe {
            callback(next_default_export, backend, readonly.into(), tls.into())
        });
        // SAFETY: the filter returned null or a string that stays until its next call.
        let name = unsafe { text(outcome.succeeded()) };
        let name = name.map(|name| OsString::from_vec(name.to_bytes().to_vec()));
        Ok(name.filter(|name| name.len() <= Exports::MAX_STRING))
    }

    fn open(&self, next: &Below, open: &Open) -> nbdkit_core::Result<Box<dyn Handle>> {
        self.loaded.backend.learn(next);
        let mut export_name = open.export_name.clone();
        if export_name.is_empty() && self.loaded.callbacks.default_export.is_some() {
            let ask = || self.default_export(next, open.readonly, open.tls);
            let default = next.default_export_above(open.readonly, open.tls, ask)?;
            export_name = default.ok_or_else(|| {
                Error::new(Errno::ENOENT, "the filter has no default export: ask for an export by its name")
            })?;
        }
        let opened = Opened::new(open, c_string(export_name.as_bytes()));
        let context = Box::new(Context::new(opened, self.loaded.backend.clone(), next.clone()));
        let handle = match self.loaded.callbacks.open {
            Some(callback) => {
                let (address, name) = (context.as_ptr(), context.opened.export_name.as_ptr());
                // SAFETY: the library is loaded, and the context outlives the handle.
                let outcome = call(Scope::of(&context.opened), || unsafe {
                    callback(next_open, address, open.readonly.into(), name, open.tls.into())
                });
                if outcome.value.is_null() {
                    return Err(outcome.error("open", 0));
                }
                outcome.succeeded()
            }
            None => {
                context.open_next(open.readonly, export_name)?;
                ptr::null_mut()
            }
        };
        Ok(Box::new(FilterHandle::new(handle, open.readonly, self.loaded.clone(), context)))
    }
}
