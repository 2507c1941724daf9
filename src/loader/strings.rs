//! Strings that C code may keep pointers to.

use std::{
    collections::HashSet,
    ffi::{CStr, CString, OsStr, c_char},
    os::unix::ffi::OsStrExt,
    sync::LazyLock,
};

use parking_lot::Mutex;

/// A set of strings whose addresses stay until it is dropped. Equal strings share one.
#[derive(Debug, Default)]
pub(crate) struct Strings(Mutex<HashSet<CString>>);

/// Those that stay as long as the process: parameters, and what is interned outside any connection.
pub(crate) static GLOBAL: LazyLock<Strings> = LazyLock::new(Strings::default);

impl Strings {
    /// The address at which the string stays.
    pub(crate) fn keep(&self, text: CString) -> *const c_char {
        let mut strings = self.0.lock();
        if let Some(known) = strings.get(&text) {
            return known.as_ptr();
        }
        let address = text.as_ptr();
        strings.insert(text);
        address
    }
}

/// The string at an address that C gave; None for null.
///
/// # Safety
/// The address is null or that of a terminated string, which nobody changes during `'a`.
pub(crate) unsafe fn text<'a>(address: *const c_char) -> Option<&'a CStr> {
    // SAFETY: not null, and the caller promises the rest.
    (!address.is_null()).then(|| unsafe { CStr::from_ptr(address) })
}

/// As [`text`], as an owned string for people; empty for null.
///
/// # Safety
/// As `text`.
pub(crate) unsafe fn owned(address: *const c_char) -> String {
    // SAFETY: the caller promises it.
    unsafe { text(address) }.map(|t| t.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Bytes as a C string. Those after a NUL, which C cannot see, are left out.
pub(crate) fn c_string(bytes: &[u8]) -> CString {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    CString::new(&bytes[..end]).unwrap_or_default()
}

/// The bytes of a C string as a value of the operating system.
pub(crate) fn os(text: &CStr) -> &OsStr {
    OsStr::from_bytes(text.to_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_strings_share_an_address_that_stays() {
        let strings = Strings::default();
        let first = strings.keep(c"one".into());
        for i in 0..1000 {
            strings.keep(c_string(i.to_string().as_bytes()));
        }
        assert_eq!(strings.keep(c"one".into()), first);
        // SAFETY: the set is alive.
        assert_eq!(unsafe { owned(first) }, "one");
    }

    #[test]
    fn what_c_cannot_see_is_left_out() {
        assert_eq!(c_string(b"a\0b").as_c_str(), c"a");
    }
}
