//! The functions that the server offers to plugins and filters, by their C names.
//!
//! They are in the dynamic symbol table of the programs: build.rs there asks the linker for it, and [`TABLE`] keeps
//! them from being left out, since nothing in Rust calls them.

#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "pointers from C are read or written where they are checked"
)]

mod lists;
mod messages;
mod parse;
mod password;
mod paths;
mod peer;
mod server;
mod strings;

use std::ffi::{c_char, c_void};

pub(crate) use lists::{ExportList, note};
pub use server::stdio_is_taken;

use crate::next_ops;

/// A pointer to a function, of whatever type.
struct Function(#[allow(dead_code, reason = "for the linker")] *const c_void);

// SAFETY: the pointer is never used.
unsafe impl Sync for Function {}

// Those of variadic.c.
unsafe extern "C" {
    fn nbdkit_error(format: *const c_char, ...);
    fn nbdkit_verror();
    fn nbdkit_debug(format: *const c_char, ...);
    fn nbdkit_vdebug();
    fn nbdkit_printf_intern(format: *const c_char, ...) -> *const c_char;
    fn nbdkit_vprintf_intern();
}

macro_rules! table {
    ($($function:path,)*) => {
        /// What must be in the programs. See the module.
        #[used]
        static TABLE: &[Function] = &[$(Function($function as *const c_void),)*];
    };
}

table! {
    nbdkit_error, nbdkit_verror, nbdkit_debug, nbdkit_vdebug, nbdkit_printf_intern, nbdkit_vprintf_intern,
    messages::nbdkit_set_error, messages::nbdkit_debug_hexdump, messages::nbdkit_debug_hexdiff,
    strings::nbdkit_strdup_intern, strings::nbdkit_strndup_intern,
    paths::nbdkit_absolute_path, paths::nbdkit_realpath,
    parse::nbdkit_parse_size, parse::nbdkit_parse_bool, parse::nbdkit_parse_probability,
    parse::nbdkit_parse_delay, parse::nbdkit_parse_int, parse::nbdkit_parse_unsigned,
    parse::nbdkit_parse_int8_t, parse::nbdkit_parse_uint8_t, parse::nbdkit_parse_int16_t,
    parse::nbdkit_parse_uint16_t, parse::nbdkit_parse_int32_t, parse::nbdkit_parse_uint32_t,
    parse::nbdkit_parse_int64_t, parse::nbdkit_parse_uint64_t,
    password::nbdkit_read_password,
    server::nbdkit_stdio_safe, server::nbdkit_nanosleep, server::nbdkit_shutdown,
    server::nbdkit_disconnect, server::nbdkit_export_name, server::nbdkit_is_tls,
    peer::nbdkit_peer_name, peer::nbdkit_peer_pid, peer::nbdkit_peer_uid, peer::nbdkit_peer_gid,
    peer::nbdkit_peer_security_context, peer::nbdkit_peer_tls_dn, peer::nbdkit_peer_tls_issuer_dn,
    lists::nbdkit_add_extent, lists::nbdkit_extents_new, lists::nbdkit_extents_free,
    lists::nbdkit_extents_count, lists::nbdkit_get_extent,
    lists::nbdkit_add_export, lists::nbdkit_use_default_export, lists::nbdkit_exports_new,
    lists::nbdkit_exports_free, lists::nbdkit_exports_count, lists::nbdkit_get_export,
    next_ops::nbdkit_extents_full, next_ops::nbdkit_extents_aligned,
    next_ops::nbdkit_context_get_backend, next_ops::nbdkit_next_context_open,
    next_ops::nbdkit_next_context_close, next_ops::nbdkit_context_set_next,
}

/// Writes out what C code has printed: the programs print without C's buffers.
pub fn flush_stdio() {
    // SAFETY: null means all streams. A failure concerns only the reader of the output.
    unsafe { nix::libc::fflush(std::ptr::null_mut()) };
}
