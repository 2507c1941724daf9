//! Pre-shared keys.

use std::fs;

use super::{keys, psk, psk_uri, says};
use crate::util::{self, NBDKIT, Server, patterned, temp};

#[test]
fn pre_shared_keys_of_many_users() {
    let dir = temp();
    let keys = keys(dir.path());
    let source = patterned(dir.path(), "source", (5 << 20) + 777);
    let words = ["-v", "--tls=require", &psk(&keys), "file", source.to_str().expect("UTF-8")];
    let server = Server::start(words);
    for user in ["alice", "bob"] {
        let uri = psk_uri(&server, user, &keys);
        let info = util::run_ok(["nbdinfo", &uri]);
        assert!(info.contains("with TLS"), "{info}");
        let copy = dir.path().join(user);
        util::run_ok(["nbdcopy", &uri, copy.to_str().expect("UTF-8")]);
        assert!(fs::read(&copy).expect("read") == fs::read(&source).expect("read"), "the copies differ");
    }
    // qemu looks for keys.psk in a directory.
    let object = format!("tls-creds-psk,id=t,endpoint=client,username=qemu,dir={}", dir.path().display());
    let image = format!("driver=nbd,server.type=unix,server.path={},tls-creds=t", server.socket().display());
    let info = util::run_ok(["qemu-img", "info", "--object", &object, "--image-opts", &image]);
    assert!(info.contains("virtual size"), "{info}");
    assert!(server.stderr().contains("TLSv1.3 TLS_AES_128_GCM_SHA256"), "{}", server.stderr());
    // The keys are in their file and nowhere else.
    let command = fs::read_to_string(format!("/proc/{}/cmdline", server.pid())).expect("cmdline");
    for key in fs::read_to_string(&keys).expect("read").lines().filter_map(|line| line.split_once(':')) {
        assert!(key.1.len() > 30 && !server.stderr().contains(key.1) && !command.contains(key.1));
    }
}

#[test]
fn wrong_keys_and_users() {
    let dir = temp();
    let keys = keys(dir.path());
    let wrong = dir.path().join("wrong.psk");
    fs::write(&wrong, "alice:00112233\nmallory:00112233\n").expect("write");
    for priority in ["NORMAL", "NORMAL:-VERS-TLS1.3"] {
        let priority = format!("--tls-priority={priority}");
        let server = Server::start(["--tls=require", &psk(&keys), &priority, "memory", "1M"]);
        for (user, why) in [
            ("alice", "error: TLS: the client's pre-shared key is not the one that its user has here"),
            ("mallory", "error: TLS: no pre-shared key for the user \"mallory\""),
        ] {
            let run = util::run(["nbdinfo", &psk_uri(&server, user, &wrong)]);
            assert!(run.code != 0 && run.stderr.contains("fatal alert"), "{user}: {}", run.stderr);
            says(&server, 0, why);
        }
        assert_eq!(util::run_ok(["nbdinfo", "--size", &psk_uri(&server, "bob", &keys)]), "1048576\n");
    }
}

#[test]
fn priorities_choose_version_and_cipher() {
    let dir = temp();
    let keys = keys(dir.path());
    for (priority, agreed) in [
        ("NORMAL", "TLSv1.3 TLS_AES_128_GCM_SHA256"),
        ("NORMAL:-VERS-TLS1.3", "TLSv1.2 PSK-AES128-GCM-SHA256"),
        ("NORMAL:-VERS-ALL:+VERS-TLS1.2:-AES-128-GCM", "TLSv1.2 PSK-AES256-GCM-SHA384"),
        ("NORMAL:-KX-ALL:+PSK:-AES-128-GCM", "TLSv1.3 TLS_CHACHA20_POLY1305_SHA256"),
        ("TLS_CHACHA20_POLY1305_SHA256", "TLSv1.3 TLS_CHACHA20_POLY1305_SHA256"),
    ] {
        let run = util::run([
            NBDKIT,
            "-v",
            "-p",
            "0",
            "--tls=require",
            &psk(&keys),
            &format!("--tls-priority={priority}"),
            "memory",
            "1M",
            "--run",
            &format!("nbdinfo --size \"nbds://alice@localhost:$port/?tls-psk-file={}\"", keys.display()),
        ]);
        assert!(run.code == 0 && run.stdout == "1048576\n", "{priority}: {}", run.stderr);
        assert!(run.stderr.contains(agreed), "{priority}: {}", run.stderr);
    }
    for (priority, why) in [
        ("NORMAL:-VERS-ALL", "leaves no version"),
        ("NORMAL:-GROUP-X25519", "cannot do without 'GROUP-X25519'"),
        ("NONSENSE", "neither a priority string of GnuTLS nor ciphers that OpenSSL knows"),
    ] {
        let priority = format!("--tls-priority={priority}");
        let error = util::run([NBDKIT, "--tls=require", &psk(&keys), &priority, "memory", "1M"]).refused();
        assert!(error.contains(why), "{error}");
    }
}

#[test]
fn both_directions_at_once() {
    let dir = temp();
    let keys = keys(dir.path());
    let server =
        Server::start(["--tls=require", &psk(&keys), "--filter=delay", "memory", "64M", "rdelay=1ms"]);
    let uri = psk_uri(&server, "alice", &keys);
    util::run_ok([
        "nbdsh",
        "-c",
        &format!(
            "h.set_uri_allow_local_file(True); h.connect_uri('{uri}')
n = 1 << 20
data = [bytes([i]) * n for i in range(64)]
for i in range(64): h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data[i])), i * n)
while h.aio_in_flight() > 0: h.poll(-1)
bufs = [nbd.Buffer(n) for i in range(64)]
for i in range(64):
    h.aio_pread(bufs[i], i * n)
    h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data[i])), i * n)
while h.aio_in_flight() > 0: h.poll(-1)
assert all(bytes(bufs[i].to_bytearray()) == data[i] for i in range(64))"
        ),
    ]);
}
