//! What others get: packages for Debian, and the crates to embed.

use std::{path::Path, process::Command};

use crate::util::{self, NBDKIT, is_left_out, run_ok, sh, temp};

/// The packages are made, checked, installed into a root of their own, tried there, and removed; nothing is left.
#[test]
fn debian_packages() {
    if is_left_out("root") {
        return;
    }
    let dir = temp();
    let here = dir.path().display();
    let source = env!("CARGO_MANIFEST_DIR");
    let binaries = Path::new(NBDKIT).parent().expect("a folder").display();
    util::bridge("nbdkit-lua-plugin");
    sh(&format!("NBDKIT_BINARIES={binaries} SOURCE_DATE_EPOCH=1700000000 {source}/scripts/deb {here}/a"));
    let names = sh(&format!("cd {here}/a && ls *.deb"));
    for name in ["nbdkit-rs_", "nbdkit-rs-mount_", "nbdkit-rs-plugin-lua_", "nbdkit-rs-dev_"] {
        assert!(names.contains(name), "{names}");
    }
    // The same sources make the same packages.
    sh(&format!("NBDKIT_BINARIES={binaries} SOURCE_DATE_EPOCH=1700000000 {source}/scripts/deb {here}/b"));
    sh(&format!("cd {here} && for deb in a/*.deb; do cmp $deb b/${{deb#a/}}; done"));
    let said =
        util::run(["bash", "-c", &format!("lintian --fail-on error --no-tag-display-limit {here}/a/*.deb")]);
    assert!(said.code == 0, "{}{}", said.stdout, said.stderr);
    // Beside the distribution's nbdkit no file is in the way.
    let theirs = "nbdkit nbdkit-plugin-lua nbdkit-plugin-python";
    let clash = sh(&format!(
        "cd {here} && for deb in a/nbdkit-rs_*.deb a/nbdkit-rs-mount_*.deb a/nbdkit-rs-plugin-*.deb; do
             dpkg-deb --fsys-tarfile $deb | tar -t | grep -v '/$' | sed 's/^[.]//'
         done | sort >ours; dpkg -L {theirs} | sort | comm -12 - ours"
    ));
    assert_eq!(clash, "");
    let root = format!("{here}/root");
    sh(&format!(
        "mkdir -p {root}/var/lib/dpkg {root}/var/log && touch {root}/var/lib/dpkg/status
         dpkg --root={root} --force-script-chrootless --force-depends -i {here}/a/*.deb"
    ));
    let out =
        run_ok([&format!("{root}/usr/bin/nbdkit-rs"), "memory", "1M", "--run", "nbdinfo --size \"$uri\""]);
    assert_eq!(out, "1048576\n");
    let list = run_ok([&format!("{root}/usr/bin/nbdkit-mount"), "--list"]);
    assert!(list.contains("\n  lua "), "{list}");
    sh(&format!(
        "dpkg --root={root} --force-script-chrootless -P $(dpkg --root={root} -l | awk '/^ii/ {{print $2}}')"
    ));
    let left = sh(&format!("cd {root} && find . -type f -not -path './var/*'"));
    assert_eq!(left, "");
}

/// Builds an example and returns its program.
fn example(name: &str) -> std::path::PathBuf {
    let folder = Path::new(NBDKIT).parent().expect("the target folder of the profile");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--quiet", "--package", "nbdkit-rs", "--example", name]);
    cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
    cargo.arg("--target-dir").arg(folder.parent().expect("the target folder"));
    if folder.ends_with("release") {
        cargo.arg("--release");
    }
    let output = cargo.output().expect("run cargo");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    folder.join("examples").join(name)
}

/// A `Vec<u8>` of a program that embeds the crates, over NBD and as a file.
#[test]
fn embedded() {
    let dir = temp();
    let here = dir.path().display();
    let wait = "for i in $(seq 200); do TEST && break; read -t 0.1 <> <(:) || true; done";
    let serve = example("serve");
    sh(&format!(
        "cd {here}; {} ./sock & trap 'kill %1' EXIT; {}
         echo hello | nbdcopy - 'nbd+unix:///?socket=sock' && nbdcopy 'nbd+unix:///?socket=sock' copy
         head -c 5 copy | grep -qx hello",
        serve.display(),
        wait.replace("TEST", "[ -S sock ]")
    ));
    if !is_left_out("fuse") {
        let mount = example("mount");
        sh(&format!(
            "cd {here}; mkdir mnt; {} mnt & {}
             mkfs.ext4 -q mnt/nbd; e2fsck -fn mnt/nbd; umount mnt; wait",
            mount.display(),
            wait.replace("TEST", "[ -f mnt/nbd ]")
        ));
    }
}
