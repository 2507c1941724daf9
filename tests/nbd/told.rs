//! What clients are told of layers that answer as they like: extents that are short, long or not in blocks, exports that
//! are not listed, failures with words.

use crate::util::{
    NBDKIT, Server, image, is_left_out, nbdsh,
    raw::{Raw, contexts, go},
    run, temp,
};

const REQ_ONE: u16 = 1 << 3;

/// The extents from `offset` on, as lengths and kinds.
fn status(raw: &mut Raw, flags: u16, offset: u64, length: u32) -> Vec<(u32, u32)> {
    raw.request(flags, 7, offset, length);
    let chunks = raw.chunks();
    assert_eq!((chunks.len(), chunks[0].kind), (1, 5), "{chunks:?}");
    (4..chunks[0].payload.len()).step_by(8).map(|at| (chunks[0].u32(at), chunks[0].u32(at + 4))).collect()
}

/// A script's disk under a filter.
fn eval(filter: &str, size: u64, extents: &str, parameter: Option<&str>) -> Server {
    let filter = format!("--filter={filter}");
    let (size, extents) = (format!("get_size=echo {size}"), format!("extents={extents}"));
    let words = [&filter, "eval", &size, "pread=head -c $3 /dev/zero", "can_extents=exit 0", &extents];
    Server::start(words.into_iter().chain(parameter))
}

#[test]
fn blocks_over_pieces_of_blocks() {
    // Each answer is for the 100 bytes that the request begins in.
    let pieces = "echo $(($4 / 100 * 100)) 100 hole,zero";
    for (filter, parameter) in [("blocksize", "minblock=512"), ("blocksize-policy", "blocksize-minimum=512")]
    {
        let server = eval(filter, 1536, pieces, Some(parameter));
        let raw = &mut Raw::structured(&server);
        assert_eq!(status(raw, 0, 512, 1024), [(512, 3)], "{filter}");
        assert_eq!(status(raw, 0, 1024, 512), [(512, 3)], "{filter}");
        if filter == "blocksize" {
            assert_eq!(status(raw, 0, 300, 100), [(212, 3)], "to the end of the block");
        }
    }
}

#[test]
fn nothing_is_told_of_a_disk_past_its_end() {
    let server = eval("truncate", 512, "echo 0 1M", None);
    assert_eq!(status(&mut Raw::structured(&server), 0, 0, 100), [(512, 0)]);
    let server = eval("truncate", 512, "echo 0 1M", Some("truncate=2048"));
    assert_eq!(status(&mut Raw::structured(&server), 0, 0, 1024), [(512, 0), (1536, 3)]);
}

#[test]
fn the_last_extent_may_pass_the_request() {
    let server = Server::start(["memory", "1M"]);
    let raw = &mut Raw::structured(&server);
    assert_eq!(status(raw, 0, 4096, 512), [(1048576 - 4096, 3)]);
    assert_eq!(status(raw, REQ_ONE, 4096, 512), [(512, 3)]);
}

#[test]
fn lengths_that_do_not_fit_are_whole_blocks() {
    let server = Server::start(["memory", "8G"]);
    assert_eq!(status(&mut Raw::structured(&server), 0, 0, 1 << 20), [(u32::MAX, 3)]);
    let words =
        ["--filter=blocksize-policy", "memory", "8G", "blocksize-minimum=64K", "blocksize-preferred=64K"];
    let server = Server::start(words);
    assert_eq!(status(&mut Raw::structured(&server), 0, 0, 1 << 20), [(!0xffff, 3)]);
}

/// Without a list of its own, a plugin's list is its default export; if that fails too, nothing.
#[test]
fn a_default_export_that_fails_is_not_listed() {
    const SIZE: &str = "get_size=echo 512";
    const READ: &str = "pread=head -c $3 /dev/zero";
    let list = |words: &[&str]| {
        let server = Server::start(words);
        let mut raw = Raw::options(&server);
        raw.option(3, b"");
        let mut names = Vec::new();
        loop {
            let (kind, payload) = raw.whole_reply();
            match kind {
                1 => return names,
                2 => names.push(String::from_utf8_lossy(&payload[4..]).into_owned()),
                other => panic!("reply {other:#x}: {}", String::from_utf8_lossy(&payload)),
            }
        }
    };
    assert_eq!(list(&["eval", SIZE, READ, "default_export=echo EIO no >&2; exit 1"]), [""; 0]);
    assert_eq!(list(&["eval", SIZE, READ, "default_export=echo mine"]), ["mine"]);
    // The filter has that name too, and so takes it.
    let mine = ["--filter=exportname", "eval", SIZE, READ, "default_export=mine"];
    assert_eq!(list(&[&mine[..], &["exportname-list=default-only"]].concat()), ["mine"]);
    let none = [&mine[..4], &["default-export=", "exportname-list=defaultonly"]].concat();
    assert_eq!(list(&none), [""]);
}

/// However often a client asks and opens.
#[test]
fn a_default_export_is_asked_for_once() {
    let log = "default_export=echo asked >>$tmpdir/log; echo mine";
    let pread = "pread=wc -l <$tmpdir/log | head -c $3";
    let words = ["eval", "get_size=echo 2", pread, log];
    let server = Server::start(["--filter=log"].iter().chain(&words).chain(&["logfile=/dev/null"]));
    let mut raw = Raw::options(&server);
    raw.option(3, b"");
    assert_eq!([raw.reply(), raw.reply()], [2, 1]);
    raw.option(8, b"");
    raw.option(6, &go(""));
    raw.option(10, &contexts("", &["base:allocation"]));
    raw.option(7, &go(""));
    let mut acknowledged = 0;
    while acknowledged < 4 {
        let (kind, payload) = raw.whole_reply();
        assert!(kind < 1 << 31, "{}", String::from_utf8_lossy(&payload));
        acknowledged += usize::from(kind == 1);
    }
    raw.request(0, 0, 0, 2);
    let chunks = raw.chunks();
    assert_eq!(&chunks[0].payload[8..], b"1\n");
}

#[test]
fn clients_hear_why() {
    let failing = "pread=echo first >&2; exit 1";
    let open = "open=case $3 in x) echo EPERM no entry to $3 >&2; exit 1;; esac";
    let server = Server::start(["eval", "get_size=echo 512", failing, open]);
    let raw = &mut Raw::options(&server);
    raw.option(7, &go("x"));
    let (kind, why) = raw.whole_reply();
    assert_eq!(kind, 0x8000_0006);
    let why = String::from_utf8_lossy(&why);
    assert!(why.ends_with("no entry to x"), "{why}");
    let raw = &mut Raw::structured(&server);
    raw.request(0, 0, 0, 512);
    let chunk = &raw.chunks()[0];
    assert_eq!((chunk.kind, chunk.u32(0)), (0x8001, 5));
    assert!(chunk.payload.ends_with(b"first"), "{:?}", String::from_utf8_lossy(&chunk.payload));
}

#[test]
fn keys_that_scripts_look_for() {
    let dump = |words: &[&str]| run([NBDKIT].iter().chain(words).chain(&["--dump-plugin"])).ok();
    let null = dump(&["--filter=exitwhen", "null"]);
    for event in ["file_created", "file_deleted", "process_exits", "pipe_closed", "script"] {
        assert!(null.contains(&format!("\nexitwhen_{event}=yes\n")), "{event}: {null}");
    }
    let file = dump(&["file"]);
    for key in ["extents", "block_size", "blkdiscard", "blkrotational", "blksszget", "blkzeroout"] {
        assert!(file.contains(&format!("\nfile_{key}=yes\n")), "{key}: {file}");
    }
}

#[test]
fn debug_flags_of_bundled_layers() {
    let start = |words: &[&str]| {
        run([NBDKIT, "-v", "-U", "-"].iter().chain(words).chain(&["null", "1M", "--run", "true"])).stderr
    };
    let said = start(&["--filter=ip", "-D", "ip.rules=1"]);
    assert!(said.contains("ip: allow: []") && !said.contains("global variable"), "{said}");
    let said = start(&["--filter=ip", "-D", "ip.ruls=1"]);
    assert!(said.contains("ip does not contain a global variable called ip_debug_ruls"), "{said}");
}

/// A loop device that is detached at the end.
struct Loop(String);

impl Drop for Loop {
    fn drop(&mut self) {
        run(["losetup", "-d", &self.0]);
    }
}

#[test]
fn a_block_device_tells_what_it_likes() {
    let dir = temp();
    let image = image(dir.path(), "disk", 1 << 20);
    let attached = run([
        "losetup".as_ref(),
        "-f".as_ref(),
        "--show".as_ref(),
        "--sector-size=4096".as_ref(),
        image.as_os_str(),
    ]);
    if is_left_out("loop") {
        return;
    }
    assert_eq!(attached.code, 0, "{}", attached.stderr);
    let device = Loop(attached.stdout.trim().to_owned());
    let server = Server::start(["-v", "-D", "file.zero=1", "file", &device.0]);
    let info = run(["nbdinfo", &server.uri()]).ok();
    for line in ["block_size_minimum: 4096", "block_size_preferred: 4096", "block_size_maximum: 4294967295"] {
        assert!(info.contains(line), "{line}: {info}");
    }
    let script = "
h.pwrite(b'x' * 65536, 0, nbd.CMD_FLAG_FUA)
h.zero(4096, 8192, nbd.CMD_FLAG_NO_HOLE); h.zero(4096, 16384); h.trim(4096, 32768)
assert h.pread(12288, 4096) == b'x' * 4096 + bytes(4096) + b'x' * 4096
assert h.pread(8192, 16384) == bytes(4096) + b'x' * 4096";
    nbdsh(&server.uri(), script);
    let log = server.stderr();
    assert!(log.contains("file: ZeroRange of 4096 bytes at 8192: Ok"), "{log}");
}

/// An answer about what a disk can do that fails is an error only for a layer that needs it.
#[test]
fn what_a_filter_masks_may_fail() {
    for (question, masked_by) in [
        ("can_extents", &["noextents"][..]),
        ("can_zero", &["nozero"]),
        ("is_rotational", &["rotational"]),
        ("can_cache", &["nocache"]),
    ] {
        let fails = format!("{question}=echo EIO cannot tell >&2; exit 1");
        let words =
            ["eval", "get_size=echo 512", "pread=head -c $3 /dev/zero", "pwrite=cat >/dev/null", &fails];
        for filter in masked_by {
            let filter = format!("--filter={filter}");
            let server = Server::start([filter.as_str()].into_iter().chain(words));
            nbdsh(&server.uri(), "assert h.pread(512, 0) == bytes(512)");
            let above = Server::start(["--filter=log", &filter].into_iter().chain(words));
            nbdsh(&above.uri(), "assert h.pread(512, 0) == bytes(512)");
        }
        // Where it is needed the client hears why.
        let server = Server::start(words);
        let raw = &mut Raw::options(&server);
        raw.option(7, &go(""));
        let (kind, why) = raw.whole_reply();
        let why = String::from_utf8_lossy(&why);
        assert!(kind == 0x8000_0006 && why.ends_with("cannot tell"), "{question}: {kind:#x} {why}");
    }
}
