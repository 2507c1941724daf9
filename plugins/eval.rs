//! A disk whose methods are pieces of shell script in the parameters.

use std::{
    collections::HashMap,
    ffi::{CString, OsStr},
    os::unix::ffi::OsStrExt,
    path::Path,
};

use nbdkit_core::{Info, Plugin};

use crate::sh::{Found, Methods, SHELL, Scripted};

const HELP: &str = "\
METHOD=<SCRIPT>    What to do when METHOD is called, such as get_size='echo 64M'.
missing=<SCRIPT>   What to do for methods without a script (default 'exit 2').
All other parameters are given to the config script.";

/// The methods that can be defined.
const METHODS: [&str; 34] = [
    "after_fork",
    "block_size",
    "cache",
    "can_cache",
    "can_extents",
    "can_fast_zero",
    "can_flush",
    "can_fua",
    "can_multi_conn",
    "can_trim",
    "can_write",
    "can_zero",
    "cleanup",
    "close",
    "config",
    "config_complete",
    "default_export",
    "dump_plugin",
    "export_description",
    "extents",
    "flush",
    "get_ready",
    "get_size",
    "is_rotational",
    "list_exports",
    "missing",
    "open",
    "pread",
    "preconnect",
    "pwrite",
    "thread_model",
    "trim",
    "unload",
    "zero",
];

/// What a plugin can do when it says nothing about it: each question, the method that it is about, and what a script
/// would print.
const INFERRED: [(&str, &str, &str); 6] = [
    ("can_cache", "cache", "native"),
    ("can_extents", "extents", ""),
    ("can_flush", "flush", ""),
    ("can_trim", "trim", ""),
    ("can_write", "pwrite", ""),
    ("can_zero", "zero", ""),
];

pub(crate) fn new() -> Box<dyn Plugin> {
    Box::new(Scripted::new(Fragments::default()))
}

/// A script for each method. See the module.
#[derive(Default)]
struct Fragments(HashMap<String, [CString; 2]>);

impl Fragments {
    fn program(&self, method: &str) -> Option<Found<'_>> {
        let [text, name] = self.0.get(method)?;
        Some(Found::Program(vec![SHELL, c"-c", text, name]))
    }
}

impl Methods for Fragments {
    fn info(&self) -> Info {
        Info::bundled("eval", "nbdkit eval plugin", HELP)
    }

    fn find(&self, method: &str) -> Found<'_> {
        let inferred = || {
            let (_, _, prints) = INFERRED
                .iter()
                .find(|(question, about, _)| *question == method && self.0.contains_key(*about))?;
            Some(Found::Prints(prints))
        };
        // The others are not for scripts of this kind.
        let missing = || self.program("missing").filter(|_| METHODS.contains(&method));
        self.program(method).or_else(inferred).or_else(missing).unwrap_or(Found::Missing)
    }

    fn define(&mut self, key: &str, value: &OsStr, _: &Path) -> anyhow::Result<bool> {
        if !METHODS.contains(&key) {
            return Ok(false);
        }
        let mut text = value.as_bytes().to_vec();
        if text.starts_with(b"-") || text.starts_with(b"+") {
            // Not an option of the shell.
            text.insert(0, b' ');
        }
        self.0.insert(key.to_owned(), [CString::new(text)?, CString::new(key)?]);
        Ok(true)
    }

    fn check(&self) -> anyhow::Result<()> {
        Ok(())
    }

    fn title(&self) -> String {
        "eval".into()
    }
}
