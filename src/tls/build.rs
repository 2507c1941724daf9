//! Decides whether OpenSSL is opened on demand (libssl.rs), which is written for what most servers run on.

use std::env::{var, var_os};

fn main() {
    println!("cargo::rustc-check-cfg=cfg(openssl_on_demand)");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=OPENSSL_STATIC");
    let is = |name: &str, value: &str| var(name).is_ok_and(|v| v == value);
    let version_3 =
        var("DEP_OPENSSL_VERSION_NUMBER").is_ok_and(|number| number.len() == 8 && number.starts_with('3'));
    let target = is("CARGO_CFG_TARGET_ARCH", "x86_64") && is("CARGO_CFG_TARGET_ENV", "gnu");
    if version_3 && target && var_os("OPENSSL_STATIC").is_none() {
        println!("cargo::rustc-cfg=openssl_on_demand");
    }
}
