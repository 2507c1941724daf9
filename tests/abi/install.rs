//! `make install`: what it puts where, and that a plugin finds its place by pkg-config.

use std::{fs, path::Path};

use crate::util::{NBDKIT, run, run_ok, sh, temp};

/// Runs the script of `make install` with the programs under test.
fn install(prefix: &str, destdir: &str) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let binaries = Path::new(NBDKIT).parent().expect("a folder");
    run_ok([
        "env",
        &format!("DESTDIR={destdir}"),
        &format!("NBDKIT_BINARIES={}", binaries.display()),
        root.join("scripts/install").to_str().expect("UTF-8"),
        prefix,
    ]);
}

/// A plugin is compiled and installed with what pkg-config says, and both programs find it by its name.
#[test]
fn a_plugin_finds_its_place() {
    let dir = temp();
    // Neither the shell nor sed takes it for anything but a path.
    let prefix = dir.path().join("a|b&c");
    let prefix = prefix.to_str().expect("UTF-8");
    install(prefix, "");
    let pkg_config = |words: &str| {
        sh(&format!("PKG_CONFIG_PATH='{prefix}/lib/pkgconfig' pkg-config {words} nbdkit")).trim().to_owned()
    };
    assert_eq!(pkg_config("--modversion"), env!("CARGO_PKG_VERSION"));
    assert_eq!(pkg_config("--variable=prefix"), prefix);
    for (variable, kind) in [("plugindir", "plugins"), ("filterdir", "filters")] {
        let folder = pkg_config(&format!("--variable={variable}"));
        assert_eq!(folder, format!("{prefix}/lib/nbdkit/{kind}"));
        assert!(Path::new(&folder).is_dir(), "{folder}");
    }
    assert!(Path::new(&pkg_config("--variable=bindir")).join("nbdkit").is_file());
    assert!(Path::new(&pkg_config("--variable=sbindir")).join("nbdkit").is_file());

    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/abi");
    sh(&format!(
        "export PKG_CONFIG_PATH='{prefix}/lib/pkgconfig'
         flags=$(pkg-config --cflags --libs nbdkit)
         eval \"gcc -shared -fPIC $flags {0}/ramdisk_v2.c\" \\
            -o \"'$(pkg-config --variable=plugindir nbdkit)/nbdkit-ramdisk-v2-plugin.so'\"
         eval \"gcc -shared -fPIC $flags {0}/invert.c\" \\
            -o \"'$(pkg-config --variable=filterdir nbdkit)/nbdkit-invert-filter.so'\"",
        here.display()
    ));
    let words = ["--filter=invert", "ramdisk-v2", "2M"];
    let nbdkit = format!("{prefix}/bin/nbdkit");
    let size = run_ok([&nbdkit[..], "-U", "-"].iter().chain(&words).chain(&["--run", "nbdinfo --size $uri"]));
    assert_eq!(size.trim(), "2097152");
    let mount = format!("{prefix}/bin/nbdkit-mount");
    let script = "cmp $file <(head -c 2M /dev/zero | tr '\\0' '\\377')";
    let script = format!("bash -c \"{script}\"");
    run_ok([&mount[..]].iter().chain(&["--run", &script]).chain(&words));
    // Those that are not installed do not find it.
    let unknown = run([NBDKIT, "ramdisk-v2", "--dump-plugin"]);
    assert!(unknown.stderr.contains("unknown plugin 'ramdisk-v2'"), "{}", unknown.stderr);
}

/// Packages are made of what is beneath DESTDIR, which nothing inside knows of.
#[test]
fn destdir_is_not_in_what_is_installed() {
    let dir = temp();
    let stage = dir.path().join("stage");
    install("/opt/of/a/package", stage.to_str().expect("UTF-8"));
    assert!(!Path::new("/opt/of/a/package").exists());
    let to = stage.join("opt/of/a/package");
    for file in [
        "bin/nbdkit",
        "bin/nbdkit-mount",
        "include/nbdkit-plugin.h",
        "include/nbdkit-filter.h",
        "include/nbdkit-common.h",
        "include/nbdkit-version.h",
        "share/man/man1/nbdkit.1",
        "share/man/man3/nbdkit-plugin.3",
        "share/man/man3/nbdkit-filter.3",
        "share/bash-completion/completions/nbdkit",
    ] {
        assert!(to.join(file).is_file(), "{file}");
    }
    let pc = fs::read_to_string(to.join("lib/pkgconfig/nbdkit.pc")).expect("nbdkit.pc");
    assert!(pc.starts_with("prefix=/opt/of/a/package\n"), "{pc}");
    assert!(!pc.contains("stage") && !pc.contains('@'), "{pc}");
}

#[test]
fn a_relative_prefix_is_refused() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/install");
    let refused = run([script.to_str().expect("UTF-8"), "usr"]).refused();
    assert!(refused.contains("absolute path: usr"), "{refused}");
}
