//! The nbd plugin as a client that encrypts, with certificates: to our server and to the distribution's, which has GnuTLS.

use super::Authority;
use crate::util::{self, NBDKIT, Run};

/// A proxy for a server on a TCP port, which shows somebody's certificate.
fn proxied(authority: &Authority, server: &str, whose: &str, proxy: &str) -> Run {
    let (option, client) = (authority.option(whose), authority.of("client"));
    let proxy = format!(
        "exec {NBDKIT} -U - nbd hostname=localhost port=$port tls=require tls-certificates={} shared=true {proxy} \
         --run 'qemu-io -f raw -c \"write -P 1 0 1M\" -c \"read -P 1 0 1M\" $uri'",
        client.display()
    );
    let words =
        [server, "-p", "0", "--tls=require", "--tls-verify-peer", &option, "memory", "1M", "--run", &proxy];
    util::run(words)
}

#[test]
fn certificates_of_both_sides() {
    let authority = Authority::new();
    let out = proxied(&authority, NBDKIT, "server", "").ok();
    assert!(!out.contains("failed"), "{out}");
    for (whose, proxy, why) in [("foreign", "", "not trusted"), ("stale", "", "expired")] {
        let run = proxied(&authority, NBDKIT, whose, proxy);
        assert!(run.code != 0 && run.stderr.contains(why), "{whose} {proxy}: {}", run.stderr);
    }
    let out = proxied(&authority, NBDKIT, "foreign", "tls-verify=false").ok();
    assert!(!out.contains("failed"), "{out}");
}

/// The certificate is for another name.
#[test]
fn names_are_compared() {
    let authority = Authority::new();
    let (option, client) = (authority.option("server"), authority.of("client"));
    let ask = |host: &str, name: &str| {
        let uri = format!("nbds://{host}:$port/?tls-certificates={}{name}", client.display());
        let proxy = format!("exec {NBDKIT} -U - nbd \"{uri}\" shared=true --run 'nbdinfo --size $uri'");
        util::run([NBDKIT, "-p", "0", "--tls=require", &option, "memory", "1M", "--run", &proxy])
    };
    assert_eq!(ask("localhost", "").ok(), "1048576\n");
    assert_eq!(ask("127.0.0.1", "").ok(), "1048576\n");
    let wrong = ask("localhost", "&tls-hostname=example.com");
    assert!(wrong.code != 0 && wrong.stderr.contains("hostname mismatch"), "{}", wrong.stderr);
    assert_eq!(ask("127.0.0.1", "&tls-hostname=localhost").ok(), "1048576\n");
}
