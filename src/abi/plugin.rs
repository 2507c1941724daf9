//! `struct nbdkit_plugin`.

use core::ffi::{c_char, c_int, c_void};

type Get<T> = Option<unsafe extern "C" fn(handle: *mut c_void) -> T>;

/// The function a plugin exports, `plugin_init`.
pub type PluginInit = unsafe extern "C" fn() -> *const Plugin;

/// What a plugin registers. Versions 1 and 2 of the interface share it: each has slots of its own for the calls that
/// differ, and a plugin fills those of its version. A plugin may know fewer fields than there are, or more:
/// `_struct_size` is what it knows.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "nbdkit-plugin(3) documents each field")]
pub struct Plugin {
    pub _struct_size: u64,
    pub _api_version: c_int,
    pub _thread_model: c_int,

    pub name: *const c_char,
    pub longname: *const c_char,
    pub version: *const c_char,
    pub description: *const c_char,

    pub load: Option<unsafe extern "C" fn()>,
    pub unload: Option<unsafe extern "C" fn()>,

    pub config: Option<unsafe extern "C" fn(key: *const c_char, value: *const c_char) -> c_int>,
    pub config_complete: Option<unsafe extern "C" fn() -> c_int>,
    pub config_help: *const c_char,

    pub open: Option<unsafe extern "C" fn(readonly: c_int) -> *mut c_void>,
    pub close: Option<unsafe extern "C" fn(handle: *mut c_void)>,

    pub get_size: Get<i64>,

    pub can_write: Get<c_int>,
    pub can_flush: Get<c_int>,
    pub is_rotational: Get<c_int>,
    pub can_trim: Get<c_int>,

    pub pread_v1:
        Option<unsafe extern "C" fn(*mut c_void, buf: *mut c_void, count: u32, offset: u64) -> c_int>,
    pub pwrite_v1:
        Option<unsafe extern "C" fn(*mut c_void, buf: *const c_void, count: u32, offset: u64) -> c_int>,
    pub flush_v1: Option<unsafe extern "C" fn(*mut c_void) -> c_int>,
    pub trim_v1: Option<unsafe extern "C" fn(*mut c_void, count: u32, offset: u64) -> c_int>,
    pub zero_v1: Option<unsafe extern "C" fn(*mut c_void, count: u32, offset: u64, may_trim: c_int) -> c_int>,

    pub errno_is_preserved: c_int,

    pub dump_plugin: Option<unsafe extern "C" fn()>,

    pub can_zero: Get<c_int>,
    pub can_fua: Get<c_int>,
    pub pread: Option<
        unsafe extern "C" fn(*mut c_void, buf: *mut c_void, count: u32, offset: u64, flags: u32) -> c_int,
    >,
    pub pwrite: Option<
        unsafe extern "C" fn(*mut c_void, buf: *const c_void, count: u32, offset: u64, flags: u32) -> c_int,
    >,
    pub flush: Option<unsafe extern "C" fn(*mut c_void, flags: u32) -> c_int>,
    pub trim: Option<unsafe extern "C" fn(*mut c_void, count: u32, offset: u64, flags: u32) -> c_int>,
    pub zero: Option<unsafe extern "C" fn(*mut c_void, count: u32, offset: u64, flags: u32) -> c_int>,

    pub magic_config_key: *const c_char,

    pub can_multi_conn: Get<c_int>,

    pub can_extents: Get<c_int>,
    pub extents: Option<
        unsafe extern "C" fn(*mut c_void, count: u32, offset: u64, flags: u32, extents: *mut c_void) -> c_int,
    >,
    pub can_cache: Get<c_int>,
    pub cache: Option<unsafe extern "C" fn(*mut c_void, count: u32, offset: u64, flags: u32) -> c_int>,

    pub thread_model: Option<unsafe extern "C" fn() -> c_int>,

    pub can_fast_zero: Get<c_int>,

    pub preconnect: Option<unsafe extern "C" fn(readonly: c_int) -> c_int>,

    pub get_ready: Option<unsafe extern "C" fn() -> c_int>,
    pub after_fork: Option<unsafe extern "C" fn() -> c_int>,

    pub list_exports:
        Option<unsafe extern "C" fn(readonly: c_int, is_tls: c_int, exports: *mut c_void) -> c_int>,
    pub default_export: Option<unsafe extern "C" fn(readonly: c_int, is_tls: c_int) -> *const c_char>,
    pub export_description: Get<*const c_char>,

    pub cleanup: Option<unsafe extern "C" fn()>,

    pub block_size: Option<
        unsafe extern "C" fn(*mut c_void, minimum: *mut u32, preferred: *mut u32, maximum: *mut u32) -> c_int,
    >,
}
