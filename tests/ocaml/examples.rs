//! The examples in OCaml do what their first lines say.

use std::{fs, path::Path};

use super::{compiled_text, root, sdk, serve};
use crate::util::{NBDKIT, examples::takes_a_file_system, sh, temp};

#[track_caller]
fn example(dir: &Path, sdk: &Path, name: &str, libraries: &str) -> String {
    let text = fs::read_to_string(root().join(format!("examples/ocaml/{name}.ml"))).expect("the example");
    compiled_text(dir, sdk, name, &text, libraries)
}

#[test]
fn ramdisk() {
    let Some(sdk) = sdk() else { return };
    let dir = temp();
    let plugin = example(dir.path(), sdk, "ramdisk", "");
    let python = "
data = bytes(range(256)) * 64
h.pwrite(data, 1000)
assert h.pread(len(data) + 2000, 0) == bytes(1000) + data + bytes(1000)
h.zero(5000, 3000)
assert h.pread(5002, 2999) == data[1999:2000] + bytes(5000) + data[7000:7001]";
    serve(NBDKIT, &[&plugin, "10M"], python);
    takes_a_file_system([&plugin, "10M"]);
}

#[test]
fn sparse() {
    let Some(sdk) = sdk() else { return };
    let dir = temp();
    let plugin = example(dir.path(), sdk, "sparse", "");
    let python = "
assert h.get_size() == 1 << 40
assert h.pread(20, 5 << 30) == b'This is GiB 5 of 102'
assert h.pread(8192, (5 << 30) - 4096).count(0) > 8100
seen = []
h.block_status(3 << 30, 1 << 30, lambda context, at, entries, error: seen.extend(entries))
assert seen[:4] == [4096, 0, (1 << 30) - 4096, 3] and len(seen) == 12, seen";
    serve(NBDKIT, &[&plugin], python);
}

/// What was written is there for the next server, also after a record that was cut short.
#[test]
fn keyvalue() {
    let Some(sdk) = sdk() else { return };
    let dir = temp();
    let plugin = example(dir.path(), sdk, "keyvalue", "-I +unix unix.cmxa");
    let store = dir.path().join("disk.store");
    let words = [&*plugin, store.to_str().expect("UTF-8"), "size=10M"];
    let python = "
h.pwrite(b'x' * 10000, 5000)
h.pwrite(b'y' * 10, 9000)
assert h.pread(12000, 4000) == bytes(1000) + b'x' * 4000 + b'y' * 10 + b'x' * 5990 + bytes(1000)
h.flush()";
    serve(NBDKIT, &words, python);
    assert_eq!(fs::metadata(&store).expect("the store").len(), 4 * (8 + 4096));
    sh(&format!("head -c 100 /dev/zero >> {}", store.display()));
    let python = "
assert h.pread(12000, 4000) == bytes(1000) + b'x' * 4000 + b'y' * 10 + b'x' * 5990 + bytes(1000)
seen = []
h.block_status(h.get_size(), 0, lambda context, at, entries, error: seen.extend(entries))
assert seen == [4096, 3, 12288, 0, h.get_size() - 16384, 3], seen
h.pwrite(b'z', 0)
assert h.pread(2, 0) == b'z' + bytes(1)";
    serve(NBDKIT, &words, python);
}
