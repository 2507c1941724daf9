//! What a server costs while nobody looks: libraries, threads and memory. Counted, never timed.

use crate::util::{self, NBDKIT, Server, sh};

/// The files that a server has mapped.
fn mapped(server: &Server) -> String {
    std::fs::read_to_string(format!("/proc/{}/maps", server.pid())).expect("maps")
}

#[test]
fn libraries_are_loaded_when_they_are_needed() {
    let plain = Server::start(["memory", "1M"]);
    let maps = mapped(&plain);
    assert!(maps.contains("libc.so"), "{maps}");
    for library in ["libssl", "libcrypto", "libgcc_s"] {
        assert!(!maps.contains(library), "{library} costs every start");
    }
    let dir = util::temp();
    let keys = dir.path().join("keys");
    std::fs::write(&keys, "alice:0123456789abcdef\n").expect("write");
    let tls = Server::start(["--tls=on", &format!("--tls-psk={}", keys.display()), "memory", "1M"]);
    assert!(mapped(&tls).contains("libssl"));
}

#[test]
fn a_server_with_a_command_has_one_thread() {
    let threads = sh(&format!("{NBDKIT} memory 1M --run 'ls /proc/$PPID/task | wc -l'"));
    assert_eq!(threads.trim(), "1");
}
