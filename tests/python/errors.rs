//! What goes wrong in a script, and what the client and the log get of it.

use super::{bridge_or_return, nbdsh, nbdsh_with, script, servers};
use crate::util::{Mount, NBDKIT};

const FAILURES: &str = "
import errno, nbdkit, sys
API_VERSION = 2
def deeper(error):
    raise error
def open(readonly): return nbdkit.export_name()
def get_size(h): return 1 << 20
def pread(h, buf, offset, flags):
    if h == 'value': deeper(ValueError('no such thing'))
    elif h == 'os': deeper(OSError(errno.ENOSPC, 'the pool is full'))
    elif h == 'file': deeper(FileNotFoundError('made by hand'))
    elif h == 'set': nbdkit.set_error(errno.ENOMEM); deeper(ValueError('after set_error'))
    elif h == 'both': nbdkit.set_error(errno.ENOMEM); deeper(OSError(errno.ENOSPC, 'the other errno'))
    elif h == 'shutdown': deeper(OSError(errno.ESHUTDOWN, 'going down'))
    elif h == 'exit': sys.exit(3)
    elif h == 'interrupt': deeper(KeyboardInterrupt())
    elif h == 'deep':
        def again(): again()
        again()
    elif h == 'unprintable':
        class Bad(Exception):
            def __str__(self): raise RuntimeError('not even that')
        deeper(Bad())
    elif h == 'returns': return b'x' * len(buf)
    elif h == 'too-long': buf[:] = bytes(len(buf) + 1)
def pwrite(h, buf, offset, flags):
    if h == 'read-only': buf[0] = 1
";

#[test]
fn errno_and_traceback() {
    let bridge = bridge_or_return!();
    let script = script(FAILURES);
    for server in servers(&bridge) {
        let words: Vec<&str> = server.iter().map(String::as_str).chain([&*script.path]).collect();
        for (export, errno, message) in [
            ("value", "EIO", "ValueError: no such thing"),
            ("os", "ENOSPC", "the pool is full"),
            ("file", "EIO", "FileNotFoundError: made by hand"),
            ("set", "ENOMEM", "ValueError: after set_error"),
            ("both", "ENOMEM", "the other errno"),
            ("shutdown", "ESHUTDOWN", "going down"),
            ("exit", "EIO", "SystemExit: 3"),
            ("interrupt", "EIO", "KeyboardInterrupt"),
            ("deep", "EIO", "RecursionError"),
            ("unprintable", "EIO", "Bad"),
            ("returns", "EIO", "it must fill the buffer"),
            ("too-long", "EIO", "ValueError: memoryview assignment"),
        ] {
            let client = format!(
                "
connect('{export}')
for _ in range(3):
    got = fails(h.pread, 512, 0)
    assert got == '{errno}', got
connect('fine')
h.pread(512, 0)
"
            );
            let run = nbdsh_with(&words, &client);
            assert_eq!(run.code, 0, "{export}: {}{}", run.stdout, run.stderr);
            assert!(run.stderr.contains(message), "{export}: {}", run.stderr);
            assert!(run.stderr.contains(&format!("{}: pread: ", script.path)), "{}", run.stderr);
            if message.contains("Error: ") && !["returns", "too-long"].contains(&export) {
                for line in ["Traceback (most recent call last)", "in deeper", "    raise error"] {
                    assert!(run.stderr.contains(line), "{export}: {line}: {}", run.stderr);
                }
            }
        }
        let run = nbdsh_with(&words, "connect('read-only'); assert fails(h.pwrite, bytes(512), 0) == 'EIO'");
        assert!(run.stderr.contains("cannot modify read-only memory"), "{}", run.stderr);
    }
}

#[test]
fn errno_of_a_mounted_script() {
    bridge_or_return!();
    let script = script(&FAILURES.replace("nbdkit.export_name()", "'os'"));
    let mut mount = Mount::start(["python", &script.path]);
    let error = std::fs::read(mount.file()).expect_err("the script fails");
    assert_eq!(error.raw_os_error(), Some(28), "{error}");
    assert_eq!(mount.unmount(), 0);
}

#[test]
fn short_buffers_and_none_at_all() {
    bridge_or_return!();
    for (pread, message) in [
        (
            "pread(h, count, offset): return b'x' * 5",
            "it returned a buffer of 5 bytes where 512 were asked for",
        ),
        ("pread(h, count, offset): return b''", "it returned a buffer of 0 bytes where 512 were asked for"),
        (
            "pread(h, count, offset): return None",
            "it must return a buffer, such as bytes or a bytearray, and not NoneType",
        ),
        ("pread(h, count, offset): return 'text'", "and not str"),
        ("pread(h, count): return bytes(count)", "TypeError"),
    ] {
        let script = script(&format!("def open(r): return 1\ndef get_size(h): return 4096\ndef {pread}\n"));
        let log = nbdsh(&script, &[], "connect(); assert fails(h.pread, 512, 0) == 'EIO'");
        assert!(log.contains(message), "{log}");
    }
}

/// A view of the server's memory cannot be used when the call is over, and a script that keeps one is told.
#[test]
fn a_buffer_that_is_kept() {
    let bridge = bridge_or_return!();
    let script = script(
        "
import nbdkit
API_VERSION = 2
kept = []
def open(r): return nbdkit.export_name()
def get_size(h): return 1 << 20
def pread(h, buf, offset, flags):
    buf[:] = b'r' * len(buf)
    if h == 'whole': kept.append(buf)
    elif h == 'slice': kept.append(buf[10:20])
    elif h == 'cycle':
        cycle = [buf[5:]]
        cycle.append(cycle)
    elif h == 'use': assert bytes(kept[-1]) == b'r' * len(kept[-1])
def pwrite(h, buf, offset, flags):
    if h == 'slice': kept.append(buf[10:20])
def flush(h, flags):
    if h == 'whole': kept[-1][0]
",
    );
    for server in servers(&bridge) {
        let words: Vec<&str> = server.iter().map(String::as_str).chain([&*script.path]).collect();
        let run = nbdsh_with(
            &words,
            "
connect('cycle')
assert h.pread(512, 0) == b'r' * 512
connect('whole')
assert h.pread(512, 0) == b'r' * 512
fails(h.flush)
connect('slice')
assert fails(h.pwrite, bytes(512), 0) == 'EIO'
# From now on it may.
for _ in range(3):
    h.pwrite(bytes(512), 0)
    assert h.pread(512, 0) == b'r' * 512
connect('use')
h.pread(512, 0)
",
        );
        assert_eq!(run.code, 0, "{}{}", run.stdout, run.stderr);
        assert!(run.stderr.contains("operation forbidden on released memoryview object"), "{}", run.stderr);
        let told = run.stderr.matches("the script keeps a view of the buffer").count();
        assert_eq!(told, 1, "{}", run.stderr);
    }
}

#[test]
fn answers_of_the_wrong_type() {
    bridge_or_return!();
    for (function, client, message) in [
        (
            "def get_size(h): return 'large'",
            "fails(connect)",
            "get_size: it must return the size in bytes, from 0 to 2**63 - 1, and not 'large'",
        ),
        ("def get_size(h): return -5", "fails(connect)", "and not -5"),
        ("def get_size(h): return 1 << 63", "fails(connect)", "and not 9223372036854775808"),
        ("def get_size(h): pass", "fails(connect)", "and not None"),
        (
            "def block_size(h): return 512",
            "fails(connect)",
            "block_size: it must return (minimum, preferred, maximum)",
        ),
        ("def block_size(h): return (1, 2)", "fails(connect)", "and not (1, 2)"),
        (
            "def can_fua(h): return 7",
            "fails(connect)",
            "can_fua: it must return one of nbdkit.FUA_*, and not 7",
        ),
        (
            "def can_cache(h): return 'yes'",
            "fails(connect)",
            "can_cache: it must return one of nbdkit.CACHE_*, and not 'yes'",
        ),
        ("def can_flush(h): raise ValueError('unsure')", "fails(connect)", "can_flush: Traceback"),
        (
            "def export_description(h): return 7",
            "connect()",
            "export_description: it must return a string, and not 7",
        ),
        (
            "def default_export(r, t): return b'x'",
            "fails(connect)",
            "default_export: it must return a string",
        ),
        (
            "def extents(h, c, o, f): return 5",
            "connect(); fails(h.block_status, 512, 0, lambda *a: 0)",
            "extents: it must return an iterable of (offset, length, type) tuples, and not 5",
        ),
        (
            "def extents(h, c, o, f): return [(0, 512)]",
            "connect(); fails(h.block_status, 512, 0, lambda *a: 0)",
            "and not (0, 512)",
        ),
        (
            "def extents(h, c, o, f): yield (0, 512, 0); raise ValueError('late')",
            "connect(); fails(h.block_status, 512, 0, lambda *a: 0)",
            "ValueError: late",
        ),
        (
            "def extents(h, c, o, f): return [(0, 512, 0), (1024, 512, 0)]",
            "connect(); fails(h.block_status, 4096, 0, lambda *a: 0)",
            "the server refused the extent (1024, 512, 0)",
        ),
        ("def open(r): raise PermissionError(13, 'not you')", "fails(connect)", "not you"),
        ("def preconnect(r): raise RuntimeError('nobody')", "fails(connect)", "RuntimeError: nobody"),
        (
            "def close(h): raise RuntimeError('stuck')",
            "connect(); h.shutdown(); connect()",
            "close: Traceback",
        ),
    ] {
        let script = script(&format!(
            "API_VERSION = 2\ndef open(r): return 1\ndef get_size(h): return 4096\n\
             def pread(h, buf, offset, flags): pass\ndef pwrite(h, buf, offset, flags): pass\n{function}\n"
        ));
        let run = nbdsh_with(&[NBDKIT, "python", &script.path], client);
        assert_eq!(run.code, 0, "{function}: {}{}", run.stdout, run.stderr);
        assert!(run.stderr.contains(message), "{function}: {}", run.stderr);
    }
}

#[test]
fn a_list_of_exports_of_the_wrong_type() {
    bridge_or_return!();
    for (list, message) in [
        ("5", "list_exports: it must return an iterable of names"),
        ("[('a', 'b', 'c')]", "and not ('a', 'b', 'c')"),
        ("['a\\0b']", "zero byte in an export's name"),
        ("['x' * 5000]", "the server refused the export"),
    ] {
        let script = script(&format!(
            "def open(r): return 1\ndef get_size(h): return 4096\ndef pread(h, c, o): return bytes(c)\n\
             def list_exports(readonly, tls): return {list}\n"
        ));
        let client = "
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_unix(os.environ['unixsocket'])
fails(h.opt_list, lambda *a: 0)
";
        let log = nbdsh(&script, &[], client);
        assert!(log.contains(message), "{list}: {log}");
    }
}
