//! The server's functions that the SDK does not have in the form that Python needs. What nbdkit 1.32 lacks is looked
//! up when it is called.

use std::{
    ffi::{CStr, CString, c_char, c_int, c_uint, c_void},
    ptr,
};

use nbdkit::bridge::newer_function;

unsafe extern "C" {
    fn nbdkit_set_error(errno: c_int);
    fn nbdkit_parse_size(text: *const c_char) -> i64;
    fn nbdkit_export_name() -> *const c_char;
    fn nbdkit_nanosleep(seconds: c_uint, nanoseconds: c_uint) -> c_int;
    fn nbdkit_peer_pid() -> i64;
    fn nbdkit_peer_uid() -> i64;
    fn nbdkit_peer_gid() -> i64;
    fn nbdkit_read_password(value: *const c_char, password: *mut *mut c_char) -> c_int;
    fn nbdkit_strdup_intern(text: *const c_char) -> *const c_char;
    fn nbdkit_add_extent(extents: *mut c_void, offset: u64, length: u64, kind: u32) -> c_int;
}

/// The errno that the client gets if this callback fails.
pub(crate) fn set_error(errno: i32) {
    // SAFETY: any number may be set.
    unsafe { nbdkit_set_error(errno) }
}

/// None if it is not a size; the server has logged why.
pub(crate) fn parse_size(text: &CStr) -> Option<i64> {
    // SAFETY: a C string that lives through the call.
    Some(unsafe { nbdkit_parse_size(text.as_ptr()) }).filter(|size| *size != -1)
}

/// The name as it came from the client; None where there is no client.
pub(crate) fn export_name() -> Option<Vec<u8>> {
    // SAFETY: it may be called at any time.
    let name = unsafe { nbdkit_export_name() };
    // SAFETY: null or a string that lives as long as the connection.
    (!name.is_null()).then(|| unsafe { CStr::from_ptr(name) }.to_bytes().to_vec())
}

/// False if the sleep ended early: the server stops or the client is gone.
pub(crate) fn nanosleep(seconds: u32, nanoseconds: u32) -> bool {
    // SAFETY: it takes any numbers.
    unsafe { nbdkit_nanosleep(seconds, nanoseconds) == 0 }
}

macro_rules! peer_numbers {
    ($($name:ident = $function:ident;)*) => {
        $(
            /// None if it is not known; the server has logged why.
            pub(crate) fn $name() -> Option<i64> {
                // SAFETY: it may be called at any time.
                Some(unsafe { $function() }).filter(|number| *number != -1)
            }
        )*
    };
}
peer_numbers! {
    peer_pid = nbdkit_peer_pid;
    peer_uid = nbdkit_peer_uid;
    peer_gid = nbdkit_peer_gid;
}

/// None if it cannot be read; the server has logged why.
pub(crate) fn read_password(value: &CStr) -> Option<Vec<u8>> {
    let mut password = ptr::null_mut();
    // SAFETY: a C string and a place for the answer, both of which live through the call.
    let failed = unsafe { nbdkit_read_password(value.as_ptr(), &raw mut password) } == -1;
    if failed || password.is_null() {
        return None;
    }
    // SAFETY: the server allocated the string for the caller.
    let bytes = unsafe { CStr::from_ptr(password) }.to_bytes().to_vec();
    // SAFETY: with malloc; nobody else has it.
    unsafe { libc::free(password.cast::<c_void>()) };
    Some(bytes)
}

/// A string that the server keeps as long as it needs it.
pub(crate) fn intern(text: &CStr) -> *const c_char {
    // SAFETY: a C string that lives through the call.
    unsafe { nbdkit_strdup_intern(text.as_ptr()) }
}

/// Reports that `length` bytes from `offset` are of one kind; false if the server refuses it, and has logged why.
pub(crate) fn add_extent(extents: *mut c_void, offset: u64, length: u64, kind: u32) -> bool {
    // SAFETY: the list is the server's, given for a callback that has not returned.
    unsafe { nbdkit_add_extent(extents, offset, length, kind) == 0 }
}

/// What a newer function said.
pub(crate) enum Newer<T> {
    Answer(T),
    /// The server has logged why not.
    Failed,
    /// The server is too old.
    Missing,
}

impl<T> Newer<T> {
    fn of(answer: Option<Option<T>>) -> Self {
        match answer {
            Some(Some(answer)) => Newer::Answer(answer),
            Some(None) => Newer::Failed,
            None => Newer::Missing,
        }
    }
}

/// `nbdkit_parse_probability`.
pub(crate) fn parse_probability(what: &CStr, text: &CStr) -> Newer<f64> {
    type Parse = unsafe extern "C" fn(*const c_char, *const c_char, *mut f64) -> c_int;
    // SAFETY: that is the function's type.
    let parse = unsafe { newer_function::<Parse>(c"nbdkit_parse_probability") };
    Newer::of(parse.map(|parse| {
        let mut answer = 0.0;
        // SAFETY: two C strings and a place for the answer, all of which live through the call.
        let parsed = unsafe { parse(what.as_ptr(), text.as_ptr(), &raw mut answer) } == 0;
        parsed.then_some(answer)
    }))
}

/// `nbdkit_parse_delay`: seconds and nanoseconds.
pub(crate) fn parse_delay(what: &CStr, text: &CStr) -> Newer<(u32, u32)> {
    type Parse = unsafe extern "C" fn(*const c_char, *const c_char, *mut c_uint, *mut c_uint) -> c_int;
    // SAFETY: that is the function's type.
    let parse = unsafe { newer_function::<Parse>(c"nbdkit_parse_delay") };
    Newer::of(parse.map(|parse| {
        let (mut seconds, mut nanoseconds) = (0, 0);
        // SAFETY: two C strings and two places for the answer, all of which live through the call.
        let parsed =
            unsafe { parse(what.as_ptr(), text.as_ptr(), &raw mut seconds, &raw mut nanoseconds) } == 0;
        parsed.then_some((seconds, nanoseconds))
    }))
}

/// A function that returns a string for the caller to free: `nbdkit_peer_security_context` and its like.
pub(crate) fn peer_text(function: &CStr) -> Newer<Vec<u8>> {
    type Ask = unsafe extern "C" fn() -> *mut c_char;
    // SAFETY: that is the type of each of them.
    let ask = unsafe { newer_function::<Ask>(function) };
    Newer::of(ask.map(|ask| {
        // SAFETY: it may be called at any time.
        let text = unsafe { ask() };
        if text.is_null() {
            return None;
        }
        // SAFETY: a string that the server allocated for the caller.
        let bytes = unsafe { CStr::from_ptr(text) }.to_bytes().to_vec();
        // SAFETY: with malloc; nobody else has it.
        unsafe { libc::free(text.cast()) };
        Some(bytes)
    }))
}

/// `nbdkit_disconnect`; false if the server is too old.
pub(crate) fn disconnect(force: bool) -> bool {
    // SAFETY: that is the function's type.
    let disconnect = unsafe { newer_function::<unsafe extern "C" fn(c_int)>(c"nbdkit_disconnect") };
    // SAFETY: it may be called in any callback; elsewhere it does nothing.
    disconnect.map(|disconnect| unsafe { disconnect(force.into()) }).is_some()
}

/// A text for C; None if there is a zero byte in it, which would cut it short.
pub(crate) fn c_text(bytes: Vec<u8>) -> Option<CString> {
    CString::new(bytes).ok()
}
