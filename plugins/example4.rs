//! The example4 plugin: a script, found by name as those in the directory of plugins are.
//!
//! The script is example4.sh, and all that scripts can do is in [`sh`](crate::sh). What is here is only that it need not be
//! installed.

use std::{
    ffi::{CStr, CString, OsStr},
    path::Path,
};

use anyhow::ensure;
use nbdkit_core::{Info, Plugin};

use crate::sh::{Found, Methods, SHELL, Scripted};

pub(crate) fn new() -> Box<dyn Plugin> {
    let text = CString::new(include_str!("example4.sh")).unwrap_or_default();
    Box::new(Scripted::new(Example { text, size_is_set: false }))
}

struct Example {
    text: CString,
    size_is_set: bool,
}

impl Methods for Example {
    fn info(&self) -> Info {
        Info::bundled(
            "example4",
            "a disk of zeroes out of a script",
            "size=SIZE  (required) Size of the disk",
        )
    }

    fn find(&self, method: &str) -> Found<'_> {
        const NAME: &CStr = c"example4";
        match method {
            // Asked when no parameter was given, too.
            "dump_plugin" => Found::Prints("example4_extra=hello\n"),
            _ => Found::Program(vec![SHELL, c"-c", &self.text, NAME]),
        }
    }

    fn define(&mut self, key: &str, _: &OsStr, _: &Path) -> anyhow::Result<bool> {
        self.size_is_set |= key == "size";
        // The script takes it.
        Ok(false)
    }

    fn check(&self) -> anyhow::Result<()> {
        ensure!(self.size_is_set, "size was not set: give it as size=1M, for example");
        Ok(())
    }

    fn title(&self) -> String {
        "example4".into()
    }
}
