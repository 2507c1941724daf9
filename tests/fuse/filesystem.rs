//! The main job: file systems on loop devices on the mount.

use std::path::Path;

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
