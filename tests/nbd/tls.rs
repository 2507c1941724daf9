//! TLS with certificates and pre-shared keys, through clients that use GnuTLS.

use std::{fs, path::Path};

use crate::util::{self, Run, Server, patterned, raw::Raw, raw::go, sh, temp};

const ACK: u32 = 1;
const ERR_INVALID: u32 = 1 << 31 | 3;
const ERR_TLS_REQD: u32 = 1 << 31 | 5;

/// An authority, certificates of the server and of clients in `dir/{server,client,stranger,expired,revoked}`.
fn certificates(dir: &Path) {
    let script = r#"
cd "$0"
authority() {
    certtool --generate-privkey --ecc > "$1-key.pem"
    printf 'cn = %s\nca\ncert_signing_key\ncrl_signing_key\n' "$1" > t
    certtool --generate-self-signed --load-privkey "$1-key.pem" --template t > "$1.pem"
}
issue() { # directory, authority, kind, more of the template
    mkdir -p "$1"
    cp "$2.pem" "$1/ca-cert.pem"
    certtool --generate-privkey --ecc > "$1/$3-key.pem"
    printf 'cn = localhost\ndns_name = localhost\nip_address = 127.0.0.1\ntls_www_%s\nsigning_key\n%b' "$3" "$4" > t
    certtool --generate-certificate --load-ca-certificate "$2.pem" --load-ca-privkey "$2-key.pem" \
        --load-privkey "$1/$3-key.pem" --template t > "$1/$3-cert.pem"
}
past='activation_date = "2001-01-01 00:00:00"\nexpiration_date = "2002-01-01 00:00:00"\n'
authority ca; authority other
issue server ca server ''
issue client ca client ''
issue stranger other client ''; cp ca.pem stranger/ca-cert.pem
issue expired ca client "$past"
issue revoked ca client ''
mkdir anonymous; cp ca.pem anonymous/ca-cert.pem
printf 'crl_next_update = 9000\ncrl_number = 1\n' > t
certtool --generate-crl --load-ca-certificate ca.pem --load-ca-privkey ca-key.pem \
    --load-certificate revoked/client-cert.pem --template t > server/ca-crl.pem
"#;
    util::run_ok([
        "bash",
        "-euo",
        "pipefail",
        "-c",
        &format!("{{ {script} }} 2>/dev/null"),
        &dir.display().to_string(),
    ]);
}

/// Asks for the size over TLS, with the certificates in a directory.
fn size(server: &Server, certificates: &Path) -> Run {
    let uri = format!(
        "nbds+unix://localhost/?socket={}&tls-certificates={}",
        server.socket().display(),
        certificates.display()
    );
    let script = format!(
        "h.set_uri_allow_local_file(True); h.set_tls_verify_peer(True)
h.connect_uri('{uri}'); assert h.get_tls_negotiated(); print(h.get_size())"
    );
    util::run(["nbdsh", "-c", &script])
}

#[test]
fn certificates_of_both_sides() {
    let dir = temp();
    certificates(dir.path());
    let start = |which: &str| {
        let option = format!("--tls-certificates={}", dir.path().join(which).display());
        Server::start(["-v", "--tls=require", "--tls-verify-peer", &option, "memory", "1M"])
    };
    let server = start("server");
    assert_eq!(size(&server, &dir.path().join("client")).ok().trim(), "1048576");
    for (who, why) in [
        ("anonymous", "did not return a certificate"),
        // Its client keeps a certificate back that the authority did not sign.
        ("stranger", "did not return a certificate"),
        ("expired", "certificate verify failed"),
        ("revoked", "certificate verify failed"),
    ] {
        let before = server.stderr().len();
        let run = size(&server, &dir.path().join(who));
        assert!(run.code != 0 && run.stderr.contains("nbd_connect_uri"), "{who}: {}", run.stderr);
        // The client may be told before the server has said it.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
        while !server.stderr()[before..].contains(why) {
            assert!(std::time::Instant::now() < deadline, "{who}: {}", &server.stderr()[before..]);
            std::thread::yield_now();
        }
    }
    // Still there for an honest client.
    assert_eq!(size(&server, &dir.path().join("client")).ok().trim(), "1048576");
}

/// Keys of three users.
fn keys(dir: &Path) -> std::path::PathBuf {
    let file = dir.join("keys.psk");
    for user in ["alice", "bob", "qemu"] {
        util::run_ok(["psktool", "-u", user, "-p", file.to_str().expect("UTF-8")]);
    }
    file
}

#[test]
fn pre_shared_keys_of_many_users() {
    let dir = temp();
    let keys = keys(dir.path());
    let source = patterned(dir.path(), "source", (5 << 20) + 777);
    let option = format!("--tls-psk={}", keys.display());
    let server = Server::start(["-v", "--tls=require", &option, "file", source.to_str().expect("UTF-8")]);
    let uri = |user: &str, keys: &Path| {
        format!("nbds+unix://{user}@/?socket={}&tls-psk-file={}", server.socket().display(), keys.display())
    };
    for user in ["alice", "bob"] {
        let info = util::run_ok(["nbdinfo", &uri(user, &keys)]);
        assert!(info.contains("with TLS"), "{info}");
        let copy = dir.path().join(user);
        util::run_ok(["nbdcopy", &uri(user, &keys), copy.to_str().expect("UTF-8")]);
        assert!(fs::read(&copy).expect("read") == fs::read(&source).expect("read"), "the copies differ");
    }
    let wrong = dir.path().join("wrong.psk");
    fs::write(&wrong, "alice:00112233\nmallory:00112233\n").expect("write");
    for user in ["alice", "mallory"] {
        let run = util::run(["nbdinfo", &uri(user, &wrong)]);
        assert!(run.code != 0, "{user}: {}", run.stdout);
    }
    assert!(server.stderr().contains("no pre-shared key for the user \"mallory\""), "{}", server.stderr());
    // qemu looks for keys.psk in a directory.
    let object = format!("tls-creds-psk,id=t,endpoint=client,username=qemu,dir={}", dir.path().display());
    let image = format!("driver=nbd,server.type=unix,server.path={},tls-creds=t", server.socket().display());
    let info = util::run_ok(["qemu-img", "info", "--object", &object, "--image-opts", &image]);
    assert!(info.contains("virtual size"), "{info}");
    assert!(server.stderr().contains("TLS_AES_128_GCM_SHA256"), "{}", server.stderr());
}

#[test]
fn both_directions_at_once() {
    let dir = temp();
    let option = format!("--tls-psk={}", keys(dir.path()).display());
    let server = Server::start(["--tls=require", &option, "--filter=delay", "memory", "64M", "rdelay=1ms"]);
    let uri = format!(
        "nbds+unix://alice@/?socket={}&tls-psk-file={}",
        server.socket().display(),
        dir.path().join("keys.psk").display()
    );
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

#[test]
fn nothing_is_said_before() {
    let dir = temp();
    let option = format!("--tls-psk={}", keys(dir.path()).display());
    let server = Server::start(["-v", "--tls=require", &option, "memory", "1M"]);
    let mut raw = Raw::options(&server);
    for (option, data) in [(7, go("")), (6, go("")), (3, vec![]), (8, vec![]), (11, vec![]), (99, vec![1; 9])]
    {
        raw.option(option, &data);
        assert_eq!(raw.reply(), ERR_TLS_REQD, "option {option}");
    }
    raw.option(2, b"");
    assert_eq!(raw.reply(), ACK);
    raw.ends();
    let mut raw = Raw::options(&server);
    raw.option(1, b"");
    raw.ends();
    let mut raw = Raw::options(&server);
    raw.option(5, b"x");
    assert_eq!(raw.reply(), ERR_INVALID);
    // An option that somebody put in behind STARTTLS.
    raw.send(&[&b"IHAVEOPT\0\0\0\x05\0\0\0\0"[..], b"IHAVEOPT\0\0\0\x08\0\0\0\0"].concat());
    raw.ends();
    assert!(server.stderr().contains("TLS: "), "{}", server.stderr());
    // libnbd does without TLS unless it is asked for.
    let run = util::run(["nbdinfo", &server.uri()]);
    assert!(run.code != 0 && run.stderr.contains("error to opt_go"), "{}", run.stderr);
}

#[test]
fn options_and_variables() {
    let dir = temp();
    let keys = keys(dir.path());
    let keys = keys.to_str().expect("UTF-8");
    let nbdkit = util::NBDKIT;
    let said = sh(&format!(
        "{nbdkit} --tls=require --tls-psk={keys} memory 1M --run 'echo \"$uri\"; echo \"$tls:$tls_psk:$tls_certificates\"'"
    ));
    let mut lines = said.lines();
    let uri = lines.next().expect("a URI");
    assert!(
        uri.starts_with("nbds+unix://?socket=") && uri.ends_with(&format!("&tls-psk-file={keys}")),
        "{uri}"
    );
    assert_eq!(lines.next(), Some(&*format!("2:{keys}:")));
    assert_eq!(
        sh(&format!("{nbdkit} --tls-psk={keys} memory 1M --run 'echo \"$tls\"; nbdinfo --size \"$uri\"'")),
        "1\n1048576\n"
    );
    assert!(sh(&format!("{nbdkit} --dump-config")).contains("tls=yes\n"));
    for (words, why) in [
        (&["--tls=maybe"][..], "off, on or require"),
        (&["--tls=require", "--tls-certificates=/nonexistent"], "/nonexistent/server-cert.pem"),
        (&["--tls-psk=/nonexistent"], "/nonexistent"),
        (&["--tls=require", "-o", "--tls-psk=/x"], "-o"),
    ] {
        let words = [nbdkit].into_iter().chain(words.iter().copied()).chain(["memory", "1M"]);
        let error = util::run(words).refused();
        assert!(error.contains(why), "{error}");
    }
}
