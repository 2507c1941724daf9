//! Certificates of servers and clients, good ones and others.

use super::{Authority, says};
use crate::util::{self, NBDKIT, Run, Server, temp};

#[test]
fn certificates_of_both_sides() {
    let authority = Authority::new();
    let words = ["-v", "--tls=require", "--tls-verify-peer", &authority.option("server"), "memory", "1M"];
    let server = Server::start(words);
    assert_eq!(authority.size(&server, "client").ok().trim(), "1048576");
    for (who, why) in [
        ("anonymous", "error: TLS: peer did not return a certificate"),
        // Its client keeps a certificate back that the authority did not sign.
        ("stranger", "error: TLS: peer did not return a certificate"),
        ("expired", "error: TLS: certificate verify failed: certificate has expired"),
        ("revoked", "error: TLS: certificate verify failed: certificate revoked"),
    ] {
        let before = server.stderr().len();
        let run = authority.size(&server, who);
        assert!(run.code != 0 && run.stderr.contains("fatal alert"), "{who}: {}", run.stderr);
        says(&server, before, why);
    }
    // Still there for an honest client.
    assert_eq!(authority.size(&server, "client").ok().trim(), "1048576");
}

/// A client who shows a certificate of another authority all the same, and what alert it gets.
const INSISTENT: &str = r#"
import ssl, sys
sys.path.insert(0, sys.argv[1])
from client import *
for version, alert in (ssl.TLSVersion.TLSv1_2, "unknown ca"), (ssl.TLSVersion.TLSv1_3, "unknown ca"):
    c = context(); c.minimum_version = c.maximum_version = version
    c.load_cert_chain(sys.argv[3] + "/client-cert.pem", sys.argv[3] + "/client-key.pem")
    try:
        s = secure(start(sys.argv[2]), c)
        option(s, 8)
        raise SystemExit("let in")
    except ssl.SSLError as e:
        assert alert in str(e), e
"#;

#[test]
fn a_stranger_who_insists_is_told_why_not() {
    let authority = Authority::new();
    let words = ["--tls=require", "--tls-verify-peer", &authority.option("server"), "memory", "1M"];
    let server = Server::start(words);
    super::wire::python(&server, INSISTENT, &[&authority.of("stranger").display().to_string()]);
    says(&server, 0, "certificate verify failed: unable to get local issuer certificate");
}

/// A server on a TCP port with a client that checks its certificate: over Unix sockets libnbd does not.
fn over_tcp(authority: &Authority, whose: &str, more: &[&str]) -> Run {
    let client = authority.of("client");
    let script = authority.script(&format!("nbds://localhost:$port/?tls-certificates={}", client.display()));
    let (option, command) = (authority.option(whose), format!("nbdsh -c \"{script}\""));
    let words = [NBDKIT, "-v", "-p", "0", "--tls=require", &option, "memory", "1M", "--run", &command];
    util::run(words.iter().chain(more))
}

#[test]
fn servers_that_a_client_does_not_trust() {
    let authority = Authority::new();
    for (whose, warning) in [("stale", "warning: TLS: "), ("foreign", "")] {
        let run = over_tcp(&authority, whose, &[]);
        assert!(run.code != 0, "{}", run.stdout);
        let client = "gnutls_handshake: Error in the certificate verification";
        let server = "error: TLS: the client closed the connection in the handshake: it may not trust";
        for what in [client, server, warning] {
            assert!(run.stderr.contains(what), "{whose}: {what}: {}", run.stderr);
        }
        assert_eq!(run.stderr.contains("stale/server-cert.pem expired: Jan  1"), whose == "stale");
    }
}

#[test]
fn over_tcp_by_name() {
    let authority = Authority::new();
    for priority in ["NORMAL", "NORMAL:-VERS-TLS1.3", "NORMAL:-VERS-ALL:+VERS-TLS1.3", "SECURE256"] {
        let priority = format!("--tls-priority={priority}");
        let run = over_tcp(&authority, "server", &["--tls-verify-peer", &priority]);
        assert!(run.code == 0 && run.stdout == "1048576\n", "{priority}: {}", run.stderr);
        let agreed = match &*priority {
            "--tls-priority=NORMAL:-VERS-TLS1.3" => "TLSv1.2 ECDHE-ECDSA-AES128-GCM-SHA256",
            "--tls-priority=SECURE256" => "TLSv1.3 TLS_AES_256_GCM_SHA384",
            _ => "TLSv1.3 TLS_AES_128_GCM_SHA256",
        };
        assert!(run.stderr.contains(agreed), "{priority}: {}", run.stderr);
    }
}

#[test]
fn qemu_with_certificates() {
    let authority = Authority::new();
    let words = ["--tls=require", "--tls-verify-peer", &authority.option("server"), "memory", "1M"];
    let server = Server::start(words);
    let info = |whose: &str| {
        let dir = authority.of(whose);
        let object = format!("tls-creds-x509,id=t,endpoint=client,dir={}", dir.display());
        let socket = server.socket().display();
        let image =
            format!("driver=nbd,server.type=unix,server.path={socket},tls-creds=t,tls-hostname=localhost");
        util::run(["qemu-img", "info", "--object", &object, "--image-opts", &image])
    };
    // It takes none of an elliptic curve.
    assert!(info("qemu").ok().contains("virtual size: 1 MiB"));
    assert_ne!(info("anonymous").code, 0);
    says(&server, 0, "peer did not return a certificate");
}

#[test]
fn the_ip_filter_looks_at_names() {
    let authority = Authority::new();
    let start = |rules: &[&str]| {
        let option = authority.option("server");
        let words = ["--tls=on", "--tls-verify-peer", &option, "--filter=ip", "memory", "1M"];
        Server::start(words.iter().chain(rules))
    };
    let server = start(&["allow=dn:CN=localhost,O=Us\\, client", "deny=all"]);
    assert_eq!(authority.size(&server, "client").ok().trim(), "1048576");
    assert_ne!(util::run(["nbdinfo", &server.uri()]).code, 0);
    says(&server, 0, "is not permitted to connect");

    let server = start(&["allow=dn:CN=localhost", "deny=all"]);
    assert_ne!(authority.size(&server, "client").code, 0);
    let server = start(&["allow=issuer-dn:CN=ca,O=Example", "deny=all"]);
    assert_eq!(authority.size(&server, "client").ok().trim(), "1048576");
    let server = start(&["deny=dn:CN=localhost,O=Us\\, client"]);
    assert_ne!(authority.size(&server, "client").code, 0);
    util::run_ok(["nbdinfo", &server.uri()]);
}

/// A disk that tells who reads it.
const PLUGIN: &str = r#"
#include <stdlib.h>
#include <string.h>
#include <stdio.h>
#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>
#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL
static void *who_open (int readonly) { return NBDKIT_HANDLE_NOT_NEEDED; }
static int64_t who_size (void *handle) { return 512; }
static int who_pread (void *handle, void *buf, uint32_t count, uint64_t offset, uint32_t flags)
{
  char text[512] = "";
  char *dn = nbdkit_peer_tls_dn (), *issuer = nbdkit_peer_tls_issuer_dn ();
  snprintf (text, sizeof text, "%s|%s|%d|", dn ? dn : "null", issuer ? issuer : "null", nbdkit_is_tls ());
  free (dn); free (issuer);
  memcpy (buf, text + offset, count);
  return 0;
}
static struct nbdkit_plugin plugin = { .name = "who", .open = who_open, .get_size = who_size, .pread = who_pread };
NBDKIT_REGISTER_PLUGIN(plugin)
"#;

#[test]
fn plugins_in_c_learn_the_names() {
    let authority = Authority::new();
    let dir = temp();
    let (source, plugin) = (dir.path().join("who.c"), dir.path().join("who.so"));
    std::fs::write(&source, PLUGIN).expect("write");
    let include = concat!(env!("CARGO_MANIFEST_DIR"), "/include");
    let (source, plugin) = (source.to_str().expect("UTF-8"), plugin.to_str().expect("UTF-8"));
    util::run_ok(["cc", "-shared", "-fPIC", "-I", include, "-o", plugin, source]);
    let read = "print(bytes(h.pread(512, 0)).split(b'\\0')[0].decode())";
    let says = |verify: &[&str], uri: &dyn Fn(&Server) -> String| {
        let option = authority.option("server");
        let words = ["--tls=on", &option].into_iter().chain(verify.iter().copied()).chain([plugin]);
        let server = Server::start(words);
        let uri = uri(&server);
        let connect = format!("h.set_uri_allow_local_file(True); h.connect_uri('{uri}')");
        util::run_ok(["nbdsh", "-c", &connect, "-c", read]).trim().to_owned()
    };
    let secure = |server: &Server| {
        let (socket, client) = (server.socket().display(), authority.of("client"));
        format!("nbds+unix://localhost/?socket={socket}&tls-certificates={}", client.display())
    };
    let names = "CN=localhost,O=Us\\, client|CN=ca,O=Example|1|";
    assert_eq!(says(&["--tls-verify-peer"], &secure), names);
    // Nobody asked for the certificate.
    assert_eq!(says(&[], &secure), "||1|");
    assert_eq!(says(&["--tls-verify-peer"], &Server::uri), "||0|");
}
