//! What `file` and `split` do so that nobody damages an image: locks, and warnings about other formats.

use std::{fs, path::Path};

use crate::util::{self, Mount, NBDKIT, NBDKIT_MOUNT, Run, Server, image, run, sh, temp};

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// qemu-io on a file, as it comes.
fn qemu(file: &Path, options: &[&str], command: &str) -> Run {
    run([&["qemu-io", "-f", "raw"], options, &["-c", command, text(file)]].concat())
}

/// Starts a server that must not start, for the file is in use.
#[track_caller]
fn in_use(words: &[&str], by: &str, name: &str) {
    let line = run([&[NBDKIT, "-U", "-", "--run", "true"], words].concat()).refused();
    assert!(line.contains("is in use by") && line.contains(by) && line.contains(name), "{line}");
    assert!(line.contains("lock=off"), "{line}");
}

#[test]
fn qemu_and_we_exclude_each_other() {
    let dir = temp();
    let disk = image(dir.path(), "disk.img", 1 << 20);
    let other = image(dir.path(), "other.img", 1 << 20);
    let (disk, name) = (disk.as_path(), text(&disk));
    for words in [&["file", name][..], &["split", text(&other), name], &["partitioning", text(&other), name]]
    {
        let server = Server::start(words);
        let out = qemu(disk, &[], "read 0 512");
        assert!(out.code != 0 && out.stderr.contains("lock"), "{words:?}: {}", out.stderr);
        let pid = format!("(process {})", server.pid());
        in_use(&["file", name], &pid, "nbdkit");
        in_use(&["-r", "file", name], &pid, "which writes to it");
        assert!(run([NBDKIT_MOUNT, "--run", "true", "file", name]).refused_with(3).contains(&pid));
    }
    // Readers share.
    let readers = [Server::start(["-r", "file", name]), Server::start(["--filter=cow", "file", name])];
    let mount = Mount::start(["-r", "split", name]);
    util::run_ok(["qemu-io", "-r", "-f", "raw", "-c", "read 0 512", name]);
    let out = qemu(disk, &[], "write 0 512");
    assert!(out.code != 0 && out.stderr.contains("lock"), "{}", out.stderr);
    in_use(&["file", name], "", "lets nobody else write to it");
    drop((readers, mount));
    // And all of it goes with the servers.
    util::qemu_io(name, &["write 0 512"]);
}

#[test]
fn a_program_that_uses_the_image_is_named() {
    let dir = temp();
    let raw = image(dir.path(), "disk.img", 1 << 20);
    let qcow2 = dir.path().join("disk.qcow2");
    sh(&format!("qemu-img create -q -f qcow2 {} 1M", text(&qcow2)));
    // qemu lets others write to a raw image that it only reads.
    for (options, disk, words) in [
        ("-f raw", &raw, &["file"][..]),
        ("-f raw", &raw, &["-r", "file"]),
        ("-r -f qcow2", &qcow2, &["format=raw", "file"]),
    ] {
        let name = text(disk);
        // It waits for commands from a pipe that stays open as long as the shell.
        let command = format!(
            "mkfifo pipe; qemu-io {options} {name} <pipe >out & q=$!; exec 3>pipe; echo 'read 0 1' >&3; \
             until grep -q ops out; do :; done; {NBDKIT} -U - {} {name} {} --run true; echo status $?; kill $q; wait",
            words.iter().filter(|word| !word.contains('=')).copied().collect::<Vec<_>>().join(" "),
            words.iter().filter(|word| word.contains('=')).copied().collect::<Vec<_>>().join(" "),
        );
        let out =
            run(["sh", "-c", &format!("cd {} && rm -f pipe out; {{ {command}; }} 2>&1", text(dir.path()))]);
        let told = out.stdout;
        assert!(
            told.contains("in use by qemu-io (process ") && told.contains("status 1"),
            "{options}: {told}"
        );
    }
}

#[test]
fn the_lock_can_be_left_out() {
    let dir = temp();
    let disk = image(dir.path(), "disk.img", 1 << 20);
    let off = ["file", text(&disk), "lock=off"];
    let first = Server::start(off);
    let second = Server::start(off);
    for server in [&first, &second] {
        util::qemu_io(&server.uri(), &["write -P 7 0 4k"]);
    }
    util::qemu_io(text(&disk), &["read -P 7 0 4k", "write 0 4k"]);
    drop((first, second));
    let on = Server::start(["file", text(&disk), "lock=on"]);
    // Several connections of one server are one user of the file.
    util::nbdsh(
        &on.uri(),
        &format!(
            "a = nbd.NBD(); a.connect_uri('{0}'); b = nbd.NBD(); b.connect_uri('{0}'); a.pwrite(b'x' * 512, 0); \
             assert b.pread(512, 0) == b'x' * 512",
            on.uri()
        ),
    );
    let line = run([NBDKIT, "file", text(&disk), "lock=maybe"]).refused();
    assert!(line.contains("off, auto or on"), "{line}");
}

#[test]
fn files_of_a_directory_are_locked_while_they_are_open() {
    let dir = temp();
    for name in ["a", "b"] {
        image(dir.path(), name, 1 << 20);
    }
    let server = Server::start(["file", &format!("dir={}", text(dir.path()))]);
    let [a, b] = ["a", "b"].map(|name| dir.path().join(name));
    util::nbdsh(
        &server.uri_of("a"),
        &format!(
            "import subprocess\n\
             def qemu(f): return subprocess.run(['qemu-io', '-f', 'raw', '-c', 'write 0 512', f]).returncode\n\
             assert qemu('{}') != 0\nassert qemu('{}') == 0",
            text(&a),
            text(&b)
        ),
    );
    // When the client has left, the file is free; that is the server's turn, so it may take a moment.
    let free = || qemu(&a, &[], "write 0 512").code == 0;
    assert!((0..200).any(|_| free()));
}

#[test]
fn an_image_of_another_format_is_named_and_read_only() {
    let dir = temp();
    let raw = image(dir.path(), "raw", 1 << 20);
    for (make, format, hint) in [
        ("qemu-img convert -O qcow2", "qcow2", "--filter=qcow2dec"),
        ("qemu-img convert -O vpc -o subformat=fixed,force_size=on", "vpc", "qemu-nbd"),
        ("qemu-img convert -O vmdk", "vmdk", "qemu-nbd"),
    ] {
        let disk = dir.path().join(format);
        sh(&format!("{make} {} {}", text(&raw), text(&disk)));
        for plugin in ["file", "split"] {
            let before = fs::read(&disk).expect("read");
            let server = Server::start([plugin, text(&disk)]);
            assert!(
                util::run_ok(["nbdinfo", &server.uri()]).contains("is_read_only: true"),
                "{plugin} {format}"
            );
            let told = server.stderr();
            let lines: Vec<_> = told.lines().filter(|line| line.contains("image")).collect();
            assert_eq!(lines.len(), 1, "{told}");
            for words in [&format!("is a {format}"), hint, "as it is, read-only", "format=raw"] {
                assert!(lines[0].contains(words), "{words}: {told}");
            }
            drop(server);
            let server = Server::start([plugin, text(&disk), "format=raw"]);
            util::qemu_io(&server.uri(), &["write -P 7 512 512"]);
            assert_eq!(server.stderr(), "");
            drop(server);
            assert_ne!(fs::read(&disk).expect("read"), before);
            fs::write(&disk, &before).expect("write");
        }
    }
}

#[test]
fn a_filter_that_reads_the_format_gets_it_without_a_word() {
    let dir = temp();
    let tar = dir.path().join("disk.tar");
    image(dir.path(), "disk", 1 << 20);
    sh(&format!("tar -C {0} -cf {1} disk", text(dir.path()), text(&tar)));
    let words = ["-f", "--filter=tar", "file", text(&tar), "tar-entry=disk"];
    let out = run([&[NBDKIT, "-U", "-", "--run", "true"], &words[..]].concat());
    assert!(!out.stderr.contains("image"), "{}", out.stderr);
    let out = run([NBDKIT, "-U", "-", "--run", "true", "file", text(&tar)]);
    assert!(out.stderr.contains("is a tar image") && out.stderr.contains("--filter=tar"), "{}", out.stderr);
}

#[test]
fn what_a_client_writes_to_a_disk_does_not_make_it_an_image() {
    let dir = temp();
    let disk = image(dir.path(), "disk", 4 << 20);
    let server = Server::start(["file", text(&disk)]);
    sh(&format!("qemu-img create -q -f qcow2 '{}' 1M", server.uri()));
    assert!(util::run_ok(["nbdinfo", &server.uri()]).contains("is_read_only: false"));
    sh(&format!("qemu-io -f qcow2 -c 'write 0 4k' '{}'", server.uri()));
    assert_eq!(server.stderr(), "");
}

#[test]
fn a_disk_that_cannot_be_written_to_says_so() {
    // Nobody, not even root, may write to a program while it runs.
    let dir = temp();
    let program = dir.path().join("sleep");
    fs::copy("/bin/sleep", &program).expect("copy");
    let mut child = std::process::Command::new(&program).arg("600").spawn().expect("start");
    for plugin in ["file", "split"] {
        let server = Server::start([plugin, text(&program)]);
        assert!(util::run_ok(["nbdinfo", &server.uri()]).contains("is_read_only: true"));
        let told = server.stderr();
        assert!(told.contains("sleep cannot be written to, and is served read-only"), "{told}");
        assert_eq!(told.lines().count(), 1, "{told}");
        drop(server);
        assert_eq!(Server::start(["-r", plugin, text(&program)]).stderr(), "");
    }
    child.kill().expect("kill");
    child.wait().expect("wait");
}

#[test]
fn a_flush_of_a_read_only_disk_succeeds() {
    // As on squashfs and iso9660, fdatasync(2) of these files is EINVAL.
    let server = Server::start(["-r", "file", "/proc/version"]);
    util::nbdsh(&server.uri(), "assert h.can_flush()\nh.flush()");
}
