//! How a server starts, lives and ends.

use std::{fs, os::unix::fs::PermissionsExt, process::Command};

use crate::util::{self, NBDKIT, NBDKIT_MOUNT, Run, Server, image, temp};

#[test]
fn run_sets_variables_and_gives_its_status() {
    let out = util::run_ok([
        NBDKIT,
        "-e",
        "a b",
        "memory",
        "1M",
        "--run",
        "echo \"$uri|$nbd|$unixsocket|$port|$exportname|$tls\"; env | grep -c ^uri= || true; nbdinfo --size \"$uri\"",
    ]);
    let lines: Vec<&str> = out.lines().collect();
    let fields: Vec<&str> = lines[0].split('|').collect();
    assert!(fields[0].starts_with("nbd+unix:///a%20b?socket=/"), "{out}");
    assert_eq!((fields[0], fields[3], fields[4]), (fields[1], "", "a b"));
    assert!(fields[0].ends_with(fields[2]));
    assert_eq!(lines[1..], ["0", "1048576"], "not exported, and served");
    assert!(!std::path::Path::new(fields[2]).exists(), "the private socket goes");

    for (command, code) in
        [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137), ("no-such-command 2>/dev/null", 127)]
    {
        assert_eq!(util::run([NBDKIT, "memory", "1M", "--run", command]).code, code, "{command}");
    }
}

#[test]
fn run_gives_its_status_when_the_server_ends_first() {
    let early = "while nbdinfo --size \"$uri\" 2>/dev/null; do :; done; exit 5";
    assert_eq!(util::run([NBDKIT, "--filter=exitlast", "memory", "1M", "--run", early]).code, 5);
    // The server passes SIGTERM on.
    let terminated = "kill -TERM $PPID; exec sleep 60";
    assert_eq!(util::run([NBDKIT, "memory", "1M", "--run", terminated]).code, 128 + 15);
    let stubborn = "trap '' TERM; kill -TERM $PPID; tail --pid=$PPID -f /dev/null";
    assert_eq!(util::run([NBDKIT, "memory", "1M", "--run", stubborn]).code, 128 + 15);
}

#[test]
fn run_gets_no_files_and_no_blocked_signals() {
    let script = "ls -l /proc/self/fd | grep -c -v -E 'total|/proc/|pipe|/dev/null|/dev/pts' || true; \
                  grep SigBlk /proc/self/status";
    let out = util::run_ok([NBDKIT, "memory", "1M", "--run", script]);
    assert_eq!(out.split_whitespace().collect::<Vec<_>>(), ["0", "SigBlk:", "0000000000000000"], "{out}");
}

#[test]
fn tcp_with_a_port_of_the_kernels_choice() {
    let out = util::run_ok([
        NBDKIT,
        "-i",
        "127.0.0.1",
        "-p",
        "0",
        "memory",
        "1M",
        "--run",
        "test -n \"$port\" && test -z \"$unixsocket\" && nbdinfo --size \"$uri\"",
    ]);
    assert_eq!(out.trim(), "1048576");
    let out = util::run_ok([NBDKIT, "-i", "::1", "-p", "0", "--print-uri", "memory", "1M", "--run", "true"]);
    assert!(out.starts_with("nbd://[::1]:"), "{out}");
}

#[test]
fn the_background_server_is_ready_when_the_command_returns() {
    let dir = temp();
    let (socket, pidfile) = (dir.path().join("sock"), dir.path().join("pid"));
    let (socket, pidfile) = (socket.to_str().expect("UTF-8"), pidfile.to_str().expect("UTF-8"));
    util::run_ok([NBDKIT, "-U", socket, "-P", pidfile, "memory", "1M"]);
    let uri = format!("nbd+unix://?socket={socket}");
    assert_eq!(util::run_ok(["nbdinfo", "--size", &uri]).trim(), "1048576");
    let pid = fs::read_to_string(pidfile).expect("the pidfile");
    assert!(pid.ends_with('\n'));
    assert_eq!(fs::metadata(pidfile).expect("the pidfile").permissions().mode() & 0o777, 0o644);
    util::sh(&format!("kill {} && tail --pid={} -f /dev/null", pid.trim(), pid.trim()));
    assert!(fs::exists(socket).expect("exists"), "a named socket stays");
    assert!(fs::exists(pidfile).expect("exists"), "so does the pidfile");
}

#[test]
fn signals_end_it_cleanly() {
    for signal in ["INT", "TERM", "HUP", "QUIT"] {
        let mut server = Server::start(["memory", "1M"]);
        util::sh(&format!("kill -{signal} {}", server.pid()));
        assert_eq!(server.wait(), 0, "{signal}");
    }
}

#[test]
fn a_sleeping_request_does_not_hold_the_end() {
    let mut server = Server::start(["--filter=delay", "memory", "1M", "rdelay=60"]);
    let uri = server.uri();
    let script = "h.aio_pread(nbd.Buffer(512), 0)
while h.aio_get_direction() & nbd.AIO_DIRECTION_WRITE: h.poll(-1)
print('sent', flush=True)
try:
    while h.aio_in_flight() > 0: h.poll(-1)
except nbd.Error: pass";
    let mut client = Command::new("nbdsh")
        .args(["-u", &uri, "-c", script])
        .env("PATH", "/usr/bin:/bin")
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("nbdsh");
    let mut word = [0; 4];
    std::io::Read::read_exact(&mut client.stdout.take().expect("stdout"), &mut word).expect("a word");
    assert_eq!(server.terminate(), 0);
    client.wait().expect("the client");
}

#[test]
fn one_client_on_stdin_and_stdout() {
    let script = format!(
        "h.connect_command(['{NBDKIT}', '-s', 'memory', '1M'])
h.pwrite(b'over pipes', 100)
assert h.pread(10, 100) == b'over pipes'"
    );
    util::run_ok(["nbdsh", "-c", &script]);
}

#[test]
fn it_ends_with_its_parent() {
    let dir = temp();
    let pidfile = dir.path().join("pid");
    let (socket, pid) = (dir.path().join("sock"), pidfile.display());
    let script = format!(
        "{NBDKIT} --exit-with-parent -U {} -P {pid} memory 1M & until test -s {pid}; do :; done; cat {pid}",
        socket.display()
    );
    let pid = util::sh(&script);
    util::sh(&format!("tail --pid={} -f /dev/null", pid.trim()));
}

#[test]
fn exitlast_ends_after_the_last_client() {
    let mut server = Server::start(["--filter=exitlast", "memory", "1M"]);
    util::nbdsh(&server.uri(), "h.pread(1, 0)");
    assert_eq!(server.wait(), 0);
}

#[test]
fn information() {
    let lines = |run: Run| run.ok().lines().map(str::to_owned).collect::<Vec<_>>();
    let config = lines(util::run([NBDKIT, "--dump-config"]));
    for want in ["name=nbdkit", "version_major=1", "host_os=linux-gnu"] {
        assert!(config.iter().any(|l| l == want), "{config:?}");
    }
    let dump = lines(util::run([NBDKIT, "file", "--dump-plugin"]));
    let at =
        |key: &str| dump.iter().position(|l| l.starts_with(key)).unwrap_or_else(|| panic!("{key}: {dump:?}"));
    assert!(at("max_thread_model=parallel") < at("thread_model=parallel"));
    assert!(at("thread_model=") < at("has_thread_model=1"));
    assert!(dump.contains(&"magic_config_key=file".to_owned()) && dump.contains(&"name=file".to_owned()));
    for shell in ["bash", "zsh", "fish"] {
        let script = util::run_ok([NBDKIT, &format!("--completions={shell}")]);
        assert!(script.contains("--complete") && script.contains("nbdkit-mount"), "{shell}");
    }
}

#[test]
fn relative_paths_work_in_the_background() {
    let dir = temp();
    image(dir.path(), "disk.img", 1 << 20);
    let out = util::sh(&format!(
        "cd {} && {NBDKIT} -U sock -P pid file disk.img && nbdinfo --size 'nbd+unix://?socket=sock'; kill $(cat pid)",
        dir.path().display()
    ));
    assert_eq!(out.trim(), "1048576");
}

#[test]
fn the_callers_umask_does_not_matter() {
    for umask in ["000", "077", "777"] {
        let dir = temp();
        let modes = util::sh(&format!(
            "cd {} && umask {umask} && {NBDKIT} -U sock -P pid memory 1M && stat -c %a sock pid; kill $(cat pid)",
            dir.path().display()
        ));
        assert_eq!(modes.split_whitespace().collect::<Vec<_>>(), ["755", "644"], "{umask}");
    }
}

#[test]
fn a_relative_path_in_a_directory_that_is_gone() {
    for command in [format!("{NBDKIT} -U sock memory 1M"), format!("{NBDKIT_MOUNT} memory 1M mnt")] {
        let dir = temp();
        let script = format!("mkdir gone && cd gone && rmdir ../gone && exec {command}");
        let script = format!("cd {} && {script}", dir.path().display());
        let line = util::run(["sh", "-c", &script]).refused();
        assert!(line.contains("cannot find the current directory"), "{line}");
    }
}
