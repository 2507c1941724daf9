//! Filters that say when: when requests go on, when a client must leave and when the server ends.

use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    process::{Command, Stdio},
    time::Duration,
};

use super::{captive, refused};
use crate::util::{self, Mount, NBDKIT, Server, nbdsh, sh, temp};

#[test]
fn exitwhen_a_file_is_created() {
    let dir = temp();
    let stop = dir.path().join("stop");
    let event = format!("exit-when-file-created={}", stop.display());
    let mut server = Server::start(["--filter=exitwhen", "memory", "1M", &event]);
    nbdsh(
        &server.uri(),
        &format!(
            r#"
open("{stop}", "w").close()
other = nbd.NBD()
try:
    other.connect_uri("{uri}")
    raise SystemExit("the server takes clients")
except nbd.Error:
    pass
h.pread(512, 0)
"#,
            stop = stop.display(),
            uri = server.uri()
        ),
    );
    assert_eq!(server.wait(), 0);
}

#[test]
fn exitwhen_without_any_client() {
    let dir = temp();
    let file = dir.path().join("file");
    fs::write(&file, "").expect("write");
    let event = format!("exit-when-file-deleted={}", file.display());
    let mut server = Server::start(["--filter=exitwhen", "memory", "1M", &event, "exit-when-poll=1"]);
    fs::remove_file(&file).expect("remove");
    assert_eq!(server.wait(), 0);
    // It had happened before the start. A command is not interrupted.
    assert_eq!(Server::start(["--filter=exitwhen", "memory", "1M", &event]).wait(), 0);
    let run = captive(["--filter=exitwhen", "memory", "1M", &event], "! nbdinfo \"$uri\" && exit 7");
    assert_eq!(run.code, 7, "{}", run.stderr);
}

#[test]
fn exitwhen_a_process_or_a_pipe_ends() {
    let mut child =
        Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("start cat");
    let event = format!("exit-when-process-exits={}", child.id());
    let mut server = Server::start(["--filter=exitwhen", "memory", "1M", &event]);
    drop(child.stdin.take());
    child.wait().expect("wait");
    assert_eq!(server.wait(), 0);
    sh(&format!("true | {NBDKIT} -f -U $(mktemp -u) --filter=exitwhen memory 1M exit-when-pipe-closed=0"));
    let error = refused(&["--filter=exitwhen", "memory", "1M", "exit-when-pipe-closed=99"]);
    assert!(error.contains("is not the end of a pipe"), "{error}");
}

#[test]
fn exitwhen_a_script_says_so() {
    let dir = temp();
    let stop = dir.path().join("stop");
    let event = format!("exit-when-script=test ! -e {} || exit 88", stop.display());
    let mut server = Server::start(["--filter=exitwhen", "memory", "1M", &event, "exit-when-poll=1"]);
    nbdsh(&server.uri(), "h.pread(512, 0)");
    fs::write(&stop, "").expect("write");
    assert_eq!(server.wait(), 0);
}

#[test]
fn time_limit_ends_a_connection() {
    let server =
        Server::start(["--filter=time-limit", "--filter=delay", "memory", "1M", "time-limit=1", "rdelay=2"]);
    // The first read is longer than the limit.
    nbdsh(
        &server.uri(),
        "h.pwrite(b'x', 0)
try:
    h.pread(512, 0); h.pread(512, 0)
    raise SystemExit('still connected')
except nbd.Error:
    pass",
    );
    nbdsh(&server.uri(), "h.pwrite(b'y', 0)");
}

/// A client that does nothing is disconnected by the clock.
#[test]
fn time_limit_ends_an_idle_connection() {
    let server = Server::start(["--filter=time-limit", "memory", "1M", "time-limit=1"]);
    nbdsh(
        &server.uri(),
        "h.pread(1, 0)
while not (h.aio_is_dead() or h.aio_is_closed()):
    try:
        h.poll(-1)
    except nbd.Error:
        break",
    );
}

struct Control(UnixStream);

impl Control {
    fn connect(path: &std::path::Path) -> Self {
        let stream = UnixStream::connect(path).expect("connect to the control socket");
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
        Control(stream)
    }

    fn say(&mut self, command: &[u8]) -> u8 {
        self.0.write_all(command).expect("a command");
        let mut answer = [0];
        self.0.read_exact(&mut answer).expect("an answer");
        answer[0]
    }
}

#[test]
fn pause_holds_requests_back() {
    let dir = temp();
    let path = dir.path().join("control");
    let parameter = format!("pause-control={}", path.display());
    let mut server = Server::start(["--filter=pause", "memory", "1M", &parameter]);
    let mut control = Control::connect(&path);
    assert_eq!(control.say(b"?"), b'X');
    assert_eq!(control.say(b"p\n"), b'P');
    // The client asks, and only then lets go on.
    nbdsh(
        &server.uri(),
        &format!(
            r#"
import socket
buf = nbd.Buffer(512)
cookie = h.aio_pread(buf, 0)
while h.aio_get_direction() & nbd.AIO_DIRECTION_WRITE:
    h.poll(-1)
assert h.poll(100) == 0, "something came"
assert not h.aio_command_completed(cookie)
s = socket.socket(socket.AF_UNIX); s.connect("{path}"); s.sendall(b"r"); assert s.recv(1) == b"R"
while not h.aio_command_completed(cookie):
    h.poll(-1)
"#,
            path = path.display()
        ),
    );
    assert_eq!(control.say(b"p"), b'P');
    assert_eq!(server.terminate(), 0);
    assert!(!path.exists(), "the socket stays");
    let error = refused(&["--filter=pause", "memory", "1M"]);
    assert!(error.contains("pause-control="), "{error}");
}

#[test]
fn pause_holds_a_mount_back() {
    let dir = temp();
    let path = dir.path().join("control");
    let parameter = format!("pause-control={}", path.display());
    let mut mount = Mount::start(["--filter=pause", "pattern", "1M", &parameter]);
    let mut control = Control::connect(&path);
    assert_eq!(control.say(b"p"), b'P');
    let disk = mount.file();
    let reader = std::thread::spawn(move || fs::read(disk).expect("read the disk"));
    assert_eq!(control.say(b"r"), b'R');
    assert_eq!(reader.join().expect("the reader").len(), 1 << 20);
    assert_eq!(mount.unmount(), 0);
}

/// What a limited server sends takes its time: 1.25 MiB at 8 Mbit/s, of which 250 KiB are free.
#[test]
fn rate_slows_a_copy_down() {
    for rate in ["rate=8M", "connection-rate=8M", "address-rate=8M"] {
        let words = ["--filter=rate", "pattern", "1280K", rate, "burstiness=0.25"];
        let command = "nbdcopy --connections=1 --request-size=65536 \"$uri\" null:";
        let start = std::time::Instant::now();
        captive(words, command).ok();
        // A lower bound is no race: a slow machine makes it only longer.
        assert!(start.elapsed() >= Duration::from_millis(900), "{rate}: {:?}", start.elapsed());
    }
}

#[test]
fn rate_follows_its_file() {
    let dir = temp();
    let path = dir.path().join("rate");
    fs::write(&path, "1\n").expect("write");
    let parameter = format!("rate-file={}", path.display());
    let server = Server::start(["--filter=rate", "memory", "1M", &parameter, "burstiness=0"]);
    // One byte would take eight seconds, and the whole disk months.
    nbdsh(
        &server.uri(),
        &format!(
            r#"
import os
buf = nbd.Buffer(1 << 20)
h.aio_pread(buf, 0)
while h.aio_get_direction() & nbd.AIO_DIRECTION_WRITE:
    h.poll(-1)
assert h.poll(100) == 0, "something came"
with open("{path}.new", "w") as f:
    f.write("0")
os.rename("{path}.new", "{path}")
other = nbd.NBD(); other.connect_uri("{uri}"); other.pread(1 << 20, 0)
"#,
            path = path.display(),
            uri = server.uri()
        ),
    );
    let error = refused(&["--filter=rate", "memory", "1M", "rate=fast"]);
    assert!(error.contains("'fast'"), "{error}");
    util::run_ok([NBDKIT, "--filter=rate", "memory", "--help"]);
}
