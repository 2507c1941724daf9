//! TLS with certificates and pre-shared keys: through clients that use GnuTLS, and through Python's OpenSSL where a
//! client has to do what they never do.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use crate::util::{self, Run, Server, temp};

mod certificates;
mod client;
mod keys;
mod options;
mod wire;

/// What the server shall have said by now, or say soon: a client may know of the end before.
#[track_caller]
fn says(server: &Server, from: usize, what: &str) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !server.stderr()[from..].contains(what) {
        assert!(Instant::now() < deadline, "no {what:?} in: {}", &server.stderr()[from..]);
        std::thread::yield_now();
    }
}

/// An authority, and what it and a stranger signed, made by certtool. In each directory: `ca-cert.pem`, and the
/// certificate of a server or a client.
struct Authority(tempfile::TempDir);

const SCRIPT: &str = r#"
cd "$0"
authority() {
    certtool --generate-privkey --ecc > "$1-key.pem"
    printf 'cn = "%s"\norganization = Example\nca\ncert_signing_key\ncrl_signing_key\n' "$1" > t
    certtool --generate-self-signed --load-privkey "$1-key.pem" --template t > "$1.pem"
}
issue() { # directory, authority, kind, more of the template, algorithm
    mkdir -p "$1"
    cp ca.pem "$1/ca-cert.pem"
    certtool --generate-privkey --"${5:-ecc}" > "$1/$3-key.pem"
    printf 'cn = localhost\norganization = "Us, %s"\ndns_name = localhost\nip_address = 127.0.0.1\ntls_www_%s
signing_key\nencryption_key\n%b' "$1" "$3" "$4" > t
    certtool --generate-certificate --load-ca-certificate "$2.pem" --load-ca-privkey "$2-key.pem" \
        --load-privkey "$1/$3-key.pem" --template t > "$1/$3-cert.pem"
}
past='activation_date = "2001-01-01 00:00:00"\nexpiration_date = "2002-01-01 00:00:00"\n'
authority ca; authority other
issue server ca server ''
issue stale ca server "$past"
issue foreign other server ''
issue client ca client ''
issue qemu ca client '' rsa
issue stranger other client ''
issue expired ca client "$past"
issue revoked ca client ''
mkdir anonymous; cp ca.pem anonymous/ca-cert.pem
printf 'crl_next_update = 9000\ncrl_number = 1\n' > t
certtool --generate-crl --load-ca-certificate ca.pem --load-ca-privkey ca-key.pem \
    --load-certificate revoked/client-cert.pem --template t > server/ca-crl.pem
"#;

impl Authority {
    fn new() -> Self {
        let dir = temp();
        let script = format!("{{ {SCRIPT} }} 2>/dev/null");
        let words = ["bash", "-euo", "pipefail", "-c", &script, &dir.path().display().to_string()];
        util::run_ok(words);
        Authority(dir)
    }

    /// One of the directories.
    fn of(&self, whose: &str) -> PathBuf {
        self.0.path().join(whose)
    }

    fn option(&self, whose: &str) -> String {
        format!("--tls-certificates={}", self.of(whose).display())
    }

    /// Asks a server on a Unix socket for the size, with somebody's certificates.
    fn size(&self, server: &Server, whose: &str) -> Run {
        let uri = format!(
            "nbds+unix://localhost/?socket={}&tls-certificates={}",
            server.socket().display(),
            self.of(whose).display()
        );
        util::run(["nbdsh", "-c", &self.script(&uri)])
    }

    /// A client that checks the server's certificate.
    fn script(&self, uri: &str) -> String {
        format!(
            "h.set_uri_allow_local_file(True); h.set_tls_verify_peer(True)
h.connect_uri('{uri}'); assert h.get_tls_negotiated(); print(h.get_size()); h.shutdown()"
        )
    }
}

/// Keys of three users, made by psktool.
fn keys(dir: &Path) -> PathBuf {
    let file = dir.join("keys.psk");
    for user in ["alice", "bob", "qemu"] {
        util::run_ok(["psktool", "-u", user, "-p", file.to_str().expect("UTF-8")]);
    }
    file
}

fn psk(keys: &Path) -> String {
    format!("--tls-psk={}", keys.display())
}

/// The URI of a server for one of the users.
fn psk_uri(server: &Server, user: &str, keys: &Path) -> String {
    format!("nbds+unix://{user}@/?socket={}&tls-psk-file={}", server.socket().display(), keys.display())
}
