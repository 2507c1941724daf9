//! Who gets in, and to what.

use super::{captive, info, refused};
use crate::util::{self, NBDKIT, Server, image, nbdsh, patterned, sh, temp};

/// A server of a directory with the files a and b of different sizes.
fn directory(parameters: &[&str]) -> (Server, tempfile::TempDir) {
    let dir = temp();
    image(dir.path(), "a", 1 << 20);
    image(dir.path(), "b", 2 << 20);
    let path = format!("dir={}", dir.path().display());
    let words = ["--filter=exportname", "file", &path];
    (Server::start(words.iter().chain(parameters)), dir)
}

fn listed(server: &Server) -> Vec<String> {
    let json = util::run_ok(["nbdinfo", "--list", "--json", "--no-content", &server.uri()]);
    let names = json.lines().filter_map(|line| line.trim().strip_prefix("\"export-name\": \""));
    let mut names: Vec<_> = names.map(|rest| rest.trim_end_matches("\",").to_owned()).collect();
    names.sort();
    names
}

fn size(uri: &str) -> String {
    util::run_ok(["nbdinfo", "--size", uri]).trim().to_owned()
}

#[test]
fn exportname_gives_the_empty_name_a_meaning() {
    let (server, _dir) = directory(&["default-export=b"]);
    assert_eq!(size(&server.uri()), "2097152");
    assert_eq!(size(&server.uri_of("a")), "1048576");
    assert_eq!(listed(&server), ["a", "b"]);
}

#[test]
fn exportname_chooses_what_is_listed_and_opened() {
    let (server, _dir) = directory(&["exportname-list=explicit", "exportname=a", "exportname-strict=true"]);
    assert_eq!(listed(&server), ["a"]);
    assert_eq!(size(&server.uri_of("a")), "1048576");
    assert_ne!(util::run(["nbdinfo", &server.uri_of("b")]).code, 0);
    assert!(server.stderr().contains("export 'b' is not among those of exportname="), "{}", server.stderr());

    let (server, _dir) = directory(&["exportname-list=error"]);
    assert_ne!(util::run(["nbdinfo", "--list", &server.uri()]).code, 0);
    assert_eq!(size(&server.uri_of("b")), "2097152");
}

#[test]
fn exportname_describes() {
    let (server, _dir) = directory(&["exportdesc=script:echo \"this is $name\""]);
    let info = util::run_ok(["nbdinfo", "--json", &server.uri_of("b")]);
    assert!(info.contains("\"description\": \"this is b\""), "{info}");
}

#[test]
fn ip_lets_the_user_in_and_nobody_else() {
    let uid = rustix::process::getuid().as_raw();
    let allow = format!("allow=uid:{uid}");
    let out = captive(["--filter=ip", "memory", "1M", &allow, "deny=all"], "nbdinfo --size \"$uri\"");
    assert_eq!(out.ok().trim(), "1048576");
    let allow = format!("allow=uid:{}", uid + 1);
    let out = captive(["--filter=ip", "memory", "1M", &allow, "deny=all"], "! nbdinfo \"$uri\"");
    assert_eq!(out.code, 0);
    assert!(out.stderr.contains(&format!("uid {uid}")), "{}", out.stderr);
    let own = "allow=gid:4294967294,anyunix";
    captive(["--filter=ip", "memory", "1M", own, "deny=any"], "nbdinfo \"$uri\"").ok();
}

#[test]
fn ip_knows_addresses() {
    for (rules, address, expected) in [
        (["allow=127.0.0.0/8", "deny=all"], "127.0.0.1", 0),
        (["allow=127.0.0.2", "deny=all"], "127.0.0.1", 1),
        (["allow=::1", "deny=anyipv4"], "127.0.0.1", 1),
        (["allow=::1", "deny=all"], "::1", 0),
        (["allow=anyipv4", "deny=anyipv6"], "::1", 1),
    ] {
        let host = if address.contains(':') { format!("[{address}]") } else { address.to_owned() };
        let command = format!("nbdinfo nbd://{host}:$port || exit 1");
        let words = [NBDKIT, "-i", address, "-p", "0", "--filter=ip", "memory", "1M"];
        let run = util::run(words.iter().chain(&rules).copied().chain(["--run", &command]));
        assert_eq!(run.code, expected, "{rules:?} {address}: {}", run.stderr);
    }
}

#[test]
fn limit_refuses_one_client_too_many() {
    let server = Server::start(["--filter=limit", "memory", "1M", "limit=2"]);
    nbdsh(
        &server.uri(),
        &format!(
            r#"
second = nbd.NBD(); second.connect_uri("{uri}"); second.pread(1, 0)
third = nbd.NBD()
try:
    third.connect_uri("{uri}")
    raise SystemExit("the third one is in")
except nbd.Error:
    pass
h.pread(1, 0); second.pread(1, 0)
"#,
            uri = server.uri()
        ),
    );
    assert!(server.stderr().contains("limit=2 allows no more"), "{}", server.stderr());
}

#[test]
fn tls_fallback_shows_the_disk_to_clients_with_tls_only() {
    let dir = temp();
    let keys = dir.path().join("keys.psk");
    util::run_ok(["psktool", "-u", "alice", "-p", keys.to_str().expect("UTF-8")]);
    let psk = format!("--tls-psk={}", keys.display());
    let words = ["--tls=on", &psk, "--filter=tls-fallback", "memory", "1M", "tlsreadme=use TLS"];
    let server = Server::start(words);
    nbdsh(
        &server.uri_of("anything"),
        "assert h.get_size() == 512 and h.is_read_only() and not h.can_multi_conn()
data = h.pread(512, 0)
assert data == b'use TLS' + bytes(505), data",
    );
    let uri =
        format!("nbds+unix://alice@/?socket={}&tls-psk-file={}", server.socket().display(), keys.display());
    sh(&format!(
        "nbdsh -c 'h.set_uri_allow_local_file(True)
h.connect_uri(\"{uri}\"); assert h.get_size() == 1048576 and not h.is_read_only()'"
    ));
    let error = refused(&["--filter=tls-fallback", "--filter=noparallel", "null", "serialize=connections"]);
    assert!(error.contains("several connections at once"), "{error}");
}

#[test]
fn multi_conn_makes_and_hides_the_promise() {
    let promised = |words: &[&str]| info(words).contains("\"can_multi_conn\": true");
    assert!(promised(&["--filter=multi-conn", "memory", "1M"]));
    assert!(!promised(&["--filter=multi-conn", "memory", "1M", "multi-conn-mode=disable"]));
    let noparallel = ["--filter=multi-conn", "--filter=noparallel", "memory", "1M", "serialize=connections"];
    assert!(!promised(&noparallel));
    let dir = temp();
    let disk = patterned(dir.path(), "disk", 8 << 20);
    let words = ["--filter=multi-conn", "memory", "8M", "multi-conn-mode=emulate"];
    let command = "nbdcopy --connections=4 --flush $disk \"$uri\" && nbdcopy \"$uri\" - | cmp - $disk";
    captive(words, &command.replace("$disk", disk.to_str().expect("UTF-8"))).ok();
}
