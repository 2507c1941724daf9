//! Clients that no other test has at the other end.

use std::fs;

use crate::util::{self, NBDKIT, Server, image, patterned, qemu_io, temp};

/// A directory of two exports, and the words that serve it.
fn two(dir: &std::path::Path) -> [String; 2] {
    image(dir, "first", 1 << 20);
    image(dir, "zweite ä", 2 << 20);
    ["file".into(), format!("dir={}", dir.display())]
}

#[test]
fn nbd_client_lists_exports() {
    let dir = temp();
    let words = two(dir.path());
    let server = Server::start(&words);
    let over_unix = util::sh(&format!("nbd-client -l -unix {}", server.socket().display()));
    let [plugin, parameter] = &words;
    let list = "nbd-client -l 127.0.0.1 $port";
    let over_tcp = util::run_ok([NBDKIT, "-i", "127.0.0.1", "-p", "0", plugin, parameter, "--run", list]);
    for out in [over_unix, over_tcp] {
        let mut names: Vec<&str> = out.lines().filter(|l| !l.is_empty() && !l.contains("..")).collect();
        names.sort_unstable();
        assert_eq!(names, ["first", "zweite ä"], "{out}");
    }
}

#[test]
fn qemu_nbd_lists_exports() {
    let dir = temp();
    let server = Server::start(two(dir.path()));
    let out = util::run_ok(["qemu-nbd", "--list", "-k", &server.socket().display().to_string()]);
    for line in
        ["exports available: 2", "export: 'first'", "size:  1048576", "size:  2097152", "base:allocation"]
    {
        assert!(out.contains(line), "{line}: {out}");
    }
}

/// The C nbdkit as a client, and clients of its own behind it: what it offers is what ours does, data and holes too.
#[test]
fn the_nbd_plugin_of_the_c_nbdkit() {
    let dir = temp();
    let source = patterned(dir.path(), "source", (3 << 20) + 512);
    let target = image(dir.path(), "target", 16 << 20);
    for words in [
        &["file", target.to_str().expect("UTF-8")][..],
        &["--no-sr", "file", target.to_str().expect("UTF-8")],
    ] {
        let server = Server::start(words);
        let behind = |command: &str| {
            let uri = format!("uri={}", server.uri());
            util::run_ok(["nbdkit", "-U", "-", "nbd", &uri, "--run", command])
        };
        let info = behind("nbdinfo --json --no-content $uri");
        let direct = util::run_ok(["nbdinfo", "--json", "--no-content", &server.uri()]);
        let flags = |json: &str| -> Vec<serde_json::Value> {
            let info: serde_json::Value = serde_json::from_str(json).expect("JSON");
            let export = &info["exports"][0];
            ["export-size", "is_read_only", "can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn"]
                .map(|key| export[key].clone())
                .to_vec()
        };
        assert_eq!(flags(&info), flags(&direct));
        behind(&format!("nbdcopy --flush {} $uri", source.display()));
        let copy = dir.path().join("copy");
        behind(&format!("rm -f {0}; nbdcopy $uri {0}", copy.display()));
        let (source, copy) = (fs::read(&source).expect("read"), fs::read(&copy).expect("read"));
        assert!(copy[..source.len()] == source[..], "the copy differs");
        assert!(copy[source.len()..].iter().all(|b| *b == 0) && copy.len() == 16 << 20);
        if !words.contains(&"--no-sr") {
            let map = behind("nbdinfo --map --totals $uri");
            assert!(map.contains("hole,zero"), "{map}");
        }
        qemu_io(&server.uri(), &["write -z 1M 64k", "discard 2M 64k"]);
        behind("nbdsh -u $uri -c 'assert h.pread(65536, 1 << 20) == bytes(65536)'");
    }
}

/// And the other way round: ours on a socket that the C nbdkit passes on, through several connections at once.
#[test]
fn fio_through_the_c_nbdkit() {
    let server = Server::start(["memory", "16M"]);
    util::run_ok([
        "nbdkit",
        "-U",
        "-",
        "nbd",
        &format!("uri={}", server.uri()),
        "shared=true",
        "--run",
        "fio --name=v --ioengine=nbd --uri=\"$uri\" --rw=randwrite --bsrange=512-64k --size=16m --iodepth=16 \
         --verify=crc32c --verify_fatal=1 --verify_state_save=0 --output-format=terse",
    ]);
}
