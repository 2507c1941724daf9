//! The examples in Lua do what their first lines say.

use std::fs;

use super::{lua, serve};
use crate::util::{
    NBDKIT,
    examples::{RAMDISK, example, takes_a_file_system},
    run_ok, temp,
};

#[test]
fn ramdisk() {
    lua();
    serve(NBDKIT, &["lua", &example("lua/ramdisk.lua"), "size=10M"], RAMDISK);
    takes_a_file_system(["lua", &example("lua/ramdisk.lua"), "size=10M"]);
}

#[test]
fn sparse() {
    lua();
    let python = "
assert h.get_size() == 8 << 40
assert h.pread(20, 5 << 30) == b'This is GiB 5 of 819'
assert h.pread(8192, (5 << 30) - 4096).count(0) > 8100
seen = []
h.block_status(3 << 30, 1 << 30, lambda context, at, entries, error: seen.extend(entries))
assert seen[:4] == [4096, 0, (1 << 30) - 4096, 3] and len(seen) == 12, seen";
    serve(NBDKIT, &["lua", &example("lua/sparse.lua"), "size=8T"], python);
}

#[test]
fn fractal() {
    lua();
    let dir = temp();
    let picture = dir.path().join("mandelbrot.pgm");
    let command = format!("nbdcopy \"$uri\" {}", picture.display());
    let words = ["width=64", "height=48"];
    run_ok(
        [NBDKIT, "-U", "-", "lua", &example("lua/fractal.lua")]
            .iter()
            .chain(&words)
            .chain(&["--run", &command]),
    );
    let picture = fs::read(&picture).expect("the picture");
    let header = b"P5\n64 48\n255\n";
    assert!(picture.starts_with(header));
    let at = |column: usize, row: usize| picture[header.len() + row * 64 + column];
    assert_eq!(picture.len(), header.len() + 64 * 48);
    assert_eq!(at(32, 24), 0, "the middle is in the set");
    assert!(at(0, 0) > 250, "a corner is far from it");
    // The set is the same above and below its axis.
    for row in 1..24 {
        for column in 0..64 {
            assert_eq!(at(column, 24 - row), at(column, 24 + row));
        }
    }
}
