//! A layer that does not fill the buffer of a read: nobody gets to see what was in it before.

use std::path::Path;

use crate::util::{Mount, Server, nbdsh, run_ok, temp};

fn compiled(dir: &Path, name: &str, options: &[&str]) -> String {
    let root = env!("CARGO_MANIFEST_DIR");
    let (include, source) = (format!("-I{root}/include"), format!("{root}/tests/abi/unfilled.c"));
    let library = dir.join(name).display().to_string();
    let words = ["gcc", "-Wall", "-Werror", "-shared", "-fPIC", &include, "-o", &library, &source];
    run_ok(words.iter().chain(options));
    library
}

#[test]
fn what_the_buffer_held_before_is_nobodys() {
    let dir = temp();
    let plugin = compiled(dir.path(), "plugin.so", &[]);
    let filter = format!("--filter={}", compiled(dir.path(), "filter.so", &["-DFILTER"]));
    let disk = "
for _ in range(20):
    for block, expected in [(1, bytes(4096)), (2, b'p' * 2048 + bytes(2048)), (3, bytes(4096)), (4, b'f' * 4096)]:
        assert read(0) == b'S' * 4096
        got = read(block)
        assert got == expected, (block, got[:16], got[-16:])
";
    for words in [vec![&*plugin], vec![&filter, "memory", "1M"]] {
        let server = Server::start(&words);
        nbdsh(&server.uri(), &format!("def read(block): return bytes(h.pread(4096, block * 4096))\n{disk}"));
        let mount = Mount::start(&words);
        let python = format!(
            "
import mmap, os
fd = os.open({:?}, os.O_RDONLY | os.O_DIRECT)
page = mmap.mmap(-1, 4096)
def read(block):
    assert os.preadv(fd, [page], block * 4096) == 4096
    return page[:]
{disk}",
            mount.file()
        );
        run_ok(["python3", "-c", &python]);
    }
}
