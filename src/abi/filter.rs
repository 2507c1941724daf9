//! `struct nbdkit_filter` in its three layouts, and `struct nbdkit_next_ops`.
//!
//! The layout belongs to the version of nbdkit that a filter was built for (`_version`). They differ in the middle
//! only, so each is the same head and the same callbacks with the difference between them.

use core::ffi::{c_char, c_int, c_void};

/// `nbdkit_next_config`.
pub type NextConfig =
    unsafe extern "C" fn(backend: *mut c_void, key: *const c_char, value: *const c_char) -> c_int;
/// `nbdkit_next_config_complete`.
pub type NextConfigComplete = unsafe extern "C" fn(backend: *mut c_void) -> c_int;
/// `nbdkit_next_preconnect`.
pub type NextPreconnect = unsafe extern "C" fn(backend: *mut c_void, readonly: c_int) -> c_int;
/// `nbdkit_next_list_exports`.
pub type NextListExports =
    unsafe extern "C" fn(backend: *mut c_void, readonly: c_int, exports: *mut c_void) -> c_int;
/// `nbdkit_next_default_export`.
pub type NextDefaultExport = unsafe extern "C" fn(backend: *mut c_void, readonly: c_int) -> *const c_char;
/// `nbdkit_next_open`.
pub type NextOpen =
    unsafe extern "C" fn(context: *mut c_void, readonly: c_int, exportname: *const c_char) -> c_int;

type Ask<T> = unsafe extern "C" fn(next: *mut NextOps) -> T;

/// The layer below, as a filter sees it: `nbdkit_next *` points to one, and the server keeps more behind it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "nbdkit-filter(3) documents each field")]
pub struct NextOps {
    pub prepare: Ask<c_int>,
    pub finalize: Ask<c_int>,

    pub get_size: Ask<i64>,
    pub export_description: Ask<*const c_char>,
    pub block_size: unsafe extern "C" fn(*mut NextOps, *mut u32, *mut u32, *mut u32) -> c_int,

    pub can_write: Ask<c_int>,
    pub can_flush: Ask<c_int>,
    pub is_rotational: Ask<c_int>,
    pub can_trim: Ask<c_int>,
    pub can_zero: Ask<c_int>,
    pub can_fast_zero: Ask<c_int>,
    pub can_extents: Ask<c_int>,
    pub can_fua: Ask<c_int>,
    pub can_multi_conn: Ask<c_int>,
    pub can_cache: Ask<c_int>,

    pub pread: unsafe extern "C" fn(
        *mut NextOps,
        buf: *mut c_void,
        count: u32,
        offset: u64,
        flags: u32,
        err: *mut c_int,
    ) -> c_int,
    pub pwrite: unsafe extern "C" fn(
        *mut NextOps,
        buf: *const c_void,
        count: u32,
        offset: u64,
        flags: u32,
        err: *mut c_int,
    ) -> c_int,
    pub flush: unsafe extern "C" fn(*mut NextOps, flags: u32, err: *mut c_int) -> c_int,
    pub trim:
        unsafe extern "C" fn(*mut NextOps, count: u32, offset: u64, flags: u32, err: *mut c_int) -> c_int,
    pub zero:
        unsafe extern "C" fn(*mut NextOps, count: u32, offset: u64, flags: u32, err: *mut c_int) -> c_int,
    pub extents: unsafe extern "C" fn(
        *mut NextOps,
        count: u32,
        offset: u64,
        flags: u32,
        extents: *mut c_void,
        err: *mut c_int,
    ) -> c_int,
    pub cache:
        unsafe extern "C" fn(*mut NextOps, count: u32, offset: u64, flags: u32, err: *mut c_int) -> c_int,
}

/// What every layout begins with. The first two fields never change: they tell the layout.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "nbdkit-filter(3) documents each field")]
pub struct FilterHead {
    pub _api_version: c_int,
    pub _version: *const c_char,

    pub name: *const c_char,
    pub longname: *const c_char,
    pub description: *const c_char,

    pub load: Option<unsafe extern "C" fn()>,
    pub unload: Option<unsafe extern "C" fn()>,

    pub config: Option<
        unsafe extern "C" fn(
            next: NextConfig,
            backend: *mut c_void,
            key: *const c_char,
            value: *const c_char,
        ) -> c_int,
    >,
    pub config_complete:
        Option<unsafe extern "C" fn(next: NextConfigComplete, backend: *mut c_void) -> c_int>,
    pub config_help: *const c_char,
}

type Get<T> = Option<unsafe extern "C" fn(next: *mut NextOps, handle: *mut c_void) -> T>;
type Range = Option<
    unsafe extern "C" fn(
        next: *mut NextOps,
        handle: *mut c_void,
        count: u32,
        offset: u64,
        flags: u32,
        err: *mut c_int,
    ) -> c_int,
>;

/// What every layout ends with.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "nbdkit-filter(3) documents each field")]
pub struct FilterCallbacks {
    pub get_ready: Option<unsafe extern "C" fn(thread_model: c_int) -> c_int>,
    pub after_fork: Option<unsafe extern "C" fn(backend: *mut c_void) -> c_int>,
    pub cleanup: Option<unsafe extern "C" fn(backend: *mut c_void)>,
    pub preconnect:
        Option<unsafe extern "C" fn(next: NextPreconnect, backend: *mut c_void, readonly: c_int) -> c_int>,
    pub list_exports: Option<
        unsafe extern "C" fn(
            next: NextListExports,
            backend: *mut c_void,
            readonly: c_int,
            is_tls: c_int,
            exports: *mut c_void,
        ) -> c_int,
    >,
    pub default_export: Option<
        unsafe extern "C" fn(
            next: NextDefaultExport,
            backend: *mut c_void,
            readonly: c_int,
            is_tls: c_int,
        ) -> *const c_char,
    >,

    pub open: Option<
        unsafe extern "C" fn(
            next: NextOpen,
            context: *mut c_void,
            readonly: c_int,
            exportname: *const c_char,
            is_tls: c_int,
        ) -> *mut c_void,
    >,
    pub close: Option<unsafe extern "C" fn(handle: *mut c_void)>,

    pub prepare:
        Option<unsafe extern "C" fn(next: *mut NextOps, handle: *mut c_void, readonly: c_int) -> c_int>,
    pub finalize: Get<c_int>,

    pub get_size: Get<i64>,
    pub export_description: Get<*const c_char>,
    pub block_size: Option<
        unsafe extern "C" fn(
            next: *mut NextOps,
            handle: *mut c_void,
            minimum: *mut u32,
            preferred: *mut u32,
            maximum: *mut u32,
        ) -> c_int,
    >,

    pub can_write: Get<c_int>,
    pub can_flush: Get<c_int>,
    pub is_rotational: Get<c_int>,
    pub can_trim: Get<c_int>,
    pub can_zero: Get<c_int>,
    pub can_fast_zero: Get<c_int>,
    pub can_extents: Get<c_int>,
    pub can_fua: Get<c_int>,
    pub can_multi_conn: Get<c_int>,
    pub can_cache: Get<c_int>,

    pub pread: Option<
        unsafe extern "C" fn(
            next: *mut NextOps,
            handle: *mut c_void,
            buf: *mut c_void,
            count: u32,
            offset: u64,
            flags: u32,
            err: *mut c_int,
        ) -> c_int,
    >,
    pub pwrite: Option<
        unsafe extern "C" fn(
            next: *mut NextOps,
            handle: *mut c_void,
            buf: *const c_void,
            count: u32,
            offset: u64,
            flags: u32,
            err: *mut c_int,
        ) -> c_int,
    >,
    pub flush: Option<
        unsafe extern "C" fn(next: *mut NextOps, handle: *mut c_void, flags: u32, err: *mut c_int) -> c_int,
    >,
    pub trim: Range,
    pub zero: Range,
    pub extents: Option<
        unsafe extern "C" fn(
            next: *mut NextOps,
            handle: *mut c_void,
            count: u32,
            offset: u64,
            flags: u32,
            extents: *mut c_void,
            err: *mut c_int,
        ) -> c_int,
    >,
    pub cache: Range,
}

/// The layout of nbdkit 1.32 to 1.34.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "nbdkit-filter(3) documents each field")]
pub struct FilterV132 {
    pub head: FilterHead,
    pub thread_model: Option<unsafe extern "C" fn() -> c_int>,
    pub callbacks: FilterCallbacks,
}

/// The layout of nbdkit 1.36 to 1.42: `dump_plugin` was added.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "nbdkit-filter(3) documents each field")]
pub struct FilterV136 {
    pub head: FilterHead,
    pub thread_model: Option<unsafe extern "C" fn() -> c_int>,
    pub dump_plugin: Option<unsafe extern "C" fn()>,
    pub callbacks: FilterCallbacks,
}

/// The layout since nbdkit 1.44: `thread_model` is told the model of the layers below.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "nbdkit-filter(3) documents each field")]
pub struct FilterV144 {
    pub head: FilterHead,
    pub thread_model: Option<unsafe extern "C" fn(next_thread_model: c_int) -> c_int>,
    pub dump_plugin: Option<unsafe extern "C" fn()>,
    pub callbacks: FilterCallbacks,
}

/// `struct nbdkit_extent`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Extent {
    /// Start in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
    /// `EXTENT_` bits.
    pub r#type: u32,
}

/// `struct nbdkit_export`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Export {
    /// The name.
    pub name: *mut c_char,
    /// The description, or null.
    pub description: *mut c_char,
}
