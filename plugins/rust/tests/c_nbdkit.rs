//! Plugins made with this package, in the C nbdkit of the distribution, used by the distribution's clients.

use std::{
    io::Read,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

/// A plugin among the examples of this package, which cargo builds before it runs this test.
fn plugin(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("this program's path");
    let examples = test.parent().and_then(Path::parent).expect("the target folder").join("examples");
    let plugin = examples.join(format!("lib{name}.so"));
    assert!(plugin.exists(), "{} is missing: `cargo test -p nbdkit` builds it", plugin.display());
    plugin
}

fn nbdkit_path() -> &'static str {
    let binary = ["/usr/bin/nbdkit", "/usr/sbin/nbdkit"].into_iter().find(|path| Path::new(path).exists());
    binary.expect("the C nbdkit (package nbdkit)")
}

/// The C nbdkit, which fails rather than hangs.
fn nbdkit() -> Command {
    let mut command = Command::new("timeout");
    command.args(["60", nbdkit_path()]);
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Standard output of a run that must succeed, and what the server logged.
struct Ran {
    stdout: String,
    log: String,
}

fn succeeded(output: Output) -> Ran {
    let ran = Ran { stdout: text(&output.stdout), log: text(&output.stderr) };
    assert!(output.status.success(), "{}\n{}", ran.stdout, ran.log);
    ran
}

/// Runs a Python script in nbdsh, which connects with `connect(export)`.
fn nbdsh(name: &str, parameters: &[&str], script: &str) -> Ran {
    let mut command = nbdkit();
    command.args(["-v", "-U", "-"]).arg(plugin(name)).args(parameters);
    command.args(["--run", "export unixsocket; exec nbdsh -c \"$SCRIPT\""]);
    run_script(command, "h.connect_unix(os.environ['unixsocket'])", script)
}

/// The same with a server for this one client, whose whole log is there.
fn nbdsh_to_the_end(name: &str, parameters: &[&str], script: &str) -> Ran {
    let mut server =
        vec![nbdkit_path().to_owned(), "-v".to_owned(), "-s".to_owned(), plugin(name).display().to_string()];
    server.extend(parameters.iter().map(|&parameter| parameter.to_owned()));
    let mut command = Command::new("timeout");
    command.args(["60", "nbdsh", "-c"]).arg("import os; exec(os.environ['SCRIPT'])");
    run_script(command, &format!("h.connect_command({server:?})"), script)
}

fn run_script(mut command: Command, connect: &str, script: &str) -> Ran {
    let prelude = format!(
        "
import os, errno, nbd
def connect(export=''):
    h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.set_export_name(export)
    {connect}
def fails(call, *arguments):
    try:
        call(*arguments)
    except nbd.Error as error:
        return error.errno
    raise SystemExit('did not fail')
"
    );
    // nbdsh must find the Python that its module is for.
    command.env("PATH", format!("/usr/bin:/bin:{}", std::env::var("PATH").unwrap_or_default()));
    command.env("SCRIPT", prelude + script);
    succeeded(command.output().expect("run timeout"))
}

fn dump_plugin(name: &str, parameters: &[&str]) -> String {
    let output = nbdkit().arg(plugin(name)).args(parameters).arg("--dump-plugin").output();
    succeeded(output.expect("run timeout")).stdout
}

/// The `has_` lines of a dump: what is registered.
fn registered(dump: &str) -> Vec<&str> {
    let mut methods: Vec<&str> =
        dump.lines().filter_map(|line| line.strip_prefix("has_")?.strip_suffix("=1")).collect();
    methods.sort_unstable();
    methods
}

#[test]
fn exactly_the_named_methods_are_registered() {
    let ramdisk = dump_plugin("ramdisk", &[]);
    let required = ["close", "get_size", "open", "pread"];
    let named = ["can_multi_conn", "config", "flush", "get_ready", "pwrite", "zero"];
    let texts = ["config_help", "description"];
    let mut wanted = [&required[..], &named, &texts].concat();
    wanted.sort_unstable();
    assert_eq!(registered(&ramdisk), wanted, "{ramdisk}");

    let everything = dump_plugin("everything", &[]);
    for method in ["after_fork", "block_size", "cleanup", "default_export", "list_exports", "trim", "unload"]
    {
        assert!(everything.contains(&format!("has_{method}=1\n")), "{method}: {everything}");
    }
}

#[test]
fn the_texts_of_a_plugin() {
    let dump = dump_plugin("everything", &["size=1M"]);
    for line in ["name=everything", "version=1.2.3", "magic_config_key=word", "thread_model=parallel"] {
        assert!(dump.lines().any(|l| l == line), "{line}: {dump}");
    }
    // The plugin's own lines come after the server's.
    assert!(dump.ends_with("\neverything_answer=42\n"), "{dump}");

    let help =
        succeeded(nbdkit().arg(plugin("everything")).arg("--help").output().expect("run timeout")).stdout;
    for text in ["every method there is", "a plugin for tests\nin two lines", "is only looked at"] {
        assert!(help.contains(text), "{text}: {help}");
    }
}

#[test]
fn data_survives_on_the_ramdisk() {
    nbdsh(
        "ramdisk",
        &["2M"],
        "
connect()
assert h.get_size() == 2 << 20
assert h.can_multi_conn() and h.can_flush() and not h.is_read_only()
h.pwrite(b'written' * 1000, 12345)
h.flush()
assert h.pread(7000, 12345) == b'written' * 1000
h.zero(7, 12345)
assert h.pread(14, 12345) == bytes(7) + b'written'
assert h.pread(512, (2 << 20) - 512) == bytes(512)
",
    );
}

#[test]
fn extents_reach_the_client() {
    nbdsh(
        "extents",
        &[],
        "
connect()
M = 1 << 20
def ask(count, offset, flags=0):
    found = []
    h.block_status(count, offset, lambda context, offset, entries, error: found.extend(entries), flags)
    return found
assert ask(4 * M, 0) == [M, 0, M, 3, M, 2, M, 0], ask(4 * M, 0)
assert ask(4 * M, 512)[:2] == [M - 512, 0]
assert ask(4 * M, M + 512, nbd.CMD_FLAG_REQ_ONE) == [M - 512, 3]
assert h.pread(4, M - 2) == b'xx' + bytes(2)
",
    );
}

#[test]
fn thread_models() {
    for model in ["serialize-connections", "serialize-all-requests", "serialize-requests", "parallel"] {
        let dump = dump_plugin("thread_model", &[&format!("model={model}")]);
        assert!(dump.contains(&format!("\nthread_model={}\n", model.replace('-', "_"))), "{dump}");
    }
    // The disk reads as the number of requests at work.
    nbdsh(
        "thread_model",
        &["serialize-all-requests"],
        "
connect()
buffers = [nbd.Buffer(512) for _ in range(8)]
cookies = [h.aio_pread(buffer, 512 * i) for i, buffer in enumerate(buffers)]
for cookie in cookies:
    while not h.aio_command_completed(cookie):
        h.poll(-1)
assert all(b.to_bytearray() == b'\\x01' * 512 for b in buffers)
",
    );
    // Each of these reads waits for the other one.
    nbdsh(
        "everything",
        &[],
        "
connect('meeting')
cookies = [h.aio_pread(nbd.Buffer(512), offset) for offset in (0, 512)]
for cookie in cookies:
    while not h.aio_command_completed(cookie):
        h.poll(-1)
",
    );
}

#[test]
fn what_a_disk_can_do() {
    nbdsh(
        "everything",
        &[],
        "
h.set_full_info(True)
connect('second')
for answer in (h.is_rotational(), h.can_fua(), h.can_trim(), h.can_zero(), h.can_fast_zero(), h.can_cache(),
               h.can_multi_conn(), h.can_flush()):
    assert answer
assert h.get_canonical_export_name() == 'second'
assert h.get_export_description() == 'about second'
assert [h.get_block_size(i) for i in range(3)] == [512, 4096, 1 << 20]
",
    );
    nbdsh("everything", &[], "connect('third'); assert h.is_read_only()");
    let mut list = nbdkit();
    list.args(["-U", "-"]).arg(plugin("everything")).args(["--run", "nbdinfo --list \"$uri\""]);
    let list = succeeded(list.output().expect("run timeout")).stdout;
    for text in ["export=\"first\"", "export=\"second\"", "the second one", "export=\"third\""] {
        assert!(list.contains(text), "{text}: {list}");
    }
}

/// The calls that the plugin logged, in order.
fn calls(log: &str) -> Vec<&str> {
    log.lines().filter_map(|line| line.split_once("called: ").map(|(_, call)| call)).collect()
}

#[test]
fn the_life_of_a_plugin() {
    let ran = nbdsh_to_the_end(
        "everything",
        &["hello", "size=1K", "flag=off"],
        "
connect()
h.pwrite(b'x' * 512, 0, nbd.CMD_FLAG_FUA)
h.flush()
h.trim(512, 512)
h.zero(512, 0, nbd.CMD_FLAG_FAST_ZERO)
h.cache(1024, 0)
h.block_status(1024, 0, lambda *ignored: 0, nbd.CMD_FLAG_REQ_ONE)
assert h.pread(512, 0) == bytes(512)
h.shutdown()
",
    );
    let calls = calls(&ran.log);
    let wanted = [
        "load",
        "config word hello stdio false false",
        "config size 1024",
        "config flag false",
        "config_complete",
        "thread_model",
        "get_ready",
        "after_fork",
        "preconnect readonly false unnamed peer Ok(true)",
        "default_export readonly false tls false",
        "open first readonly false tls false",
        "write_at 512 0 Flags(FUA)",
        "flush",
        "trim 512 512 Flags(0x0)",
        "zero 512 0 Flags(MAY_TRIM | FAST_ZERO)",
        "cache 1024 0",
        "extents 1024 0 Flags(REQ_ONE)",
        "drop first",
        "cleanup",
        "unload",
    ];
    assert_eq!(calls, wanted, "{}", ran.log);
}

#[test]
fn errors_have_errno_and_message() {
    for (export, errno, message) in [
        ("enospc", "ENOSPC", "the pool is full"),
        ("system-call", "ENOMEM", "Cannot allocate memory (os error 12)"),
        ("no-errno", "EIO", "nobody knows why"),
        ("errno-set-apart", "ESHUTDOWN", "see elsewhere"),
        ("zero-byte", "EIO", "before\u{fffd}after"),
        ("panic", "EIO", "read_at: panic: a read of 512 bytes"),
        ("panic-with-a-number", "EIO", "read_at: panic: not a text"),
    ] {
        // A failed request leaves the connection as it was.
        let script = format!(
            "
connect('{export}')
for _ in range(2):
    got = fails(h.pread, 512, 0)
    assert got == '{errno}' or got == errno.{errno}, got
h.pwrite(bytes(512), 0)
h.shutdown()
"
        );
        let log = nbdsh_to_the_end("faults", &[], &script).log;
        let logged = log.lines().filter(|line| line.contains("error: ") && line.ends_with(message)).count();
        assert_eq!(logged, 2, "{export}: {log}");
        assert!(log.contains(&format!("dropped: {export}")), "{log}");
    }
}

#[test]
fn failures_while_connecting() {
    for (export, message) in [
        ("panic-in-open", "open: panic: no handle today"),
        ("error-in-open", "there is no such disk"),
        ("negative-size", "get_size: the size is negative: -5"),
    ] {
        let log = nbdsh("faults", &[], &format!("fails(connect, '{export}')")).log;
        assert!(log.contains(message), "{export}: {log}");
    }
    let log = nbdsh_to_the_end("faults", &[], "connect('panic-in-drop'); h.shutdown()").log;
    assert!(log.contains("close: panic: the handle does not want to go"), "{log}");
}

#[test]
fn failures_at_the_start() {
    for (parameter, message) in [
        ("error=soon", "error: error=soon: as you wished"),
        ("panic=now", "error: config: panic: parameter now"),
    ] {
        let output =
            nbdkit().args(["-U", "-"]).arg(plugin("faults")).args([parameter, "--run", "true"]).output();
        let output = output.expect("run timeout");
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output.stderr).contains(message), "{}", text(&output.stderr));
    }
    let mut bad = nbdkit();
    bad.arg(plugin("everything"))
        .arg(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(b"size=\xff"));
    let output = bad.output().expect("run timeout");
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("size is not UTF-8"), "{}", text(&output.stderr));
}

#[test]
fn a_method_that_is_named_but_not_there() {
    // zero falls back to writing, as it does for any plugin that cannot.
    let log = nbdsh("faults", &[], "connect(); h.zero(512, 0)").log;
    assert!(log.contains("written instead"), "{log}");
}

#[test]
fn the_server_refuses_a_gap_between_extents() {
    let script = "
connect()
assert fails(h.block_status, 4096, 0, lambda *ignored: 0) in ('EINVAL', errno.EINVAL)
";
    let log = nbdsh("faults", &[], script).log;
    assert!(log.contains("the server refused the extent"), "{log}");
}

#[test]
fn functions_that_this_server_does_not_have() {
    let output = nbdkit().arg(plugin("everything")).arg("chance=10%").output().expect("run timeout");
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("it needs nbdkit 1.36"), "{}", text(&output.stderr));
    let log = nbdsh("everything", &[], "connect('disconnect'); h.pread(512, 0)").log;
    assert!(log.contains("it needs nbdkit 1.34"), "{log}");
}

#[test]
fn a_plugin_can_end_the_server() {
    let folder = tempfile::tempdir().expect("a folder");
    let (socket, ready) = (folder.path().join("socket"), folder.path().join("ready"));
    let made = Command::new("mkfifo").arg(&ready).status().expect("run mkfifo");
    assert!(made.success());
    let mut server = nbdkit()
        .args(["-f", "-U"])
        .arg(&socket)
        .arg("-P")
        .arg(&ready)
        .arg(plugin("everything"))
        .stderr(Stdio::null())
        .spawn()
        .expect("run timeout");
    let mut pid = String::new();
    std::fs::File::open(&ready).and_then(|mut fifo| fifo.read_to_string(&mut pid)).expect("the server's PID");
    let uri = format!("nbd+unix:///shutdown?socket={}", socket.display());
    let read = Command::new("/usr/bin/python3")
        .args(["-c", "import nbd, sys; h = nbd.NBD(); h.connect_uri(sys.argv[1]); h.pread(512, 0)", &uri])
        .output()
        .expect("run Python");
    // The reply may be lost in the shutdown; the end of the server is what counts.
    assert!(server.wait().expect("wait").success(), "{}", text(&read.stderr));
}
