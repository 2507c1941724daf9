//! The main job: file systems on loop devices on the mount.

use std::path::Path;

use rustix::process::Signal;

use crate::util::{Mount, image, sh, temp};

/// Makes a file system on the mounted disk, copies a tree into it by the kernel's loop device, and checks.
fn main_job(mount: &mut Mount, dir: &Path) {
    let inside = dir.join("inside");
    std::fs::create_dir(&inside).expect("mkdir");
    sh(&format!(
        "mkfs.ext4 -q {file} && mount -o loop {file} {inside} && \
         cp -r /usr/share/common-licenses {inside}/tree && umount {inside} && \
         mount -o loop {file} {inside} && diff -r /usr/share/common-licenses {inside}/tree; umount {inside}",
        file = mount.file().display(),
        inside = inside.display()
    ));
    assert_eq!(mount.unmount(), 0);
}

#[test]
fn ext4_on_a_file() {
    let dir = temp();
    let disk = image(dir.path(), "disk.img", 64 << 20);
    for words in [&["file"][..], &["--no-passthrough", "file"], &["--filter=nofilter", "file"]] {
        let run = temp();
        let file = format!("file={}", disk.display());
        let mut mount = Mount::start(words.iter().copied().chain([file.as_str()]));
        main_job(&mut mount, run.path());
        sh(&format!(
            "e2fsck -fn {0} >/dev/null && debugfs -R 'cat tree/GPL-3' {0} 2>/dev/null | cmp - /usr/share/common-licenses/GPL-3",
            disk.display()
        ));
    }
}

#[test]
fn ext4_through_filters() {
    let dir = temp();
    let disk = image(dir.path(), "disk.img", 66 << 20);
    let file = format!("file={}", disk.display());
    let mut mount =
        Mount::start(["--filter=offset", "--filter=blocksize", "file", &file, "offset=1M", "minblock=4K"]);
    main_job(&mut mount, dir.path());
    sh(&format!(
        "dd if={} bs=1M skip=1 of={1}/fs status=none && e2fsck -fn {1}/fs",
        disk.display(),
        dir.path().display()
    ));
}

#[test]
fn partitions_by_number() {
    let dir = temp();
    let disk = image(dir.path(), "disk.img", 80 << 20);
    // The fifth is a logical one.
    sh(&format!(
        "printf 'label: dos\\n2048,20480\\n22528,,E\\n' | sfdisk -q {0} && printf '24576,+,L\\n' | sfdisk -q -a {0}",
        disk.display()
    ));
    let file = format!("file={}", disk.display());
    let mut mount = Mount::start(["--filter=partition", "file", &file, "partition=5"]);
    main_job(&mut mount, dir.path());
    sh(&format!(
        "dd if={} bs=512 skip=24576 of={1}/fs status=none && e2fsck -fn {1}/fs",
        disk.display(),
        dir.path().display()
    ));
}

#[test]
fn copy_on_write_spares_the_image() {
    let dir = temp();
    let disk = image(dir.path(), "disk.img", 64 << 20);
    let before = sh(&format!("sha256sum <{}", disk.display()));
    let file = format!("file={}", disk.display());
    let mut mount = Mount::start(["--filter=cow", "file", &file]);
    main_job(&mut mount, dir.path());
    assert_eq!(sh(&format!("sha256sum <{}", disk.display())), before);
}

#[test]
fn other_file_systems() {
    for (make, check, size) in
        [("mkfs.xfs -q", "xfs_repair -n -f", 320 << 20), ("mkfs.btrfs -q", "btrfs check", 128 << 20)]
    {
        let dir = temp();
        let disk = image(dir.path(), "disk.img", size);
        let inside = dir.path().join("inside");
        std::fs::create_dir(&inside).expect("mkdir");
        let mut mount = Mount::start(["file", &format!("file={}", disk.display())]);
        sh(&format!(
            "{make} {file} && mount -o loop {file} {inside} && \
             fio --name=v --directory={inside} --rw=randwrite --bs=4k --size=16m --numjobs=2 --direct=1 --verify=crc32c \
                 --verify_fatal=1 --verify_state_save=0 --output-format=terse && \
             umount {inside} && mount -o loop {file} {inside} && \
             fio --name=v --directory={inside} --rw=randwrite --bs=4k --size=16m --numjobs=2 --direct=1 --verify=crc32c \
                 --verify_only --verify_fatal=1 --verify_state_save=0 --output-format=terse; umount {inside}",
            file = mount.file().display(),
            inside = inside.display()
        ));
        assert_eq!(mount.unmount(), 0);
        sh(&format!("{check} {} >/dev/null 2>&1", disk.display()));
    }
}

/// Not every kernel has this file system: its tools write it.
#[test]
fn fat() {
    let dir = temp();
    let disk = image(dir.path(), "disk.img", 64 << 20);
    let mut mount = Mount::start(["file", &format!("file={}", disk.display())]);
    sh(&format!(
        "mkfs.vfat {file} >/dev/null && mcopy -i {file} /usr/share/common-licenses/GPL-3 ::gpl && \
         mtype -i {file} ::gpl | cmp - /usr/share/common-licenses/GPL-3",
        file = mount.file().display()
    ));
    assert_eq!(mount.unmount(), 0);
    sh(&format!(
        "fsck.vfat -n {0} >/dev/null && mtype -i {0} ::gpl | cmp - /usr/share/common-licenses/GPL-3",
        disk.display()
    ));
}

/// What a file system on a loop device has not written yet is not lost when the server is told to end.
#[test]
fn a_signal_under_a_mounted_file_system() {
    let dir = temp();
    let disk = image(dir.path(), "disk.img", 64 << 20);
    let inside = dir.path().join("inside");
    std::fs::create_dir(&inside).expect("mkdir");
    let mut mount = Mount::start(["--filter=nofilter", "file", &format!("file={}", disk.display())]);
    sh(&format!(
        "mkfs.ext4 -q {file} && mount -o loop {file} {inside} && cp -r /usr/share/common-licenses {inside}/tree",
        file = mount.file().display(),
        inside = inside.display()
    ));
    let code = mount.signal(Signal::TERM);
    sh(&format!("umount -l {}", inside.display()));
    assert_eq!(code, 0);
    sh(&format!(
        "mount -o loop {disk} {inside} && diff -r /usr/share/common-licenses {inside}/tree; umount {inside}",
        disk = disk.display(),
        inside = inside.display()
    ));
}
