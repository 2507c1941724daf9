//! A plugin from a shared library, version 1 or 2 of the interface: loaded, configured, asked for exports.

#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a call of a C function through its pointer is one step"
)]

use std::{
    ffi::{CStr, CString, OsStr, OsString, c_char, c_int},
    mem::MaybeUninit,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::Path,
    ptr,
    sync::Arc,
};

use anyhow::{Context as _, Result, ensure};
use nbdkit_abi as abi;
use nbdkit_core::{
    Client, Errno, Error, Exports, Handle, Info, Interface, Open, Plugin, ShutdownFlag, ThreadModel,
};
use parking_lot::Mutex;

use crate::{
    DebugFlags,
    context::{Opened, Outcome, Scope, call, serve},
    exports::{self, ExportList},
    module::{self, Module},
    plugin_handle::PluginHandle,
    strings::{GLOBAL, c_string, owned, text},
};

/// The optional function `plugin_text` of a library: a text about the plugin as it is now, by the name of its field in the
/// structure; null or a string that stays.
type Text = unsafe extern "C" fn(*const c_char) -> *const c_char;

/// What a plugin registered, with the library it is in.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) table: abi::Plugin,
    pub(crate) name: String,
    /// Knows more about the plugin once it is configured, as one that runs a script.
    text: Option<Text>,
    /// Unloaded by the last who lets go of this.
    _module: Module,
}

// SAFETY: the table is never written to; its strings and functions belong to the library, which lives as long. That
// the functions may be called from any thread, as the thread model allows, is the plugin's part of the interface.
unsafe impl Send for Loaded {}
// SAFETY: as above.
unsafe impl Sync for Loaded {}

/// A plugin from a shared library.
#[derive(Debug)]
struct CPlugin {
    loaded: Arc<Loaded>,
    info: Info,
    max_model: ThreadModel,
    /// The plugin's answer, once it was asked.
    model: Mutex<Option<ThreadModel>>,
}

/// Loads a plugin from a shared library and calls its `load`.
///
/// # Errors
/// If it cannot be loaded, is not a plugin, or lacks something; the error names the file and the reason.
pub fn load_plugin(path: &Path, flags: &mut DebugFlags) -> Result<Box<dyn Plugin>> {
    load(path, flags, false)
}

/// As [`load_plugin`], for one that nobody asks for by its name, which may be any.
///
/// # Errors
/// As `load_plugin`.
pub(crate) fn load_compiled(path: &Path, flags: &mut DebugFlags) -> Result<Box<dyn Plugin>> {
    load(path, flags, true)
}

fn load(path: &Path, flags: &mut DebugFlags, any_name: bool) -> Result<Box<dyn Plugin>> {
    let mut module = Module::open("plugin", path)?;
    let init: abi::PluginInit = module.entry("plugin", c"plugin_init")?;
    // SAFETY: the entry point takes nothing and returns a pointer.
    let registered = call(Scope::start(), || unsafe { init() });
    ensure!(
        !registered.value.is_null(),
        registered.failure("plugin_init").context(path.display().to_string())
    );
    // SAFETY: not null; the library says how long the structure is, and it is in the library's memory.
    let table = unsafe { copy_table(registered.succeeded()) };
    check(&table).with_context(|| path.display().to_string())?;
    // SAFETY: the strings and functions are the library's.
    let name = unsafe { module.load("plugin", table.name, table.load, table.unload, flags, any_name) }?;
    let max_model = thread_model(table._thread_model)
        .with_context(|| format!("{}: _thread_model is {}", path.display(), table._thread_model))?;
    // SAFETY: the strings are the library's.
    let info =
        unsafe { module::info(&module, table.version, table.longname, table.description, table.config_help) };
    // SAFETY: as above.
    let magic = unsafe { owned(table.magic_config_key) };
    let info = Info { magic_config_key: (!magic.is_empty()).then(|| magic.into()), ..info };
    let text = module.entry("plugin", c"plugin_text").ok();
    let loaded = Arc::new(Loaded { table, name, text, _module: module });
    Ok(Box::new(CPlugin { loaded, info, max_model, model: Mutex::new(None) }))
}

/// Copies what both the plugin and the server know of the structure; the rest is null.
///
/// # Safety
/// At `registered` are at least 8 bytes, the size, and as many as it says.
unsafe fn copy_table(registered: *const abi::Plugin) -> abi::Plugin {
    let mut table = MaybeUninit::<abi::Plugin>::zeroed();
    // SAFETY: the caller promises it.
    let theirs = unsafe { (&raw const (*registered)._struct_size).read() };
    let theirs = usize::try_from(theirs).unwrap_or(usize::MAX);
    // Never half a pointer.
    let size = theirs.min(size_of::<abi::Plugin>()) & !(align_of::<abi::Plugin>() - 1);
    // SAFETY: both are that long, and they are apart.
    unsafe { ptr::copy_nonoverlapping(registered.cast::<u8>(), table.as_mut_ptr().cast(), size) };
    // SAFETY: zero is a value of each field: a number, a null pointer or no function.
    unsafe { table.assume_init() }
}

/// Checks what every plugin must have.
fn check(table: &abi::Plugin) -> Result<()> {
    let version = table._api_version;
    ensure!(
        (0..=abi::PLUGIN_API_VERSION).contains(&version),
        "the plugin is for version {version} of the plugin interface, and this server knows 1 to {}",
        abi::PLUGIN_API_VERSION
    );
    for (missing, field) in [
        (table.name.is_null(), ".name"),
        (table.open.is_none(), ".open callback"),
        (table.get_size.is_none(), ".get_size callback"),
        (table.pread.is_none() && table.pread_v1.is_none(), ".pread callback"),
    ] {
        ensure!(!missing, "plugin must have a {field}");
    }
    Ok(())
}

/// A thread model by number.
pub(crate) fn thread_model(number: c_int) -> Option<ThreadModel> {
    Some(match number {
        abi::THREAD_MODEL_SERIALIZE_CONNECTIONS => ThreadModel::SerializeConnections,
        abi::THREAD_MODEL_SERIALIZE_ALL_REQUESTS => ThreadModel::SerializeAllRequests,
        abi::THREAD_MODEL_SERIALIZE_REQUESTS => ThreadModel::SerializeRequests,
        abi::THREAD_MODEL_PARALLEL => ThreadModel::Parallel,
        _ => return None,
    })
}

impl Loaded {
    /// The reason why a request failed: `nbdkit_set_error`, else errno if the plugin keeps it, else `EIO`.
    pub(crate) fn error<R>(&self, what: &str, outcome: Outcome<R>) -> Error {
        let preserved = outcome.set_errno == 0 && self.table.errno_is_preserved != 0;
        let errno = if preserved { outcome.errno } else { 0 };
        outcome.error(what, errno)
    }

    /// What the plugin says now of a field, if it says more than it did when it was loaded.
    fn text_now(&self, field: &CStr) -> Option<String> {
        let text = self.text?;
        // SAFETY: the library is loaded, and the name is a terminated string.
        let text = call(Scope::default(), || unsafe { text(field.as_ptr()) }).succeeded();
        // SAFETY: null or a string that stays.
        Some(unsafe { owned(text) }).filter(|text| !text.is_empty())
    }

    /// As [`error`](Self::error) when `failed` says so of the value, else the value.
    pub(crate) fn check<R: Copy>(
        &self,
        what: &str,
        outcome: Outcome<R>,
        failed: impl Fn(R) -> bool,
    ) -> nbdkit_core::Result<R> {
        if failed(outcome.value) { Err(self.error(what, outcome)) } else { Ok(outcome.succeeded()) }
    }
}

impl CPlugin {
    /// Calls one of the callbacks of the start, if the plugin has it.
    fn step(&self, what: &str, callback: Option<unsafe extern "C" fn() -> c_int>) -> Result<()> {
        let Some(callback) = callback else { return Ok(()) };
        // SAFETY: the library is loaded.
        let outcome = call(Scope::start(), || unsafe { callback() });
        if outcome.value == -1 {
            return Err(outcome.failure(&format!("{}: {what}", self.loaded.name)));
        }
        outcome.succeeded();
        Ok(())
    }

    fn ask_model(&self) -> Result<ThreadModel> {
        let Some(callback) = self.loaded.table.thread_model else { return Ok(self.max_model) };
        // SAFETY: the library is loaded.
        let outcome = call(Scope::start(), || unsafe { callback() });
        match thread_model(outcome.value) {
            Some(model) => {
                outcome.succeeded();
                Ok(model.min(self.max_model))
            }
            None => Err(outcome.failure(&format!("{}: thread_model", self.loaded.name))),
        }
    }
}

impl Plugin for CPlugin {
    fn info(&self) -> Info {
        let mut info = self.info.clone();
        for (field, value) in [
            (c"name", &mut info.name),
            (c"longname", &mut info.longname),
            (c"version", &mut info.version),
            (c"description", &mut info.description),
            (c"config_help", &mut info.config_help),
        ] {
            if let Some(text) = self.loaded.text_now(field) {
                *value = text.into();
            }
        }
        if let Some(key) = self.loaded.text_now(c"magic_config_key") {
            info.magic_config_key = Some(key.into());
        }
        info
    }

    fn interface(&self) -> Option<Interface> {
        let table = &self.loaded.table;
        Some(Interface {
            api_version: table._api_version,
            struct_size: table._struct_size,
            errno_is_preserved: table.errno_is_preserved != 0,
            callbacks: callbacks(table),
        })
    }

    fn config(&mut self, key: &str, value: &OsStr) -> Result<bool> {
        let Some(config) = self.loaded.table.config else { return Ok(false) };
        // The plugin may keep both for as long as it likes.
        let key_address = GLOBAL.keep(CString::new(key)?);
        let value_address = GLOBAL.keep(CString::new(value.as_bytes())?);
        // SAFETY: the library is loaded; both are terminated strings.
        let outcome = call(Scope::start(), || unsafe { config(key_address, value_address) });
        if outcome.value == -1 {
            return Err(outcome.failure(&format!("{}: parameter '{key}'", self.loaded.name)));
        }
        outcome.succeeded();
        Ok(true)
    }

    fn config_complete(&mut self) -> Result<()> {
        self.step("config_complete", self.loaded.table.config_complete)?;
        *self.model.lock() = Some(self.ask_model()?);
        Ok(())
    }

    fn dump(&self) -> Vec<(String, String)> {
        if let Some(dump) = self.loaded.table.dump_plugin {
            // SAFETY: the library is loaded.
            call(Scope::start(), || unsafe { dump() }).succeeded();
            exports::flush_stdio();
        }
        Vec::new()
    }

    fn thread_model(&self) -> ThreadModel {
        if let Some(model) = *self.model.lock() {
            return model;
        }
        // Asked before config_complete, by --dump-plugin: no start depends on it.
        self.ask_model().unwrap_or(ThreadModel::SerializeConnections)
    }

    fn max_thread_model(&self) -> ThreadModel {
        self.max_model
    }

    fn get_ready(&mut self) -> Result<()> {
        self.step("get_ready", self.loaded.table.get_ready)?;
        exports::stdio_is_taken();
        Ok(())
    }

    fn after_fork(&self, server: &Arc<ShutdownFlag>) -> Result<()> {
        serve(server);
        self.step("after_fork", self.loaded.table.after_fork)
    }

    fn cleanup(&self) {
        if let Some(cleanup) = self.loaded.table.cleanup {
            // SAFETY: the library is loaded.
            call(Scope::default(), || unsafe { cleanup() }).succeeded();
        }
    }

    fn preconnect(&self, client: Option<&Arc<Client>>, readonly: bool) -> nbdkit_core::Result<()> {
        let Some(callback) = self.loaded.table.preconnect else { return Ok(()) };
        let scope = Scope { client, ..Scope::default() };
        // SAFETY: the library is loaded.
        let outcome = call(scope, || unsafe { callback(readonly.into()) });
        self.loaded.check("preconnect", outcome, |r| r == -1).map(drop)
    }

    fn list_exports(&self, readonly: bool, tls: bool) -> nbdkit_core::Result<Exports> {
        let mut list = ExportList::default();
        match self.loaded.table.list_exports {
            Some(callback) => {
                let (scope, address) = (Scope { tls, ..Scope::default() }, list.as_ptr());
                // SAFETY: the library is loaded, and the list lives through the call.
                let outcome = call(scope, || unsafe { callback(readonly.into(), tls.into(), address) });
                self.loaded.check("list_exports", outcome, |r| r == -1)?;
            }
            None => list.use_default(),
        }
        Ok(list.finish())
    }

    fn default_export(&self, readonly: bool, tls: bool) -> nbdkit_core::Result<Option<OsString>> {
        let Some(callback) = self.loaded.table.default_export else { return Ok(Some(OsString::new())) };
        // SAFETY: the library is loaded.
        let call =
            call(Scope { tls, ..Scope::default() }, || unsafe { callback(readonly.into(), tls.into()) });
        // SAFETY: the plugin returned null or a string that stays until its next call.
        let name = unsafe { text(call.succeeded()) };
        let name = name.map(|name| OsString::from_vec(name.to_bytes().to_vec()));
        Ok(name.filter(|name| name.len() <= Exports::MAX_STRING))
    }

    fn open(&self, open: &Open) -> nbdkit_core::Result<Box<dyn Handle>> {
        let Some(callback) = self.loaded.table.open else {
            return Err(Error::new(Errno::EIO, "the plugin has no open"));
        };
        let mut export_name = open.export_name.clone();
        if export_name.is_empty() {
            let ask = || self.default_export(open.readonly, open.tls);
            let default = open.client.default_export(Client::PLUGIN, open.readonly, open.tls, ask)?;
            export_name = default.ok_or_else(|| {
                Error::new(Errno::ENOENT, "the plugin has no default export: ask for an export by its name")
            })?;
        }
        let opened = Opened::new(open, c_string(export_name.as_bytes()));
        // SAFETY: the library is loaded.
        let outcome = call(Scope::of(&opened), || unsafe { callback(open.readonly.into()) });
        let handle = self.loaded.check("open", outcome, |handle| handle.is_null())?;
        Ok(Box::new(PluginHandle::new(handle, open.readonly, self.loaded.clone(), opened)))
    }
}

/// The callbacks that a plugin has, in the order of `--dump-plugin`.
fn callbacks(table: &abi::Plugin) -> Vec<&'static str> {
    let mut names = Vec::new();
    macro_rules! has {
        ($($there:expr, $name:literal;)*) => { $(if $there { names.push($name); })* };
    }
    has! {
        !table.longname.is_null(), "longname";
        !table.description.is_null(), "description";
        table.load.is_some(), "load";
        table.unload.is_some(), "unload";
        table.dump_plugin.is_some(), "dump_plugin";
        table.config.is_some(), "config";
        table.config_complete.is_some(), "config_complete";
        !table.config_help.is_null(), "config_help";
        table.thread_model.is_some(), "thread_model";
        table.get_ready.is_some(), "get_ready";
        table.after_fork.is_some(), "after_fork";
        table.cleanup.is_some(), "cleanup";
        table.preconnect.is_some(), "preconnect";
        table.list_exports.is_some(), "list_exports";
        table.default_export.is_some(), "default_export";
        table.open.is_some(), "open";
        table.close.is_some(), "close";
        table.export_description.is_some(), "export_description";
        table.get_size.is_some(), "get_size";
        table.block_size.is_some(), "block_size";
        table.can_write.is_some(), "can_write";
        table.can_flush.is_some(), "can_flush";
        table.is_rotational.is_some(), "is_rotational";
        table.can_trim.is_some(), "can_trim";
        table.can_zero.is_some(), "can_zero";
        table.can_fast_zero.is_some(), "can_fast_zero";
        table.can_extents.is_some(), "can_extents";
        table.can_fua.is_some(), "can_fua";
        table.can_multi_conn.is_some(), "can_multi_conn";
        table.can_cache.is_some(), "can_cache";
        table.pread.is_some(), "pread";
        table.pwrite.is_some(), "pwrite";
        table.flush.is_some(), "flush";
        table.trim.is_some(), "trim";
        table.zero.is_some(), "zero";
        table.extents.is_some(), "extents";
        table.cache.is_some(), "cache";
        table.pread_v1.is_some(), "_pread_v1";
        table.pwrite_v1.is_some(), "_pwrite_v1";
        table.flush_v1.is_some(), "_flush_v1";
        table.trim_v1.is_some(), "_trim_v1";
        table.zero_v1.is_some(), "_zero_v1";
    }
    names
}
