//! What scripts are told and how they are understood, compared with the distribution's nbdkit.

use std::fs;

use super::{captive, captive_of, nbdsh, script};
use crate::util::{NBDKIT, run, temp};

/// The distribution's server.
const THEIRS: &str = "nbdkit";

/// Answers everything and writes down what it was asked.
const RECORDER: &str = r#"#!/bin/bash
{ printf '[%s]' "$@"; echo; } >>"$(dirname "$0")/log"
case $1 in
get_size) echo 1M ;;
can_write | can_flush | can_trim | can_zero | can_extents | can_fast_zero | can_multi_conn) exit 0 ;;
can_fua | can_cache) echo native ;;
pread) head -c "$3" /dev/zero ;;
pwrite) cat >/dev/null ;;
trim | zero | flush | cache | config) exit 0 ;;
extents) printf '0 4K\n4K 1020K hole,zero\n' ;;
open) printf 'handle %s\n' "$3" ;;
thread_model) echo parallel ;;
magic_config_key) echo size ;;
list_exports) printf 'INTERLEAVED\none\nthe first\ntwo\n' ;;
default_export) echo one ;;
export_description) echo 'a disk' ;;
block_size) echo 1 4K 1M ;;
*) exit 2 ;;
esac
"#;

#[test]
fn a_script_is_asked_what_the_c_nbdkit_asks() {
    let requests = "h.pread(512, 0); h.pwrite(b\"x\" * 512, 1024, nbd.CMD_FLAG_FUA)\n\
        h.zero(512, 0, nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_FAST_ZERO); h.zero(512, 0, nbd.CMD_FLAG_NO_HOLE)\n\
        h.trim(512, 0, nbd.CMD_FLAG_FUA); h.cache(512, 0); h.flush()";
    let command = format!(
        "nbdinfo --list \"$uri\" | grep -v uri; {}; nbdinfo --map \"$uri\"; nbdinfo --json \"$uri\" | grep -v uri",
        nbdsh(requests)
    );
    let serve = |program: &str| {
        let dir = temp();
        let path = script(dir.path(), "recorder", RECORDER);
        let path = path.to_str().expect("UTF-8");
        let out = captive_of(program, ["sh", path, "a=b c", "bare"], &command).ok();
        let log = fs::read_to_string(dir.path().join("log")).expect("a log");
        // The order in which capabilities are asked is the server's affair, and nothing is called `cleanup` in 1.32, which
        // may also end before it closes the last disk.
        let mut lines: Vec<String> = log
            .lines()
            .map(str::to_owned)
            .filter(|line| line != "[cleanup]" && !line.starts_with("[close]"))
            .collect();
        lines.sort();
        (out, lines, log)
    };
    let (ours, theirs) = (serve(NBDKIT), serve(THEIRS));
    assert_eq!(ours.0, theirs.0);
    assert_eq!(ours.1, theirs.1);
    let count = |what: &str| ours.2.lines().filter(|line| line.starts_with(what)).count();
    assert_eq!(count("[close]"), count("[open]"), "{}", ours.2);
    assert!(
        ours.2.contains("[config][size][bare]\n[config_complete]\n[thread_model]\n[get_ready]\n"),
        "{}",
        ours.2
    );
    assert!(ours.2.contains("[zero][handle one][512][0][fua,may_trim,fast]"), "{}", ours.2);
    assert!(ours.2.ends_with("[cleanup]\n[unload]\n"), "{}", ours.2);
}

/// What a client hears of scripts that are good, odd and wrong.
#[test]
fn clients_hear_what_they_hear_of_the_c_nbdkit() {
    let pread = [
        "printf 1234",
        "printf 123",
        "printf 12345",
        "exit 1",
        "exit 2",
        "exit 3",
        "exit 99",
        "kill -9 $$",
        "echo EINVAL x >&2; exit 1",
        "echo enomem >&2; exit 1",
        "echo EFBIG big >&2; exit 77",
        "echo EPIPE x >&2; exit 1",
        "echo ENOENT x >&2; exit 1",
        "echo noise >&2; echo ENOSPC >&2; exit 1",
        "echo EROFS >&2; printf 1234",
    ];
    let pwrite = ["cat >/dev/null", "exit 0", "exit 1", "echo EDQUOT quota >&2; exit 1", "exec <&-; exit 1"];
    let extents = [
        "echo 0 1M",
        "echo 0 1M 3",
        "echo 0 512K; echo 512K 65024K zero,hole",
        "echo 0 64M hole,foo",
        "exit 1",
        "echo; echo 0 1M",
    ];
    let exports =
        ["echo NAMES; echo a", "echo a; echo b", "echo NAMES+DESCRIPTIONS; echo a; echo b; echo c", "exit 2"];
    let heard = |words: &[String], command: &str| {
        let heard = |program| captive_of(program, words, command).ok();
        let (ours, theirs) = (heard(NBDKIT), heard(THEIRS));
        assert_eq!(ours, theirs, "{words:?}");
    };
    let words = |method: &str, script: &str| {
        vec!["eval".to_owned(), "get_size=echo 64M".into(), format!("{method}={script}")]
    };
    // The offset says which of the scripts is meant.
    let by_offset = |scripts: &[&str]| {
        let cases: String =
            scripts.iter().enumerate().map(|(i, script)| format!("{i}) {script} ;;\n")).collect();
        format!("case $(($4 / 4096)) in\n{cases}esac")
    };
    let each = |scripts: &[&str], request: &str| {
        let count = scripts.len();
        nbdsh(&format!(
            "for i in range({count}):\n try: print({request})\n except nbd.Error as e: print(e.errno)"
        ))
    };
    heard(&words("pread", &by_offset(&pread)), &each(&pread, "h.pread(4, i * 4096)"));
    heard(&words("pwrite", &by_offset(&pwrite)), &each(&pwrite, "h.pwrite(b\"x\" * (1 << 20), i * 4096)"));
    for script in extents {
        heard(&words("extents", script), "nbdinfo --map \"$uri\" || true");
    }
    for script in exports {
        let command =
            "nbdinfo --list --no-content --json \"$uri\" | grep 'export-name\\|description' || true";
        heard(&words("list_exports", script), command);
    }
}

#[test]
fn capabilities_are_those_of_the_c_nbdkit() {
    let sets: [&[&str]; 8] = [
        &[],
        &["pwrite=true"],
        &["pwrite=true", "flush=true"],
        &["pwrite=true", "flush=true", "zero=true", "trim=true", "cache=true", "extents=echo 0 1M"],
        &["pwrite=true", "can_fua=echo Native", "can_multi_conn=true", "can_cache=echo emulate"],
        &["pwrite=true", "can_write=exit 3"],
        &["is_rotational=true", "block_size=echo 512 4k 1M"],
        &["pwrite=true", "zero=true", "can_fast_zero=true"],
    ];
    for set in sets {
        let words = [&["eval", "get_size=echo 1M", "pread=head -c $3 /dev/zero"], set].concat();
        let info = |program| captive_of(program, &words, "nbdinfo --json \"$uri\" | grep -v '\"uri\"'").ok();
        assert_eq!(info(NBDKIT), info(THEIRS), "{set:?}");
    }
}

#[test]
fn missing_stands_for_methods_without_a_script() {
    let dir = temp();
    let log = dir.path().join("log");
    let missing = format!("missing=echo $0 $1 >>{}; exit 2", log.display());
    captive(["eval", "get_size=echo 1M", "pwrite=true", &missing], "nbdinfo --size \"$uri\"").ok();
    let log = fs::read_to_string(log).expect("a log");
    for method in ["config_complete", "thread_model", "preconnect", "open", "can_trim", "close", "unload"] {
        assert!(log.contains(&format!("missing {method}\n")), "{method} in {log}");
    }
    assert!(
        !log.contains(" can_write\n") && !log.contains(" get_size\n") && !log.contains(" load\n"),
        "{log}"
    );
}

#[test]
fn suites_find_what_they_probe() {
    let dir = temp();
    let path = script(dir.path(), "recorder", RECORDER);
    let path = path.to_str().expect("UTF-8");
    let serial =
        script(dir.path(), "serial", "#!/bin/sh\n[ $1 = dump_plugin ] || exit 2; echo 'as it = is'\n");
    let dump = |words: &[&str]| run([NBDKIT].iter().chain(words).chain(&["--dump-plugin"])).ok();
    for (words, model) in [
        (&["sh"][..], "parallel"),
        (&["sh", path], "parallel"),
        (&["sh", serial.to_str().expect("UTF-8")], "serialize_all_requests"),
        (&["eval"], "serialize_all_requests"),
        (&["eval", "thread_model=echo serialize_requests"], "serialize_requests"),
    ] {
        let text = dump(words);
        assert!(
            text.contains(&format!("max_thread_model=parallel\nthread_model={model}\n")),
            "{words:?}: {text}"
        );
        assert!(text.contains("\nmax_known_status=8\n"), "{text}");
    }
    assert!(dump(&["sh", serial.to_str().expect("UTF-8")]).ends_with("as it = is\n"));
    assert!(dump(&["sh"]).contains("\nmagic_config_key=script\n"));
    assert!(dump(&["sh", path]).contains("\nmagic_config_key=size\n"));
}

#[test]
fn messages_name_the_script_and_what_it_said() {
    let dir = temp();
    let path = script(
        dir.path(),
        "s",
        "#!/bin/sh\n[ $1 != config ] || { echo EINVAL no $2 >&2; exit 1; }; exit 2\n",
    );
    let path = path.to_str().expect("UTF-8");
    let refused =
        |words: &[&str]| run([NBDKIT, "-U", "-"].iter().chain(words).chain(&["--run", "true"])).refused();
    assert!(refused(&["sh", path, "colour=red"]).ends_with("s: config: no colour\n"));
    assert!(refused(&["sh"]).contains("nbdkit sh SCRIPT"));
    assert!(refused(&["sh", "/nonexistent/script"]).contains("/nonexistent/script: No such file"));
    assert!(refused(&["eval", "a=b"]).contains("unknown parameter 'a': eval has no config method"));
    let no_interpreter = script(dir.path(), "n", "#!/nonexistent/interpreter\n");
    let said = refused(&["sh", no_interpreter.to_str().expect("UTF-8")]);
    assert!(said.contains("cannot run") && said.contains("first line"), "{said}");
    let failure = captive(
        ["eval", "get_size=echo 1M", "pread=echo ENOSPC the pool is full >&2; exit 1"],
        &nbdsh("try: h.pread(4, 0)\nexcept nbd.Error as e: print(e.errno)"),
    );
    assert!(failure.stderr.contains("pread: the pool is full\n"), "{}", failure.stderr);
    assert_eq!(failure.ok(), "ENOSPC\n");
}

/// A client that is told to leave hears so until it does; the request that told it has its answer.
#[test]
fn a_client_is_told_to_leave() {
    const HEARD: &str = "
def heard(ask):
    try: ask()
    except nbd.Error as e: return e.errno
for _ in range(2): print(heard(lambda: h.pread(512, 0)))
print(heard(lambda: h.pwrite(b\"x\" * 512, 0)), heard(h.flush), heard(lambda: h.pread(512, 0)), h.aio_is_ready())
h.shutdown()
";
    for (code, first) in [("7", "None"), ("8", "ESHUTDOWN"), ("8; echo", "ESHUTDOWN")] {
        let pread = format!("pread=head -c $3 /dev/zero; exit {code}");
        let words = ["eval", "get_size=echo 512", "pwrite=cat >/dev/null", "flush=true", &pread];
        let out = captive(words, &nbdsh(HEARD)).ok();
        assert_eq!(out, format!("{first}\nESHUTDOWN\nESHUTDOWN ESHUTDOWN ESHUTDOWN True\n"), "exit {code}");
    }
    let ask = "try: h.pread(512, 0)\nexcept nbd.Error as e: print(e.errno)";
    for (pread, errno) in [("exit 5", "ESHUTDOWN"), ("echo ENOSPC >&2; exit 5", "ENOSPC")] {
        let pread = format!("pread={pread}");
        let out = captive(["eval", "get_size=echo 512", &pread], &nbdsh(ask)).ok();
        assert_eq!(out, format!("{errno}\n"), "{pread}");
    }
}
