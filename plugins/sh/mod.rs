//! A disk whose methods are calls of a script, in any language: `SCRIPT METHOD [ARGUMENTS]`.
//!
//! The protocol of scripts is here once; eval, whose scripts are parameters, uses it too. [`process`] runs a program,
//! [`answer`] and [`parse`] read what it says, [`scripts`] calls methods, and [`plugin`] and [`handle`] are the layer
//! made of them.

use std::{
    ffi::{CStr, CString, OsStr},
    fs::{self, File},
    io::{self, Read as _},
    os::unix::{ffi::OsStrExt, fs::OpenOptionsExt},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail, ensure};
use nbdkit_core::{Info, Plugin};

mod alarm;
mod answer;
mod handle;
mod parse;
mod plugin;
mod process;
mod scripts;
#[cfg(test)]
mod tests;

pub(crate) use alarm::{Alarm, Patience};
pub(crate) use plugin::Scripted;
pub(crate) use process::{Ended, How, Job, Output, run};
pub(crate) use scripts::{Found, Methods};

const HELP: &str = "\
script=<FILENAME>   (required) The script to run; '-' reads it from standard input.
All other parameters are the script's.";

/// The shell of scripts that do not name an interpreter.
pub(crate) const SHELL: &CStr = c"/bin/sh";

/// The longest first line that the kernel reads.
const MAX_LINE: u64 = 256;

pub(crate) fn new() -> Box<dyn Plugin> {
    Box::new(Scripted::new(Script::default()))
}

/// One script for all methods.
#[derive(Default)]
struct Script {
    /// Absolute, and after the shell if it needs one.
    words: Vec<CString>,
    path: PathBuf,
    /// A client speaks on standard input.
    no_stdin: bool,
}

impl Methods for Script {
    fn info(&self) -> Info {
        let info = Info::bundled("sh", "nbdkit shell plugin", HELP);
        if self.words.is_empty() { info.magic("script") } else { info }
    }

    fn find(&self, _: &str) -> Found<'_> {
        match self.words.is_empty() {
            true => Found::Missing,
            false => Found::Program(self.words.iter().map(|word| &**word).collect()),
        }
    }

    fn define(&mut self, key: &str, value: &OsStr, directory: &Path) -> anyhow::Result<bool> {
        if !self.words.is_empty() {
            return Ok(false);
        }
        ensure!(key == "script", "the first parameter must be the script: nbdkit sh SCRIPT [KEY=VALUE ...]");
        self.path = if value == "-" {
            ensure!(!self.no_stdin, "an inline script is incompatible with -s: put it into a file");
            inline(directory)?
        } else {
            fs::canonicalize(value).with_context(|| format!("script={}", value.display()))?
        };
        if !has_format(&self.path)? {
            self.words.push(SHELL.to_owned());
        }
        self.words.push(CString::new(self.path.as_os_str().as_bytes())?);
        Ok(true)
    }

    fn check(&self) -> anyhow::Result<()> {
        ensure!(!self.words.is_empty(), "the script is missing: nbdkit sh SCRIPT [KEY=VALUE ...]");
        Ok(())
    }

    fn title(&self) -> String {
        self.path.display().to_string()
    }

    fn stdio_is_taken(&mut self) {
        self.no_stdin = true;
    }
}

/// Keeps the script that comes on standard input.
fn inline(directory: &Path) -> anyhow::Result<PathBuf> {
    let path = directory.join("inline-script.sh");
    let file = File::options().write(true).create_new(true).mode(0o700).open(&path);
    let copied = file.and_then(|mut file| io::copy(&mut io::stdin().lock(), &mut file));
    copied.context("cannot read the script from standard input")?;
    Ok(path)
}

/// Whether a file that must be executable tells the kernel how to run it. Scripts without a first line for that, which
/// begin with text, are the shell's; so are those whose first line names the server itself: it would run them for ever.
fn has_format(path: &Path) -> anyhow::Result<bool> {
    let shown = path.display();
    rustix::fs::access(path, rustix::fs::Access::EXEC_OK)
        .map_err(io::Error::from)
        .with_context(|| format!("cannot run {shown}: is it executable (chmod +x)?"))?;
    if path.is_dir() {
        bail!("{shown} is a directory and no script");
    }
    let mut start = Vec::new();
    match File::open(path) {
        Ok(file) => file.take(MAX_LINE).read_to_end(&mut start).with_context(|| shown.to_string())?,
        // A program that may be run but not read.
        Err(_) => return Ok(true),
    };
    let line = start.split(|b| *b == b'\n').next().unwrap_or_default();
    Ok(match line.strip_prefix(b"#!") {
        Some(words) => !words
            .split(u8::is_ascii_whitespace)
            .any(|word| Path::new(OsStr::from_bytes(word)).file_name().is_some_and(|name| name == "nbdkit")),
        None => !start.iter().take(4).all(|b| matches!(b, b'\t' | b'\n' | b'\r' | b' '..=b'~')),
    })
}
