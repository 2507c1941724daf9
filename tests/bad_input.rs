//! Bad input: one line that names the fix, exit code 1, nothing left behind.

use std::{ffi::OsStr, path::Path, process::Command};

use crate::util::{self, Mount, NBDKIT, NBDKIT_MOUNT, image, temp};

/// Runs `nbdkit WORDS…`, which must be refused, in an empty directory that must stay empty. Returns the line.
#[track_caller]
fn refused(words: &[&str]) -> String {
    let dir = temp();
    let tmpdir = format!("TMPDIR={}", dir.path().display());
    let line = util::run(["env", tmpdir.as_str(), NBDKIT].iter().chain(words)).refused();
    assert!(line.starts_with("nbdkit: error: "), "{line}");
    let left: Vec<_> = std::fs::read_dir(dir.path()).expect("list").collect();
    assert!(left.is_empty(), "left behind: {left:?}");
    line
}

/// The same for `nbdkit-mount WORDS… MOUNTPOINT`, with an empty directory as the mountpoint.
#[track_caller]
fn mount_refused(code: i32, words: &[&str]) -> String {
    let dir = temp();
    let line = mount_refused_on(code, words, dir.path());
    let left: Vec<_> = std::fs::read_dir(dir.path()).expect("list").collect();
    assert!(left.is_empty(), "left behind: {left:?}");
    line
}

#[track_caller]
fn mount_refused_on(code: i32, words: &[&str], mountpoint: &Path) -> String {
    let words = words.iter().map(OsStr::new).chain([mountpoint.as_os_str()]);
    let line = util::run([OsStr::new(NBDKIT_MOUNT)].into_iter().chain(words)).refused_with(code);
    assert!(line.starts_with("nbdkit-mount: error: "), "{line}");
    line
}

/// Asserts that the line holds each of the words.
#[track_caller]
fn says(line: &str, words: &[&str]) {
    for word in words {
        assert!(line.contains(word), "no '{word}' in: {line}");
    }
}

#[test]
fn unknown_layers_suggest_near_names() {
    says(&refused(&["-U", "-", "memroy", "1M"]), &["memroy", "'memory'"]);
    says(&refused(&["-U", "-", "--filter=ofset", "memory", "1M"]), &["ofset", "'offset'"]);
    says(&refused(&["-U", "-", "zzzz"]), &["unknown plugin 'zzzz'"]);
    says(&mount_refused(1, &["memroy", "1M"]), &["'memory'"]);
}

#[test]
fn no_plugin() {
    says(&refused(&[]), &["no plugin"]);
    says(&util::run([NBDKIT_MOUNT]).refused(), &["no plugin"]);
}

#[test]
fn files_that_are_not() {
    let dir = temp();
    let missing = dir.path().join("missing.img");
    let missing = missing.to_str().expect("UTF-8");
    says(&refused(&["-U", "-", "file", missing]), &[missing, "does not exist"]);
    says(&refused(&["-U", "-", "file", dir.path().to_str().expect("UTF-8")]), &["directory", "dir="]);
    says(&mount_refused(1, &["file", missing]), &[missing]);
}

#[test]
fn unknown_options_and_keys_are_named() {
    says(&refused(&["-U", "-", "memory", "1M", "colour=red"]), &["unknown parameter 'colour'"]);
    says(&refused(&["-U", "-", "--filter=offset", "memory", "1M", "colour=red"]), &["'colour'"]);
    says(&refused(&["-U", "-", "--colour", "memory", "1M"]), &["--colour"]);
    says(&refused(&["-U", "-", "memory", "1M", "2M", "extra"]), &["extra"]);
}

#[test]
fn sizes() {
    for bad in ["M", "-1", "1X", "9223372036854775808", "8E", "99999999999999999999", ""] {
        says(&refused(&["-U", "-", "memory", &format!("size={bad}")]), &["size"]);
    }
    says(&refused(&["-U", "-", "memory"]), &["size="]);
}

#[test]
fn delays_belong_to_the_filter() {
    let dir = temp();
    let disk = image(dir.path(), "disk", 4096);
    let disk = disk.to_str().expect("UTF-8");
    for key in ["rdelay=1", "wdelay=1"] {
        says(&refused(&["-U", "-", "file", disk, key]), &["--filter=delay"]);
    }
}

#[test]
fn ranges_and_partitions_that_are_not_there() {
    let line = mount_refused(3, &["--filter=offset", "memory", "1M", "offset=512K", "range=1M"]);
    says(&line, &["range"]);
    let dir = temp();
    let disk = image(dir.path(), "disk", 16 << 20);
    util::sh(&format!("printf 'label: dos\\n2048 4096\\n8192 4096\\n' | sfdisk -q {}", disk.display()));
    let file = format!("file={}", disk.display());
    let line = mount_refused(3, &["--filter=partition", "file", &file, "partition=3"]);
    says(&line, &["partition 3 not found", "1", "2"]);
    // Over NBD an export is opened for each client: the client is told, the server lives.
    let out = util::run_ok([
        NBDKIT,
        "-U",
        "-",
        "--filter=partition",
        "file",
        &file,
        "partition=3",
        "--run",
        "nbdinfo \"$uri\" >/dev/null && exit 9; true",
    ]);
    assert_eq!(out, "");
}

#[test]
fn mountpoints() {
    let dir = temp();
    let missing = dir.path().join("missing");
    says(&mount_refused_on(4, &["memory", "1M"], &missing), &["mkdir"]);
    let mount = Mount::start(["memory", "1M"]);
    says(&mount_refused_on(4, &["memory", "1M"], mount.path()), &["mounted"]);
    says(&util::run([NBDKIT_MOUNT, "memory", "size=1M"]).refused_with(2), &["mountpoint is missing"]);
}

#[test]
fn stale_mounts_name_the_cure() {
    let mut mount = Mount::start(["memory", "1M"]);
    mount.kill();
    let line = mount_refused_on(4, &["memory", "1M"], mount.path());
    says(&line, &["fusermount3 -u", &mount.path().display().to_string()]);
}

#[test]
fn no_dev_fuse() {
    let dir = temp();
    let script = format!(
        "mount -t tmpfs none /dev && exec {NBDKIT_MOUNT} memory 1M {} 2>{}/stderr",
        dir.path().display(),
        dir.path().display()
    );
    let run = util::run(["unshare", "-m", "sh", "-c", &script]);
    assert_eq!(run.code, 4, "{}", run.stderr);
    let stderr = std::fs::read_to_string(dir.path().join("stderr")).expect("stderr");
    says(&stderr, &["/dev/fuse", "modprobe fuse"]);
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
}

#[test]
fn addresses() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").port().to_string();
    says(&refused(&["-f", "-i", "127.0.0.1", "-p", &port, "memory", "1M"]), &[&port, "in use"]);
    let long = format!("/tmp/{}", "x".repeat(120));
    says(&refused(&["-f", "-U", &long, "memory", "1M"]), &["107", "shorter"]);
    let dir = temp();
    let there = image(dir.path(), "there", 0);
    says(&refused(&["-f", "-U", there.to_str().expect("UTF-8"), "memory", "1M"]), &["there"]);
    assert!(there.exists(), "the user's file must stay");
}

#[test]
fn option_conflicts() {
    for words in [["-p", "1", "-U", "-"], ["-s", "--run", "true", "-f"], ["-s", "-U", "-", "-f"]] {
        let all: Vec<&str> = words.into_iter().chain(["memory", "1M"]).collect();
        says(&refused(&all), &["cannot be used together"]);
    }
    says(&refused(&["-t", "x", "-U", "-", "memory", "1M"]), &["--threads"]);
}

#[test]
fn closed_standard_files() {
    for program in [NBDKIT, NBDKIT_MOUNT] {
        for closed in ["<&-", ">&-"] {
            let output = Command::new("sh")
                .args(["-c", &format!("exec {program} --version {closed}")])
                .output()
                .expect("sh");
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{program} {closed}");
            assert!(stderr.contains("stdin, stdout or stderr is closed"), "{stderr}");
        }
    }
}

#[test]
fn a_failed_start_leaves_no_socket() {
    let dir = temp();
    let socket = dir.path().join("sock");
    let pidfile = dir.path().join("no/such/folder/pid");
    let (socket_text, pidfile) = (socket.to_str().expect("UTF-8"), pidfile.to_str().expect("UTF-8"));
    says(&refused(&["-f", "-U", socket_text, "-P", pidfile, "memory", "1M"]), &["pidfile"]);
    assert!(!socket.exists());
    // In the background too: the parent reports the child's failure.
    says(&refused(&["-U", socket_text, "-P", pidfile, "memory", "1M"]), &["pidfile"]);
    assert!(!socket.exists());
}
