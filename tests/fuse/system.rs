//! Under mount(8) and fstab(5), with a poor environment, and as an ordinary user.
//!
//! What has to be installed somewhere is, in a mount name space of the test's own.

use std::fs;

use crate::util::{self, NBDKIT_MOUNT, image, run, sh, temp};

/// Runs a script in a private mount name space in which nbdkit-mount is installed, with its helper for mount(8).
fn installed(script: &str) -> util::Run {
    let root = env!("CARGO_MANIFEST_DIR");
    let script = format!(
        "set -e; mount -t tmpfs none /mnt; mkdir /mnt/sbin /mnt/bin; sed s,@prefix@,/usr/local, {root}/contrib/mount.nbdkit.in >/mnt/sbin/mount.nbdkit; \
         chmod 755 /mnt/sbin/mount.nbdkit; ln -s {NBDKIT_MOUNT} /mnt/bin/nbdkit-mount; \
         sbin=$(realpath /sbin); mount -t overlay -o lowerdir=/mnt/sbin:$sbin none $sbin; \
         mount --bind /mnt/bin /usr/local/bin; {script}"
    );
    run(["unshare", "-m", "bash", "-c", &script])
}

#[test]
fn mount_knows_both_types() {
    let dir = temp();
    let mnt = dir.path().join("mnt").display().to_string();
    fs::create_dir(&mnt).expect("mkdir");
    let disk = image(dir.path(), "a disk.img", 1 << 20);
    for (kind, options) in [
        ("fuse.nbdkit-mount", "ro,noauto,nofail,_netdev,x-systemd.automount"),
        ("nbdkit", "ro,noauto,nofail,_netdev,user=root,x-systemd.automount"),
    ] {
        let out = installed(&format!(
            "mount -t {kind} \"file 'file={}'\" {mnt} -o {options}; stat -c '%s %a' {mnt}/nbd; \
             findmnt -no FSTYPE {mnt}; umount {mnt}",
            disk.display()
        ));
        assert_eq!(out.stdout, "1048576 444\nfuse.nbdkit-mount\n", "{kind}: {}", out.stderr);
    }
}

#[test]
fn a_line_of_fstab() {
    let dir = temp();
    let mnt = dir.path().join("mnt").display().to_string();
    fs::create_dir(&mnt).expect("mkdir");
    let fstab = dir.path().join("fstab");
    fs::write(&fstab, format!("memory\\040size=2M {mnt} fuse.nbdkit-mount noauto,nofail,user 0 0\n"))
        .expect("write");
    let out = installed(&format!("mount -T {} {mnt}; stat -c %s {mnt}/nbd; umount {mnt}", fstab.display()));
    assert_eq!(out.stdout, "2097152\n", "{}", out.stderr);
}

/// Any options may stand in front, `mount -a` leaves alone what is mounted, and a remount changes what it can.
#[test]
fn a_line_of_fstab_is_mounted_once() {
    let dir = temp();
    let path = dir.path().display().to_string();
    let disk = image(dir.path(), "disk.img", 32 << 20).display().to_string();
    for name in ["mnt", "inside"] {
        fs::create_dir(dir.path().join(name)).expect("mkdir");
    }
    sh(&format!("mkfs.ext4 -q {disk}"));
    for kind in ["fuse.nbdkit-mount", "nbdkit"] {
        let source = format!("-t\\0404\\040--mount\\040{path}/inside\\040--filter=delay\\040file\\040{disk}");
        let fstab = dir.path().join("fstab");
        fs::write(&fstab, format!("{source} {path}/mnt {kind} nofail 0 0\n")).expect("write");
        let out = installed(&format!(
            "fstab={}; mount -T $fstab -a; mount -T $fstab -a; grep -c {path}/mnt /proc/mounts; \
             findmnt -no SOURCE,OPTIONS {path}/mnt; findmnt -no FSTYPE {path}/inside; \
             umount {path}/inside; mount -o remount,ro {path}/mnt; findmnt -no OPTIONS {path}/mnt | cut -c1-2; \
             mount -o remount,rw {path}/mnt; findmnt -no OPTIONS {path}/mnt | cut -c1-2; \
             umount {path}/mnt",
            fstab.display()
        ));
        let lines: Vec<_> = out.stdout.lines().collect();
        assert_eq!(lines.len(), 5, "{kind}: {} {}", out.stdout, out.stderr);
        assert_eq!(lines[0], "1", "mounted once");
        let source = format!("-t 4 --mount {path}/inside --filter=delay file {disk}");
        assert!(lines[1].starts_with(&source), "{kind}: {}", lines[1]);
        assert!(lines[1].contains("nosuid,nodev"), "{kind}: {}", lines[1]);
        assert_eq!(&lines[2..], ["ext4", "ro", "rw"], "{kind}: {}", out.stderr);
    }
}

#[test]
fn options_may_stand_in_the_source() {
    let dir = temp();
    let mnt = dir.path().join("mnt").display().to_string();
    fs::create_dir(&mnt).expect("mkdir");
    sh(&format!(
        "{NBDKIT_MOUNT} '--filter=offset memory size=2M offset=1M' {mnt} -o rw,nofail && stat -c %s {mnt}/nbd | grep -qx 1048576; \
         {NBDKIT_MOUNT} -u {mnt}"
    ));
}

#[test]
fn an_empty_environment_is_enough() {
    let dir = temp();
    let mnt = dir.path().join("mnt").display().to_string();
    fs::create_dir(&mnt).expect("mkdir");
    sh(&format!(
        "env -i {NBDKIT_MOUNT} memory 1M {mnt} && stat {mnt}/nbd && env -i {NBDKIT_MOUNT} -u {mnt}; \
         env -i {NBDKIT_MOUNT} --run 'test -f \"$file\"' memory 1M"
    ));
}

/// Runs a script as an ordinary user who may use FUSE, in a mount name space of its own; `$mnt` is a directory of that
/// user's, `$nbdkit` the program.
fn as_user(setup: &str, script: &str) -> util::Run {
    let dir = temp();
    let path = dir.path().display().to_string();
    fs::create_dir(dir.path().join("mnt")).expect("mkdir");
    // The program may lie where the user cannot go.
    let outer = format!(
        "set -e; chmod 755 {path}; chown nobody {path}/mnt; mount -t tmpfs none /mnt; cp {NBDKIT_MOUNT} /mnt/nbdkit-mount; \
         mount -t tmpfs none /dev; mknod -m 666 /dev/fuse c 10 229; mknod -m 666 /dev/null c 1 3; {setup}; cd /; \
         exec setpriv --reuid=nobody --regid=nogroup --clear-groups env -i PATH=/usr/bin:/bin mnt={path}/mnt \
         nbdkit=/mnt/nbdkit-mount bash -c '{script}'"
    );
    run(["unshare", "-m", "bash", "-c", &outer])
}

#[test]
fn an_ordinary_user_mounts_with_fusermount3() {
    let out = as_user(
        "true",
        "set -e; $nbdkit memory 2M $mnt; stat -c \"%s %U\" $mnt/nbd; echo data >$mnt/nbd; head -c 4 $mnt/nbd; echo; \
         $nbdkit --filter=cow -f memory 1M $mnt && exit 9; $nbdkit -u $mnt; ls -A $mnt; \
         $nbdkit --run \"stat -c %s \\$file\" memory 1M",
    );
    assert_eq!(out.stdout, "2097152 nobody\ndata\n1048576\n", "{}", out.stderr);
    assert!(out.stderr.contains("is in use"), "{}", out.stderr);
}

#[test]
fn an_ordinary_user_is_told_what_is_missing() {
    for (setup, words, code, says) in [
        ("rm /dev/fuse", "memory 1M $mnt", 4, &["/dev/fuse", "modprobe fuse"][..]),
        ("chmod 600 /dev/fuse", "memory 1M $mnt", 4, &["/dev/fuse", "run as root"]),
        ("true", "-o allow_other memory 1M $mnt", 4, &["user_allow_other", "/etc/fuse.conf"]),
        ("true", "--loop memory 1M $mnt", 4, &["loop", "root"]),
        ("true", "memory 1M /", 4, &["cannot mount"]),
        (
            "mount -t tmpfs none /usr/local/bin; cp $(which bash) /usr/local/bin; mount --bind /dev/null $(realpath $(which fusermount3))",
            "memory 1M $mnt",
            4,
            &["fusermount3", "package fuse3"],
        ),
    ] {
        let out = as_user(setup, &format!("$nbdkit {words}"));
        let line = out.refused_with(code);
        says.iter().for_each(|word| assert!(line.contains(word), "no '{word}' in: {line}"));
    }
}
