//! Compiles the functions that take a variable number of arguments: Rust cannot define those.

fn main() {
    println!("cargo:rerun-if-changed=variadic.c");
    cc::Build::new().file("variadic.c").std("gnu11").warnings(true).compile("nbdkit_variadic");
    // The tests of this package load plugins, so they export the interface as the programs do.
    println!("cargo:rustc-link-arg=-Wl,--export-dynamic-symbol=nbdkit_*");
}
