//! Filters that change, check or move data, or what clients are told about requests.

use super::{captive, info, refused};
use crate::util::{Server, nbdsh, patterned, qemu_io, run, sh, temp};

#[test]
fn swab_reverses_bytes() {
    for (bits, expected) in [("16", "badcfehg"), ("32", "dcbahgfe"), ("64", "hgfedcba")] {
        let bits = format!("swab-bits={bits}");
        let words = ["--filter=swab", "data", "raw=abcdefgh", "size=512", &bits];
        let out = captive(words, "nbdcopy \"$uri\" - | head -c 8").ok();
        assert_eq!(out, expected);
    }
    let server = Server::start(["--filter=swab", "memory", "1M"]);
    nbdsh(
        &server.uri(),
        "assert h.get_block_size(nbd.SIZE_MINIMUM) == 2
h.pwrite(b'abcd', 2); assert h.pread(4, 2) == b'abcd'
h.set_strict_mode(0)
try:
    h.pread(1, 0); raise SystemExit('an unaligned read')
except nbd.Error as e:
    assert e.errno == 'EINVAL'",
    );
}

#[test]
fn protect_keeps_a_range() {
    let server = Server::start(["--filter=protect", "memory", "1M", "protect=512-1023", "protect=~0-65535"]);
    nbdsh(
        &server.uri(),
        "
def refused(request):
    try:
        request()
    except nbd.Error as e:
        assert e.errno == 'EPERM', e.errno
        return
    raise SystemExit('it was allowed')

h.pwrite(b'x' * 512, 0)
h.pwrite(bytes(512), 512)
h.zero(1024, 256)
h.trim(512, 512)
refused(lambda: h.pwrite(b'x', 1023))
refused(lambda: h.pwrite(b'x' * 2048, 0))
refused(lambda: h.pwrite(b'x', 65536))
h.pwrite(b'y', 65535)
assert h.pread(1024, 256) == bytes(1024)",
    );
    let error = refused(&["--filter=protect", "memory", "1M", "protect=512"]);
    assert!(error.contains("use START-END"), "{error}");
}

#[test]
fn checkwrite_lets_a_true_copy_pass() {
    let dir = temp();
    let disk = patterned(dir.path(), "disk", 3 << 20);
    let disk = disk.to_str().expect("UTF-8");
    sh(&format!("fallocate --punch-hole --offset 65536 --length 1M {disk}"));
    let before = std::fs::read(disk).expect("the disk");
    let words = ["--filter=checkwrite", "file", disk];
    captive(words, "nbdcopy \"$uri\" \"$uri\"").ok();
    captive(words, "qemu-img convert -n -f raw \"$uri\" -O raw \"$uri\"").ok();
    let other = patterned(dir.path(), "other", 3 << 20);
    sh(&format!("printf x | dd of={} bs=1 seek=2000000 conv=notrunc status=none", other.display()));
    let run = captive(words, &format!("nbdcopy {} \"$uri\"", other.display()));
    assert_ne!(run.code, 0, "a wrong copy");
    assert!(std::fs::read(disk).expect("the disk") == before, "the disk was written to");
}

#[test]
fn map_moves_ranges() {
    let dir = temp();
    let disk = patterned(dir.path(), "disk", 1 << 20);
    let words = ["--filter=map", "file", disk.to_str().expect("UTF-8"), "map=0-511:512", "map=512-1023:0"];
    let copy = dir.path().join("copy");
    captive(words, &format!("nbdcopy \"$uri\" {}", copy.display())).ok();
    let (disk, copy) = (std::fs::read(disk).expect("the disk"), std::fs::read(copy).expect("the copy"));
    assert!(copy[..512] == disk[512..1024] && copy[512..1024] == disk[..512] && copy[1024..] == disk[1024..]);

    let words = ["--filter=map", "memory", "1M", "map-size=2M", "map=0x100000-0x17ffff:0"];
    let server = Server::start(words);
    nbdsh(
        &server.uri(),
        "assert h.get_size() == 2 << 20
h.pwrite(b'hello', 0)
assert h.pread(5, 1 << 20) == b'hello'
try:
    h.pread(1, 0x180000); raise SystemExit('there is nothing')
except nbd.Error as e:
    assert e.errno == 'EIO'",
    );
}

#[test]
fn blocksize_policy_tells_and_enforces() {
    let words =
        ["--filter=blocksize-policy", "memory", "1M", "blocksize-minimum=4K", "blocksize-maximum=64K"];
    let told = info(&words);
    for line in
        ["\"block_size_minimum\": 4096", "\"block_size_preferred\": 32768", "\"block_size_maximum\": 65536"]
    {
        assert!(told.contains(line), "{line} is not in {told}");
    }
    let server = Server::start(words.iter().chain(&["blocksize-error-policy=error"]));
    nbdsh(
        &server.uri(),
        "h.set_strict_mode(0)
for request in [lambda: h.pread(512, 0), lambda: h.pread(4096, 1), lambda: h.pwrite(bytes(131072), 0)]:
    try:
        request(); raise SystemExit('it was allowed')
    except nbd.Error as e:
        assert e.errno == 'EINVAL'
h.pread(65536, 4096)",
    );
    qemu_io(&server.uri(), &["read 0 512", "write 1000 5000", "write -z 0 1M"]);
}

#[test]
fn blocksize_policy_disconnects_who_writes_too_much() {
    let words = ["--filter=blocksize-policy", "memory", "1M", "blocksize-write-disconnect=4K"];
    let server = Server::start(words);
    nbdsh(
        &server.uri(),
        "h.pwrite(bytes(4096), 0)
try:
    h.pwrite(bytes(4097), 0); raise SystemExit('it was allowed')
except nbd.Error:
    pass
assert h.aio_is_dead() or h.aio_is_closed()",
    );
    nbdsh(&server.uri(), "h.pread(1, 0)");
}

#[test]
fn flags_that_filters_set() {
    let can = |filter: &str, parameter: &str, line: &str| {
        let filter = format!("--filter={filter}");
        let words: Vec<_> =
            [&filter, "memory", "1M", parameter].into_iter().filter(|w| !w.is_empty()).collect();
        info(&words).contains(line)
    };
    assert!(can("rotational", "", "\"is_rotational\": true"));
    assert!(can("rotational", "rotational=false", "\"is_rotational\": false"));
    assert!(can("nocache", "", "\"can_cache\": false"));
    assert!(can("nocache", "cachemode=emulate", "\"can_cache\": true"));
    assert!(can("nocache", "cachemode=nop", "\"can_cache\": true"));
    captive(
        ["--filter=nocache", "memory", "1M", "cachemode=emulate"],
        "nbdsh -u \"$uri\" -c 'h.cache(1 << 20, 0)'",
    )
    .ok();
}

/// The distribution's server tells the same about its disks.
#[test]
fn capabilities_are_those_of_the_c_nbdkit() {
    // Its memory plugin has no preferred block size.
    let fields = |words: &[&str], json: String| -> Vec<String> {
        let block_size = words[0].contains("blocksize");
        let kept = json
            .lines()
            .filter(|line| line.contains("can_") || line.contains("is_") || line.contains("size"))
            .filter(|line| block_size || !line.contains("block_size"));
        kept.filter(|line| !line.contains("uri")).map(|line| line.trim().to_owned()).collect()
    };
    for words in [
        "--filter=checkwrite memory 1M",
        "--filter=swab memory 1025 swab-bits=64",
        "--filter=nocache memory 1M",
        "--filter=nocache memory 1M cachemode=emulate",
        "--filter=protect memory 1M protect=0-511",
        "--filter=blocksize-policy memory 1M blocksize-preferred=32K",
        "--filter=multi-conn memory 1M multi-conn-mode=disable",
        "--filter=exportname memory 1M exportdesc=fixed:x",
        "--filter=tls-fallback memory 1M",
        "--filter=retry memory 1M",
        "--filter=retry-request memory 1M",
        "--filter=rate memory 1M rate=1G",
        "--filter=stats memory 1M statsfile=/dev/null",
        "--filter=limit memory 1M",
        "--filter=ip memory 1M allow=all",
        "--filter=exitwhen memory 1M",
    ] {
        let words: Vec<&str> = words.split(' ').collect();
        let theirs = ["/usr/bin/nbdkit", "-U", "-"].into_iter().chain(words.iter().copied());
        let theirs = run(theirs.chain(["--run", "nbdinfo --json \"$uri\""])).ok();
        assert_eq!(fields(&words, info(&words)), fields(&words, theirs), "{words:?}");
    }
}
