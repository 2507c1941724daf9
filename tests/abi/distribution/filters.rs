//! Filters, over our own memory plugin; those that look for something on the disk, over a file.

use std::{
    collections::BTreeSet,
    io::{Read, Write},
    os::unix::net::UnixStream,
};

use super::*;
use crate::util::{NBDKIT_MOUNT, Server, nbdsh, patterned, run};

/// A disk of our memory plugin below the filter.
fn of<'a>(name: &'a str, more: &'a [&'a str]) -> Disk<'a> {
    Disk::new(move |_| [vec![filter(name)], words(["memory", "1M"]), words(more.iter().copied())].concat())
        .writable()
}

/// As [`of`], with a parameter that is a file which does not exist yet.
fn with_file<'a>(name: &'a str, parameter: &'a str) -> Disk<'a> {
    Disk::new(move |dir| {
        words([
            filter(name),
            "memory".into(),
            "1M".into(),
            format!("{parameter}={}", word(&dir.join("file"))),
        ])
    })
    .writable()
}

/// A filter over a file that a shell script makes: `disk` in the current directory.
fn over_file<'a>(name: &'a str, more: &'a [&'a str], script: &'a str) -> Disk<'a> {
    Disk::new(move |dir| {
        patterned(dir, "content", 1 << 20);
        sh(&format!("cd {}\n{script}", word(dir)));
        let disk = word(&dir.join("disk"));
        [vec![filter(name)], words(["file", &disk]), words(more.iter().copied())].concat()
    })
}

#[test]
fn each_loads_and_is_put_to_work_here() {
    let own = include_str!("filters.rs");
    for path in libraries("filter") {
        let option = format!("--filter={}", path.display());
        let dump = run_ok([NBDKIT, &option, "null", "--dump-plugin"]);
        assert!(dump.contains(&format!("_path={}\n", path.display())), "{dump}");
        let help = run_ok([NBDKIT, &option, "null", "--help"]);
        assert!(help.contains("filter: "), "{help}");
    }
    let names: BTreeSet<String> = libraries("filter")
        .iter()
        .map(|path| path.file_name().unwrap().to_str().unwrap().to_owned())
        .map(|file| file.replace("nbdkit-", "").replace("-filter.so", ""))
        .collect();
    let missing: Vec<_> = names.iter().filter(|name| !own.contains(&format!("(\"{name}\""))).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn those_that_change_no_data() {
    of("blocksize", &["minblock=4K", "maxdata=8K"]).through_both_doors();
    of("blocksize-policy", &["blocksize-minimum=512", "blocksize-error-policy=error"]).through_both_doors();
    of("cacheextents", &[]).through_both_doors();
    of("fua", &["fuamode=force"]).through_both_doors();
    of("multi-conn", &["multi-conn-mode=emulate"]).through_both_doors();
    of("nocache", &["cachemode=none"]).through_both_doors();
    of("noextents", &[]).through_both_doors();
    of("nofilter", &[]).through_both_doors();
    of("noparallel", &["serialize=connections"]).through_both_doors();
    of("nozero", &["zeromode=emulate"]).through_both_doors();
    of("readahead", &[]).through_both_doors();
    of("scan", &["scan-size=64K"]).through_both_doors();
}

#[test]
fn those_that_keep_what_is_written() {
    of("cache", &["cache=writethrough"]).through_both_doors();
    of("cache", &["cache-on-read=true"]).through_both_doors();
    of("cow", &[]).through_both_doors();
}

#[test]
fn those_that_move_data() {
    of("offset", &["offset=128K", "range=512K"]).through_both_doors();
    of("truncate", &["truncate=640K", "round-down=256K"]).through_both_doors();
    of("swab", &["swab-bits=32"]).through_both_doors();
}

#[test]
fn those_that_take_their_time() {
    of("delay", &["rdelay=1ms", "wdelay=1ms"]).through_both_doors();
    of("rate", &["rate=1G"]).through_both_doors();
    of("retry", &["retry-delay=1"]).through_both_doors();
    of("retry-request", &["retry-request-delay=1"]).through_both_doors();
}

#[test]
fn those_that_take_notes() {
    with_file("log", "logfile").through_both_doors();
    with_file("stats", "statsfile").through_both_doors();
    let dir = temp();
    for (name, parameter, words) in
        [("log", "logfile", ["Read id=", "Write id="]), ("stats", "statsfile", ["read: ", "write: "])]
    {
        for front_end in ["NBD", "FUSE"] {
            let notes = dir.path().join(format!("{name}-{front_end}"));
            let parameter = format!("{parameter}={}", word(&notes));
            let chain = [&filter(name), "memory", "1M", &parameter];
            if front_end == "NBD" {
                let mut server = Server::start(chain);
                nbdsh(&server.uri(), "h.pwrite(bytes(512), 0)\nh.pread(512, 0)");
                assert_eq!(server.terminate(), 0);
            } else {
                let mut mount = Mount::start(chain);
                fs::write(mount.file(), [7; 4096]).expect("write");
                assert_eq!(fs::read(mount.file()).expect("read").len(), 1 << 20);
                assert_eq!(mount.unmount(), 0);
            }
            let notes = fs::read_to_string(notes).expect("notes");
            assert!(words.iter().all(|word| notes.contains(word)), "{front_end}: {notes}");
        }
    }
}

/// What a read and a write of the first and the last block of the disk come to, at each front end. A failure is an
/// errno.
#[track_caller]
fn failures(chain: &[&str]) -> [[i32; 2]; 2] {
    let server = Server::start(chain);
    let script = "
def code(call, *words):
    try:
        call(*words)
    except nbd.Error as e:
        return e.errnum
    return 0
size = h.get_size()
print(code(h.pread, 4096, 0), code(h.pwrite, b'x' * 4096, size - 4096))
";
    let said = nbdsh(&server.uri(), script);
    let said: Vec<i32> = said.split_whitespace().map(|n| n.parse().expect("a number")).collect();
    let mount = Mount::start(chain);
    let file = File::options().read(true).write(true).open(mount.file()).expect("open the disk");
    let size = file.metadata().expect("stat").len();
    let code = |result: std::io::Result<()>| result.map_or_else(|e| e.raw_os_error().unwrap(), |()| 0);
    let read = code(file.read_exact_at(&mut [0; 4096], 0));
    let write = code(file.write_all_at(&[b'x'; 4096], size - 4096).and_then(|()| file.sync_all()));
    [[said[0], said[1]], [read, write]]
}

const EPERM: i32 = 1;
const EIO: i32 = 5;
const ENOSPC: i32 = 28;

#[test]
fn those_that_fail_on_purpose() {
    let all = failures(&[&filter("error"), "memory", "1M", "error-pwrite=ENOSPC", "error-pwrite-rate=100%"]);
    assert_eq!(all, [[0, ENOSPC]; 2]);
    let all = failures(&[&filter("protect"), "memory", "1M", "protect=1047552-"]);
    assert_eq!(all, [[0, EPERM]; 2]);
    // Other bytes than those that are there already.
    let all = failures(&[&filter("checkwrite"), "memory", "1M"]);
    assert_eq!(all, [[0, EIO]; 2]);
    let dir = temp();
    let map = dir.path().join("map");
    fs::write(&map, "0x0 ? 1\n0x0 0x1000 -\n0x1000 0xff000 +\n").expect("write a file");
    let chain = [&filter("ddrescue"), "-r", "memory", "1M", &format!("ddrescue-mapfile={}", word(&map))];
    let server = Server::start(chain);
    nbdsh(
        &server.uri(),
        "h.pread(4096, 4096)\ntry:\n    h.pread(4096, 0)\n    assert False\nexcept nbd.Error: pass",
    );
    let mount = Mount::start(chain);
    let file = File::open(mount.file()).expect("open the disk");
    file.read_exact_at(&mut [0; 4096], 4096).expect("a good part");
    assert_eq!(file.read_exact_at(&mut [0; 4096], 0).unwrap_err().raw_os_error(), Some(EIO));
}

/// What the file `content` is, that the scripts of [`over_file`] use.
fn content() -> Vec<u8> {
    let dir = temp();
    fs::read(patterned(dir.path(), "content", 1 << 20)).expect("read")
}

/// The disk is what the script has put into something else.
#[track_caller]
fn is_the_content(disk: Disk<'_>) {
    for seen in disk.through_both_doors() {
        assert!(seen == content());
    }
}

#[test]
fn those_that_find_a_disk_in_something_else() {
    let script = "(head -c 1M /dev/zero; cat content; head -c 1M /dev/zero) > disk
                  echo start=2048,size=2048 | sfdisk -q disk";
    is_the_content(over_file("partition", &["partition=1"], script).writable());
    let script = "mke2fs -q -t ext2 disk 8M; debugfs -w -R 'write content hello' disk 2>/dev/null";
    is_the_content(over_file("ext2", &["ext2file=/hello"], script).writable());
    let script =
        "qemu-img create -q -f luks --object secret,id=s,data=12345 -o key-secret=s,iter-time=10 disk 1M
                  qemu-img convert -n --object secret,id=s,data=12345 -f raw content \
                      --target-image-opts driver=luks,file.filename=disk,key-secret=s";
    is_the_content(over_file("luks", &["passphrase=12345"], script).writable());
    is_the_content(over_file("gzip", &[], "gzip -c content > disk"));
    is_the_content(over_file("xz", &[], "xz -c content > disk"));
    is_the_content(over_file("tar", &["tar-entry=content"], "tar cf disk content").writable());
}

#[test]
fn extents_from_a_list() {
    let dir = temp();
    let list = dir.path().join("list");
    fs::write(&list, "0 64K\n64K 960K hole,zero\n").expect("write a file");
    let list = format!("extentlist={}", word(&list));
    of("extentlist", &[&list]).through_both_doors();
    let chain = [filter("extentlist"), "memory".into(), "1M".into(), list];
    let server = Server::start(&chain);
    let map = run_ok(["nbdinfo", "--map", &server.uri()]);
    assert_eq!(
        map.split_whitespace().collect::<Vec<_>>()[..8],
        ["0", "65536", "0", "data", "65536", "983040", "3", "hole,zero"]
    );
    let mount = Mount::start(&chain);
    let file = File::open(mount.file()).expect("open the disk");
    assert_eq!(rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(0)).expect("seek"), 65536);
}

#[test]
fn the_name_of_an_export() {
    let words = ["exportname=one", "exportname=two", "exportname-strict=true", "exportname-list=explicit"];
    of("exportname", &words).export("two").through_both_doors();
    let chain =
        [&[filter("exportname"), "memory".into(), "1M".into()][..], &words.map(String::from)].concat();
    let server = Server::start(&chain);
    let list = run_ok(["nbdinfo", "--list", &server.uri()]);
    assert!(list.contains("export=\"one\"") && list.contains("export=\"two\""), "{list}");
    assert_ne!(run(["nbdinfo", &server.uri_of("three")]).code, 0);
    let all: Vec<_> =
        [NBDKIT_MOUNT, "-e", "three", "--run", "true"].map(String::from).into_iter().chain(chain).collect();
    let refused = run(&all);
    assert!(refused.code == 3 && refused.stderr.contains("not found"), "{}", refused.stderr);
}

#[test]
fn who_may_connect() {
    // The mount has no address: whatever the rules are, they cannot be applied to it.
    let ip = [&filter("ip"), "memory", "1M", "allow=all"];
    run_ok(["nbdinfo", "--size", &Server::start(ip).uri()]);
    let refused = run([&[NBDKIT_MOUNT, "--run", "true"][..], &ip].concat()).refused_with(3);
    assert!(refused.contains("nbdkit_peer_name"), "{refused}");

    of("limit", &["limit=1"]).through_both_doors();
    let server = Server::start([&filter("limit"), "memory", "1M", "limit=1"]);
    let second =
        format!("import subprocess\nassert subprocess.run(['nbdinfo', '{}']).returncode != 0", server.uri());
    nbdsh(&server.uri(), &second);

    let readme = b"This NBD server requires TLS";
    let disk =
        Disk::new(|_| words([filter("tls-fallback"), "memory".into(), "1M".into(), "--tls=off".into()]));
    let seen = disk.over_nbd(NBDKIT);
    assert!(seen.before.starts_with(readme) && seen.after.is_none());
    let mount = Mount::start([&filter("tls-fallback"), "memory", "1M"]);
    assert!(fs::read(mount.file()).expect("read").starts_with(readme));
}

#[test]
fn those_that_end_the_server() {
    let mut server = Server::start([&filter("exitlast"), "memory", "1M"]);
    run_ok(["nbdinfo", "--size", &server.uri()]);
    assert_eq!(server.wait(), 0);
    let mut mount = Mount::start([&filter("exitlast"), "memory", "1M"]);
    assert_eq!(fs::read(mount.file()).expect("read").len(), 1 << 20);
    assert_eq!(mount.unmount(), 0);

    let dir = temp();
    let event = dir.path().join("event");
    let words = [
        &filter("exitwhen"),
        "memory",
        "1M",
        &format!("exit-when-file-created={}", word(&event)),
        "exit-when-poll=1",
    ];
    let mut server = Server::start(words);
    run_ok(["nbdinfo", "--size", &server.uri()]);
    let mut mount = Mount::start(words);
    assert_eq!(fs::read(mount.file()).expect("read").len(), 1 << 20);
    fs::write(&event, "").expect("write a file");
    assert_eq!(server.wait(), 0);
    assert_eq!(mount.unmount(), 0);
}

#[test]
fn a_pause() {
    let dir = temp();
    let control = dir.path().join("control");
    let words = [&filter("pause"), "memory", "1M", &format!("pause-control={}", word(&control))];
    let tell = |command: &[u8], answer: &[u8]| {
        let mut stream = UnixStream::connect(&control).expect("connect");
        stream.write_all(command).expect("write");
        let mut byte = [0];
        stream.read_exact(&mut byte).expect("read");
        assert_eq!(byte, answer);
    };
    let server = Server::start(words);
    tell(b"p", b"P");
    // The read is answered after the pause.
    let script = format!(
        "
import socket
cookie = h.aio_pread(nbd.Buffer(512), 0)
while h.aio_get_direction() & nbd.AIO_DIRECTION_WRITE:
    h.poll(-1)
assert not h.aio_command_completed(cookie)
s = socket.socket(socket.AF_UNIX)
s.connect('{}')
s.send(b'r')
assert s.recv(1) == b'R'
while not h.aio_command_completed(cookie):
    h.poll(-1)
",
        word(&control)
    );
    nbdsh(&server.uri(), &script);
    drop(server);
    fs::remove_file(&control).expect("the socket");
    let mount = Mount::start(words);
    tell(b"p", b"P");
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| fs::read(mount.file()).expect("read").len());
        tell(b"r", b"R");
        assert_eq!(reader.join().expect("the reader"), 1 << 20);
    });
}
