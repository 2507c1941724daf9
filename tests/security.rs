//! What strangers get to see, and what reaches a shell.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use crate::util::{NBDKIT, NBDKIT_MOUNT, Server, image, is_left_out, nbdsh, run_ok, sh, temp};

fn mode(path: &Path) -> u32 {
    let metadata = fs::symlink_metadata(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    metadata.permissions().mode() & 0o777
}

/// Whatever the umask of the caller: only the owner can connect to a socket (that takes the right to write), read an
/// overlay and a script's directory; logs, statistics and the pidfile may be read.
#[test]
fn what_a_server_makes_is_its_owners() {
    for umask in ["000", "022", "077"] {
        let dir = temp();
        image(dir.path(), "disk", 1 << 20);
        sh(&format!(
            "umask {umask}; cd {}; {NBDKIT} -U socket -P pid --log=$PWD/messages --filter=cow --filter=log --filter=stats \
             file disk cow-file=overlay logfile=log statsfile=stats \
             --run 'nbdsh -u \"$uri\" -c \"h.pwrite(bytes(512), 0)\" && stat -c %a socket > modes'",
            dir.path().display()
        ));
        let made = |name: &str| mode(&dir.path().join(name));
        assert_eq!(fs::read_to_string(dir.path().join("modes")).expect("modes"), "755\n", "umask {umask}");
        let modes = ["pid", "messages", "log", "stats", "overlay"].map(made);
        assert_eq!(modes, [0o644, 0o644, 0o644, 0o644, 0o600], "umask {umask}");
    }
}

#[test]
fn what_a_mount_makes_is_its_owners() {
    if is_left_out("fuse") || !rustix::process::geteuid().is_root() {
        return;
    }
    let dir = temp();
    sh(&format!(
        "umask 000; cd {}; {NBDKIT_MOUNT} -U socket --run '
         stat -c %a socket $mnt/nbd /run/nbdkit-mount /run/nbdkit-mount/$(mountpoint -d $mnt) > modes; true' memory 1M",
        dir.path().display()
    ));
    let modes = fs::read_to_string(dir.path().join("modes")).expect("modes");
    assert_eq!(modes.lines().collect::<Vec<_>>(), ["755", "644", "700", "600"]);
}

/// The name of an export is a client's, and a script gets it as it is.
#[test]
fn no_shell_reads_what_a_client_sends() {
    let dir = temp();
    let [made, names] = ["made", "names"].map(|name| dir.path().join(name));
    let evil = format!(
        "x'; touch {made}; \"$(touch {made})\" `touch {made}` $((1+1)) & | > {made} \\ *",
        made = made.display()
    );
    let script = dir.path().join("script");
    let text = "#!/bin/sh\ncase $1 in\nget_size) echo 1M;;\npread) head -c $3 /dev/zero;;\nopen) printf '%s\\n' \"$3\" >>NAMES; echo handle;;\n*) exit 2;;\nesac\n";
    fs::write(&script, text.replace("NAMES", names.to_str().expect("UTF-8"))).expect("write");
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).expect("chmod");
    for words in [
        vec!["sh".to_owned(), script.display().to_string()],
        vec![
            "eval".into(),
            "get_size=echo 1M".into(),
            "pread=head -c $3 /dev/zero".into(),
            format!("open=printf '%s\\n' \"$3\" >>{}; echo handle", names.display()),
        ],
        // What it writes are words for a shell.
        vec![
            "--filter=log".into(),
            "sh".into(),
            script.display().to_string(),
            "logscript=eval true $act".into(),
        ],
    ] {
        let server = Server::start(&words);
        let python = format!(
            "
s = nbd.NBD()
s.set_export_name({evil:?})
s.connect_unix({:?})
assert s.pread(512, 0) == bytes(512)
s.shutdown()",
            server.socket().to_str().expect("UTF-8")
        );
        run_ok(["nbdsh", "-c", &python]);
        assert!(!made.exists(), "{words:?}");
        let found = fs::read_to_string(&names).expect("names");
        assert!(found.lines().all(|name| name == evil), "{words:?}: {found}");
        fs::remove_file(&names).expect("remove");
        drop(server);
    }
    // The name that a URI holds is quoted where a command is shown.
    let out = run_ok([NBDKIT, "-U", "-", "-e", &evil, "null", "1M", "--run", "nbdinfo --size \"$uri\""]);
    assert_eq!(out, "1048576\n");
    assert!(!made.exists());
}

/// Files of a directory, and nothing outside of it.
#[test]
fn exports_cannot_leave_their_directory() {
    let dir = temp();
    let exports = dir.path().join("exports");
    fs::create_dir(&exports).expect("mkdir");
    fs::write(dir.path().join("secret"), [b's'; 512]).expect("write");
    fs::write(exports.join("disk"), [b'd'; 512]).expect("write");
    for (name, target) in [("up", "../secret"), ("inside", "disk"), ("around", "../exports/disk")] {
        std::os::unix::fs::symlink(target, exports.join(name)).expect("symlink");
    }
    let words = format!("dir={}", exports.display());
    let opens = |server: &Server, name: &str| {
        let python = format!(
            "
s = nbd.NBD()
s.set_export_name({name:?})
try:
    s.connect_unix({:?})
    print(bytes(s.pread(1, 0)).decode())
except nbd.Error: print('refused')",
            server.socket().to_str().expect("UTF-8")
        );
        run_ok(["nbdsh", "-c", &python]).trim().to_owned()
    };
    let server = Server::start(["file", &words]);
    for name in ["up", "around", "../secret", "/etc/passwd", "..", ".", "exports/../../secret"] {
        assert_eq!(opens(&server, name), "refused", "{name}");
    }
    assert!(server.stderr().contains("follow-links=true"), "{}", server.stderr());
    assert_eq!([opens(&server, "disk"), opens(&server, "inside")], ["d", "d"]);
    let listed = run_ok(["nbdinfo", "--list", &server.uri()]);
    assert!(listed.contains("\"inside\"") && !listed.contains("\"up\""), "{listed}");

    let server = Server::start(["file", &words, "follow-links=true"]);
    assert_eq!([opens(&server, "up"), opens(&server, "around")], ["s", "d"]);
    assert_eq!(opens(&server, "../secret"), "refused");
    nbdsh(&server.uri_of("up"), "assert h.pread(1, 0) == b's'");
}
