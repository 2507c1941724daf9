//! The life of a script: every callback in its order, threads, the fork to the background, and the end.

use std::fs;

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open},
};

use super::{bridge_or_return, nbdsh, nbdsh_with, script, servers};
use crate::util::{Mount, NBDKIT_MOUNT, Server, run, run_ok};

/// A script that has every function and notes each call.
const EVERYTHING: &str = r#"
import builtins, nbdkit, os
API_VERSION = 2
disk = bytearray(65536)
log = builtins.open(os.environ["RESULT"], "w", buffering=1)
def note(*words): print(*words, file=log)
def dump_plugin(): note("dump_plugin")
def config(key, value): note("config", key, value)
def config_complete(): note("config_complete")
def thread_model(): note("thread_model"); return nbdkit.THREAD_MODEL_SERIALIZE_REQUESTS
def get_ready(): note("get_ready")
def after_fork(): note("after_fork")
def cleanup(): note("cleanup")
def preconnect(readonly): note("preconnect", readonly)
def list_exports(readonly, tls): note("list_exports", readonly, tls); return ["one", ("two", "the second")]
def default_export(readonly, tls): note("default_export", readonly, tls); return "one"
def open(readonly): note("open", readonly, nbdkit.export_name(), nbdkit.is_tls()); return {"name": nbdkit.export_name()}
def close(h): note("close", h["name"])
def export_description(h): return "about " + h["name"]
def get_size(h): return len(disk)
def block_size(h): return (512, 4096, 32768)
def is_rotational(h): return True
def can_multi_conn(h): return True
def can_write(h): return h["name"] != "two"
def can_flush(h): return 1
def can_trim(h): return [0]
def can_zero(h): return True
def can_fast_zero(h): return True
def can_fua(h): return nbdkit.FUA_NATIVE
def can_cache(h): return nbdkit.CACHE_NATIVE
def can_extents(h): return True
def pread(h, buf, offset, flags):
    note("pread", len(buf), offset, flags)
    buf[:] = disk[offset:offset+len(buf)]
def pwrite(h, buf, offset, flags):
    note("pwrite", len(buf), offset, flags)
    disk[offset:offset+len(buf)] = buf
def flush(h, flags): note("flush", flags)
def trim(h, count, offset, flags): note("trim", count, offset, flags)
def zero(h, count, offset, flags):
    note("zero", count, offset, flags)
    disk[offset:offset+count] = bytes(count)
def cache(h, count, offset, flags): note("cache", count, offset, flags)
def extents(h, count, offset, flags):
    note("extents", count, offset, flags)
    yield (0, 32768, 0)
    yield (32768, 16384, nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO)
    yield (49152, 16384, nbdkit.EXTENT_ZERO)
"#;

#[test]
fn every_callback_over_nbd() {
    let bridge = bridge_or_return!();
    let script = script(EVERYTHING);
    let result = format!("RESULT={}", script.file("result").display());
    for server in servers(&bridge) {
        let words = ["env", &result, &server[0], "-s", &server[1], &script.path, "a=b"];
        let client = format!(
            "
import nbd
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.set_full_info(True)
h.connect_command({words:?})
assert h.get_size() == 65536 and not h.is_read_only()
assert h.is_rotational() and h.can_flush() and h.can_trim() and h.can_zero() and h.can_fast_zero()
assert h.can_fua() and h.can_cache() and h.can_multi_conn()
assert h.get_export_description() == 'about one'
assert [h.get_block_size(i) for i in range(3)] == [512, 4096, 32768]
h.pwrite(b'x' * 512, 1024, nbd.CMD_FLAG_FUA)
assert h.pread(1024, 1024) == b'x' * 512 + bytes(512)
h.flush()
h.trim(512, 512, nbd.CMD_FLAG_FUA)
h.zero(512, 1024, nbd.CMD_FLAG_NO_HOLE)
h.zero(512, 1024, nbd.CMD_FLAG_FAST_ZERO)
h.cache(4096, 0)
found = []
h.block_status(65536, 0, lambda c, o, entries, e: found.extend(entries))
assert found == [32768, 0, 16384, 3, 16384, 2], found
h.block_status(16384, 4096, lambda c, o, entries, e: found.extend(entries), nbd.CMD_FLAG_REQ_ONE)
h.shutdown()
"
        );
        run_ok(["nbdsh", "-c", &client]);
        let mut log = script.lines("result");
        let want = [
            "config a b",
            "config_complete",
            "thread_model",
            "get_ready",
            "after_fork",
            "preconnect False",
            "default_export False False",
            "open False one False",
            "pwrite 512 1024 2",
            "pread 1024 1024 0",
            "flush 0",
            "trim 512 512 2",
            "zero 512 1024 0",
            "zero 512 1024 9",
            "cache 4096 0 0",
            "extents 65536 0 0",
            "extents 16384 4096 4",
            "close one",
            "cleanup",
        ];
        // The C nbdkit asks for the default export once more.
        log.dedup();
        assert_eq!(log, want, "{server:?}");

        let list = [&*server[0], "-U", "-", "--run", "nbdinfo --list \"$uri\"", &server[1], &script.path];
        let list = run_ok(["env", &result].iter().chain(&list));
        for text in ["export=\"one\"", "export=\"two\"", "the second"] {
            assert!(list.contains(text), "{text}: {list}");
        }
        let dump = ["env", &result, &server[0], &server[1], &script.path, "--dump-plugin"];
        assert!(run_ok(dump).contains("thread_model=serialize_requests\n"));
        assert_eq!(script.lines("result").last().expect("a line"), "dump_plugin");
    }
}

#[test]
fn every_request_through_a_mount() {
    bridge_or_return!();
    let script = script(EVERYTHING);
    let result = format!("RESULT={}", script.file("result").display());
    let client = "
set -e
[ $(stat -c %s $file) = 65536 ]
head -c 4096 /dev/zero | tr '\\0' x | dd of=$file bs=4096 seek=1 conv=notrunc,fsync iflag=fullblock status=none
cmp -n 4096 -i 4096:0 $file <(head -c 4096 /dev/zero | tr '\\0' x)
fallocate -p -o 4096 -l 4096 $file
cmp -n 4096 -i 4096:0 $file /dev/zero
fallocate -z -o 8192 -l 4096 $file
qemu-img map -f raw --output=json $file
";
    let client = format!("export file; exec bash -c {}", shell_quote(client));
    let map = run_ok(["env", &result, NBDKIT_MOUNT, "--run", &client, "python", &script.path, "a=b"]);
    assert!(map.contains("\"start\": 32768"), "{map}");
    let log = script.lines("result");
    for call in [
        "config a b",
        "config_complete",
        "thread_model",
        "get_ready",
        "after_fork",
        "preconnect False",
        "open False one False",
        "pwrite 4096 4096",
        "zero 4096 4096",
        "zero 4096 8192",
        "flush 0",
        "extents ",
        "pread ",
        "close one",
        "cleanup",
    ] {
        assert!(log.iter().any(|line| line.starts_with(call)), "{call}: {log:?}");
    }
}

fn shell_quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

#[test]
fn functions_of_the_server() {
    let bridge = bridge_or_return!();
    let script = script(
        "
import nbdkit, os
API_VERSION = 2
def raises(kind, call, *arguments):
    try: call(*arguments)
    except kind as e: return str(e)
    raise AssertionError('nothing was raised')
def config_complete():
    assert nbdkit.stdio_safe()
    assert nbdkit.parse_size('100M') == 100 << 20 and nbdkit.parse_size('3s') == 1536
    assert 'lots' in raises(ValueError, nbdkit.parse_size, 'lots')
    raises(ValueError, nbdkit.parse_size, '1\\0')
    raises(TypeError, nbdkit.parse_size, 7)
    raises(TypeError, nbdkit.set_error, 'EIO')
    raises(OverflowError, nbdkit.set_error, 1 << 40)
    raises(RuntimeError, nbdkit.export_name)
    assert nbdkit.read_password('secret') == b'secret'
    with __builtins__.open('/dev/null') as null:
        raises(RuntimeError, nbdkit.read_password, '+/none')
    nbdkit.debug('a note \\u00e9')
    newer = os.environ['NEWER'] == '1'
    if newer:
        assert nbdkit.parse_probability('chance', '10%') == 0.1
        raises(ValueError, nbdkit.parse_probability, 'chance', 'often')
        assert nbdkit.parse_delay('wait', '1500ms') == (1, 500000000)
        raises(ValueError, nbdkit.parse_delay, 'wait', 'long')
    else:
        for call in (nbdkit.parse_probability, nbdkit.parse_delay):
            assert 'a newer nbdkit is needed' in raises(RuntimeError, call, 'what', '1')
        assert 'newer' in raises(RuntimeError, nbdkit.disconnect, True)
        assert 'newer' in raises(RuntimeError, nbdkit.peer_tls_dn)
def open(readonly):
    assert not nbdkit.is_tls() and not nbdkit.stdio_safe()
    assert nbdkit.peer_pid() > 0 and nbdkit.peer_uid() == os.getuid() and nbdkit.peer_gid() == os.getgid()
    raises(RuntimeError, nbdkit.peer_security_context)
    if os.environ['NEWER'] == '1': assert nbdkit.peer_tls_dn() == nbdkit.peer_tls_issuer_dn() == ''
    return nbdkit.export_name()
def get_size(h): return 4096
def pread(h, buf, offset, flags):
    nbdkit.nanosleep(0, 1)
    if h == 'disconnect': nbdkit.disconnect(True)
    if h == 'shutdown': nbdkit.shutdown()
    if h == 'sleep': nbdkit.shutdown(); nbdkit.nanosleep(3600, 0)
for name, value in dict(THREAD_MODEL_SERIALIZE_CONNECTIONS=0, THREAD_MODEL_SERIALIZE_ALL_REQUESTS=1,
        THREAD_MODEL_SERIALIZE_REQUESTS=2, THREAD_MODEL_PARALLEL=3, FLAG_MAY_TRIM=1, FLAG_FUA=2, FLAG_REQ_ONE=4,
        FLAG_FAST_ZERO=8, FUA_NONE=0, FUA_EMULATE=1, FUA_NATIVE=2, CACHE_NONE=0, CACHE_EMULATE=1, CACHE_NATIVE=2,
        EXTENT_HOLE=1, EXTENT_ZERO=2).items():
    assert getattr(nbdkit, name) == value, name
",
    );
    for (server, newer) in servers(&bridge).iter().zip(["NEWER=1", "NEWER=0"]) {
        let words = [newer, &server[0], "-v", &server[1], &script.path];
        let ran = |client: &str| nbdsh_with(&words, client);
        let fine = ran("connect('x'); h.pread(512, 0)");
        assert_eq!(fine.code, 0, "{}{}", fine.stdout, fine.stderr);
        assert!(fine.stderr.contains("a note \u{e9}"), "{}", fine.stderr);
        if newer == "NEWER=1" {
            let gone = ran("
connect('disconnect')
try: h.pread(512, 0); raise SystemExit('still there')
except nbd.Error: pass
connect('x'); h.pread(512, 0)");
            assert_eq!(gone.code, 0, "{}{}", gone.stdout, gone.stderr);
        }
    }
}

/// A script ends the server, and its own sleep with it.
#[test]
fn a_script_ends_the_server() {
    bridge_or_return!();
    for sleep in ["", "; nbdkit.nanosleep(3600, 0)"] {
        let script = script(&format!(
            "import nbdkit\ndef open(r): return 1\ndef get_size(h): return 4096\n\
             def pread(h, count, offset): nbdkit.shutdown(){sleep}; return bytes(count)\n"
        ));
        let mut server = Server::start(["python", &script.path]);
        run(["nbdsh", "-u", &server.uri(), "-c", "h.pread(512, 0)"]);
        assert_eq!(server.wait(), 0);
        assert_eq!(
            server.stderr().contains("the sleep ended early"),
            !sleep.is_empty(),
            "{}",
            server.stderr()
        );
    }
}

/// Requests run at once where the script says that they may, and else one after another.
#[test]
fn thread_models() {
    let bridge = bridge_or_return!();
    let parallel = script(
        "
import nbdkit, threading
API_VERSION = 2
meeting = threading.Barrier(4)
def thread_model(): return nbdkit.THREAD_MODEL_PARALLEL
def open(r): return 1
def get_size(h): return 1 << 20
def pread(h, buf, offset, flags): meeting.wait(60)
",
    );
    let client =
        "connect(); at_once(h, [lambda i=i: h.aio_pread(nbd.Buffer(512), i * 512) for i in range(4)])";
    for server in servers(&bridge) {
        let words: Vec<&str> = server.iter().map(String::as_str).chain([&*parallel.path]).collect();
        let run = nbdsh_with(&words, client);
        assert_eq!(run.code, 0, "{}{}", run.stdout, run.stderr);
    }
    let mount = Mount::start(["python", &parallel.path]);
    let reads = format!(
        "for i in 0 1 2 3; do dd if={} of=/dev/null bs=4096 count=1 skip=$i iflag=direct status=none & done; wait",
        mount.file().display()
    );
    crate::util::sh(&reads);

    let serial = script(
        "
import threading, time
API_VERSION = 2
working = 0
def open(r): return 1
def get_size(h): return 1 << 20
def pread(h, buf, offset, flags):
    global working
    working += 1
    time.sleep(0.001)
    buf[:] = bytes([working]) * len(buf)
    working -= 1
",
    );
    let client = "
connect()
buffers = [nbd.Buffer(512) for _ in range(50)]
at_once(h, [lambda b=b: h.aio_pread(b, 0) for b in buffers])
assert all(b.to_bytearray() == b'\\x01' * 512 for b in buffers)
";
    nbdsh(&serial, &[], client);
}

/// The script's own threads run while the server waits for requests, and more clients than threads come and go.
#[test]
fn threads_of_the_script() {
    bridge_or_return!();
    let script = script(
        "
import nbdkit, threading
API_VERSION = 2
ticks = threading.Semaphore(0)
go = threading.Event()
def work():
    go.wait()
    for _ in range(100000): pass
    ticks.release()
def get_ready(): threading.Thread(target=work).start()
def after_fork(): threading.Thread(target=work, daemon=True).start()
def thread_model(): return nbdkit.THREAD_MODEL_PARALLEL
def open(r): return threading.get_ident()
def get_size(h): return 1 << 20
def pread(h, buf, offset, flags):
    if offset == 0: go.set()
    else: assert ticks.acquire(timeout=60)
    buf[:] = bytes(len(buf))
",
    );
    // In the foreground both threads are there.
    nbdsh(&script, &[], "connect(); h.pread(1, 0); h.pread(1, 1); h.pread(1, 1)");
    nbdsh(
        &script,
        &[],
        "
import threading
def client():
    c = nbd.NBD()
    c.connect_unix(os.environ['unixsocket'])
    for _ in range(20):
        at_once(c, [lambda: c.aio_pread(nbd.Buffer(4096), 0) for _ in range(16)])
    c.shutdown()
for _ in range(3):
    threads = [threading.Thread(target=client) for _ in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
",
    );
}

/// In the background the interpreter is as good as before, whatever ran when the server forked.
#[test]
fn in_the_background() {
    let bridge = bridge_or_return!();
    let script = script(
        "
import os, struct, threading
API_VERSION = 2
def spin():
    while True: sum(range(1000))
def get_ready():
    for _ in range(4): threading.Thread(target=spin, daemon=True).start()
def after_fork():
    global pid, alive
    pid = os.getpid()
    alive = threading.active_count()
    threading.Thread(target=spin, daemon=True).start()
def open(r): return 1
def get_size(h): return 4096
def pread(h, buf, offset, flags):
    assert pid == os.getpid() and threading.main_thread().is_alive()
    buf[:] = struct.pack('<II', alive, pid)
",
    );
    for server in servers(&bridge) {
        let socket = script.file("socket");
        run_ok([&*server[0], "-U", socket.to_str().expect("UTF-8"), &*server[1], &script.path]);
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        // The C nbdkit is ready some time after its first process has ended; a client waits for it.
        let client = "import struct; print(*struct.unpack('<II', h.pread(8, 0)))";
        let read = run_ok(["nbdsh", "-u", &uri, "-c", client]);
        let (threads, pid) = read.trim().split_once(' ').expect("two numbers");
        let pid = Pid::from_raw(pid.parse().expect("a number")).expect("a process");
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).expect("a pidfd");
        kill_process(pid, Signal::TERM).expect("kill");
        let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
        let ended = poll(&mut fds, Some(&Timespec { tv_sec: 60, tv_nsec: 0 })).expect("poll") > 0;
        if !ended {
            kill_process(pid, Signal::KILL).expect("kill");
        }
        assert!(ended, "{server:?} does not end");
        // Of the threads of the first process only the main one is here.
        assert_eq!(threads, "1", "{server:?}");
        fs::remove_file(&socket).unwrap_or_default();
    }
}

/// Ctrl-C ends the server whatever the script does, and what it left to the end is done.
#[test]
fn the_end() {
    bridge_or_return!();
    let text = "
import atexit, os, sys, tempfile, threading
lock = threading.Lock()
def wait():
    lock.acquire()
    lock.acquire()
def after_fork(): THREAD
def cleanup(): print('cleanup', file=log)
log = open(os.path.dirname(__file__) + '/result', 'w')
temporary = tempfile.NamedTemporaryFile(dir=os.path.dirname(__file__), suffix='.temporary')
atexit.register(print, 'atexit', file=log)
def open(r): return 1
def get_size(h): return 4096
def pread(h, c, o): return bytes(c)
";
    for (signal, thread) in [
        (Signal::INT, "pass"),
        (Signal::TERM, "pass"),
        (Signal::INT, "threading.Thread(target=wait).start()"),
    ] {
        let idle = script(&text.replace("THREAD", thread));
        let mut server = Server::start(["python", &idle.path]);
        run_ok(["nbdsh", "-u", &server.uri(), "-c", "h.pread(512, 0)"]);
        assert_eq!(server.signal(signal), 0);
        assert_eq!(idle.lines("result"), ["cleanup", "atexit"], "{thread}");
        // What Python removes when it ends is gone; a thread might still need it.
        let files = fs::read_dir(idle.dir.path()).expect("a directory").flatten();
        let left = files.filter(|f| f.path().extension().is_some_and(|e| e == "temporary")).count();
        assert!(left == 0 || thread != "pass");
    }

    for busy in ["while True: pass", "import time; time.sleep(3600)", "threading.Event().wait()"] {
        let script = script(&format!(
            "import threading\nAPI_VERSION = 2\nstarted = threading.Semaphore(0)\n\
             def thread_model(): return 3\ndef open(r): return 1\ndef get_size(h): return 4096\n\
             def pread(h, buf, offset, flags):\n  if offset: started.acquire(); return\n  started.release()\n  {busy}\n"
        ));
        let mut server = Server::start(["python", &script.path]);
        let client = "
h.aio_pread(nbd.Buffer(512), 0)
cookie = h.aio_pread(nbd.Buffer(512), 512)
while not h.aio_command_completed(cookie): h.poll(-1)
import os; os._exit(0)
";
        run_ok(["nbdsh", "-u", &server.uri(), "-c", client]);
        assert_eq!(server.signal(Signal::INT), 0, "{busy}");
    }
}
