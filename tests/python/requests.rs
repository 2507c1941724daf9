//! Reads, writes and the rest, in every version of the interface.

use super::{bridge_or_return, is_left_out, nbdsh, nbdsh_with, script, servers};
use crate::util::{Mount, NBDKIT, qemu_io, run_ok, sh};

/// The example of the document that proposed version 2, which returns what it reads.
const PROPOSED: &str = r#"
import builtins
import errno
import nbdkit
disk = bytearray(1024 * 1024)

def api_version():
    return 2

def config(key, value):
    print("ignored parameter %s=%s" % (key, value))

def open(readonly):
    print("open: readonly=%d" % readonly)
    return 1

def get_size(h):
    global disk
    return len(disk)

def pread(h, count, offset, flags):
    global disk
    return disk[offset:offset+count]

def pwrite(h, buf, offset, flags):
    global disk
    end = offset + len(buf)
    disk[offset:end] = buf

def zero(h, count, offset, flags):
    global disk
    if flags & nbdkit.FLAG_MAY_TRIM:
        disk[offset:offset+count] = bytearray(count)
    else:
        nbdkit.set_error(errno.EOPNOTSUPP)
"#;

const VERSION_1: &str = "
import nbdkit
disk = bytearray(1024 * 1024)
def config_complete(): print('set_error = %r' % nbdkit.set_error)
def open(readonly): return 1
def get_size(h): return len(disk)
def can_write(h): return True
def can_flush(h): return True
def is_rotational(h): return False
def can_trim(h): return True
def pread(h, count, offset): return disk[offset:offset+count]
def pwrite(h, buf, offset):
    disk[offset:offset+len(buf)] = buf
def flush(h): pass
def trim(h, count, offset): pass
def zero(h, count, offset, may_trim=False):
    disk[offset:offset+count] = bytearray(count)
";

const VERSION_2: &str = "
import nbdkit
API_VERSION = 2
disk = bytearray(1024 * 1024)
def open(readonly): return 1
def get_size(h): return len(disk)
def pread(h, buf, offset, flags): buf[:] = disk[offset:offset+len(buf)]
def pwrite(h, buf, offset, flags): disk[offset:offset+len(buf)] = buf
def flush(h, flags): pass
def trim(h, count, offset, flags): pass
def zero(h, count, offset, flags): disk[offset:offset+count] = bytearray(count)
";

#[test]
fn a_disk_in_each_version_in_every_server() {
    let bridge = bridge_or_return!();
    let client = "
connect()
assert h.get_size() == 1 << 20 and not h.is_read_only()
data = os.urandom(70000)
h.pwrite(data, 12345)
assert h.pread(70000, 12345) == data
h.zero(1000, 13000, nbd.CMD_FLAG_NO_HOLE)
h.zero(1000, 15000)
want = bytearray(data)
for start in (13000 - 12345, 15000 - 12345):
    want[start:start+1000] = bytes(1000)
assert h.pread(70000, 12345) == want
assert h.pread(512, (1 << 20) - 512) == bytes(512)
print(h.can_flush(), h.can_trim(), h.can_fua(), h.can_zero(), h.can_fast_zero(), h.can_multi_conn(), h.can_cache())
";
    for text in [PROPOSED, VERSION_1, VERSION_2] {
        let script = script(text);
        let parameter: &[&str] = if text == PROPOSED { &["a=b"] } else { &[] };
        let mut answers = Vec::new();
        let distribution = vec!["/usr/bin/nbdkit".to_owned(), "python".to_owned()];
        // The C plugin of 1.32 does not know the proposed form.
        let theirs = (text != PROPOSED).then_some(distribution);
        for server in servers(&bridge).into_iter().chain(theirs) {
            let mut words: Vec<&str> = server.iter().map(String::as_str).collect();
            words.push(&script.path);
            words.extend(parameter);
            let run = nbdsh_with(&words, client);
            assert_eq!(run.code, 0, "{words:?}: {}{}", run.stdout, run.stderr);
            answers.push(run.stdout);
        }
        // What the script prints itself may come before or behind that, when its buffer is written out.
        let told = |answer: &String| -> Vec<String> {
            let words = |line: &&str| line.split(' ').all(|word| matches!(word, "True" | "False"));
            answer.lines().filter(words).map(str::to_owned).collect()
        };
        assert_eq!(told(&answers[0]).len(), 1, "{answers:?}");
        assert!(answers.iter().all(|answer| told(answer) == told(&answers[0])), "{answers:?}");
    }
}

#[test]
fn a_disk_in_each_version_as_a_file() {
    bridge_or_return!();
    for text in [PROPOSED, VERSION_1, VERSION_2] {
        let script = script(text);
        let mut mount = Mount::start(["python", &script.path]);
        let file = mount.file();
        let file = file.to_str().expect("UTF-8");
        qemu_io(file, &["write -P 7 4096 64k", "flush", "write -z 8192 4k", "discard 32k 4k"]);
        qemu_io(file, &["read -P 7 4096 4k", "read -P 0 8192 4k", "read -P 7 12k 20k"]);
        run_ok(["mkfs.ext4", "-q", "-F", file]);
        run_ok(["e2fsck", "-fn", file]);
        assert_eq!(mount.unmount(), 0);
    }
}

/// Whatever has the buffer protocol may be returned, and a longer buffer than was asked for.
#[test]
fn any_buffer_will_do() {
    bridge_or_return!();
    let text = "
import array, mmap, nbdkit
memory = mmap.mmap(-1, 8192)
memory[:512] = b'm' * 512
class Made:
    pass
kinds = {
    'bytes': lambda n: b'b' * n,
    'bytearray': lambda n: bytearray(b'a' * n),
    'longer': lambda n: b'l' * (n + 100),
    'memoryview': lambda n: memoryview(b'xv' * n)[1::2],
    'array': lambda n: array.array('I', [0x61616161]) * (n // 4),
    'mmap': lambda n: memory,
    'matrix': lambda n: memoryview(b'2' * n).cast('B', (2, n // 2)),
}
def open(readonly): return nbdkit.export_name()
def get_size(h): return 1 << 20
def pread(h, count, offset): return kinds[h](count)
";
    let script = script(text);
    nbdsh(
        &script,
        &[],
        "
for name, want in {'bytes': b'b', 'bytearray': b'a', 'longer': b'l', 'memoryview': b'v', 'array': b'a', 'mmap': b'm',
                   'matrix': b'2'}.items():
    connect(name)
    got = h.pread(512, 0)
    assert got == want * (512 // len(want)), (name, got)
",
    );
}

/// Arrays are filled from the server's buffers and the other way round, without a copy in between.
#[test]
fn a_numpy_array_fills_buffers() {
    bridge_or_return!();
    if is_left_out("numpy") {
        return;
    }
    let script = script(
        "
import numpy
API_VERSION = 2
disk = numpy.zeros(1 << 20, dtype=numpy.uint8)
def open(readonly): return None
def get_size(h): return disk.size
def pread(h, buf, offset, flags): numpy.frombuffer(buf, dtype=numpy.uint8)[:] = disk[offset:offset+len(buf)]
def pwrite(h, buf, offset, flags): disk[offset:offset+len(buf)] = numpy.frombuffer(buf, dtype=numpy.uint8)
",
    );
    nbdsh(
        &script,
        &[],
        "connect(); data = os.urandom(300000); h.pwrite(data, 777); assert h.pread(300000, 777) == data",
    );
}

#[test]
fn a_numpy_array_is_a_disk() {
    bridge_or_return!();
    if is_left_out("numpy") {
        return;
    }
    let script = script(
        "
import nbdkit, numpy
disk = numpy.zeros(1 << 20, dtype=numpy.uint8)
def open(readonly): return nbdkit.export_name()
def get_size(h): return disk.size
def pread(h, count, offset):
    if h: return numpy.array([[1, 2]] * (count // 2), dtype=numpy.uint8, order='C' if h == 'rows' else 'F')
    return disk[offset:offset+count]
def pwrite(h, buf, offset): disk[offset:offset+len(buf)] = numpy.frombuffer(buf, dtype=numpy.uint8)
def zero(h, count, offset, may_trim): disk[offset:offset+count] = 0
",
    );
    nbdsh(
        &script,
        &[],
        "
connect()
data = os.urandom(300000)
h.pwrite(data, 777)
assert h.pread(300000, 777) == data
h.zero(1000, 777)
assert h.pread(2000, 777) == bytes(1000) + data[1000:2000]
for name in ('rows', 'columns'):
    connect(name)
    assert h.pread(100, 0) == bytes([1, 2]) * 50
",
    );
}

/// The second parameter of `pread` decides, however the function is made.
#[test]
fn count_or_buffer_is_told_by_the_name() {
    bridge_or_return!();
    for (pread, works) in [
        ("def pread(h, count, offset, flags): return b'c' * count", "c"),
        ("def pread(handle, buffer, where, flags=0): buffer[:] = b'f' * len(buffer)", "f"),
        ("pread = lambda h, count, offset, flags: b'l' * count", "l"),
        ("class C:\n  def __call__(self, h, count, o, flags): return b'o' * count\npread = C()", "o"),
        ("class C:\n  def m(self, h, b, o, flags): b[:] = b'm' * len(b)\npread = C().m", "m"),
        (
            "import functools\ndef logged(f):\n  @functools.wraps(f)\n  def g(*a): return f(*a)\n  return g\n\
             @logged\ndef pread(h, count, o, flags): return b'd' * count",
            "d",
        ),
        ("def pread(*arguments): arguments[1][:] = b's' * len(arguments[1])", "s"),
    ] {
        let script = script(&format!(
            "API_VERSION = 2\ndef open(r): return 1\ndef get_size(h): return 4096\n{pread}\n"
        ));
        nbdsh(&script, &[], &format!("connect(); assert h.pread(9, 0) == b'{works}' * 9"));
    }
}

/// Version 1, and scripts that are given a count, may keep what they were given to write.
#[test]
fn data_to_write_may_be_kept_where_it_always_could() {
    bridge_or_return!();
    for (version, pread, pwrite) in [
        (1, "pread(h, count, offset)", "pwrite(h, buf, offset)"),
        (2, "pread(h, count, offset, flags)", "pwrite(h, buf, offset, flags)"),
    ] {
        let script = script(&format!(
            "
API_VERSION = {version}
blocks = {{}}
def open(r): return 1
def get_size(h): return 1 << 20
def {pread}: return b''.join(blocks.get(o, bytes(512)) for o in range(offset, offset + count, 512))
def {pwrite}: blocks[offset] = buf
"
        ));
        nbdsh(
            &script,
            &[],
            "
connect()
for i in range(100):
    h.pwrite(bytes([i]) * 512, i * 512)
assert h.pread(51200, 0) == b''.join(bytes([i]) * 512 for i in range(100))
",
        );
    }
}

/// The reply is filled in place, a request of any size at once.
#[test]
fn large_requests_arrive_whole() {
    bridge_or_return!();
    let script = script(
        "
API_VERSION = 2
def open(r): return 1
def get_size(h): return 1 << 30
def pread(h, buf, offset, flags):
    assert buf.obj is not None and not buf.readonly and buf.contiguous and buf.format == 'B' and buf.itemsize == 1
    buf[0], buf[-1] = offset % 251, len(buf) % 251
    buf[1:-1] = bytes(len(buf) - 2)
def pwrite(h, buf, offset, flags):
    assert buf.readonly and bytes(buf) == b'w' * len(buf)
",
    );
    nbdsh(
        &script,
        &[],
        "
connect()
for size in (2, 4096, 1 << 20, 32 << 20):
    got = h.pread(size, 1000)
    assert (got[0], got[-1], len(got)) == (1000 % 251, size % 251, size)
    h.pwrite(b'w' * size, 5)
",
    );
}

/// Emulation is the server's: a script needs pread and pwrite and nothing else.
#[test]
fn what_is_missing_is_emulated() {
    bridge_or_return!();
    let script = script(
        "
import errno, nbdkit
API_VERSION = 2
disk = bytearray(b'x' * (1 << 20))
def open(r): return nbdkit.export_name()
def get_size(h): return len(disk)
def pread(h, buf, offset, flags): buf[:] = disk[offset:offset+len(buf)]
def pwrite(h, buf, offset, flags): disk[offset:offset+len(buf)] = buf
def zero(h, count, offset, flags):
    if h == 'set': nbdkit.set_error(errno.ENOTSUP)
    elif h == 'set-and-raise': nbdkit.set_error(errno.EOPNOTSUPP); raise ValueError('never mind')
    elif h == 'os-error': raise OSError(errno.EOPNOTSUPP, 'cannot')
    elif h == 'other': raise OSError(errno.ENOSPC, 'full')
def can_zero(h): return h != 'cannot'
",
    );
    let log = nbdsh(
        &script,
        &[],
        "
for name in ('set', 'set-and-raise', 'os-error', 'cannot'):
    connect(name)
    h.pwrite(b'x' * 4096, 0)
    h.zero(1000, 100)
    assert h.pread(1200, 0) == b'x' * 100 + bytes(1000) + b'x' * 100, name
    assert h.can_fast_zero() == (name == 'cannot')
connect('other')
assert fails(h.zero, 512, 0) == 'ENOSPC'
",
    );
    assert!(!log.contains("never mind") && !log.contains("cannot"), "{log}");
    assert!(log.contains("full"), "{log}");
}

/// A script's disk has what Python's own threads, files and sockets bring, for a copy by a foreign client.
#[test]
fn a_file_through_python_is_copied() {
    bridge_or_return!();
    let script = script(
        "
import os
API_VERSION = 2
def config(key, value):
    global path
    if key != 'file': raise RuntimeError('unknown parameter ' + key)
    path = os.path.abspath(value)
def thread_model(): return 3
def open(readonly): return os.open(path, os.O_RDONLY if readonly else os.O_RDWR)
def close(h): os.close(h)
def get_size(h): return os.stat(h).st_size
def pread(h, buf, offset, flags):
    if os.preadv(h, [buf], offset) != len(buf): raise EOFError('short read')
def pwrite(h, buf, offset, flags): os.pwritev(h, [buf], offset)
def can_multi_conn(h): return True
",
    );
    let disk = crate::util::patterned(script.dir.path(), "disk", 5 << 20);
    let copied = script.file("copy");
    sh(&format!(
        "{NBDKIT} -r -U - python {} file={} --run 'nbdcopy \"$uri\" {copy}' && cmp {disk} {copy}",
        script.path,
        disk.display(),
        copy = copied.display(),
        disk = disk.display(),
    ));
}

/// The buffer of a read has held what others wrote; a script that does not fill it shows nothing of that.
#[test]
fn what_a_script_does_not_fill_is_zeroes() {
    bridge_or_return!();
    let script = script(
        "
API_VERSION = 2
def open(readonly): return 1
def get_size(h): return 1 << 20
def pread(h, buf, offset, flags):
    if offset == 0: buf[:] = b'S' * len(buf)
    if offset == 4096: buf[:1000] = b'p' * 1000
",
    );
    nbdsh(
        &script,
        &[],
        "
h = connect()
for _ in range(20):
    assert h.pread(4096, 0) == b'S' * 4096
    assert h.pread(4096, 4096) == b'p' * 1000 + bytes(3096)
    assert h.pread(4096, 0) == b'S' * 4096
    assert h.pread(4096, 8192) == bytes(4096)
",
    );
}
