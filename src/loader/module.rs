//! A shared library that holds a plugin or a filter, from dlopen to dlclose.

#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a call of a C function through its pointer is one step"
)]

use std::{
    ffi::{CStr, c_char},
    path::{Path, PathBuf},
    sync::Once,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use log::debug;
use nbdkit_core::Info;

use crate::{
    DebugFlags,
    context::{self, Scope},
    strings::{owned, text},
};

/// Messages of the life cycle.
const CONTROLPATH: &str = "nbdkit::controlpath";

/// A loaded library. Everything that may call into it shares one; the last to let go unloads it.
#[derive(Debug)]
pub(crate) struct Module {
    pub(crate) path: PathBuf,
    name: String,
    unload: Option<unsafe extern "C" fn()>,
    /// The `load` callback was called, so `unload` must be.
    loaded: bool,
    library: Library,
}

impl Module {
    /// Opens a library; `kind` is "plugin" or "filter".
    ///
    /// # Errors
    /// Those of dlopen(3).
    pub(crate) fn open(kind: &str, path: &Path) -> Result<Self> {
        static LAST_WORDS: Once = Once::new();
        LAST_WORDS.call_once(|| {
            // SAFETY: the function touches nothing that is gone when exit() runs it. If it cannot be registered,
            // some messages of a plugin that calls exit() are lost.
            unsafe { nix::libc::atexit(context::last_words) };
        });
        // A name without a slash would be looked for among the system's libraries.
        let path = std::path::absolute(path)?;
        debug!("registering {kind} {}", path.display());
        // RTLD_GLOBAL: the modules of an embedded language look for its symbols among everybody's.
        // SAFETY: running the library's initialisers is what the user asked for.
        let library = unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) }
            .map_err(|e| anyhow!("cannot open {kind}: {}", reason(&e)))?;
        Ok(Module { path, name: String::new(), unload: None, loaded: false, library })
    }

    /// The entry point, a function that takes nothing.
    ///
    /// # Errors
    /// If there is none.
    pub(crate) fn entry<F: Copy>(&self, kind: &str, symbol: &CStr) -> Result<F> {
        // SAFETY: the interface gives the symbol this type; a library that is no plugin rarely has one.
        let found = unsafe { self.library.get::<F>(symbol.to_bytes_with_nul()) };
        found.map(|f| *f).map_err(|_| {
            let symbol = symbol.to_string_lossy();
            anyhow!("{} is not a {kind} of nbdkit: it does not define {symbol}", self.path.display())
        })
    }

    /// Checks the name, sets the debug flags and calls `load`. `any_name`: nobody asks for it by its name.
    ///
    /// # Errors
    /// A name that is missing or has the wrong form.
    ///
    /// # Safety
    /// The name and the functions are those that the library registered.
    pub(crate) unsafe fn load(
        &mut self,
        kind: &str,
        name: *const c_char,
        load: Option<unsafe extern "C" fn()>,
        unload: Option<unsafe extern "C" fn()>,
        flags: &mut DebugFlags,
        any_name: bool,
    ) -> Result<String> {
        // SAFETY: the caller promises it.
        let name = unsafe { text(name) };
        let name = match name {
            Some(name) if any_name => name.to_string_lossy().into_owned(),
            name => {
                check_name(kind, name.map(CStr::to_bytes)).with_context(|| self.path.display().to_string())?
            }
        };
        self.name = name.clone();
        self.unload = unload;
        debug!("registered {kind} {} (name {name})", self.path.display());
        flags.apply(&name, |symbol| {
            // SAFETY: the interface gives a symbol of this name the type int.
            let variable = unsafe { self.library.get::<*mut i32>(symbol) };
            variable.ok().map(|v| *v).filter(|v| !v.is_null())
        });
        debug!(target: CONTROLPATH, "{name}: load");
        self.loaded = true;
        if let Some(load) = load {
            // SAFETY: the caller promises that it is the library's.
            context::call(Scope::start(), || unsafe { load() }).succeeded();
        }
        Ok(name)
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        if !self.loaded {
            return;
        }
        debug!(target: CONTROLPATH, "{}: unload", self.name);
        if let Some(unload) = self.unload {
            // SAFETY: the library is still open, and nobody else can call into it any more.
            context::call(Scope::default(), || unsafe { unload() }).succeeded();
        }
    }
}

/// What dlerror(3) says, without what it was asked: it names the file itself.
fn reason(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// Checks the name that a library registered.
fn check_name(kind: &str, name: Option<&[u8]>) -> Result<String> {
    let name = name.with_context(|| format!("the {kind} has no .name"))?;
    ensure!(!name.is_empty(), "the {kind}'s .name is empty");
    let shown = String::from_utf8_lossy(name);
    ensure!(
        name[0].is_ascii_alphanumeric(),
        "the {kind}'s .name '{shown}' must begin with an ASCII letter or digit"
    );
    ensure!(
        name.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'-'),
        "the {kind}'s .name '{shown}' must hold only ASCII letters, digits and dashes"
    );
    Ok(shown.into_owned())
}

/// What a library says about itself.
///
/// # Safety
/// Each pointer is null or that of a terminated string in the library.
pub(crate) unsafe fn info(
    module: &Module,
    version: *const c_char,
    longname: *const c_char,
    description: *const c_char,
    config_help: *const c_char,
) -> Info {
    // SAFETY: the caller promises it, for all four.
    let [version, longname, description, config_help] =
        [version, longname, description, config_help].map(|text| unsafe { owned(text) });
    Info {
        name: module.name.clone().into(),
        version: version.into(),
        longname: longname.into(),
        description: description.into(),
        config_help: config_help.into(),
        magic_config_key: None,
        path: Some(module.path.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let reason = |name| format!("{:#}", check_name("plugin", name).unwrap_err());
        assert_eq!(check_name("plugin", Some(b"a-1")).unwrap(), "a-1");
        assert!(reason(None).contains("no .name"));
        assert!(reason(Some(b"")).contains("empty"));
        assert!(reason(Some(b"-a")).contains("must begin"));
        for bad in [&b"a b"[..], b"a.b", b"a/b", "\u{e9}t\u{e9}".as_bytes(), b"a\xff"] {
            assert!(reason(Some(bad)).contains("ASCII"), "{bad:?}");
        }
    }
}
