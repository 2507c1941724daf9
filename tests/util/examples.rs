//! What the tests of the examples share: they are the same disks in several languages.

use std::{ffi::OsStr, path::Path};

use super::{Mount, sh};

/// The path of a file of the folder `examples`.
pub(crate) fn example(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples").join(name);
    path.into_os_string().into_string().expect("UTF-8")
}

/// What is true of an empty RAM disk of a few MiB, for nbdsh.
pub(crate) const RAMDISK: &str = "
data = bytes(range(256)) * 64
h.pwrite(data, 1000)
assert h.pread(len(data) + 2000, 0) == bytes(1000) + data + bytes(1000)
h.zero(5000, 3000)
h.trim(4096, 16384)
h.flush()
want = bytearray(bytes(1000) + data)
want[3000:8000] = bytes(5000)
want[16384:] = bytes(len(want) - 16384)
assert h.pread(len(want), 0) == want";

/// Mounts a disk, by the words behind `nbdkit-mount`, and makes a file system in it.
#[track_caller]
pub(crate) fn takes_a_file_system<S: AsRef<OsStr>>(words: impl IntoIterator<Item = S>) {
    let mut mount = Mount::start(words);
    sh(&format!("mkfs.ext4 -q {0}; e2fsck -fn {0}", mount.file().display()));
    assert_eq!(mount.unmount(), 0);
}
