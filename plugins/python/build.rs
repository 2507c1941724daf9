//! How the plugin is linked, and which program its interpreter takes itself for.

fn main() {
    // The interpreter and its threads outlive the plugin's `unload`: the code must stay.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    let python = pyo3_build_config::get();
    if let Some(directory) = python.lib_dir().filter(|directory| !directory.starts_with("/usr/lib")) {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-rpath,{directory}");
    }
    println!("cargo:rerun-if-env-changed=PYO3_PYTHON");
    let program = std::env::var("PYO3_PYTHON").unwrap_or_default();
    println!("cargo:rustc-env=NBDKIT_PYTHON_PROGRAM={program}");
}
