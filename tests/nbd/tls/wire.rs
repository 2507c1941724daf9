//! Byte by byte: what may be said before TLS, what comes between, and how a connection ends.

use std::fs;

use super::{Authority, keys, psk, says};
use crate::util::{
    self, Server,
    raw::{Raw, contexts, go},
    temp,
};

const ACK: u32 = 1;
const META_CONTEXT: u32 = 4;
const ERR_INVALID: u32 = 1 << 31 | 3;
const ERR_TLS_REQD: u32 = 1 << 31 | 5;

/// A client in Python whose bytes a test chooses.
const CLIENT: &str = r#"
import socket, ssl, struct

def start(path):
    """Connects and stops before the first option."""
    s = socket.socket(socket.AF_UNIX); s.settimeout(60); s.connect(path)
    get(s, 18); s.sendall(struct.pack(">I", 3))
    return s

def get(s, n):
    data = b""
    while len(data) < n:
        more = s.recv(n - len(data))
        if not more: raise EOFError(data)
        data += more
    return data

def option(s, number, data=b""):
    """Sends an option; returns the types of its replies up to the last."""
    s.sendall(b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data)
    kinds = []
    while not kinds or kinds[-1] in (2, 3, 4):
        _, _, kind, length = struct.unpack(">QIII", get(s, 20))
        get(s, length); kinds.append(kind)
    return kinds

def string(text): return struct.pack(">I", len(text)) + text

def context():
    c = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    c.check_hostname = False; c.verify_mode = ssl.CERT_NONE
    return c

def secure(s, c=None):
    assert option(s, 5) == [1]
    return (c or context()).wrap_socket(s)
"#;

/// Runs a script with that client; `sys.argv[2]` is the server's socket, then come more words.
#[track_caller]
pub(super) fn python(server: &Server, script: &str, words: &[&str]) -> String {
    let dir = temp();
    fs::write(dir.path().join("client.py"), CLIENT).expect("write");
    let (path, socket) = (dir.path().display().to_string(), server.socket().display().to_string());
    let first = ["python3", "-c", script, &path, &socket];
    util::run_ok(first.iter().chain(words))
}

fn with_certificates(mode: &str, more: &[&str]) -> (Server, Authority) {
    let authority = Authority::new();
    let option = authority.option("server");
    let words = ["-v", mode, &option, "memory", "1M"];
    (Server::start(words.iter().chain(more)), authority)
}

#[test]
fn where_tls_is_required_nothing_is_said_before() {
    let dir = temp();
    let server = Server::start(["-v", "--tls=require", &psk(&keys(dir.path())), "memory", "1M"]);
    let mut raw = Raw::options(&server);
    for (option, data) in [
        (7, go("")),
        (6, go("")),
        (3, vec![]),
        (8, vec![]),
        (10, contexts("", &[])),
        (11, vec![]),
        (99, vec![1; 9]),
    ] {
        raw.option(option, &data);
        assert_eq!(raw.reply(), ERR_TLS_REQD, "option {option}");
    }
    raw.option(2, b"");
    assert_eq!(raw.reply(), ACK);
    raw.ends();
    let mut raw = Raw::options(&server);
    raw.option(1, b"");
    raw.ends();
    says(&server, 0, "an export before TLS, which is required");
    // libnbd does without TLS unless it is asked for.
    let run = util::run(["nbdinfo", &server.uri()]);
    assert!(run.code != 0 && run.stderr.contains("error to opt_go"), "{}", run.stderr);
}

#[test]
fn where_tls_is_offered_both_are_served() {
    let dir = temp();
    let keys = keys(dir.path());
    let server = Server::start(["--tls=on", &psk(&keys), "memory", "1M"]);
    assert!(!util::run_ok(["nbdinfo", &server.uri()]).contains("with TLS"));
    assert!(util::run_ok(["nbdinfo", &super::psk_uri(&server, "bob", &keys)]).contains("with TLS"));
    let mut raw = Raw::options(&server);
    raw.option(5, b"x");
    assert_eq!(raw.reply(), ERR_INVALID);
    raw.option(8, b"");
    assert_eq!(raw.reply(), ACK);
    raw.option(10, &contexts("", &["base:allocation"]));
    assert_eq!((raw.reply(), raw.reply()), (META_CONTEXT, ACK));
    raw.option(7, &go(""));
}

#[test]
fn what_was_said_before_tls_is_forgotten() {
    let (server, _authority) = with_certificates("--tls=on", &[]);
    let script = r#"
import sys
sys.path.insert(0, sys.argv[1])
from client import *
INVALID = 1 << 31 | 3
CONTEXT = string(b"") + struct.pack(">I", 1) + string(b"base:allocation")

s = start(sys.argv[2])
assert option(s, 8) == [1]
assert option(s, 8) == [INVALID]
assert option(s, 10, CONTEXT) == [4, 1]
assert option(s, 3) == [2, 1]
assert option(s, 3) == [INVALID]
for _ in range(20): option(s, 99)
s = secure(s)
# A context without structured replies is an error: they are not agreed on any more.
assert option(s, 10, CONTEXT) == [INVALID]
assert option(s, 5) == [INVALID]
assert option(s, 3) == [2, 1]
for _ in range(20): option(s, 99)
assert option(s, 8) == [1]
assert option(s, 7, string(b"") + struct.pack(">H", 0)) == [3, 1]
# No context was chosen for this one.
s.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 7, 1, 0, 4096))
magic, flags, kind, cookie, length = struct.unpack(">IHHQI", get(s, 20))
assert magic == 0x668e33ef and kind >= 1 << 15, kind
get(s, length)
s.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 2, 1, 0, 0))
# The end is told, so that nothing can be cut off.
assert s.recv(1) == b""
"#;
    python(&server, script, &[]);
}

#[test]
fn bytes_between_end_the_connection() {
    let (server, _authority) = with_certificates("--tls=require", &[]);
    // An option that somebody put in behind STARTTLS.
    let mut raw = Raw::options(&server);
    raw.send(&[&b"IHAVEOPT\0\0\0\x05\0\0\0\0"[..], b"IHAVEOPT\0\0\0\x08\0\0\0\0"].concat());
    raw.ends();
    says(&server, 0, "error: TLS: unencrypted data came between NBD_OPT_STARTTLS and TLS");
    // The same after the answer, where the handshake has to be.
    let mut raw = Raw::options(&server);
    raw.option(5, b"");
    assert_eq!(raw.reply(), ACK);
    let before = server.stderr().len();
    raw.option(8, b"");
    raw.ends();
    says(&server, before, "error: TLS: ");
}

#[test]
fn a_handshake_has_a_deadline() {
    let (server, _authority) = with_certificates("--tls=require", &["--timeout=200ms"]);
    // A client that says nothing more, and one that stops in the middle of its first record.
    for begin in [&b""[..], b"\x16\x03\x01\x02\0\x01\0"] {
        let before = server.stderr().len();
        let mut raw = Raw::options(&server);
        raw.option(5, b"");
        assert_eq!(raw.reply(), ACK);
        raw.send(begin);
        raw.ends();
        says(&server, before, "error: TLS: the negotiation took too long");
    }
}

#[test]
fn a_connection_that_is_cut_is_told_from_one_that_ends() {
    let (server, _authority) = with_certificates("--tls=require", &[]);
    let script = r#"
import sys
sys.path.insert(0, sys.argv[1])
from client import *
s = secure(start(sys.argv[2]))
assert option(s, 7, string(b"") + struct.pack(">H", 0)) == [3, 1]
if sys.argv[3] == "polite": s.unwrap()
else: s.close()
"#;
    python(&server, script, &["polite"]);
    says(&server, 0, "debug: the connection was closed");
    assert!(!server.stderr().contains("close_notify"), "{}", server.stderr());
    python(&server, script, &["rude"]);
    says(&server, 0, "debug: TLS: the connection was cut, for no close_notify came");
}

/// The start of a script with a relay that says STARTTLS for s_client, which knows no NBD.
const RELAY: &str = r#"
import sys, threading, subprocess
sys.path.insert(0, sys.argv[1])
from client import *
s = start(sys.argv[2]); assert option(s, 5) == [1]
listener = socket.create_server(("127.0.0.1", 0))
def relay():
    peer, _ = listener.accept()
    def copy(a, b):
        try:
            while data := a.recv(65536): b.sendall(data)
            b.shutdown(socket.SHUT_WR)
        except OSError: pass
    threading.Thread(target=copy, args=(peer, s), daemon=True).start()
    copy(s, peer)
threading.Thread(target=relay, daemon=True).start()
"#;

#[test]
fn openssl_agrees() {
    let (server, authority) = with_certificates("--tls=on", &[]);
    let script = RELAY.to_owned()
        + r#"
out = subprocess.run(["openssl", "s_client", "-connect", "127.0.0.1:%d" % listener.getsockname()[1],
    "-CAfile", sys.argv[3], "-verify_hostname", "localhost", "-verify_return_error"],
    input=b"IHAVEOPT\0\0\0\2\0\0\0\0", capture_output=True, timeout=60)
print(out.stdout.decode(errors="replace"))
"#;
    let out = python(&server, &script, &[authority.of("ca.pem").to_str().expect("UTF-8")]);
    assert!(out.contains("Verify return code: 0 (ok)"), "{out}");
    assert!(out.contains("TLS_AES_128_GCM_SHA256"), "{out}");
    assert!(out.contains("Secure Renegotiation IS NOT supported"), "{out}");
}

/// What scanners of TLS servers look for: old versions, ciphers without encryption, without a certificate or with a broken
/// algorithm, and a second handshake within a connection.
#[test]
fn broken_versions_and_ciphers_are_refused() {
    let (server, _authority) = with_certificates("--tls=require", &[]);
    let script = r#"
import sys, warnings
sys.path.insert(0, sys.argv[1])
warnings.simplefilter("ignore")
from client import *
V = ssl.TLSVersion
def talks(version, ciphers):
    c = context()
    try:
        c.set_ciphers(ciphers + ":@SECLEVEL=0")
        c.minimum_version = c.maximum_version = version
    except (ssl.SSLError, ValueError):
        return None
    s = start(sys.argv[2])
    try:
        t = secure(s, c)
        return t.version(), t.cipher()[0]
    except (ssl.SSLError, OSError):
        return False
    finally:
        s.close()
assert talks(V.TLSv1_3, "ALL"), "this client works"
good = talks(V.TLSv1_2, "ALL:COMPLEMENTOFALL")
assert good[0] == "TLSv1.2" and good[1].startswith("ECDHE-"), good
tried = 0
for version in V.TLSv1, V.TLSv1_1:
    answer = talks(version, "ALL:COMPLEMENTOFALL")
    assert not answer, answer
    tried += answer is False
for ciphers in "NULL", "aNULL", "EXPORT", "LOW", "DES", "3DES", "RC4", "MD5", "kRSA", "CAMELLIA", "SEED", "IDEA", "ADH", "AECDH":
    answer = talks(V.TLSv1_2, ciphers)
    assert not answer, (ciphers, answer)
    tried += answer is False
assert tried >= 4, tried
"#;
    python(&server, script, &[]);

    let script = RELAY.to_owned()
        + r#"
command = ["openssl", "s_client", "-tls1_2", "-connect", "127.0.0.1:%d" % listener.getsockname()[1]]
try:
    out = subprocess.run(command, input=b"R\n", capture_output=True, timeout=3).stderr
except subprocess.TimeoutExpired as waits:
    out = waits.stderr
print(out.decode(errors="replace"))
"#;
    let out = python(&server, &script, &[]);
    let (first, second) = out.split_once("RENEGOTIATING").expect("an attempt");
    assert!(first.contains("verify return") && !second.contains("verify return"), "{out}");
}
