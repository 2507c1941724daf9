//! The server's C functions. They are not linked: the dynamic linker finds them in the server that loads the plugin.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};

unsafe extern "C" {
    pub(crate) fn nbdkit_error(format: *const c_char, ...);
    pub(crate) fn nbdkit_debug(format: *const c_char, ...);
    pub(crate) fn nbdkit_set_error(errno: c_int);

    pub(crate) fn nbdkit_parse_size(text: *const c_char) -> i64;
    pub(crate) fn nbdkit_parse_int64_t(what: *const c_char, text: *const c_char, result: *mut i64) -> c_int;
    pub(crate) fn nbdkit_parse_bool(text: *const c_char) -> c_int;

    pub(crate) fn nbdkit_read_password(value: *const c_char, password: *mut *mut c_char) -> c_int;
    pub(crate) fn nbdkit_absolute_path(path: *const c_char) -> *mut c_char;
    pub(crate) fn nbdkit_realpath(path: *const c_char) -> *mut c_char;
    pub(crate) fn nbdkit_nanosleep(seconds: c_uint, nanoseconds: c_uint) -> c_int;

    pub(crate) fn nbdkit_stdio_safe() -> c_int;
    pub(crate) fn nbdkit_export_name() -> *const c_char;
    pub(crate) fn nbdkit_is_tls() -> c_int;
    pub(crate) fn nbdkit_peer_name(address: *mut libc::sockaddr, length: *mut libc::socklen_t) -> c_int;
    pub(crate) fn nbdkit_peer_pid() -> i64;
    pub(crate) fn nbdkit_peer_uid() -> i64;
    pub(crate) fn nbdkit_peer_gid() -> i64;
    pub(crate) fn nbdkit_shutdown();

    pub(crate) fn nbdkit_strdup_intern(text: *const c_char) -> *const c_char;
    pub(crate) fn nbdkit_add_extent(extents: *mut c_void, offset: u64, length: u64, kind: u32) -> c_int;
    pub(crate) fn nbdkit_add_export(
        exports: *mut c_void,
        name: *const c_char,
        description: *const c_char,
    ) -> c_int;
    pub(crate) fn nbdkit_use_default_export(exports: *mut c_void) -> c_int;
}

/// `nbdkit_disconnect`, since nbdkit 1.34.
pub(crate) type Disconnect = unsafe extern "C" fn(force: c_int);
/// `nbdkit_debug_hexdump`, since nbdkit 1.46.
pub(crate) type Hexdump =
    unsafe extern "C" fn(buffer: *const c_void, length: usize, prefix: *const c_char, start: u64);
/// `nbdkit_debug_hexdiff`, since nbdkit 1.46.
pub(crate) type Hexdiff = unsafe extern "C" fn(
    old: *const c_void,
    new: *const c_void,
    length: usize,
    prefix: *const c_char,
    start: u64,
);
/// `nbdkit_parse_probability`, since nbdkit 1.36.
pub(crate) type ParseProbability =
    unsafe extern "C" fn(what: *const c_char, text: *const c_char, result: *mut f64) -> c_int;
/// `nbdkit_parse_delay`, since nbdkit 1.38.
pub(crate) type ParseDelay = unsafe extern "C" fn(
    what: *const c_char,
    text: *const c_char,
    seconds: *mut c_uint,
    nanoseconds: *mut c_uint,
) -> c_int;
/// `nbdkit_peer_security_context` and `nbdkit_peer_tls_dn`, since nbdkit 1.36: strings for their caller to free.
pub(crate) type Text = unsafe extern "C" fn() -> *mut c_char;

/// The address of a function that not every server has.
///
/// # Safety
///
/// `F` is the type of a pointer to the function of that name.
pub unsafe fn newer_function<F: Copy>(name: &CStr) -> Option<F> {
    const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
    // SAFETY: the name is a C string, and RTLD_DEFAULT is always a valid place to look.
    let address = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    // SAFETY: the caller vouches for the type, the assertion for its size, and the address is not null.
    (!address.is_null()).then(|| unsafe { std::mem::transmute_copy(&address) })
}

/// `text` for C. A zero byte would end it early, so it becomes the replacement character.
pub fn c_string(text: &str) -> CString {
    CString::new(text).unwrap_or_else(|_| {
        let without_zero = text.replace('\0', "\u{fffd}");
        CString::new(without_zero).unwrap_or_default()
    })
}

/// Logs an error.
pub fn log_error(message: &str) {
    let message = c_string(message);
    // SAFETY: "%s" takes the one string that follows it; both live through the call.
    unsafe { nbdkit_error(c"%s".as_ptr(), message.as_ptr()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_bytes_do_not_cut_a_message_short() {
        assert_eq!(c_string("plain").as_c_str(), c"plain");
        assert_eq!(c_string("a\0b").as_c_str(), c"a\u{fffd}b");
    }

    #[test]
    fn functions_are_found_by_name_or_not_at_all() {
        // SAFETY: getpid takes nothing and returns a pid_t.
        let getpid = unsafe { newer_function::<unsafe extern "C" fn() -> libc::pid_t>(c"getpid") };
        // SAFETY: as above.
        assert_eq!(unsafe { getpid.expect("in every libc")() }, std::process::id() as libc::pid_t);
        // SAFETY: nothing is called.
        let missing = unsafe { newer_function::<unsafe extern "C" fn()>(c"nbdkit_no_such_function") };
        assert!(missing.is_none());
    }
}
