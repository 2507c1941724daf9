//! Exports the functions of the C interface from the programs, so that plugins and filters find them there, and links
//! the unwinder into them: loading libgcc_s is a twelfth of a start.

use std::{path::PathBuf, process::Command};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-link-arg-bins=-Wl,--export-dynamic-symbol=nbdkit_*");
    if let Some(directory) = unwinder() {
        println!("cargo:rustc-link-search=native={}", directory.display());
        println!("cargo:rustc-link-lib=static=gcc_eh");
    }
}

/// Where the compiler has its unwinder to link. None: the programs load it, as usual.
fn unwinder() -> Option<PathBuf> {
    let is_gnu = std::env::var("CARGO_CFG_TARGET_ENV").is_ok_and(|env| env == "gnu");
    let is_native = std::env::var("TARGET") == std::env::var("HOST");
    if !is_gnu || !is_native {
        return None;
    }
    let output = Command::new("cc").arg("-print-file-name=libgcc_eh.a").output().ok()?;
    let path = PathBuf::from(String::from_utf8(output.stdout).ok()?.trim());
    path.exists().then(|| path.parent().map(PathBuf::from))?
}
