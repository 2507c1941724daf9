//! How a server starts: sockets that others left, limits, files of parameters, versions.

use std::{fs, os::unix::fs::FileTypeExt};

use crate::util::{self, NBDKIT, NBDKIT_MOUNT, Server, sh, temp};

#[test]
fn a_socket_that_nobody_listens_on_is_replaced() {
    let dir = temp();
    let socket = dir.path().join("sock");
    let path = socket.to_str().expect("UTF-8");
    // A server leaves its socket.
    util::run_ok([NBDKIT, "-U", path, "memory", "1M", "--run", "true"]);
    assert!(fs::symlink_metadata(&socket).expect("a socket").file_type().is_socket());
    let size = util::run_ok([NBDKIT, "-U", path, "memory", "2M", "--run", "nbdinfo --size \"$uri\""]);
    assert_eq!(size.trim(), "2097152");
    // One that is served stays, and so do its clients.
    let server = Server::start(["memory", "1M"]);
    let taken = server.socket().to_str().expect("UTF-8");
    let error = util::run([NBDKIT, "-f", "-U", taken, "memory", "1M"]).refused();
    assert!(error.contains("another server listens there"), "{error}");
    assert_eq!(util::run_ok(["nbdinfo", "--size", &server.uri()]).trim(), "1048576");
    // The mount's socket is no other.
    let mount = dir.path().join("mnt");
    fs::create_dir(&mount).expect("mkdir");
    let mount = mount.to_str().expect("UTF-8");
    let pid = dir.path().join("pid");
    let pid = pid.to_str().expect("UTF-8");
    for _ in 0..2 {
        util::run_ok([NBDKIT_MOUNT, "-P", pid, "-U", path, "memory", "1M", mount]);
        assert_eq!(sh(&format!("nbdinfo --size 'nbd+unix://?socket={path}'")), "1048576\n");
        // Killed, it cannot remove its socket.
        sh(&format!("kill -KILL $(cat {pid}); fusermount3 -uz {mount}"));
        assert!(socket.exists());
    }
}

#[test]
fn a_private_socket_where_the_directory_for_temporary_files_has_a_long_name() {
    let dir = temp();
    let long = dir.path().join("x".repeat(100));
    fs::create_dir(&long).expect("mkdir");
    let tmpdir = format!("TMPDIR={}", long.display());
    let words = ["env", &tmpdir, NBDKIT, "memory", "1M", "--run"];
    let out = util::run_ok(words.iter().chain(&["echo $unixsocket; nbdinfo --size \"$uri\""]));
    let (socket, size) = out.split_once('\n').expect("two lines");
    assert_eq!(size.trim(), "1048576");
    assert!(socket.starts_with("/tmp/nbdkit") && !fs::exists(socket).expect("stat"), "{socket}");
    assert_eq!(fs::read_dir(&long).expect("list").count(), 0);
}

#[test]
fn addresses_in_uris() {
    let uri = |words: &str| {
        sh(&format!("{NBDKIT} -p 0 {words} memory 1M --run 'nbdinfo --size \"$uri\"; echo $uri'"))
    };
    for (words, start) in [
        ("-i 127.0.0.1", "1048576\nnbd://127.0.0.1:"),
        ("-i ::1", "1048576\nnbd://[::1]:"),
        ("-i localhost -e e", "1048576\nnbd://localhost:"),
        ("-i 0.0.0.0", "1048576\nnbd://localhost:"),
        ("", "1048576\nnbd://localhost:"),
    ] {
        assert!(uri(words).starts_with(start), "{words}: {}", uri(words));
    }
}

#[test]
fn the_limit_of_open_files_is_raised_for_the_server_alone() {
    let pid = temp();
    let pid = pid.path().join("pid");
    let pid = pid.display();
    let out = sh(&format!(
        "ulimit -Sn 100; ulimit -Hn 4000; {NBDKIT} -P {pid} memory 1M \
         --run 'grep \"Max open files\" /proc/$(cat {pid})/limits; ulimit -Sn; ulimit -Hn'"
    ));
    let words: Vec<&str> = out.split_whitespace().collect();
    assert_eq!(words, ["Max", "open", "files", "4000", "4000", "files", "100", "4000"]);
}

#[test]
fn parameters_in_a_file() {
    let dir = temp();
    let file = dir.path().join("parameters");
    fs::write(&file, "# A disk\n\n  1M  \noffset=64K\r\nrange=128K").expect("write");
    let words = format!("@{}", file.display());
    let out = util::run_ok([NBDKIT, "--filter=offset", "memory", &words, "--run", "nbdinfo --size \"$uri\""]);
    assert_eq!(out.trim(), "131072");
    // Words beside it count too, the last one of a key most.
    let words = format!("{NBDKIT} --filter=offset memory {words} range=4K --run 'nbdinfo --size \"$uri\"'");
    assert_eq!(sh(&words), "4096\n");
    // A line is a word as it stands: blanks and quotes in it count, an @ is not special, names start from where the server does.
    fs::write(dir.path().join("a 'file' @1"), [7; 512]).expect("write");
    fs::write(&file, "a 'file' @1\n").expect("write");
    let here = dir.path().display();
    let out = sh(&format!(
        "cd {here}; mkdir x; mv parameters x; {NBDKIT} file @x/parameters --run 'nbdinfo --size \"$uri\"'"
    ));
    assert_eq!(out, "512\n");
    let odd = sh(&format!(
        "cd {here}; cp \"a 'file' @1\" @odd; {NBDKIT} file file=@odd --run 'nbdinfo --size \"$uri\"'"
    ));
    assert_eq!(odd, "512\n");
    let missing = util::run([NBDKIT, "file", "@/nonexistent"]).refused();
    assert!(missing.contains("cannot read the parameters in /nonexistent"), "{missing}");
    // The words after "@" of the data plugin are its own.
    let size = util::run_ok([NBDKIT, "data", "@1", "--run", "nbdinfo --size \"$uri\""]);
    assert_eq!(size.trim(), "1");
}

#[test]
fn other_names_of_options() {
    let out = sh(&format!("{NBDKIT} --keep-alive --time-out=9s memory 1M --run 'nbdinfo --size \"$uri\"'"));
    assert_eq!(out, "1048576\n");
    for word in ["-h", "--help"] {
        assert!(util::run_ok([NBDKIT, word]).contains("--filter"), "{word}");
        assert!(util::run_ok([NBDKIT, "memory", word]).contains("plugin: memory"), "{word}");
        assert!(util::run_ok([NBDKIT_MOUNT, word]).contains("--filter"), "{word}");
    }
    let long = util::run_ok([NBDKIT, "--long-options"]);
    assert!(long.contains("--keep-alive\n") && long.contains("--time-out\n"), "{long}");
    assert!(util::run_ok([NBDKIT, "--short-options"]).contains("-h\n"));
}

#[test]
fn credentials_stay_as_given() {
    let dir = temp();
    let here = dir.path().display();
    let out = sh(&format!(
        "cd {here}; echo 'alice:0123456789abcdef' > keys; {NBDKIT} --tls=require --tls-psk=keys memory 1M \
         --run 'echo \"$uri\"; echo \"$tls_psk|$tls_certificates\"'"
    ));
    let (uri, variables) = out.split_once('\n').expect("two lines");
    assert_eq!(variables, "keys|\n");
    assert!(uri.ends_with(&format!("tls-psk-file={here}/keys")), "{uri}");
    let out =
        sh(&format!("{NBDKIT} --tls-certificates=./a --tls=off memory 1M --run 'echo $tls_certificates'"));
    assert_eq!(out, "./a\n");
}

#[test]
fn both_versions_and_the_commit() {
    for (program, name) in [(NBDKIT, "nbdkit"), (NBDKIT_MOUNT, "nbdkit-mount")] {
        let out = util::run_ok([program, "--version"]);
        let words: Vec<&str> = out.split_whitespace().collect();
        let ["1", minor, _] = words[1].split('.').collect::<Vec<_>>()[..] else { panic!("{out}") };
        assert!(minor.parse::<u32>().expect("a number") >= 46, "{out}");
        assert_eq!((words[0], words[2], words[4], words.len()), (name, "(nbdkit-rs", "commit", 6), "{out}");
    }
    let config = util::run_ok([NBDKIT, "--dump-config"]);
    let value = |key: &str| config.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    let version = util::run_ok([NBDKIT, "--version"]);
    let expected = format!(
        "nbdkit {} (nbdkit-rs {}, commit {})\n",
        value("version").expect("a version"),
        value("version_own").expect("a version"),
        value("version_commit").expect("a commit")
    );
    assert_eq!(version, expected);
    assert!(value("version").expect("a version").starts_with("1."));
}

#[test]
fn probes_for_tracers() {
    let notes = util::run_ok(["readelf", "-n", NBDKIT]);
    let probes: Vec<(&str, &str)> = notes
        .lines()
        .zip(notes.lines().skip(1))
        .filter_map(|(a, b)| Some((a.trim().strip_prefix("Provider: ")?, b.trim().strip_prefix("Name: ")?)))
        .collect();
    for name in ["handle_single_connection", "preconnect"] {
        assert!(probes.contains(&("nbdkit", name)), "{probes:?}");
    }
    // The number of the connection; and whether the server is read-only.
    for (name, count) in [("handle_single_connection", 1), ("preconnect", 2)] {
        let (_, after) = notes.split_once(&format!("Name: {name}\n")).expect("the probe");
        let arguments = after.lines().find_map(|line| line.trim().strip_prefix("Arguments:"));
        let arguments: Vec<_> = arguments.expect("a line of arguments").split_whitespace().collect();
        assert!(
            arguments.len() == count && arguments.iter().all(|a| a.starts_with("-8@")),
            "{name}: {arguments:?}"
        );
    }
}
