//! Plugins that are scripts, through both front ends and beside the distribution's nbdkit.

mod compiled;
mod disks;
mod examples;
mod hostile;
mod protocol;

use std::{
    ffi::OsStr,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use crate::util::{NBDKIT, Run, run};

/// An executable script.
fn script(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, text).expect("write a script");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("make it executable");
    path
}

/// Runs a shell command while `program` serves a disk: `$uri` leads to it.
fn captive_of<S: AsRef<OsStr>>(program: &str, words: impl IntoIterator<Item = S>, command: &str) -> Run {
    let words: Vec<_> = words.into_iter().map(|word| word.as_ref().to_owned()).collect();
    let before = [program, "-U", "-"].map(Into::into);
    run(before.into_iter().chain(words).chain(["--run", command].map(Into::into)))
}

fn captive<S: AsRef<OsStr>>(words: impl IntoIterator<Item = S>, command: &str) -> Run {
    captive_of(NBDKIT, words, command)
}

/// A Python script in libnbd's shell, as a command for [`captive`].
fn nbdsh(script: &str) -> String {
    format!("nbdsh -u \"$uri\" -c '{script}'")
}
