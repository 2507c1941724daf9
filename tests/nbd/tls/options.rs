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
