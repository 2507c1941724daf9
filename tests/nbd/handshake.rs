//! Negotiation, by libnbd: what an export says about itself, lists, options in every order.

use serde_json::Value;

use crate::util::{
    self, Server, image,
    raw::{Raw, contexts, go},
    temp,
};

fn info(server: &Server) -> Value {
    let json = util::run_ok(["nbdinfo", "--json", "--no-content", &server.uri()]);
    serde_json::from_str(&json).expect("JSON")
}

/// The flags of the only export.
fn flags(server: &Server) -> Vec<String> {
    let info = info(server);
    let export = info["exports"][0].as_object().expect("an export").clone();
    let mut on: Vec<_> =
        export.into_iter().filter(|(_, v)| *v == Value::Bool(true)).map(|(k, _)| k).collect();
    on.sort();
    on
}

#[test]
fn an_export_tells_its_flags() {
    let all = [
        "can_cache",
        "can_df",
        "can_fast_zero",
        "can_flush",
        "can_fua",
        "can_multi_conn",
        "can_trim",
        "can_zero",
    ];
    assert_eq!(flags(&Server::start(["memory", "1M"])), all);
    let readonly: Vec<_> = flags(&Server::start(["-r", "memory", "1M"]));
    assert_eq!(readonly, ["can_cache", "can_df", "can_flush", "can_multi_conn", "is_read_only"]);
    assert!(!flags(&Server::start(["--no-sr", "memory", "1M"])).contains(&"can_df".to_owned()));
    let serial = flags(&Server::start(["--filter=noparallel", "memory", "1M", "serialize=connections"]));
    assert!(!serial.contains(&"can_multi_conn".to_owned()));
}

/// The flags of each plugin and filter are those of the C nbdkit, where it has no fault.
#[test]
fn flags_are_those_of_the_c_nbdkit() {
    let dir = temp();
    let disk = image(dir.path(), "disk", 1 << 20);
    let disk = disk.to_str().expect("UTF-8");
    for words in [
        &["memory", "1M"][..],
        &["-r", "memory", "1M"],
        &["file", disk],
        &["null", "1M"],
        &["zero"],
        &["pattern", "1M"],
        &["full", "1M"],
        &["data", "raw=abc"],
        &["info"],
        &["--filter=nozero", "memory", "1M"],
        &["--filter=fua", "memory", "1M", "fuamode=emulate"],
        &["--filter=noextents", "memory", "1M"],
        &["--filter=blocksize", "memory", "1M"],
        &["--filter=truncate", "memory", "1M", "round-up=4M"],
        &["--filter=offset", "memory", "1M", "offset=512"],
        &["--filter=log", "memory", "1M"],
        &["--filter=delay", "memory", "1M"],
        &["--filter=error", "memory", "1M"],
        &["--filter=noparallel", "memory", "1M"],
    ] {
        let theirs = util::run_ok(
            ["nbdkit", "-U", "-"]
                .iter()
                .chain(words)
                .chain(&["--run", "nbdinfo --json --no-content \"$uri\""]),
        );
        let theirs: Value = serde_json::from_str(&theirs).expect("JSON");
        let ours = info(&Server::start(words));
        let keys = [
            "is_read_only",
            "is_rotational",
            "can_cache",
            "can_df",
            "can_fast_zero",
            "can_flush",
            "can_fua",
            "can_multi_conn",
            "can_trim",
            "can_zero",
            "export-size",
            "block_size_minimum",
        ];
        for key in keys {
            // Fast zero is honest in ours where the C nbdkit does not offer it at all.
            if key == "can_fast_zero" && words.contains(&disk) {
                continue;
            }
            // Newer versions of the C nbdkit tell it.
            if key == "block_size_minimum" && (words.contains(&"memory") || words.contains(&"data")) {
                assert_eq!(ours["exports"][0][key], 1, "{words:?}");
                continue;
            }
            assert_eq!(ours["exports"][0][key], theirs["exports"][0][key], "{key} of {words:?}");
        }
    }
}

#[test]
fn a_directory_is_a_list_of_exports() {
    let dir = temp();
    for (name, size) in [("one", 1 << 20), ("two words", 2 << 20), ("drei-ä", 3 << 20)] {
        image(dir.path(), name, size);
    }
    std::fs::create_dir(dir.path().join("folder")).expect("mkdir");
    let server = Server::start(["file", &format!("dir={}", dir.path().display())]);
    let json = util::run_ok(["nbdinfo", "--list", "--json", &server.uri()]);
    let list: Value = serde_json::from_str(&json).expect("JSON");
    let mut exports: Vec<_> = list["exports"]
        .as_array()
        .expect("exports")
        .iter()
        .map(|e| {
            (
                e["export-name"].as_str().expect("a name").to_owned(),
                e["export-size"].as_u64().expect("a size"),
            )
        })
        .collect();
    exports.sort();
    let want = [("drei-ä", 3 << 20), ("one", 1 << 20), ("two words", 2 << 20)];
    assert_eq!(exports, want.map(|(name, size)| (name.to_owned(), size)));
    assert_eq!(util::run_ok(["nbdinfo", "--size", &server.uri_of("two%20words")]).trim(), "2097152");
    // Nothing outside the folder can be reached, and a missing export is an error that the connection survives.
    for name in ["..", "../one", "/etc/passwd", "missing", "folder", ""] {
        let script = format!(
            "h.set_export_name({name:?})
try:
    h.opt_go()
    raise SystemExit('opened')
except nbd.Error as e:
    assert e.errno == 'ENOENT' or e.errno == 'EINVAL' or e.errno == 'EACCES', e.errno
h.set_export_name('one')
h.opt_go()
assert h.get_size() == 1 << 20"
        );
        util::run_ok(["nbdsh", "--opt-mode", "-u", &server.uri(), "-c", &script]);
    }
}

#[test]
fn options_in_any_order() {
    let server = Server::start(["info", "mode=exportname"]);
    let script = "
h.set_export_name('first')
h.opt_info()
assert h.get_size() == 5
h.set_export_name('the second')
h.opt_info()
assert h.get_size() == 10
h.opt_list(lambda name, description: 0)
h.opt_go()
assert h.pread(10, 0) == b'the second'
";
    util::run_ok(["nbdsh", "--opt-mode", "-u", &server.uri(), "-c", script]);
}

const ACK: u32 = 1;
const GO: u32 = 7;
const LIST_META_CONTEXT: u32 = 9;
const SET_META_CONTEXT: u32 = 10;
const META_CONTEXT: u32 = 4;

/// In the option phase, with structured replies.
fn structured(server: &Server) -> Raw {
    let mut raw = Raw::options(server);
    raw.option(8, b"");
    assert_eq!(raw.reply(), ACK);
    raw
}

#[test]
fn a_context_holds_for_its_export_only() {
    let server = Server::start(["info", "mode=exportname"]);
    for (export, works) in [("one", true), ("another", false)] {
        let mut raw = structured(&server);
        raw.option(SET_META_CONTEXT, &contexts("one", &["base:allocation"]));
        assert_eq!((raw.reply(), raw.reply()), (META_CONTEXT, ACK));
        raw.option(GO, &go(export));
        while raw.reply() != ACK {}
        raw.request(0, 7, 0, 3);
        let header = raw.read(20);
        let kind = u16::from_be_bytes([header[6], header[7]]);
        assert_eq!(kind == 5, works, "{export}: chunk type {kind}");
    }
}

#[test]
fn contexts_are_listed_by_query() {
    let server = Server::start(["memory", "1M"]);
    for (queries, found) in [
        (&[][..], 1),
        (&["base:"], 1),
        (&["base:allocation"], 1),
        (&["base:other"], 0),
        (&["qemu:dirty-bitmap:x", "x-no:"], 0),
    ] {
        let mut raw = structured(&server);
        raw.option(LIST_META_CONTEXT, &contexts("", queries));
        let mut names = 0;
        while raw.reply() == META_CONTEXT {
            names += 1;
        }
        assert_eq!(names, found, "{queries:?}");
    }
    // SET has no wildcard.
    let mut raw = structured(&server);
    raw.option(SET_META_CONTEXT, &contexts("", &["base:"]));
    assert_eq!(raw.reply(), ACK);
}

#[test]
fn its_limits_can_be_chosen() {
    const ERR_UNSUP: u32 = 1 << 31 | 1;
    let server = Server::start(["--handshake-limits=options=3,bytes=1000", "memory", "1M"]);
    let mut raw = Raw::options(&server);
    for _ in 0..3 {
        raw.option(99, b"");
        assert_eq!(raw.reply(), ERR_UNSUP);
    }
    raw.option(99, b"");
    raw.ends();
    // The bytes count together.
    let mut raw = Raw::options(&server);
    for length in [500, 500] {
        raw.option(99, &vec![0; length]);
        assert_eq!(raw.reply(), ERR_UNSUP);
    }
    raw.option(99, b"x");
    raw.ends();
    // Three options do, and more after the exports were listed.
    util::run_ok(["nbdinfo", "--size", &server.uri()]);
    let mut raw = Raw::options(&server);
    raw.option(3, b"");
    assert_eq!((raw.reply(), raw.reply()), (2, ACK));
    for _ in 0..5 {
        raw.option(99, b"");
        assert_eq!(raw.reply(), ERR_UNSUP);
    }
    raw.option(99, b"");
    raw.ends();
    // Whatever the client is doing, its time is over some day.
    let server = Server::start(["--handshake-limits=seconds=100ms,options=4000000000", "memory", "1M"]);
    Raw::options(&server).ends();
    let mut raw = Raw::options(&server);
    while raw.option_answered(99) {}
    for (limits, line) in [
        ("options=0", "at least 1"),
        ("bytes=0", "at least 1"),
        ("seconds=0", "more than 0"),
        ("seconds=soon", "'soon'"),
        ("options=1,nonsense", "'nonsense' is not options=N, bytes=SIZE or seconds=N"),
        ("", "'' is not"),
    ] {
        let limits = format!("--handshake-limits={limits}");
        let said = util::run([util::NBDKIT, &limits, "memory", "1M", "--run", "true"]).refused();
        assert!(said.contains(line) && said.contains("--handshake-limits"), "{said}");
    }
    let both = ["--timeout=3", "--handshake-limits=seconds=3", "memory", "1M", "--run", "true"];
    let said = util::run([util::NBDKIT].iter().chain(&both)).refused();
    assert!(said.contains("give one of them"), "{said}");
}

#[test]
fn abort_is_clean() {
    let server = Server::start(["-v", "memory", "1M"]);
    util::run_ok(["nbdsh", "--opt-mode", "-u", &server.uri(), "-c", "h.opt_abort()"]);
    util::run_ok(["nbdinfo", &server.uri()]);
}

#[test]
fn meta_contexts_can_be_refused() {
    let out = util::run(["nbdinfo", "--map", &Server::start(["--no-mc", "memory", "1M"]).uri()]);
    assert!(out.code != 0 && !out.stdout.contains("hole"), "{}", out.stdout);
}

#[test]
fn names_up_to_4096_bytes() {
    let server = Server::start(["info", "mode=exportname"]);
    let name = "x".repeat(4096);
    assert_eq!(util::run_ok(["nbdinfo", "--size", &server.uri_of(&name)]).trim(), "4096");
}
