//! What a server says, and where: `-v`, `-D`, `--log`, `--name`.

use std::{collections::BTreeSet, fs};

use crate::util::{self, NBDKIT, temp};

/// A client that uses everything a disk can do, and is large enough for the short ways.
const CLIENT: &str = "nbdsh -u \"$uri\" -c 'h.pread(512, 0); h.pwrite(b\"x\" * 512, 0, nbd.CMD_FLAG_FUA)
h.pwrite(b\"x\" * 131072, 0); h.pread(131072, 0)
h.zero(512, 512); h.trim(512, 0); h.flush(); h.cache(512, 0); h.zero(512, 0, nbd.CMD_FLAG_NO_HOLE)'";

/// The debug messages of a server with the filter noextents over memory.
fn session(program: &str, options: &[&str]) -> Vec<String> {
    let words = [program, "-v", "-U", "-", "--filter=noextents"].into_iter().chain(options.iter().copied());
    let run = util::run(words.chain(["memory", "1M", "--run", CLIENT]));
    assert_eq!(run.code, 0, "{}", run.stderr);
    run.stderr.lines().map(str::to_owned).collect()
}

/// Messages about calls of layers: the layer and the call, without the thread's number.
fn calls(lines: &[String], wanted: &[&str]) -> BTreeSet<String> {
    let calls = lines.iter().filter_map(|line| {
        let (before, call) = line.split_once("debug: ")?;
        let (layer, what) = call.split_once(": ")?;
        let name = what.split([' ', '=']).next()?;
        let known = matches!(layer, "noextents" | "memory") && wanted.contains(&name);
        (known && before.starts_with("nbdkit: ")).then(|| call.to_owned())
    });
    // That the C nbdkit prints of a pointer means nothing to others.
    calls.filter(|call| !call.contains("returned handle")).collect()
}

const CONTROLPATH: &[&str] = &[
    "config",
    "config_complete",
    "get_ready",
    "after_fork",
    "preconnect",
    "open",
    "prepare",
    "get_size",
    "block_size",
    "can_write",
    "can_zero",
    "can_fast_zero",
    "can_trim",
    "can_fua",
    "can_flush",
    "is_rotational",
    "can_multi_conn",
    "can_cache",
    "finalize",
    "cleanup",
];
const DATAPATH: &[&str] = &["pread", "pwrite", "zero", "trim", "flush", "cache"];

#[test]
fn verbose_messages_are_those_of_the_c_nbdkit() {
    let (ours, theirs) = (session(NBDKIT, &[]), session("/usr/bin/nbdkit", &[]));
    for wanted in [CONTROLPATH, DATAPATH] {
        let theirs = calls(&theirs, wanted);
        assert!(theirs.len() >= wanted.len() * 2 - 2, "{theirs:?}");
        assert_eq!(calls(&ours, wanted), theirs);
    }
    // A connection's messages carry its number.
    for part in [
        "nbdkit: memory[1]: debug: noextents: open readonly=0",
        "nbdkit: memory[1]: debug: noextents: pread ",
    ] {
        assert!(ours.iter().any(|line| line.starts_with(part)), "{ours:?}");
    }
}

#[test]
fn flags_silence_the_paths() {
    let quiet = |flag: &str| {
        let lines = session(NBDKIT, &["-D", flag]);
        (calls(&lines, CONTROLPATH).is_empty(), calls(&lines, DATAPATH).is_empty())
    };
    assert_eq!(quiet("nbdkit.backend.controlpath=0"), (true, false));
    assert_eq!(quiet("nbdkit.backend.datapath=0"), (false, true));
    assert_eq!(quiet("nbdkit.backend.datapath=1"), (false, false));
}

#[test]
fn flags_that_are_no_use() {
    for bad in ["x", "x=1", "x.y", "x.y=z", ".y=1"] {
        let line = util::run([NBDKIT, "-D", bad, "null"]).refused();
        assert!(line.contains("must have the format NAME.FLAG=N"), "{line}");
    }
    let warning = |flag: &str| {
        let run = util::run([NBDKIT, "-D", flag, "null", "--run", "true"]);
        assert_eq!(run.code, 0, "{}", run.stderr);
        run.stderr
    };
    let line = warning("null.a.b=1");
    assert!(line.starts_with("nbdkit: warning: "), "{line}");
    assert!(line.contains("does not contain a global variable called null_debug_a_b"), "{line}");
    let line = warning("other.a=1");
    assert!(line.starts_with("nbdkit: warning: ") && line.contains("other.a was not used"), "{line}");
    for known in ["backend.controlpath", "backend.datapath", "tls.log", "tls.session", "environ"] {
        assert_eq!(warning(&format!("nbdkit.{known}=1")), "");
    }
    let run = util::run([NBDKIT, "-v", "-D", "nbdkit.environ=1", "null", "--run", "true"]);
    assert!(run.stderr.contains("nbdkit: debug: PATH="), "{}", run.stderr);
}

#[test]
fn names() {
    let run = util::run([NBDKIT, "--name=one", "-v", "no-such-plugin"]);
    assert!(run.stderr.starts_with("nbdkit[one]: error: "), "{}", run.stderr);
    let run = util::run([NBDKIT, "--name=one", "-v", "memory", "1M", "--run", "nbdinfo $uri"]);
    assert!(run.stderr.contains("\nnbdkit[one]: memory[1]: debug: "), "{}", run.stderr);
}

/// A chain whose reads fail, and a client that reads.
const FAILING: [&str; 5] = ["--filter=error", "memory", "1M", "error-pread-rate=100%", "--run"];
const READ: &str = "nbdsh -u \"$uri\" -c 'h.pread(1, 0)' 2> /dev/null";

#[test]
fn errors_go_where_they_are_wanted() {
    let dir = temp();
    let file = dir.path().join("log");
    let to_file = format!("--log={}", file.display());
    let stderr = |option: &str| util::run([NBDKIT, option].into_iter().chain(FAILING).chain([READ])).stderr;
    let usual = stderr("--log=stderr");
    assert!(usual.starts_with("nbdkit: memory[1]: error: "), "{usual}");
    assert_eq!(stderr("--log=default"), usual, "the foreground has standard error");
    assert_eq!(stderr("--log=null"), "");
    for times in 1..3 {
        assert_eq!(stderr(&to_file), "");
        assert_eq!(fs::read_to_string(&file).expect("the log"), usual.repeat(times));
    }
    // Debug messages are no errors.
    let run = util::run([NBDKIT, &to_file, "-v"].into_iter().chain(FAILING).chain([READ]));
    assert!(
        run.stderr.contains("debug: memory: open") && !run.stderr.contains("memory[1]: error: "),
        "{}",
        run.stderr
    );
    assert_eq!(fs::read_to_string(&file).expect("the log"), usual.repeat(3));
    // Those of the start, too.
    let run = util::run([NBDKIT, &to_file, "no-such-plugin"]);
    assert_eq!((run.code, run.stderr.as_str()), (1, ""));
    assert!(fs::read_to_string(&file).expect("the log").contains("nbdkit: error: unknown plugin"));
    for bad in ["--log=", "--log=bogus", "--log=relative/path"] {
        assert!(util::run([NBDKIT, bad, "null"]).refused().contains("\"stderr\", \"syslog\", \"null\""));
    }
    assert!(util::run([NBDKIT, "--log=/no/such/directory/x", "null"]).refused().contains("cannot open"));
}

/// Runs a script in a namespace where /dev/log is ours: what is sent there goes to the file `syslog`.
fn with_syslog(script: &str) -> String {
    let dir = temp();
    let listener = "
import os, signal, socket
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
s.bind('/dev/log')
if os.fork(): os._exit(0)
signal.alarm(60)
print(s.recv(4096).decode(), file=open('syslog.part', 'w'), flush=True)
os.rename('syslog.part', 'syslog')";
    let prepare = "mkdir dev && touch dev/null && mount --bind /dev/null dev/null && mount --rbind dev /dev";
    fs::write(dir.path().join("listener.py"), listener).expect("write");
    fs::write(dir.path().join("script"), format!("set -e\n{prepare}\npython3 listener.py\n{script}"))
        .expect("write");
    let path = dir.path().display();
    util::sh(&format!(
        "cd {path}; unshare -rm bash script; for ((i = 0; i < 3000; i++)) ; do test -e syslog && break; read -t 0.01 <> <(:) || true; :; done; cat syslog"
    ))
}

#[test]
fn errors_in_the_system_log() {
    let words = "--filter=error memory 1M error-pread-rate=100%";
    let read =
        "nbdsh -u \"nbd+unix://?socket=sock\" -c 'h.pread(1, 0)' 2> /dev/null || true; kill $(cat pid)";
    // Once in the background that is the default.
    for options in ["--log=syslog -f", "--log=default", ""] {
        let background = if options.contains("-f") { "& until test -e pid; do :; done" } else { "" };
        let message = with_syslog(&format!("{NBDKIT} {options} -U sock -P pid {words} {background}\n{read}"));
        assert!(
            message.contains("nbdkit[") && message.contains("]: memory[1]: error: "),
            "{options}: {message}"
        );
    }
}

#[test]
fn standard_error_in_the_background() {
    let dir = temp();
    let script =
        "nbdsh -u \"nbd+unix://?socket=sock\" -c 'h.pread(1, 0)' 2> /dev/null || true; kill $(cat pid)
        tail --pid=$(cat pid) -f /dev/null; cat err";
    for (options, heard) in [("--log=stderr", true), ("--log=null", false)] {
        let out = util::sh(&format!(
            "cd {}; rm -f sock pid; {NBDKIT} {options} -U sock -P pid --filter=error memory 1M error-pread-rate=100% 2> err
            {script}",
            dir.path().display()
        ));
        assert_eq!(out.contains("nbdkit: memory[1]: error: "), heard, "{options}: {out}");
    }
}
