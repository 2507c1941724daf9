//! Plugins that are compiled when they are used.

use std::fs;

use super::{captive, script};
use crate::util::{Mount, NBDKIT, Server, nbdsh, run, temp};

/// A RAM disk that greets.
const SOURCE: &str = r#"
#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>
#include <string.h>
#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL
static char data[1 << 20];
static int my_config(const char *key, const char *value)
{
  if (strcmp(key, "text") != 0) { nbdkit_error("unknown parameter '%s'", key); return -1; }
  strncpy(data, value, sizeof data - 1);
  return 0;
}
static void *my_open(int readonly) { return NBDKIT_HANDLE_NOT_NEEDED; }
static int64_t my_size(void *handle) { return sizeof data; }
static int my_pread(void *handle, void *buf, uint32_t count, uint64_t offset, uint32_t flags)
{ memcpy(buf, data + offset, count); return 0; }
static int my_pwrite(void *handle, const void *buf, uint32_t count, uint64_t offset, uint32_t flags)
{ memcpy(data + offset, buf, count); return 0; }
static struct nbdkit_plugin plugin = {
  .name = "ram", .config = my_config, .open = my_open, .get_size = my_size, .pread = my_pread, .pwrite = my_pwrite,
};
NBDKIT_REGISTER_PLUGIN(plugin)
"#;

/// Where the headers are that the server was built with.
const HEADERS: &str = concat!("EXTRA_CFLAGS=-I", env!("CARGO_MANIFEST_DIR"), "/include");

#[test]
fn a_source_is_a_disk_through_both_doors() {
    let dir = temp();
    // A name that the shell must not take apart.
    let path = dir.path().join("it's a source.c");
    fs::write(&path, SOURCE).expect("write the source");
    let path = path.to_str().expect("UTF-8");
    let words = ["cc", path, HEADERS, "text=hello"];
    let server = Server::start(words);
    nbdsh(
        &server.uri(),
        "assert h.pread(5, 0) == b'hello'; h.pwrite(b'x' * 4096, 8192)\nassert h.pread(1, 8192) == b'x'",
    );
    let mut mount = Mount::start(words);
    assert!(fs::read(mount.file()).expect("read").starts_with(b"hello\0"));
    assert_eq!(mount.unmount(), 0);
    let plus = captive(
        ["cc", path, "CC=g++", HEADERS, "CFLAGS=-O1 -fPIC -shared -fpermissive -w"],
        "nbdinfo --size \"$uri\"",
    );
    assert_eq!(plus.ok(), "1048576\n");
    let size = "nbdinfo --size \"$uri\"";
    let command = format!("{NBDKIT} -U - cc - {HEADERS} --run '{size}' < '{}'", path.replace('\'', "'\\''"));
    assert_eq!(run(["bash", "-c", &command]).ok(), "1048576\n");
}

/// The lines that make a source a program, in C's own way.
#[test]
fn a_source_can_be_a_program() {
    let dir = temp();
    let start = format!("#if 0\nexec {NBDKIT} cc \"$0\" '{HEADERS}' \"$@\"\n#endif\n");
    let path = script(dir.path(), "disk.c", &(start + SOURCE));
    let words = ["bash", path.to_str().expect("UTF-8"), "-U", "-", "--run", "nbdinfo --size \"$uri\""];
    assert_eq!(run(words).ok(), "1048576\n");
}

#[test]
fn what_is_wrong_is_said() {
    let dir = temp();
    let (bad, good) = (dir.path().join("bad.c"), dir.path().join("good.c"));
    fs::write(&bad, "nonsense").expect("write");
    fs::write(&good, SOURCE).expect("write");
    let (bad, good) = (bad.to_str().expect("UTF-8"), good.to_str().expect("UTF-8"));
    let start = |words: &[&str]| run([NBDKIT, "-U", "-", "cc"].iter().chain(words).chain(&["--run", "true"]));
    let run = start(&[bad]);
    assert_eq!(run.code, 1);
    assert!(run.stderr.contains("bad.c:1:") && run.stderr.contains("cannot compile"), "{}", run.stderr);
    let said = start(&[good, HEADERS, "colour=red"]).refused();
    assert!(said.contains("unknown parameter 'colour'"), "{said}");
    assert!(start(&[]).refused().contains("nbdkit cc SOURCE.c"));
    assert!(start(&["/nonexistent.c"]).refused().contains("/nonexistent.c: No such file"));
    let missing = start(&[good, "CC=/nonexistent/cc"]);
    assert!(missing.code == 1 && missing.stderr.contains("cannot compile"), "{}", missing.stderr);
    let dump = crate::util::run_ok([NBDKIT, "cc", "--dump-plugin"]);
    assert!(dump.contains("\nCC=cc\nCFLAGS=-g -O2 -fPIC -shared"), "{dump}");
    assert!(dump.contains("\nmax_thread_model=parallel\nthread_model=serialize_connections\n"), "{dump}");
}

/// [`SOURCE`] with a `get_ready` and an `after_fork`.
fn with_steps(get_ready: &str, after_fork: &str) -> String {
    let steps = format!(
        "#include <stdio.h>\nstatic int ready(void) {{ {get_ready}; return 0; }}\n\
         static int forked(void) {{ {after_fork}; return 0; }}\n\
         static struct nbdkit_plugin plugin = {{ .get_ready = ready, .after_fork = forked,"
    );
    SOURCE.replace("static struct nbdkit_plugin plugin = {", &steps)
}

/// Nobody was there to be served, so that is no failure.
#[test]
fn a_plugin_can_end_the_server_before_it_serves() {
    let dir = temp();
    let path = dir.path().join("end.c");
    let path = path.to_str().expect("UTF-8");
    for step in [["nbdkit_shutdown()", ""], ["", "nbdkit_shutdown()"]] {
        fs::write(path, with_steps(step[0], step[1])).expect("write the source");
        assert_eq!(run([NBDKIT, "-f", "-U", "-", "cc", path, HEADERS]).ok(), "");
        assert_eq!(run([NBDKIT, "-U", "-", "cc", path, HEADERS]).ok(), "");
    }
}

/// What a plugin prints while the server starts is the user's to read, and nothing after that.
#[test]
fn a_plugin_that_serves_prints_to_nobody() {
    let dir = temp();
    let path = dir.path().join("prints.c");
    let path = path.to_str().expect("UTF-8");
    let after = "printf(\"after, read %d\\n\", getchar()); fflush(stdout); fprintf(stderr, \"served\\n\")";
    fs::write(path, with_steps("printf(\"ready\\n\")", after)).expect("write the source");
    let command = format!("echo typed | {NBDKIT} -U - cc '{path}' {HEADERS} --run 'cat; echo command'");
    let out = run(["bash", "-c", &command]);
    assert!(out.stderr.contains("served"), "{}", out.stderr);
    assert_eq!(out.ok(), "ready\ntyped\ncommand\n");
    // Where a client is on standard input and output, not even the first line is printed.
    let command = format!("{NBDKIT} -s cc '{path}' {HEADERS} < /dev/null | head -c 18 | tr -d '\\0'");
    let out = run(["bash", "-c", &command]).ok();
    assert!(out.starts_with("NBDMAGIC"), "{out}");
}

/// A program at the other end of a terminal types as soon as it likes.
#[test]
fn a_password_is_read_from_a_terminal_that_is_quick() {
    const TERMINAL: &str = "
import os, pty, select, sys
main, other = pty.openpty()
os.write(main, b'too early\\n')
if os.fork() == 0:
    os.close(main)
    os.setsid()
    for fd in range(3): os.dup2(other, fd)
    os.execvp(sys.argv[1], sys.argv[1:])
os.close(other)
seen = b''
while select.select([main], [], [], 60)[0]:
    try: seen += os.read(main, 1000)
    except OSError: break
status = os.wait()[1]
assert status == 0 and b'password: ' in seen and b'{too early}' in seen, (status, seen)
";
    let dir = temp();
    let path = dir.path().join("ask.c");
    let ask = SOURCE.replace(
        "strncpy(data, value, sizeof data - 1);",
        "char *typed; if (nbdkit_read_password(value, &typed) == -1) return -1;\n\
         printf(\"{%s}\\n\", typed);",
    );
    fs::write(&path, format!("#include <stdio.h>\n{ask}")).expect("write the source");
    let path = path.to_str().expect("UTF-8");
    let words = [
        "/usr/bin/python3",
        "-c",
        TERMINAL,
        NBDKIT,
        "-U",
        "-",
        "cc",
        path,
        HEADERS,
        "text=-",
        "--run",
        "true",
    ];
    assert_eq!(run(words).ok(), "");
}

/// The source names itself as it likes, and has the debug flags of that name.
#[test]
fn a_source_has_any_name_and_flags_of_its_own() {
    let dir = temp();
    let path = dir.path().join("named.c");
    let named = SOURCE
        .replace("\"ram\"", "\"My_RAM 2.0\"")
        .replace("static char data", "NBDKIT_DLL_PUBLIC int My_RAM_debug_level = 7;\nstatic char data")
        .replace("sizeof data; }", "My_RAM_debug_level; }");
    fs::write(&path, &named).expect("write the source");
    let path = path.to_str().expect("UTF-8");
    let size = "nbdinfo --size \"$uri\"";
    assert_eq!(captive(["cc", path, HEADERS], size).ok(), "7\n");
    fs::write(path, named.replace("My_RAM 2.0", "My_RAM")).expect("write the source");
    let run = captive(["-D", "My_RAM.level=512", "-D", "cc.no=1", "cc", path, HEADERS], size);
    assert!(run.stderr.contains("-D cc.no") && !run.stderr.contains("My_RAM.level"), "{}", run.stderr);
    assert_eq!(run.ok(), "512\n");
}
