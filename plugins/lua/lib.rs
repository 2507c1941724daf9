//! Plugins written in Lua: `nbdkit lua SCRIPT [KEY=VALUE...]`.
//!
//! A plugin like any other to the server, so the server never links an interpreter. Which callbacks there are is known
//! only when a script runs, and may change while it does; the server asks before that. So all are registered, and
//! those that a script lacks answer here what the server would have assumed: see `disk.rs`.

mod answers;
mod disk;
mod functions;
mod script;

use std::{
    ffi::{CStr, OsStr, c_char},
    io::{self, Write},
    ptr,
    sync::Arc,
};

use nbdkit::{Error, ExportHandle, Result, Server, ThreadModel};
use parking_lot::Mutex;

use crate::{disk::Disk, script::Script};

/// The script, from the first parameter until the plugin is unloaded.
static SCRIPT: Mutex<Option<Arc<Script>>> = Mutex::new(None);

fn script() -> Result<Arc<Script>> {
    SCRIPT.lock().clone().ok_or_else(|| {
        Error::new(libc::EINVAL, "the first parameter must be a Lua script: nbdkit lua SCRIPT [KEY=VALUE...]")
    })
}

/// Calls a function of the script's life, if it has one of that name.
fn step(method: &str) -> Result<()> {
    script()?.call::<()>(method, ()).map(drop)
}

/// What the server says about the plugin once there is a script: what the script says about itself. Servers that do not know
/// this function say what they always do.
///
/// # Safety
/// The name of a field, as a terminated string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn plugin_text(field: *const c_char) -> *const c_char {
    // SAFETY: the caller promises it.
    let field = unsafe { CStr::from_ptr(field) };
    nbdkit::bridge::border("plugin_text", ptr::null(), || {
        // It stays until the plugin is unloaded.
        Ok(SCRIPT.lock().as_ref().and_then(|script| script.text(field)).map_or(ptr::null(), CStr::as_ptr))
    })
}

/// The plugin; its handles are [`Disk`]s.
enum Lua {}

nbdkit::plugin!(Lua {
    dump_plugin,
    config,
    config_complete,
    thread_model,
    get_ready,
    after_fork,
    preconnect,
    list_exports,
    default_export,
    export_description,
    block_size,
    can_write,
    can_flush,
    is_rotational,
    can_trim,
    can_zero,
    can_fast_zero,
    can_extents,
    can_fua,
    can_multi_conn,
    can_cache,
    write_at,
    flush,
    trim,
    zero,
    extents,
    cache,
    cleanup,
    unload,
});

impl Server for Lua {
    fn name() -> &'static str {
        "lua"
    }

    fn longname() -> Option<&'static str> {
        Some("nbdkit Lua plugin")
    }

    fn version() -> Option<&'static str> {
        Some(env!("CARGO_PKG_VERSION"))
    }

    fn description() -> Option<&'static str> {
        Some("Runs plugins written in Lua: see nbdkit-lua-plugin(3).")
    }

    fn config_help() -> Option<&'static str> {
        Some(
            "script=<FILENAME>     (required) The Lua script to run.\n\
             [other arguments may be used by the plugin that you load]",
        )
    }

    fn magic_config_key() -> Option<&'static str> {
        Some("script")
    }

    fn dump_plugin() {
        println!("lua_version={}", script::version());
        // The script prints through C's buffer.
        io::stdout().flush().unwrap_or_default();
        if let Ok(script) = script()
            && let Err(error) = script.call::<()>("dump_plugin", ())
        {
            nbdkit::bridge::log_error(&error.to_string());
        }
    }

    fn config(_: &str, _: &str) -> Result<()> {
        Ok(()) // config_os has it
    }

    /// The first parameter is the script, the others are for it.
    fn config_os(key: &str, value: &OsStr) -> Result<()> {
        let mut slot = SCRIPT.lock();
        let Some(script) = slot.clone() else {
            if key == "script" {
                *slot = Some(Arc::new(Script::load(value)?));
                return Ok(());
            }
            drop(slot);
            return script().map(drop);
        };
        drop(slot);
        let value = script.string(value.as_encoded_bytes())?;
        match script.call::<()>("config", (key, value))? {
            Some(()) => Ok(()),
            None => {
                let name = script.name();
                let text =
                    format!("{name} takes no parameters, for it has no function config: {key} is unknown");
                Err(Error::new(libc::EINVAL, text))
            }
        }
    }

    fn config_complete() -> Result<()> {
        step("config_complete")
    }

    /// A Lua state does one thing at a time, so nothing is gained by more unless there are filters.
    fn thread_model() -> Result<ThreadModel> {
        let default = ThreadModel::SerializeAllRequests;
        let Ok(script) = script() else { return Ok(default) };
        let Some(answer) = script.call("thread_model", ())? else { return Ok(default) };
        answers::thread_model(&script, answer)
    }

    fn get_ready() -> Result<()> {
        step("get_ready")
    }

    fn after_fork() -> Result<()> {
        step("after_fork")
    }

    fn preconnect(readonly: bool) -> Result<()> {
        script()?.call::<()>("preconnect", readonly).map(drop)
    }

    fn list_exports(readonly: bool, is_tls: bool, exports: &mut ExportHandle) -> Result<()> {
        let script = script()?;
        match script.call("list_exports", (readonly, is_tls))? {
            None => exports.add_default(),
            Some(list) => answers::exports(&script, &list, exports),
        }
    }

    fn default_export(readonly: bool, is_tls: bool) -> Result<Option<String>> {
        let script = script()?;
        match script.call("default_export", (readonly, is_tls))? {
            None => Ok(Some(String::new())),
            Some(answer) => answers::text(&script, "default_export", &answer),
        }
    }

    fn open(readonly: bool) -> Result<Box<dyn Server>> {
        Ok(Box::new(Disk::open(script()?, readonly)?))
    }

    fn cleanup() {
        last_step("cleanup");
    }

    fn unload() {
        last_step("unload");
        *SCRIPT.lock() = None;
    }

    // What follows is asked of handles only, which are another type.
    fn get_size(&self) -> Result<i64> {
        match *self {}
    }

    fn read_at(&self, _: &mut [u8], _: u64) -> Result<()> {
        match *self {}
    }
}

/// As [`step`], where nobody hears of a failure but the log.
fn last_step(method: &str) {
    let Ok(script) = script() else { return };
    if let Err(error) = script.call::<()>(method, ()) {
        nbdkit::bridge::log_error(&error.to_string());
    }
}
