//! The three layouts of `struct nbdkit_filter`, told apart by the version of nbdkit that a filter was built for.

#![allow(clippy::multiple_unsafe_ops_per_block, reason = "a field behind a pointer is read in one step")]

use std::ffi::c_int;

use anyhow::{Context as _, Result, ensure};
use nbdkit_abi as abi;

use crate::strings::text;

/// The function a filter exports, `filter_init`.
pub(crate) type Init = unsafe extern "C" fn() -> *const abi::FilterHead;

/// A filter's `thread_model`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Model {
    /// There is none.
    Unset,
    /// It knows nothing of the layers below.
    Alone(unsafe extern "C" fn() -> c_int),
    /// It is told the model of the layers below.
    Over(unsafe extern "C" fn(c_int) -> c_int),
}

/// What a filter registered, whatever its layout.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    pub(crate) head: abi::FilterHead,
    pub(crate) thread_model: Model,
    pub(crate) dump_plugin: Option<unsafe extern "C" fn()>,
    pub(crate) callbacks: abi::FilterCallbacks,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    V132,
    V136,
    V144,
}

/// The versions whose layout is known, for people.
const KNOWN: &str = "1.32 to 1.34, 1.36 to 1.42, and 1.44 or later";

/// The layout that belongs to a version of nbdkit. Layouts changed while 1.35 and 1.43 were developed, so those two
/// have none of their own.
fn kind(version: &str) -> Option<Kind> {
    let mut numbers = version.split(['.', '-', '+', '~']).map(str::parse::<u32>);
    match (numbers.next()?.ok()?, numbers.next()?.ok()?) {
        (1, 32..=34) => Some(Kind::V132),
        (1, 36..=42) => Some(Kind::V136),
        (1, 44..) => Some(Kind::V144),
        _ => None,
    }
}

/// Copies what a filter registered.
///
/// # Errors
/// A version of the interface or of nbdkit that is not known.
///
/// # Safety
/// The address is that of a filter's structure: an API version, a version string, and what they promise.
pub(crate) unsafe fn read(registered: *const abi::FilterHead) -> Result<Layout> {
    // SAFETY: the caller promises it: every version has this field.
    let api = unsafe { (&raw const (*registered)._api_version).read() };
    ensure!(
        api == abi::FILTER_API_VERSION,
        "the filter is for version {api} of the filter interface, and this server knows {}",
        abi::FILTER_API_VERSION
    );
    // SAFETY: as above: so does every version with this number.
    let version = unsafe { (&raw const (*registered)._version).read() };
    // SAFETY: as above.
    let version = unsafe { text(version) }.map(|v| v.to_string_lossy().into_owned()).unwrap_or_default();
    let kind = kind(&version).with_context(|| {
        format!("the filter was built for nbdkit '{version}', and this server knows the filters of {KNOWN}")
    })?;
    Ok(match kind {
        Kind::V132 => {
            // SAFETY: the caller promises it: this is the structure of that version.
            let filter = unsafe { registered.cast::<abi::FilterV132>().read() };
            let thread_model = filter.thread_model.map_or(Model::Unset, Model::Alone);
            Layout { head: filter.head, thread_model, dump_plugin: None, callbacks: filter.callbacks }
        }
        Kind::V136 => {
            // SAFETY: as above.
            let filter = unsafe { registered.cast::<abi::FilterV136>().read() };
            let abi::FilterV136 { head, dump_plugin, callbacks, .. } = filter;
            let thread_model = filter.thread_model.map_or(Model::Unset, Model::Alone);
            Layout { head, thread_model, dump_plugin, callbacks }
        }
        Kind::V144 => {
            // SAFETY: as above.
            let filter = unsafe { registered.cast::<abi::FilterV144>().read() };
            let abi::FilterV144 { head, dump_plugin, callbacks, .. } = filter;
            let thread_model = filter.thread_model.map_or(Model::Unset, Model::Over);
            Layout { head, thread_model, dump_plugin, callbacks }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        for (version, want) in [
            ("1.32.5", Some(Kind::V132)),
            ("1.34.0", Some(Kind::V132)),
            ("1.36.2", Some(Kind::V136)),
            ("1.42.7-1.fc42", Some(Kind::V136)),
            ("1.44.0", Some(Kind::V144)),
            ("1.47.3", Some(Kind::V144)),
            ("1.30.1", None),
            ("1.35.2", None),
            ("1.43.1", None),
            ("2.44.0", None),
            ("", None),
            ("x", None),
        ] {
            assert_eq!(kind(version), want, "{version}");
        }
    }
}
