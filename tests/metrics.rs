//! Watching a server at work: metrics for Prometheus, `--stats`, messages in other formats, SIGHUP and SIGUSR1.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::{Duration, Instant},
};

use crate::util::{self, Mount, NBDKIT, NBDKIT_MOUNT, Server, is_left_out, run, run_ok, sh, temp};

/// What curl gets from a path at a Unix socket.
fn get(socket: &Path, path: &str) -> String {
    run_ok(["curl", "-sS", "--unix-socket", socket.to_str().expect("UTF-8"), &format!("http://nbdkit{path}")])
}

/// The value of a metric, by its name and labels.
#[track_caller]
fn value(metrics: &str, name: &str) -> f64 {
    let line = metrics.lines().find(|line| line.rsplit_once(' ').is_some_and(|(found, _)| found == name));
    let line = line.unwrap_or_else(|| panic!("no {name} in {metrics}"));
    line.rsplit_once(' ').expect("a value").1.parse().expect("a number")
}

#[test]
fn counters_for_prometheus() {
    let dir = temp();
    let socket = dir.path().join("metrics");
    let metrics = format!("--metrics={}", socket.display());
    let words = ["--filter=error", "memory", "1M", "error-pwrite-rate=1", "error-pwrite=ENOSPC"];
    let mut server = Server::start([&[metrics.as_str()], &words[..]].concat());
    util::nbdsh(
        server.uri().as_str(),
        "
for i in range(10): h.pread(4096, i * 4096)
try:
    h.pwrite(bytes(512), 0)
    assert False
except nbd.Error: pass
print('done')",
    );
    let metrics = get(&socket, "/metrics");
    assert_eq!(value(&metrics, "nbdkit_requests_total{operation=\"read\"}"), 10.0);
    assert_eq!(value(&metrics, "nbdkit_request_bytes_total{operation=\"read\"}"), 40960.0);
    assert_eq!(value(&metrics, "nbdkit_request_errors_total{operation=\"write\"}"), 1.0);
    assert_eq!(value(&metrics, "nbdkit_errors_total{errno=\"ENOSPC\"}"), 1.0);
    assert_eq!(value(&metrics, "nbdkit_request_duration_seconds_count{operation=\"read\"}"), 10.0);
    assert_eq!(
        value(&metrics, "nbdkit_request_duration_seconds_bucket{operation=\"read\",le=\"+Inf\"}"),
        10.0
    );
    assert!(value(&metrics, "nbdkit_cache_hits_total") > 0.0);
    assert!(value(&metrics, "nbdkit_connections_total") >= 1.0);
    let layer = |layer: &str, position: u8| {
        format!(
            "nbdkit_layer_requests_total{{layer=\"{layer}\",position=\"{position}\",operation=\"write\"}}"
        )
    };
    assert_eq!(value(&metrics, &layer("error-inject", 0)), 1.0);
    assert_eq!(value(&metrics, &layer("memory", 1)), 0.0);
    // What its own tool says of the form: nothing.
    let file = dir.path().join("text");
    std::fs::write(&file, &metrics).expect("write");
    let said = sh(&format!("promtool check metrics <'{}' 2>&1", file.display()));
    assert_eq!(said, "");
    // Nonsense is answered or dropped, and hurts nobody.
    for question in ["\r\n\r\n", "POST / HTTP/1.1\r\n\r\n", "GET /nothing HTTP/1.1\r\n\r\n", "\0\u{ff}"] {
        let mut stream = UnixStream::connect(&socket).expect("connect");
        stream.write_all(question.as_bytes()).expect("write");
        stream.shutdown(std::net::Shutdown::Write).expect("shut down");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("read");
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 40"), "{answer}");
    }
    let mut stream = UnixStream::connect(&socket).expect("connect");
    let _ = stream.write_all(&[b'a'; 100_000]);
    drop(stream);
    assert!(get(&socket, "/metrics").contains("nbdkit_connections"));
    assert_eq!(server.terminate(), 0);
    assert!(!socket.exists());
}

/// A real Prometheus finds the server and has its numbers.
#[test]
fn prometheus_scrapes_it() {
    let dir = temp();
    let here = dir.path().display().to_string();
    // A port that nobody has, for each.
    let port =
        || std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port").port();
    let (own, theirs) = (port(), port());
    let _server = Server::start([format!("--metrics={own}").as_str(), "memory", "1M"]);
    std::fs::write(
        dir.path().join("prometheus.yml"),
        format!("scrape_configs:\n  - job_name: disks\n    scrape_interval: 1s\n    static_configs:\n      - targets: ['127.0.0.1:{own}']\n"),
    )
    .expect("write");
    let out = sh(&format!(
        "cd {here}
        prometheus --config.file=prometheus.yml --storage.tsdb.path=data --web.listen-address=127.0.0.1:{theirs} \
            >log 2>&1 &
        trap 'kill %1' EXIT
        for i in $(seq 600); do
            answer=$(curl -sS 'http://127.0.0.1:{theirs}/api/v1/query?query=nbdkit_build_info' 2>/dev/null || true)
            case $answer in *'\"plugin\":\"memory\"'*) echo found; exit ;; esac
            read -t 0.1 <> <(:) || true
        done
        cat log; exit 1"
    ));
    assert_eq!(out, "found\n");
}

#[test]
fn the_view_of_a_server_and_of_a_mount() {
    let dir = temp();
    let socket = dir.path().join("metrics");
    let address = socket.to_str().expect("UTF-8");
    let metrics = format!("--metrics={address}");
    let server = Server::start([metrics.as_str(), "--filter=offset", "memory", "1M"]);
    util::nbdsh(server.uri().as_str(), "h.pread(4096, 0)");
    for program in [NBDKIT, NBDKIT_MOUNT] {
        let object: serde_json::Value =
            serde_json::from_str(&run_ok([program, "--stats", address, "--json"])).expect("JSON");
        assert_eq!(object["requests"]["read"]["count"], 1, "{object}");
        assert_eq!(object["layers"][1]["name"], "memory", "{object}");
        let table = run_ok([program, "--stats", address]);
        assert!(table.lines().all(|line| line.chars().count() <= 80), "{table}");
        assert!(table.contains("\noffset "), "{table}");
    }
    // On a terminal it is alive, on a screen of its own, and leaves the other as it was.
    let view = "
import os, pty, signal, sys
pid, terminal = pty.fork()
if pid == 0: os.execv(sys.argv[1], sys.argv[1:])
text = b''
while b'history' not in text: text += os.read(terminal, 4096)
os.kill(pid, signal.SIGINT)
try:
    while True:
        more = os.read(terminal, 4096)
        if not more: break
        text += more
except OSError: pass
assert b'\\x1b[?1049h' in text and text.rstrip().endswith(b'\\x1b[?1049l'), text
assert os.waitpid(pid, 0)[1] == 0";
    run_ok(["/usr/bin/python3", "-c", view, NBDKIT, "--stats", address]);
    drop(server);
    let gone = run([NBDKIT, "--stats", "./gone-socket"]).refused();
    assert!(gone.contains("No such file"), "{gone}");
    let gone = run([NBDKIT, "--stats", "127.0.0.1:1"]).refused();
    assert!(gone.contains("--metrics"), "{gone}");
    if !is_left_out("fuse") {
        let mount = Mount::start(["memory", "1M"]);
        let object = run_ok([NBDKIT, "--stats", mount.path().to_str().expect("UTF-8"), "--json"]);
        assert!(object.contains("\"layers\""), "{object}");
    }
}

#[test]
fn addresses_that_are_none() {
    for (word, wanted) in [("nowhere", "HOST:PORT"), ("/nonexistent/socket", "cannot listen there")] {
        let line = run([NBDKIT, &format!("--metrics={word}"), "null", "1M", "--run", "true"]).refused();
        assert!(line.contains(wanted), "{line}");
    }
}

#[test]
fn formats_of_messages() {
    let error =
        |format: &str| run([NBDKIT, &format!("--log-format={format}"), "file", "/nonexistent"]).refused();
    assert!(error("text").starts_with("nbdkit: error: "));
    let timed = error("time");
    let (time, rest) = timed.split_once(' ').expect("a time");
    assert!(time.ends_with('Z') && time.len() == 27 && rest.starts_with("nbdkit: error: "), "{timed}");
    let object: serde_json::Value = serde_json::from_str(&error("json")).expect("JSON");
    assert_eq!((&object["level"], &object["program"]), (&"error".into(), &"nbdkit".into()));
    assert!(object["message"].as_str().is_some_and(|text| text.contains("/nonexistent")), "{object}");
    assert!(run([NBDKIT, "--log-format=xml", "null"]).refused().contains("text, time or json"));
    // Every line of -v too.
    let out = run([NBDKIT, "--log-format=json", "-v", "null", "1M", "--run", "nbdinfo --size \"$uri\""]);
    for line in out.stderr.lines() {
        serde_json::from_str::<serde_json::Value>(line).unwrap_or_else(|e| panic!("{line}: {e}"));
    }
    assert!(out.stderr.lines().count() > 5);
}

/// Waits until a file has something in it.
fn filled(path: &Path) -> String {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        if text.ends_with('\n') {
            return text;
        }
        assert!(Instant::now() < deadline, "{} stays empty", path.display());
        std::thread::yield_now();
    }
}

/// SIGHUP opens the file of --log again; SIGUSR1 prints statistics; neither ends the server, in either program.
#[test]
fn a_log_that_is_moved_away() {
    let dir = temp();
    let log = dir.path().join("log");
    let option = format!("--log={}", log.display());
    let socket = format!("--metrics={}", dir.path().join("metrics").display());
    let mut server = Server::start([option.as_str(), &socket, "null", "1M"]);
    let check = |pid: u32, name: &str| {
        sh(&format!("kill -USR1 {pid}"));
        let text = filled(&log);
        assert!(text.contains("info: up 0:00:"), "{text}");
        std::fs::rename(&log, dir.path().join(name)).expect("rename");
        sh(&format!("kill -HUP {pid}"));
        let deadline = Instant::now() + Duration::from_secs(20);
        while !log.exists() {
            assert!(Instant::now() < deadline, "the log is not opened again");
            std::thread::yield_now();
        }
        sh(&format!("kill -USR1 {pid}"));
        assert!(filled(&log).contains("info: up 0:00:"));
        std::fs::remove_file(&log).expect("remove");
    };
    check(server.pid(), "old");
    assert_eq!(util::run_ok(["nbdinfo", "--size", &server.uri()]), "1048576\n");
    assert_eq!(server.terminate(), 0);
    if !is_left_out("fuse") {
        let mut mount = Mount::start([option.as_str(), "null", "1M"]);
        check(mount.pid(), "older");
        assert_eq!(mount.unmount(), 0);
    }
}

/// A message that comes again and again is one line in the log, and then a count.
#[test]
fn repeats_are_counted() {
    let dir = temp();
    let log = dir.path().join("log");
    let option = format!("--log={}", log.display());
    let mut server = Server::start([option.as_str(), "full", "1M"]);
    let script = "
for i in range(5):
    try: h.pwrite(bytes(512), 0)
    except nbd.Error: pass
try: h.zero(512, 0)
except nbd.Error: pass";
    util::nbdsh(server.uri().as_str(), script);
    assert_eq!(server.terminate(), 0);
    let text = std::fs::read_to_string(&log).expect("the log");
    assert!(text.contains("the last message came 4 times more"), "{text}");
    assert_eq!(text.matches("pwrite").count(), 1, "{text}");
}
