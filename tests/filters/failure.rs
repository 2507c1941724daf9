//! Filters that hide failures, and what they open meanwhile.

use super::captive;
use crate::util::{Server, nbdsh, patterned, temp};

#[test]
fn retry_carries_a_copy_over_errors() {
    let dir = temp();
    let disk = patterned(dir.path(), "disk", 8 << 20);
    let disk = disk.to_str().expect("UTF-8");
    let errors = ["error-pread=EIO", "error-pread-rate=20%"];
    for (filter, retries, delay) in [
        ("--filter=retry", "retries=1000", "retry-delay=0"),
        ("--filter=retry-request", "retry-request-retries=1000", "retry-request-delay=0"),
    ] {
        let words = [filter, "--filter=error", "file", disk, retries, delay];
        let command = format!("nbdcopy --request-size=65536 \"$uri\" - | cmp - {disk}");
        let run = captive(words.iter().chain(&errors), &command);
        assert_eq!(run.code, 0, "{filter}: {}", run.stderr);
    }
    let words = ["--filter=error", "file", disk, "error-pread=EIO", "error-pread-rate=20%"];
    assert_ne!(captive(words, "nbdcopy --request-size=65536 \"$uri\" null:").code, 0, "there are errors");
}

#[test]
fn retry_gives_up_and_tells_the_error() {
    let words = ["-v", "--filter=retry", "--filter=error", "memory", "1M", "error-pread=ENOMEM"];
    let server =
        Server::start(words.iter().chain(&["error-pread-rate=100%", "retries=3", "retry-delay=1ms"]));
    nbdsh(
        &server.uri(),
        "try:
    h.pread(1, 0); raise SystemExit('it was read')
except nbd.Error as e:
    assert e.errno == 'ENOMEM', e.errno",
    );
    assert_eq!(server.stderr().matches("debug: memory: open ").count(), 4, "{}", server.stderr());
}

/// Messages, `--version` and `-D` call it as the C nbdkit does.
#[test]
fn the_error_filter_is_called_error_inject() {
    for program in [crate::util::NBDKIT, "nbdkit"] {
        let version = crate::util::run_ok([program, "--filter=error", "memory", "--version"]);
        assert!(version.lines().any(|line| line.starts_with("error-inject 1.")), "{version}");
        let words = ["-f", "-v", "-U", "-", "-D", "error-inject.x=1", "--filter=error", "memory", "1M"];
        let more = ["error-pread-rate=100%", "--run", "nbdsh -u \"$uri\" -c 'h.pread(1, 0)'"];
        let said = crate::util::run([program].iter().chain(&words).chain(&more)).stderr;
        for line in [
            "debug: error-inject: open ",
            "debug: error-inject: pread ",
            "injecting EIO error into pread",
            "-D error-inject.x: error-inject does not contain a global variable called error-inject_debug_x",
        ] {
            assert!(said.contains(line), "{program}: {line}: {said}");
        }
    }
}

#[test]
fn retry_request_opens_once() {
    let words = ["-v", "--filter=retry-request", "--filter=error", "memory", "1M", "error-pread=EIO"];
    let more = ["error-pread-rate=100%", "retry-request-retries=3", "retry-request-delay=1ms"];
    let server = Server::start(words.iter().chain(&more));
    nbdsh(
        &server.uri(),
        "try:
    h.pread(1, 0); raise SystemExit('it was read')
except nbd.Error as e:
    assert e.errno == 'EIO', e.errno",
    );
    let stderr = server.stderr();
    assert_eq!(stderr.matches("debug: memory: open ").count(), 1, "{stderr}");
    assert_eq!(stderr.matches("debug: error-inject: pread ").count(), 4, "{stderr}");
}

#[test]
fn openonce_opens_the_plugin_for_the_first_client_only() {
    let mut server = Server::start(["-v", "--filter=openonce", "memory", "1M"]);
    nbdsh(&server.uri(), "h.pwrite(b'shared', 0)");
    for _ in 0..3 {
        nbdsh(&server.uri(), "assert h.pread(6, 0) == b'shared'");
    }
    assert_eq!(server.terminate(), 0);
    let stderr = server.stderr();
    let count = |text: &str| stderr.matches(text).count();
    assert_eq!((count("debug: memory: open "), count("debug: memory: close")), (1, 1), "{stderr}");
    assert_eq!(count("debug: openonce: open "), 4, "{stderr}");
}
