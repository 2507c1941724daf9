//! Every command with its flags at its boundaries, by libnbd's shell.

use crate::util::{self, NBDKIT, Server, image, raw::Raw, temp};

/// Python that all scripts start with: `fails` expects an errno; strict mode off lets bad requests through.
const PRELUDE: &str = "
h.set_strict_mode(0)
size = h.get_size()
def fails(errno, call, *args):
    try:
        call(*args)
    except nbd.Error as e:
        assert e.errno == errno, (e.errno, errno, str(e))
        return
    raise AssertionError(('no error', errno, args))
";

#[track_caller]
fn script(server: &Server, script: &str) {
    util::run_ok(["nbdsh", "--base-allocation", "-u", &server.uri(), "-c", &format!("{PRELUDE}{script}")]);
}

/// Reads, writes, zeroes, trims, flushes: what must hold for every writable disk of 1 MiB.
const WRITABLE: &str = "
FUA, HOLE, FAST = nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FAST_ZERO
assert size == 1 << 20
for at, n in [(0, 1), (0, 512), (size - 1, 1), (511, 2), (4095, 4098), (0, size)]:
    data = bytes((at + i * 7) & 255 for i in range(n))
    for flags in [0, FUA]:
        h.pwrite(data, at, flags)
        assert h.pread(n, at) == data
h.flush()

h.pwrite(b'\\xff' * size, 0)
def check(at, n):
    whole = h.pread(size, 0)
    assert whole[at:at + n] == bytes(n), 'not zero'
    assert whole[:at] == b'\\xff' * at and whole[at + n:] == b'\\xff' * (size - at - n), 'too much'
    h.pwrite(b'\\xff' * n, at)
for at, n in [(0, 1), (size - 1, 1), (1, 4096), (4096, 65536), (777, 99999), (0, size)]:
    for flags in [0, FUA, HOLE, FUA | HOLE]:
        h.zero(n, at, flags)
        check(at, n)
    if h.can_fast_zero():
        try:
            h.zero(n, at, FAST)
            check(at, n)
        except nbd.Error as e:
            assert e.errno == 'ENOTSUP', e.errno
            assert h.pread(n, at) == b'\\xff' * n, 'a refused fast zero must change nothing'
if h.can_trim():
    for flags in [0, FUA]:
        h.trim(4096, 8192, flags)
        h.trim(size, 0, flags)
if h.can_cache():
    h.cache(4096, 4096)
    h.cache(size, 0)

for at, n in [(size, 1), (size - 1, 2), (1 << 62, 1), ((1 << 63) - 1, 512), (0, size + 1)]:
    fails('EINVAL', h.pread, n, at)
    fails('ENOSPC', h.pwrite, bytes(n), at)
    fails('ENOSPC', h.zero, n, at)
    fails('EINVAL', h.trim, n, at)
    fails('EINVAL', h.cache, n, at)
    fails('EINVAL', h.block_status, n, at, lambda *a: 0)
fails('EINVAL', h.pread, 0, 0)
fails('ENOSPC', h.pwrite, b'', 0)
fails('ENOSPC', h.zero, 0, 0)
fails('EINVAL', h.trim, 0, 0)

every = [nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_DF, nbd.CMD_FLAG_REQ_ONE, nbd.CMD_FLAG_FAST_ZERO, 1 << 9]
for flag in every:
    if flag not in (nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_DF):
        fails('EINVAL', h.pread, 512, 0, flag)
    if flag != nbd.CMD_FLAG_FUA:
        fails('EINVAL', h.pwrite, bytes(512), 0, flag)
        fails('EINVAL', h.trim, 512, 0, flag)
        if flag != nbd.CMD_FLAG_DF:
            fails('EINVAL', h.flush, flag)
    if flag not in (nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FAST_ZERO):
        fails('EINVAL', h.zero, 512, 0, flag)
    if flag != nbd.CMD_FLAG_FUA:
        fails('EINVAL', h.cache, 512, 0, flag)
# The connection is still good after all of it.
assert h.pread(512, 0) is not None

def extents(n, at, flags=0):
    found = []
    def each(context, offset, entries, error):
        assert context == 'base:allocation' and offset == at
        found.extend(zip(entries[::2], entries[1::2]))
    h.block_status(n, at, each, flags)
    return found
for at, n in [(0, size), (1, 1), (size - 1, 1), (4097, 70000)]:
    found = extents(n, at)
    assert found and all(length > 0 for length, _ in found)
    here = at
    for length, kind in found:
        length = min(length, at + n - here)
        if kind & 2 and length:
            assert h.pread(length, here) == bytes(length), 'reported zero, reads otherwise'
        here += length
    one = extents(n, at, nbd.CMD_FLAG_REQ_ONE)
    assert len(one) == 1 and one[0][0] <= n
";

#[test]
fn memory() {
    script(&Server::start(["memory", "1M"]), WRITABLE);
}

#[test]
fn file() {
    let dir = temp();
    let disk = image(dir.path(), "disk", 1 << 20);
    script(&Server::start(["file", disk.to_str().expect("UTF-8")]), WRITABLE);
}

#[test]
fn data_and_split() {
    script(&Server::start(["data", "raw=abc", "size=1M"]), WRITABLE);
    let dir = temp();
    let parts = [1000, 500_000, (1 << 20) - 501_000]
        .map(|size| image(dir.path(), &size.to_string(), size).to_str().expect("UTF-8").to_owned());
    script(&Server::start(["split".to_owned()].into_iter().chain(parts)), WRITABLE);
}

#[test]
fn through_filters() {
    let filters = [
        &["--filter=nofilter", "memory", "1M"][..],
        &["--filter=offset", "memory", "3M", "offset=1M", "range=1M"],
        &["--filter=cow", "memory", "1M"],
        &["--filter=log", "memory", "1M"],
        &["--filter=truncate", "memory", "2M", "truncate=1M"],
        &["--filter=blocksize", "memory", "1M", "minblock=4K", "maxdata=64K"],
        &["--filter=nozero", "memory", "1M", "zeromode=emulate"],
        &["--filter=nozero", "memory", "1M", "zeromode=notrim"],
        &["--filter=noextents", "memory", "1M"],
        &["--filter=noparallel", "memory", "1M"],
        &["--filter=fua", "memory", "1M", "fuamode=emulate"],
        &["--filter=fua", "memory", "1M", "fuamode=force"],
        &["--filter=delay", "memory", "1M", "rdelay=1us"],
        &["--filter=offset", "--filter=cow", "--filter=log", "memory", "2M", "offset=1M"],
    ];
    for words in filters {
        eprintln!("{words:?}");
        script(&Server::start(words), WRITABLE);
    }
}

#[test]
fn without_parallel_workers() {
    script(&Server::start(["-t", "1", "memory", "1M"]), WRITABLE);
}

#[test]
fn with_simple_replies() {
    let server = Server::start(["--no-sr", "memory", "1M"]);
    util::nbdsh(
        &server.uri(),
        &format!(
            "{PRELUDE}
assert not h.get_structured_replies_negotiated()
h.pwrite(b'abc' * 1000, 77)
assert h.pread(3000, 77) == b'abc' * 1000
fails('EINVAL', h.pread, 1, size)
fails('EINVAL', h.pread, 512, 0, nbd.CMD_FLAG_DF)
fails('ENOSPC', h.pwrite, b'x', size)
assert h.pread(3000, 77) == b'abc' * 1000"
        ),
    );
}

#[test]
fn readonly() {
    for words in [&["-r", "memory", "1M"][..], &["--filter=readonly", "memory", "1M"]] {
        let server = Server::start(words);
        script(
            &server,
            "
assert h.is_read_only()
for can in (h.can_trim, h.can_zero, h.can_fua, h.can_fast_zero): assert not can()
fails('EPERM', h.pwrite, b'x', 0)
fails('EPERM', h.zero, 1, 0)
fails('EPERM', h.trim, 1, 0)
fails('EPERM', h.pwrite, b'x', size)
assert h.pread(size, 0) == bytes(size)",
        );
    }
}

#[test]
fn errors_carry_their_errno() {
    for (name, seen) in [
        ("EPERM", "EPERM"),
        ("EIO", "EIO"),
        ("ENOMEM", "ENOMEM"),
        ("EINVAL", "EINVAL"),
        ("ENOSPC", "ENOSPC"),
        ("ESHUTDOWN", "ESHUTDOWN"),
    ] {
        let server =
            Server::start(["--filter=error", "memory", "1M", &format!("error={name}"), "error-rate=100%"]);
        script(
            &server,
            &format!("fails('{seen}', h.pread, 512, 0); fails('{seen}', h.pwrite, bytes(512), 0)"),
        );
    }
}

#[test]
fn a_full_disk() {
    let server = Server::start(["full", "1M"]);
    script(&server, "assert h.pread(size, 0) == bytes(size); fails('ENOSPC', h.pwrite, b'x', 0)");
}

#[test]
fn the_largest_disk() {
    for size in ["9223372036854775807", "1610612736"] {
        let server = Server::start(["memory", size]);
        script(
            &server,
            &format!(
                "
assert size == {size}
for at in (0, size // 2, size - 9):
    h.pwrite(b'nine byte', at)
    assert h.pread(9, at) == b'nine byte'
    h.zero(5, at)
    assert h.pread(9, at) == bytes(5) + b'byte'
assert h.pread(4096, 1 << 20) == bytes(4096)
fails('EINVAL', h.pread, 10, size - 9)"
            ),
        );
        // It costs only what is written.
        let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).expect("status");
        let rss = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).expect("VmRSS");
        let kib: u64 = rss.trim().trim_end_matches(" kB").parse().expect("a number");
        assert!(kib < 100_000, "{rss}");
    }
}

#[test]
fn large_requests() {
    let server = Server::start(["memory", "256M"]);
    script(
        &server,
        "
most = 64 << 20
data = b'0123456789abcdef' * (most // 16)
h.pwrite(data, 1)
assert h.pread(most, 1) == data
assert h.pread(16, 1) == data[:16]",
    );
    // libnbd asks for no more than that.
    let mut raw = Raw::transmission(&server);
    for command in [0, 1] {
        raw.request(0, command, 0, (64 << 20) + 1);
        if command == 1 {
            raw.send(&vec![1; (64 << 20) + 1]);
        }
        assert_eq!(raw.read(16)[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 22], "EINVAL");
    }
    raw.request(0, 0, 1, 16);
    assert_eq!(raw.read(16)[4..8], [0; 4]);
    assert_eq!(raw.read(16), b"0123456789abcdef");
}

/// A delayed request does not hold up the others, unless there is only one worker.
#[test]
fn requests_overtake_a_sleeping_one() {
    let order = |threads: &str| {
        let server = Server::start(["-t", threads, "--filter=delay", "memory", "1M", "wdelay=500ms"]);
        util::nbdsh(
            &server.uri(),
            "order = []
h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(512)), 0, lambda e: order.append('write') or 1)
h.aio_pread(nbd.Buffer(512), 4096, lambda e: order.append('read') or 1)
while h.aio_in_flight() > 0: h.poll(-1)
print(' '.join(order))",
        )
    };
    assert_eq!(order("16").trim(), "read write");
    assert_eq!(order("1").trim(), "write read");
}

#[test]
fn oldstyle() {
    let out = util::run_ok([
        NBDKIT,
        "-o",
        "memory",
        "1M",
        "--run",
        "nbdsh -u \"$uri\" -c 'h.pwrite(b\"hello\", 5); assert h.pread(5, 5) == b\"hello\"; print(h.get_protocol())'",
    ]);
    assert_eq!(out.trim(), "oldstyle");
}
