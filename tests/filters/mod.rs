//! Filters of the server's own kind, through foreign clients.

mod access;
mod compressed;
mod data;
mod failure;
mod life;
mod report;

use std::ffi::OsStr;

use crate::util::{NBDKIT, Run, run};

/// Runs a shell command while nbdkit serves a disk: `$uri` leads to it.
#[track_caller]
fn captive<S: AsRef<OsStr>>(words: impl IntoIterator<Item = S>, command: &str) -> Run {
    let words: Vec<_> = words.into_iter().map(|word| word.as_ref().to_owned()).collect();
    let before = [NBDKIT, "-U", "-"].map(Into::into);
    run(before.into_iter().chain(words).chain(["--run", command].map(Into::into)))
}

/// What nbdinfo tells of a disk, one field to a line.
#[track_caller]
fn info(words: &[&str]) -> String {
    captive(words, "nbdinfo --json \"$uri\"").ok()
}

/// The line with which nbdkit refuses to start.
#[track_caller]
fn refused(words: &[&str]) -> String {
    captive(words, "true").refused()
}
