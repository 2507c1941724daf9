//! The examples in the folder examples/sh do what their first lines say.

use std::{fs, path::Path};

use super::{captive, nbdsh};
use crate::util::{Mount, patterned, run_ok, sh, temp};

fn example(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/sh").join(name);
    path.into_os_string().into_string().expect("UTF-8")
}

#[test]
fn ramdisk() {
    let python = r#"
data = bytes(range(256)) * 64
h.pwrite(data, 1000)
assert h.pread(len(data) + 2000, 0) == bytes(1000) + data + bytes(1000)
h.zero(5000, 3000)
h.trim(4096, 16384)
h.flush()
want = bytearray(bytes(1000) + data)
want[3000:8000] = bytes(5000)
want[16384:] = bytes(len(want) - 16384)
assert h.pread(len(want), 0) == want"#;
    captive(["sh", &example("ramdisk.sh"), "size=10M"], &nbdsh(python)).ok();
    let mut mount = Mount::start(["sh", &example("ramdisk.sh"), "size=4M"]);
    sh(&format!("mkfs.ext4 -q {0}; e2fsck -fn {0}", mount.file().display()));
    assert_eq!(mount.unmount(), 0);
    assert!(captive(["sh", &example("ramdisk.sh")], "true").refused().contains("give a size"));
}

#[test]
fn sparse() {
    let python = r#"
assert h.get_size() == 1 << 40
assert h.pread(19, 256 << 30) == b"This is part 1 of 4"
block = h.pread(8192, (512 << 30) - 4096)
assert block[:4096] == bytes(4096) and block[4096:4114] == b"This is part 2 of "
assert h.pread(4096, 5 << 30) == bytes(4096)"#;
    captive(["sh", &example("sparse.sh")], &nbdsh(python)).ok();
    let map = captive(["sh", &example("sparse.sh")], "nbdinfo --map --totals \"$uri\"").ok();
    let words: Vec<&str> = map.split_whitespace().collect();
    assert!(words.contains(&"16384") && words.contains(&"1099511611392"), "{map}");
    let mut mount = Mount::start(["sh", &example("sparse.sh")]);
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
    let words = ["sh".to_owned(), example("pieces.sh"), format!("dir={}", pieces.display())];
    let mut mount = Mount::start(&words);
    run_ok(["cmp", &disk.display().to_string(), &mount.file().display().to_string()]);
    assert_eq!(mount.unmount(), 0);
    let copy = dir.path().join("copy").display().to_string();
    captive(&words, &format!("nbdcopy \"$uri\" {copy}")).ok();
    run_ok(["cmp", &disk.display().to_string(), &copy]);
}
