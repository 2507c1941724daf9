//! A plugin with threads and children of its own, that sleeps and exits: neither front end suffers more than it has to.

use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    time::{Duration, Instant},
};

use rustix::{fs::OFlags, process::Signal};

use crate::util::{Mount, Server, nbdsh, run_ok, temp};

/// Compiles the plugin, against our headers.
fn compiled(dir: &Path) -> String {
    let root = env!("CARGO_MANIFEST_DIR");
    let (include, source) = (format!("-I{root}/include"), format!("{root}/tests/abi/unruly.c"));
    let library = dir.join("unruly.so").display().to_string();
    run_ok(["gcc", "-Wall", "-Werror", "-pthread", "-shared", "-fPIC", &include, "-o", &library, &source]);
    library
}

/// Where on its disk the plugin does what, in blocks.
const SLEEP: u64 = 3;
const EXIT: u64 = 4;
const BLOCK: u64 = 4096;

/// What a client reads in the first three blocks.
fn said(export: &str, peer: &str) -> [String; 3] {
    ["children 3 3".into(), format!("peer {peer}"), format!("export '{export}', early 1")]
}

/// A block of the mounted disk, past the page cache and its read-ahead.
fn block(mount: &Mount, number: u64) -> io::Result<String> {
    #[repr(align(4096))]
    struct Page([u8; BLOCK as usize]);
    let mut page = Page([1; BLOCK as usize]);
    let flags = OFlags::DIRECT.bits().cast_signed();
    let file = File::options().read(true).custom_flags(flags).open(mount.file())?;
    file.read_exact_at(&mut page.0, number * BLOCK)?;
    let end = page.0.iter().position(|byte| *byte == 0).expect("a text");
    Ok(String::from_utf8_lossy(&page.0[..end]).into_owned())
}

#[test]
fn threads_and_children() {
    let dir = temp();
    let plugin = compiled(dir.path());
    let mut server = Server::start([&plugin]);
    let [children, peer, interned] = said("name", "0 1 1 1");
    let script = format!(
        "
def block(number):
    return bytes(h.pread(4096, number * 4096)).rstrip(b'\\0').decode()
for _ in range(3):
    assert block(0) == \"{children}\", block(0)
    assert block(1) == \"{peer}\", block(1)
    assert block(2) == \"{interned}\", block(2)
"
    );
    nbdsh(&server.uri_of("name"), &script);
    assert_eq!(server.terminate(), 0, "cleanup ran: {}", server.stderr());
    let log = server.stderr();
    assert_eq!(log.matches("said by a thread: No space left on device").count(), 4, "{log}");
    assert_eq!(log.matches("said by a child").count(), 6, "each child says it once: {log}");

    let mut mount = Mount::start([&plugin]);
    for (number, want) in (0..).zip(said("", "-1 0 0 0")) {
        assert_eq!(block(&mount, number).expect("read"), want);
    }
    assert_eq!(mount.unmount(), 0);
}

#[test]
fn a_sleep_ends_with_the_server() {
    let dir = temp();
    let plugin = compiled(dir.path());
    let mut server = Server::start([&plugin]);
    let asleep = |log: &dyn Fn() -> String| {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !log().contains("asleep") {
            assert!(Instant::now() < deadline, "it does not sleep: {}", log());
            std::thread::yield_now();
        }
    };
    std::thread::scope(|scope| {
        let uri = server.uri();
        let script =
            format!("try:\n    h.pread(4096, {})\n    assert False\nexcept nbd.Error: pass", SLEEP * BLOCK);
        let client = scope.spawn(move || nbdsh(&uri, &script));
        asleep(&|| server.stderr());
        assert_eq!(server.terminate(), 0);
        client.join().expect("the client");
    });
    assert!(
        server.stderr().contains("woken: Cannot send after transport endpoint shutdown"),
        "{}",
        server.stderr()
    );

    let mut mount = Mount::start([&plugin]);
    let file = mount.file();
    std::thread::scope(|scope| {
        let file = File::open(file).expect("open the disk");
        let reader = scope.spawn(move || file.read_exact_at(&mut [0; 512], SLEEP * BLOCK));
        asleep(&|| mount.stderr());
        mount.signal(Signal::TERM);
        reader.join().expect("the reader").expect_err("the disk is gone");
    });
}

#[test]
fn an_exit_in_a_request_is_the_servers() {
    let dir = temp();
    let plugin = compiled(dir.path());
    let mut server = Server::start([&plugin]);
    let script =
        format!("try:\n    h.pread(4096, {})\n    assert False\nexcept nbd.Error: pass", EXIT * BLOCK);
    nbdsh(&server.uri(), &script);
    assert_eq!(server.wait(), 7);
    assert!(server.stderr().contains("error: the last words"), "{}", server.stderr());
}
