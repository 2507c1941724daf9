//! Plugins in Python: `nbdkit python SCRIPT.py`.
//!
//! A bridge between the C interface for plugins and a script, which runs in an interpreter of the system's Python
//! inside the server. `callbacks` and `data` are what the server calls, `module` is what the script calls, `lend` lets
//! a script read and write the server's buffers without a copy.
//!
//! The plugin is not built for the stable ABI (PEP 384): the buffer protocol is in it only since Python 3.11, and a
//! library that embeds an interpreter is linked with one version of it anyway.

mod callbacks;
mod data;
mod failure;
mod interpreter;
mod lend;
mod module;
mod script;
mod server;

use std::{
    ffi::{CStr, c_char},
    ptr,
};

use nbdkit::bridge::abi;

/// A version for C.
const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");

/// The plugin, for the server that loads this library.
#[unsafe(no_mangle)]
pub extern "C" fn plugin_init() -> *const abi::Plugin {
    Box::leak(Box::new(plugin()))
}

/// What the server says about the plugin once there is a script: the script's own docstring. Servers that do not know
/// this function say what they always do.
///
/// # Safety
/// The name of a field, as a terminated string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn plugin_text(field: *const c_char) -> *const c_char {
    // SAFETY: the caller promises it.
    if unsafe { CStr::from_ptr(field) } == c"description" { callbacks::description() } else { ptr::null() }
}

fn plugin() -> abi::Plugin {
    abi::Plugin {
        _struct_size: size_of::<abi::Plugin>() as u64,
        _api_version: abi::PLUGIN_API_VERSION,
        _thread_model: abi::THREAD_MODEL_PARALLEL,
        name: c"python".as_ptr(),
        longname: c"nbdkit python plugin".as_ptr(),
        version: VERSION.as_ptr().cast::<c_char>(),
        description: c"disks in Python".as_ptr(),
        load: Some(callbacks::load),
        unload: Some(callbacks::unload),
        config: Some(callbacks::config),
        config_complete: Some(callbacks::config_complete),
        config_help: c"script=<FILENAME>     (required) The Python script to run.\n\
                       [other parameters may be taken by the script]"
            .as_ptr(),
        open: Some(callbacks::open),
        close: Some(callbacks::close),
        get_size: Some(callbacks::get_size),
        can_write: Some(callbacks::can_write),
        can_flush: Some(callbacks::can_flush),
        is_rotational: Some(callbacks::is_rotational),
        can_trim: Some(callbacks::can_trim),
        pread_v1: None,
        pwrite_v1: None,
        flush_v1: None,
        trim_v1: None,
        zero_v1: None,
        errno_is_preserved: 0,
        dump_plugin: Some(callbacks::dump_plugin),
        can_zero: Some(callbacks::can_zero),
        can_fua: Some(callbacks::can_fua),
        pread: Some(data::pread),
        pwrite: Some(data::pwrite),
        flush: Some(data::flush),
        trim: Some(data::trim),
        zero: Some(data::zero),
        magic_config_key: c"script".as_ptr(),
        can_multi_conn: Some(callbacks::can_multi_conn),
        can_extents: Some(callbacks::can_extents),
        extents: Some(data::extents),
        can_cache: Some(callbacks::can_cache),
        cache: Some(data::cache),
        thread_model: Some(callbacks::thread_model),
        can_fast_zero: Some(callbacks::can_fast_zero),
        preconnect: Some(callbacks::preconnect),
        get_ready: Some(callbacks::get_ready),
        after_fork: Some(callbacks::after_fork),
        list_exports: Some(callbacks::list_exports),
        default_export: Some(callbacks::default_export),
        export_description: Some(callbacks::export_description),
        cleanup: Some(callbacks::cleanup),
        block_size: Some(callbacks::block_size),
    }
}
