//! The language bridges under test. They are packages of their own that no program depends on, so cargo builds them
//! for tests only when it is asked to.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use super::NBDKIT;

/// Builds a bridge of this workspace beside the programs under test, if it is not there yet, and returns its file.
#[track_caller]
pub(crate) fn bridge(package: &str) -> PathBuf {
    let folder = Path::new(NBDKIT).parent().expect("the target folder of the profile");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--quiet", "--package", package]).current_dir(env!("CARGO_MANIFEST_DIR"));
    cargo.arg("--target-dir").arg(folder.parent().expect("the target folder"));
    if folder.ends_with("release") {
        cargo.arg("--release");
    }
    let output = cargo.output().expect("run cargo");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    folder.join(format!("lib{}.so", package.replace('-', "_")))
}
