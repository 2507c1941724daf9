//! The examples in the folder examples/python work.

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
};

use super::bridge_or_return;
use crate::util::{Mount, NBDKIT, Server, nbdsh, patterned, run, run_ok, sh, temp};

fn example(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/python").join(name);
    path.to_str().expect("UTF-8").to_owned()
}

#[test]
fn ramdisk() {
    bridge_or_return!();
    let mut mount = Mount::start(["python", &example("ramdisk.py"), "size=8M"]);
    let file = mount.file();
    run_ok(["mkfs.ext4".as_ref(), "-q".as_ref(), "-F".as_ref(), file.as_os_str()]);
    run_ok(["e2fsck".as_ref(), "-fn".as_ref(), file.as_os_str()]);
    assert_eq!(mount.unmount(), 0);
    let unknown = run([NBDKIT, "-U", "-", "python", &example("ramdisk.py"), "sise=8M", "--run", "true"]);
    assert!(unknown.stderr.contains("unknown parameter: sise"), "{}", unknown.stderr);
}

#[test]
fn sparse() {
    bridge_or_return!();
    let server = Server::start(["python", &example("sparse.py")]);
    nbdsh(
        &server.uri(),
        "
import os
assert h.get_size() == 1 << 40
data = os.urandom(200000)
at = (1 << 39) + 12345
h.pwrite(data, at)
assert h.pread(200000, at) == data
h.zero(100000, at + 50)
assert h.pread(200000, at) == data[:50] + bytes(100000) + data[100050:]
",
    );
    // What a client is told is what was written.
    let dir = temp();
    let disk = patterned(dir.path(), "disk", 1 << 20);
    let server = Server::start(["python", &example("sparse.py"), "size=64M"]);
    let uri = server.uri();
    let write = format!("nbdcopy {} '{uri}' && nbdinfo --map --totals '{uri}'", disk.display());
    let map = sh(&write);
    let data: Vec<_> = map.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).collect();
    assert!(data.iter().any(|line| line[0] == "1048576" && line[2] == "0"), "{map}");
    assert!(data.iter().any(|line| line[0] == "66060288" && line[2] == "3"), "{map}");
    let copy = dir.path().join("copy");
    sh(&format!("nbdcopy '{uri}' {0} && cmp -n 1048576 {0} {1}", copy.display(), disk.display()));
}

/// The server of Python's standard library does not know ranges: this one does, and drops the connection now and then.
const HTTP: &str = r#"
import http.server, os, re, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    requests = 0
    def log_message(self, *ignored): pass
    def do_HEAD(self):
        self.send_response(200 if self.path == "/disk" else 404)
        self.send_header("Content-Length", os.path.getsize("disk") if self.path == "/disk" else 0)
        self.end_headers()
    def do_GET(self):
        start, end = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        self.send_response(206)
        self.send_header("Content-Length", end - start + 1)
        self.end_headers()
        with open("disk", "rb") as f:
            f.seek(start)
            self.wfile.write(f.read(end - start + 1))
        self.requests += 1
        self.close_connection = self.requests % 5 == 0
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
"#;

#[test]
fn http() {
    bridge_or_return!();
    let dir = temp();
    let disk = patterned(dir.path(), "disk", 3_000_000);
    let mut server = Command::new("/usr/bin/python3")
        .args(["-c", HTTP])
        .current_dir(dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .expect("run Python");
    let mut port = String::new();
    BufReader::new(server.stdout.take().expect("a pipe")).read_line(&mut port).expect("a port");
    let url = |path: &str| format!("url=http://127.0.0.1:{}/{path}", port.trim());
    let words = ["-U", "-", "python", &example("http.py")];
    let copy = dir.path().join("copy");
    let command =
        format!("nbdcopy --request-size=65536 \"$uri\" {} && cmp {0} {}", copy.display(), disk.display());
    let copied = run([NBDKIT].iter().chain(&words).chain(&[&*url("disk"), "--run", &command]));
    let missing = run([NBDKIT].iter().chain(&words).chain(&[&*url("none"), "--run", "nbdinfo \"$uri\""]));
    let without = run([NBDKIT].iter().chain(&words).chain(&["--run", "true"]));
    server.kill().and_then(|()| server.wait()).expect("end the server");
    copied.ok();
    assert!(missing.code != 0 && missing.stderr.contains("404"), "{}", missing.stderr);
    assert!(without.stderr.contains("the parameter url= is missing"), "{}", without.stderr);
}
