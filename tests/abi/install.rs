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

/// Every file of a directory, with its mode and what is in it.
fn tree(root: &Path) -> String {
    sh(&format!(
        "cd '{}' && find . -type f -printf '%p %m %Ts ' -exec sha256sum {{}} \\; | sort",
        root.display()
    ))
}

/// The same sources make the same files, and nothing is left of them afterwards. What was there before stays.
#[test]
fn an_installation_can_be_repeated_and_removed() {
    let dir = temp();
    let stage = |name: &str| dir.path().join(name);
    let into = |stage: &Path| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/install");
        let binaries = Path::new(NBDKIT).parent().expect("a folder").display();
        sh(&format!(
            "DESTDIR='{}' NBDKIT_BINARIES='{binaries}' SOURCE_DATE_EPOCH=1700000000 {} /usr/local",
            stage.display(),
            script.display()
        ));
    };
    fs::create_dir_all(stage("a/usr/local/bin")).expect("mkdir");
    fs::write(stage("a/usr/local/bin/other"), "").expect("write");
    into(&stage("a"));
    into(&stage("b"));
    fs::remove_file(stage("a/usr/local/bin/other")).expect("remove");
    assert_eq!(tree(&stage("a")), tree(&stage("b")));
    // Where mount(8) looks, with the path of the program.
    let helper = ["sbin", "usr/sbin"].map(|sbin| stage("a").join(sbin).join("mount.nbdkit"));
    let helper = helper.iter().find(|path| path.exists()).expect("mount.nbdkit");
    let helper = fs::read_to_string(helper).expect("read");
    assert!(helper.contains("program=/usr/local/bin/nbdkit-mount\n"), "{helper}");
    assert!(sh(&format!("file -b '{}'", stage("a/usr/local/bin/nbdkit").display())).contains(", stripped"));
    for file in ["share/doc/nbdkit-rs/README.md", "share/doc/nbdkit-rs/examples/lua/ramdisk.lua"] {
        assert!(stage("a/usr/local").join(file).is_file(), "{file}");
    }

    fs::write(stage("a/usr/local/bin/other"), "").expect("write");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/uninstall");
    sh(&format!("DESTDIR='{}' {} /usr/local", stage("a").display(), script.display()));
    let left = sh(&format!("cd '{}' && find . -type f", stage("a").display()));
    assert_eq!(left, "./usr/local/bin/other\n");
}

/// The units are what systemd can read, and take away what serving needs not.
#[test]
fn units_are_sound() {
    let dir = temp();
    install("/usr", dir.path().to_str().expect("UTF-8"));
    let units = dir.path().join("usr/lib/systemd/system");
    for (unit, limit) in [("nbdkit@.service", 30), ("nbdkit-mount@.service", 70)] {
        let unit = units.join(unit);
        sh(&format!(
            "systemd-analyze security --offline=true --threshold={limit} --no-pager '{}'",
            unit.display()
        ));
    }
    // The programs are looked for in this root.
    let verify = run([
        "systemd-analyze".into(),
        "verify".into(),
        format!("--root={}", dir.path().display()),
        "--man=no".into(),
        "nbdkit@disk.service".into(),
        "nbdkit@disk.socket".into(),
        "nbdkit-mount@disk.service".into(),
    ]);
    let is_of_root = |line: &str| line.contains("sysinit.target") || line.contains("/bin/kill");
    let lines = verify.stderr.lines().filter(|line| line.contains("nbdkit") && !is_of_root(line));
    let said: Vec<_> = lines.collect();
    assert!(said.is_empty(), "{said:#?}");
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
