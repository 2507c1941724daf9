//! The options' words, and what `--run` is told.

use super::keys;
use crate::util::{self, sh, temp};

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
        (&["--tls=require", "--tls-certificates=/nonexistent"], "no directory /nonexistent"),
        (&["--tls-psk=/nonexistent"], "/nonexistent"),
        (&["--tls=require", "-o", "--tls-psk=/x"], "-o"),
    ] {
        let words = [nbdkit].into_iter().chain(words.iter().copied()).chain(["memory", "1M"]);
        let error = util::run(words).refused();
        assert!(error.contains(why), "{error}");
    }
}

#[test]
fn debug_flags_and_the_log_of_keys() {
    let dir = temp();
    let keys = keys(dir.path());
    let keys = keys.display();
    let uri = format!("nbds+unix://alice@/?socket=$unixsocket&tls-psk-file={keys}");
    let said = |words: &str| {
        let log = dir.path().join("log");
        sh(&format!(
            "{} -v {words} --tls=require --tls-psk={keys} memory 1M --run 'nbdinfo --size \"{uri}\"' 2> {}",
            util::NBDKIT,
            log.display()
        ));
        std::fs::read_to_string(log).expect("messages")
    };
    let plain = said("");
    assert!(!plain.contains("TLS: handshake:") && !plain.contains("TLS: session:"), "{plain}");
    let one = said("-D nbdkit.tls.log=1");
    assert!(one.contains("TLS: handshake: ") && !one.contains("bytes received"), "{one}");
    assert!(said("-D nbdkit.tls.log=9").contains("bytes received"));
    let session = said("-D nbdkit.tls.session=1");
    assert!(
        session.contains("TLS: session: TLSv1.3, cipher TLS_AES_128_GCM_SHA256, by pre-shared keys"),
        "{session}"
    );
    // Wireshark's format: a label, what the client chose by chance, a secret.
    let file = dir.path().join("secrets");
    let path = file.display();
    sh(&format!(
        "SSLKEYLOGFILE={path} {} --tls-psk={keys} --tls=require memory 1M --run 'unset SSLKEYLOGFILE; nbdinfo \"{uri}\" && nbdinfo \"{uri}\"'",
        util::NBDKIT
    ));
    let secrets = std::fs::read_to_string(&file).expect("secrets");
    let of_clients: Vec<&str> =
        secrets.lines().filter(|l| l.starts_with("CLIENT_TRAFFIC_SECRET_0 ")).collect();
    assert!(of_clients.len() >= 2, "{secrets}");
    for line in secrets.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        assert!(
            words.len() == 3 && words[1].len() == 64 && words[2].bytes().all(|b| b.is_ascii_hexdigit()),
            "{line}"
        );
    }
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&file).expect("stat").permissions());
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn the_priorities_of_the_machine() {
    let dir = temp();
    let keys = keys(dir.path());
    let (keys, policy) = (keys.display(), dir.path().join("policy"));
    let uri = format!("nbds+unix://alice@/?socket=$unixsocket&tls-psk-file={keys}");
    let versions = |text: &str, priority: &str| {
        std::fs::write(&policy, text).expect("write");
        sh(&format!(
            "GNUTLS_SYSTEM_PRIORITY_FILE={} {} -v --tls-priority={priority} --tls=require --tls-psk={keys} memory 1M \
             --run 'unset GNUTLS_SYSTEM_PRIORITY_FILE; nbdinfo --size \"{uri}\"' 2>&1",
            policy.display(),
            util::NBDKIT
        ))
    };
    let text = "SYSTEM=NORMAL:-VERS-TLS1.3\nNBDKIT=NORMAL\n";
    assert!(versions(text, "@SYSTEM").contains("TLSv1.2"));
    assert!(versions(text, "@NBDKIT,SYSTEM").contains("TLSv1.3"));
    assert!(versions("SYSTEM=NORMAL:-VERS-TLS1.3\n", "@NBDKIT,SYSTEM").contains("TLSv1.2"));
    assert!(versions("", "@NBDKIT,SYSTEM").contains("TLSv1.3"));
}
