//! The examples in the folder examples/sh do what their first lines say.

use std::fs;

use super::{captive, nbdsh};
use crate::util::{
    Mount,
    examples::{RAMDISK, example, takes_a_file_system},
    patterned, run_ok, sh, temp,
};

#[test]
fn ramdisk() {
    captive(["sh", &example("sh/ramdisk.sh"), "size=10M"], &nbdsh(RAMDISK)).ok();
    takes_a_file_system(["sh", &example("sh/ramdisk.sh"), "size=4M"]);
    assert!(captive(["sh", &example("sh/ramdisk.sh")], "true").refused().contains("give a size"));
}

#[test]
fn sparse() {
    let python = r#"
assert h.get_size() == 1 << 40
assert h.pread(19, 256 << 30) == b"This is part 1 of 4"
block = h.pread(8192, (512 << 30) - 4096)
assert block[:4096] == bytes(4096) and block[4096:4114] == b"This is part 2 of "
assert h.pread(4096, 5 << 30) == bytes(4096)"#;
    captive(["sh", &example("sh/sparse.sh")], &nbdsh(python)).ok();
    let map = captive(["sh", &example("sh/sparse.sh")], "nbdinfo --map --totals \"$uri\"").ok();
    let words: Vec<&str> = map.split_whitespace().collect();
    assert!(words.contains(&"16384") && words.contains(&"1099511611392"), "{map}");
    let mut mount = Mount::start(["sh", &example("sh/sparse.sh")]);
    let data =
        rustix::fs::seek(fs::File::open(mount.file()).expect("open"), rustix::fs::SeekFrom::Data(300 << 30));
    assert_eq!(data.expect("seek"), 512 << 30);
    assert_eq!(mount.unmount(), 0);
}

#[test]
fn pieces() {
    let dir = temp();
    let disk = patterned(dir.path(), "disk", (2 << 20) + 777);
    let pieces = dir.path().join("pieces");
    fs::create_dir(&pieces).expect("make a directory");
    sh(&format!("split -b 1M {} {}/piece.", disk.display(), pieces.display()));
    let words = ["sh".to_owned(), example("sh/pieces.sh"), format!("dir={}", pieces.display())];
    let mut mount = Mount::start(&words);
    run_ok(["cmp", &disk.display().to_string(), &mount.file().display().to_string()]);
    assert_eq!(mount.unmount(), 0);
    let copy = dir.path().join("copy").display().to_string();
    captive(&words, &format!("nbdcopy \"$uri\" {copy}")).ok();
    run_ok(["cmp", &disk.display().to_string(), &copy]);
}
