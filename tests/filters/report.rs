//! Filters that count.

use std::fs;

use super::{captive, refused};
use crate::util::{self, Mount, Server, nbdsh, sh, temp};

const REQUESTS: &str = "
for i in range(10):
    h.pread(512, 512)
h.pwrite(bytes(65536), 0)
h.zero(4096, 0)
h.trim(8192, 0)
h.cache(16384, 0)
h.flush()";

#[test]
fn stats_tells_people() {
    let dir = temp();
    let path = dir.path().join("stats");
    let parameter = format!("statsfile={}", path.display());
    let mut server = Server::start(["--filter=stats", "memory", "1M", &parameter]);
    nbdsh(&server.uri(), REQUESTS);
    assert_eq!(server.terminate(), 0);
    let text = fs::read_to_string(&path).expect("the report");
    let line = |start: &str| {
        text.lines().find(|line| line.starts_with(start)).unwrap_or_else(|| panic!("no {start} in {text}"))
    };
    assert!(line("total: 15 ops, ").contains(" s, 81.00 KiB, "), "{text}");
    assert!(line("read: 10 ops, ").contains(" s, 5.00 KiB, ") && line("read: ").ends_with("/s total"));
    assert!(line("write: 1 ops, ").contains(" s, 64.00 KiB, "), "{text}");
    for kind in ["zero: 1 ops, ", "trim: 1 ops, ", "cache: 1 ops, ", "flush: 1 ops, "] {
        line(kind);
    }
    line("     9 bits: 100.0% (10 reqs, 5.00 KiB total)");
    line("          9 bit aligned: 100.0% (10)");
}

#[test]
fn stats_tells_programs() {
    let dir = temp();
    let path = dir.path().join("stats");
    let parameter = format!("statsfile={}", path.display());
    for _ in 0..2 {
        let words = ["--filter=stats", "memory", "1M", &parameter, "statsformat=json", "statsappend=true"];
        let mut server = Server::start(words);
        nbdsh(&server.uri(), REQUESTS);
        assert_eq!(server.terminate(), 0);
    }
    let script = format!(
        "import json
reports = [json.loads(line) for line in open('{}')]
assert len(reports) == 2
for report in reports:
    read = report['operations']['read']
    assert read['ops'] == 10 and read['bytes'] == 5120 and 0 < read['seconds'] < report['elapsed']
    assert read['sizes'] == {{'9': {{'requests': 10, 'bytes': 5120, 'alignment': {{'9': 10}}}}}}
    assert report['operations']['extents']['ops'] == 0",
        path.display()
    );
    util::run_ok(["python3", "-c", &script]);
    let error = refused(&["--filter=stats", "memory", "1M"]);
    assert!(error.contains("needs statsfile=FILE"), "{error}");
}

#[test]
fn stats_sees_what_a_mount_does() {
    let dir = temp();
    let path = dir.path().join("stats");
    let parameter = format!("statsfile={}", path.display());
    let mut mount = Mount::start(["--filter=stats", "memory", "1M", &parameter]);
    sh(&format!("printf x | dd of={} conv=notrunc,fsync status=none", mount.file().display()));
    assert_eq!(mount.unmount(), 0);
    let text = fs::read_to_string(&path).expect("the report");
    assert!(text.contains("\nwrite: ") && text.contains("\nflush: "), "{text}");
}

#[test]
fn count_sums_up_at_the_end() {
    let run = captive(["-v", "--filter=count", "pattern", "1M"], "nbdcopy \"$uri\" null:");
    let line = "debug: count bytes: read 1048576, written 0, zeroed 0, trimmed 0";
    assert!(run.stderr.contains(line), "{}", run.stderr);
    let mut server = Server::start(["-v", "--filter=count", "memory", "1M"]);
    nbdsh(&server.uri(), REQUESTS);
    assert_eq!(server.terminate(), 0);
    let line = "debug: count bytes: read 5120, written 65536, zeroed 4096, trimmed 8192";
    assert!(server.stderr().contains(line), "{}", server.stderr());
}
