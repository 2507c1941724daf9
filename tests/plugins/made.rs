//! Disks that are made on the spot: what the tools of each format, the kernel and the C nbdkit's plugins say of them.

use std::{fs, path::Path};

use super::C_NBDKIT;
use crate::util::{NBDKIT, Server, is_left_out, nbdsh, run, run_ok, sh, temp};

/// A directory with files of many sizes and names, in more than one cluster of entries.
const TREE: &str = "
mkdir -p 'sub directory/deeper' empty
printf 'what is in it' > FILE.TXT
head -c 100000 /dev/urandom > 'sub directory/a long name, with a comma.data'
head -c 4096 /dev/urandom > 'sub directory/deeper/ÄÖÜ ß.bin'
: > 'sub directory/empty file'
for i in $(seq 200); do echo $i > \"sub directory/deeper/photograph number $i.jpeg\"; done
ln -s FILE.TXT link
touch -d '2001-02-03 04:05:06 UTC' FILE.TXT
";

fn tree(dir: &Path) -> String {
    let tree = dir.join("tree");
    fs::create_dir(&tree).expect("make a directory");
    sh(&format!("cd {}; {TREE}", tree.display()));
    tree.display().to_string()
}

/// Copies a disk into a file.
fn copy(program: &str, words: &[&str], image: &Path) {
    let command = format!("nbdcopy --destination-is-zero \"$uri\" - | cat > {}", image.display());
    run_ok([program, "-U", "-"].iter().copied().chain(words.iter().copied()).chain(["--run", &command]));
}

/// The file system that begins there is without fault, and has the files of the tree, as mtools copy them out.
fn is_fat(image: &Path, start: u64, tree: &str, bits: u32) {
    let dir = temp();
    let (fs, out) = (dir.path().join("fs"), dir.path().join("out"));
    fs::create_dir(&out).expect("make a directory");
    let said = sh(&format!(
        "dd if={} of={fs} iflag=skip_bytes skip={start} bs=1M conv=sparse status=none
         fsck.fat -vn {fs} 2>&1
         export MTOOLS_SKIP_CHECK=1
         mcopy -s -p -m -i {fs} '::*' {out}
         diff -r --no-dereference -x link {tree} {out}",
        image.display(),
        fs = fs.display(),
        out = out.display()
    ));
    assert!(said.contains(&format!("{bits} bit entries")), "{said}");
    assert!(!said.contains("less than the required minimum"), "{said}");
    let time = sh(&format!("TZ=UTC stat -c %y {}/FILE.TXT", out.display()));
    assert!(time.starts_with("2001-02-03 04:05:06"), "{time}");
}

#[test]
fn floppy_disks_pass_the_checks_of_others() {
    let dir = temp();
    let tree = tree(dir.path());
    let image = dir.path().join("image");
    for (bits, kind, id) in [(12, "fat12", "1"), (16, "fat16", "e"), (32, "fat32", "c")] {
        for (table, start) in [("none", 0), ("mbr", 1 << 20)] {
            for size in ["", "size=60M"] {
                let (kind_is, table_is) = (format!("type={kind}"), format!("table={table}"));
                let mut words = vec!["floppy", &tree, &kind_is, &table_is];
                words.extend(Some(size).filter(|size| !size.is_empty()));
                copy(NBDKIT, &words, &image);
                if table == "mbr" {
                    let dump = sh(&format!("sfdisk -d {}", image.display()));
                    assert!(
                        dump.contains("start=        2048") && dump.contains(&format!("type={id}")),
                        "{dump}"
                    );
                }
                if !size.is_empty() {
                    assert_eq!(fs::metadata(&image).expect("an image").len(), 60 << 20);
                }
                is_fat(&image, start, &tree, bits);
            }
        }
    }
    // The default label is that of the C nbdkit, which has it in one of the two places.
    for program in [NBDKIT, C_NBDKIT] {
        copy(program, &["floppy", &tree], &image);
        assert_eq!(fs::read(&image).expect("read")[(1 << 20) + 71..][..11], *b"NBDKITFLOPY", "{program}");
    }
    copy(NBDKIT, &["floppy", &tree, "label=my disk"], &image);
    assert!(sh(&format!("mlabel -s -i {}@@1M ::", image.display())).contains("MY DISK"));
}

#[test]
fn the_kernel_mounts_a_floppy_disk() {
    if is_left_out("root") || is_left_out("loop") || is_left_out("vfat") {
        return;
    }
    let dir = temp();
    let tree = tree(dir.path());
    let image = dir.path().join("image");
    for kind in ["fat12", "fat16", "fat32"] {
        copy(NBDKIT, &["floppy", &tree, "table=none", &format!("type={kind}"), "size=50M"], &image);
        sh(&format!(
            "mkdir -p {at}; mount -t vfat -o loop,ro,utf8 {} {at}
             trap 'umount {at}' EXIT
             diff -r --no-dereference -x link {tree} {at}
             test $(stat -c %Y {at}/FILE.TXT) = 981173106
             test $(stat -f -c %b {at}) -gt 1000",
            image.display(),
            at = dir.path().join("mounted").display(),
        ));
    }
}

/// What the files hold now is what is on the disk, and free space costs a client nothing.
#[test]
fn files_on_a_floppy_disk_are_alive() {
    let dir = temp();
    let tree = tree(dir.path());
    let server = Server::start(["floppy", &tree, "size=1G"]);
    let read_uri = |uri: &str| {
        sh(&format!(
            "nbdcopy '{uri}' - | cat > {0}/image; mtype -i {0}/image@@1M ::FILE.TXT",
            dir.path().display()
        ))
    };
    assert_eq!(read_uri(&server.uri()), "what is in it");
    fs::write(Path::new(&tree).join("FILE.TXT"), "now something").expect("write");
    assert_eq!(read_uri(&server.uri()), "now something");
    let map = run_ok(["nbdinfo", "--map", "--totals", &server.uri()]);
    let data: u64 = map
        .lines()
        .filter(|line| line.ends_with("data"))
        .filter_map(|line| line.split_whitespace().next()?.parse::<u64>().ok())
        .sum();
    assert!(data < 16 << 20, "{map}");
    nbdsh(&server.uri(), "assert h.is_read_only() and h.can_multi_conn()");
}

#[test]
fn iso_images_are_read_by_others() {
    let dir = temp();
    let tree = tree(dir.path());
    let more = dir.path().join("more");
    fs::create_dir(&more).expect("make a directory");
    fs::write(more.join("another"), "file").expect("write");
    let image = dir.path().join("image");
    let place = dir.path().join("tmp");
    fs::create_dir(&place).expect("make a directory");
    for program in ["", "prog=xorriso", "prog=/usr/bin/genisoimage"] {
        let mut words = vec!["iso", &tree, more.to_str().expect("UTF-8"), "params=-r -V \"MY DISK\""];
        words.extend(Some(program).filter(|program| !program.is_empty()));
        copy(NBDKIT, &words, &image);
        let out = dir.path().join("out");
        sh(&format!(
            "rm -rf {out}; mkdir {out}; cd {out}
             xorriso -osirrox on -indev {} -extract / {out} 2>/dev/null
             chmod -R u+w {out}; test $(cat another) = file; rm another
             diff -r --no-dereference {tree} {out}",
            image.display(),
            out = out.display()
        ));
        let info = sh(&format!("isoinfo -d -i {}", image.display()));
        assert!(info.contains("Volume id: MY DISK"), "{info}");
    }
    // Nothing is left behind, and what fails says why.
    let here = format!("TMPDIR={}", place.display());
    let start = |words: &[&str]| {
        run(["env", &here, NBDKIT, "-U", "-", "iso"]
            .iter()
            .chain(words)
            .chain(&["--run", "cd $TMPDIR; echo *.iso"]))
    };
    assert_eq!(start(&[&tree]).ok(), "*.iso\n");
    for (words, message) in [
        (&["prog=/nonexistent"][..], "/nonexistent failed with exit code 127"),
        (&["params=--no-such-option"], "xorriso failed with exit code"),
        (&["dir=/nonexistent"], "dir=/nonexistent: No such file"),
    ] {
        let refused = start(&[&[tree.as_str()], words].concat()).refused();
        assert!(refused.contains(message), "{words:?}: {refused}");
        assert_eq!(fs::read_dir(&place).expect("the directory").count(), 0, "{words:?}");
    }
    let none =
        run(["env", "PATH=/nonexistent", &here, NBDKIT, "-U", "-", "iso", &tree, "--run", "true"]).refused();
    assert!(none.contains("install one of these packages"), "{none}");
}

#[test]
fn linux_disks_are_read_by_others() {
    let dir = temp();
    let tree = tree(dir.path());
    sh(&format!("cd {tree}; ln FILE.TXT hard; chmod 4751 FILE.TXT; truncate -s 50M sparse"));
    let image = dir.path().join("image");
    let dump = |what: &str| sh(&format!("dumpe2fs -h {}.fs 2>/dev/null | grep '{what}'", image.display()));
    let number = |what: &str| {
        dump(what).split_whitespace().last().and_then(|n| n.parse::<u64>().ok()).expect("a number")
    };
    let serve = |words: &[&str]| {
        copy(NBDKIT, &[&["linuxdisk", &tree], words].concat(), &image);
        let table = sh(&format!(
            "sfdisk -d {0}; dd if={0} of={0}.fs bs=1M skip=1 conv=sparse status=none
             truncate -s $(($(sfdisk -d {0} | sed -n 's/.*size= *\\([0-9]*\\).*/\\1/p') * 512)) {0}.fs
             e2fsck -fn {0}.fs >/dev/null 2>&1; rm -rf {0}.out; mkdir {0}.out; debugfs -R 'rdump / {0}.out' {0}.fs 2>/dev/null
             rmdir {0}.out/lost+found; diff -r --no-dereference {tree} {0}.out
             debugfs -R 'stat FILE.TXT' {0}.fs 2>/dev/null | grep -q 'Mode:  04751.*Links: 2\\|Mode:  04751'",
            image.display()
        ));
        assert!(table.contains("label: gpt") && table.contains("start=        2048"), "{table}");
    };
    serve(&[]);
    assert!(!dump("features").contains("has_journal"));
    // As small as it can be: the sparse file counts for what is in it.
    assert!(number("Block count") * number("Block size") < 16 << 20);
    for kind in ["ext3", "ext4"] {
        serve(&[&format!("type={kind}"), "label=ROOTFS"]);
        assert!(dump("features").contains("has_journal"));
        assert_eq!(dump("features").contains("extent"), kind == "ext4");
        assert!(dump("volume name").contains("ROOTFS"));
    }
    serve(&["size=+100M"]);
    assert!(number("Free blocks") * number("Block size") >= 100 << 20);
    serve(&["size=64M"]);
    assert_eq!(number("Block count") * number("Block size"), 64 << 20);
    let small = run([NBDKIT, "-U", "-", "linuxdisk", &tree, "size=100K", "--run", "true"]).refused();
    assert!(small.contains("mke2fs failed with exit code"), "{small}");
}

#[test]
fn a_large_tree_on_a_linux_disk() {
    let dir = temp();
    let at = dir.path().display();
    sh(&format!(
        "mkdir {at}/t; cd {at}/t; for i in $(seq 60); do mkdir $i; for j in $(seq 50); do echo $i $j > $i/$j; done; done
         head -c 70M /dev/urandom > big"
    ));
    for kind in ["ext2", "ext4"] {
        let out = run_ok([
            NBDKIT,
            "-U",
            "-",
            "--filter=partition",
            "linuxdisk",
            &format!("{at}/t"),
            &format!("type={kind}"),
            "partition=1",
            "--run",
            &format!("nbdcopy \"$uri\" - | cat > {at}/fs; e2fsck -fn {at}/fs"),
        ]);
        assert!(out.contains("clean") || out.contains("files"), "{out}");
        sh(&format!(
            "rm -rf {at}/o; mkdir {at}/o; debugfs -R 'rdump / {at}/o' {at}/fs 2>/dev/null; rmdir {at}/o/lost+found; diff -r {at}/t {at}/o"
        ));
    }
}

#[test]
fn each_client_has_a_disk_of_its_own() {
    let dir = temp();
    let place = dir.path().join("place");
    fs::create_dir(&place).expect("make a directory");
    let here = place.display().to_string();
    let serve = |words: &[&str], python: &str| {
        let command = format!(
            "nbdsh -c 'connect = lambda: (lambda h: (h.connect_unix(\"'$unixsocket'\"), h)[1])(nbd.NBD())' -c '{python}'"
        );
        let place = format!("TMPDIR={here}");
        let before = ["env", &place, NBDKIT, "-U", "-", "tmpdisk"];
        run(before.iter().chain(words).copied().chain(["--run", &command]))
    };
    let two = "a = connect(); b = connect()
assert a.get_size() == 16 << 20 and not a.can_multi_conn() and a.can_fua() and a.can_trim()
assert a.pread(2, 0x438) == b\"\\x53\\xef\"
a.pwrite(b\"mine\", 0)
assert b.pread(4, 0) == bytes(4) and a.pread(4, 0) == b\"mine\"
c = connect(); assert c.pread(4, 0) == bytes(4)
import os; print(len(os.listdir(os.environ[\"TMPDIR\"])))";
    assert_eq!(serve(&["16M"], two).ok().trim(), "1", "there is the socket, and no disk has a name");
    for (kind, check) in [("vfat", "fsck.vfat -n"), ("xfs", "xfs_repair -n -f"), ("ext2", "e2fsck -fn")] {
        let image = dir.path().join(kind);
        copy(NBDKIT, &["tmpdisk", "400M", &format!("type={kind}"), "label=MYDISK"], &image);
        sh(&format!(
            "{check} {0} >/dev/null 2>&1; test $(blkid -o value -s LABEL {0}) = MYDISK",
            image.display()
        ));
    }
    let own = serve(
        &["1M", "command=test $size = 1048576; printf \"%s\" \"$words\" > \"$disk\"", "words=a  b"],
        "print(connect().pread(4, 0))",
    );
    assert_eq!(own.ok().trim(), "bytearray(b'a  b')");
    for (words, message) in [
        (
            &["1M", "command=echo it went wrong >&2; exit 3"][..],
            "the command failed with exit code 3: it went wrong",
        ),
        (&["1M", "command=true"], "has made no disk at $disk"),
        (&["1M", "type=nonsense"], "mkfs failed with exit code"),
    ] {
        let failed = serve(words, "connect()");
        assert!(failed.code != 0 && failed.stderr.contains(message), "{words:?}: {}", failed.stderr);
        assert_eq!(fs::read_dir(&place).expect("the directory").count(), 0, "{words:?}");
    }
    for (words, message) in [
        (&[][..], "size parameter is required"),
        (&["1M", "labels=x"], "unknown parameter 'labels'"),
        (&["1M", "disk=x"], "'disk' parameter cannot be set"),
    ] {
        let refused = run([NBDKIT, "tmpdisk"].iter().chain(words)).refused();
        assert!(refused.contains(message), "{refused}");
    }
}

#[test]
fn a_script_that_makes_a_disk_ends_with_the_server() {
    let dir = temp();
    let note = dir.path().join("note").display().to_string();
    let command =
        format!("command=trap 'echo ended >> {note}; exit 1' TERM; echo began >> {note}; sleep 100 & wait");
    let mut server = Server::start(["tmpdisk", "1M", &command]);
    sh(&format!(
        "nbdinfo '{}' >/dev/null 2>&1 & timeout 20 sh -c 'until grep -q began {note}; do :; done' 2>/dev/null",
        server.uri()
    ));
    assert_eq!(server.terminate(), 0);
    sh(&format!("grep -q ended {note}"));
}

#[test]
fn disks_are_made_when_they_are_asked_for() {
    let dir = temp();
    let disks = dir.path().join("disks");
    fs::create_dir(&disks).expect("make a directory");
    let at = format!("dir={}", disks.display());
    let python = "
def connect(name):
    h = nbd.NBD(); h.set_export_name(name); h.connect_unix(socket); return h
def refused(name):
    try:
        connect(name)
    except nbd.Error as e:
        return
    raise SystemExit(name + ' was served')
";
    let nbdsh_to = |server: &Server, script: &str| {
        let start = format!("import nbd\nsocket = '{}'\n{python}", server.socket().display());
        run_ok(["/usr/bin/python3", "-c", &format!("{start}{script}")])
    };
    let server = Server::start(["ondemand", &at, "10M", "label=HELLO"]);
    nbdsh_to(
        &server,
        "
a = connect('alice'); b = connect('b o b')
assert a.get_size() == 10 << 20 and not a.can_multi_conn() and a.pread(2, 0x438) == b'\\x53\\xef'
a.pwrite(b'mine', 0); assert b.pread(4, 0) == bytes(4)
refused('alice')
connect('').pwrite(b'd', 0)
for name in ['a.b', 'a:b', '..', 'a/b', '.x', 'x' * 256, 'a\\nb']:
    refused(name)
a.shutdown(); del a
",
    );
    assert!(server.stderr().contains("alice: filesystem is locked by another client"), "{}", server.stderr());
    assert!(server.stderr().contains("invalid exportname 'a.b' rejected"), "{}", server.stderr());
    let list = run_ok(["nbdinfo", "--list", &server.uri()]);
    let names: Vec<_> = list.lines().filter_map(|line| line.strip_prefix("export=")).collect();
    assert_eq!(names, ["\"default\":", "\"alice\":", "\"b o b\":"]);
    sh(&format!(
        "cd {}; test \"$(ls -A | tr '\\n' ' ')\" = 'alice b o b default '; test $(blkid -o value -s LABEL alice) = HELLO",
        disks.display()
    ));
    drop(server);

    // They are there for the next server, and for one at a time.
    let one = Server::start(["ondemand", &at, "1M"]);
    let other = Server::start(["ondemand", &at, "1M", "wait=true"]);
    nbdsh_to(
        &one,
        &format!(
            "
a = connect('alice'); assert a.get_size() == 10 << 20 and a.pread(4, 0) == b'mine'
mine = socket; socket = '{}'; refused('alice'); connect('carol'); socket = mine; refused('alice')
",
            other.socket().display()
        ),
    );
    nbdsh_to(
        &other,
        "
import threading
a = connect('alice'); got = []
def wait():
    h = connect('alice'); got.append(h.pread(5, 0))
t = threading.Thread(target=wait); t.start()
b = connect('bob'); assert not got
a.pwrite(b'later', 0); a.shutdown(); del a; t.join(); assert got == [b'later'], got
",
    );
    drop((one, other));
    let shared = Server::start(["ondemand", &at, "1M", "share=true"]);
    nbdsh_to(
        &shared,
        "
a = connect('new'); b = connect('new'); assert a.can_multi_conn()
a.pwrite(b'both', 0); assert b.pread(4, 0) == b'both'
",
    );
}

/// A disk that could not be made, or whose maker was killed, is not there.
#[test]
fn no_disk_is_half_made() {
    let dir = temp();
    let disks = dir.path().join("disks");
    fs::create_dir(&disks).expect("make a directory");
    let at = format!("dir={}", disks.display());
    let server = Server::start([
        "ondemand",
        &at,
        "1M",
        "command=echo half > \"$disk\"; basename \"$disk\" >&2; exit 1",
    ]);
    let failed = run(["nbdinfo", "--size", &server.uri_of("name")]);
    assert!(
        failed.code != 0 && server.stderr().contains("the command failed with exit code 1: name"),
        "{}",
        server.stderr()
    );
    assert_eq!(fs::read_dir(&disks).expect("the directory").count(), 0);
    drop(server);
    let mut server = Server::start(["ondemand", &at, "1M", "command=echo half > \"$disk\"; sleep 100"]);
    sh(&format!(
        "nbdinfo '{}' >/dev/null 2>&1 & timeout 20 sh -c 'until ls {}/.nbdkit-*/name; do :; done' >/dev/null 2>&1",
        server.uri_of("name"),
        disks.display()
    ));
    server.signal(rustix::process::Signal::KILL);
    assert!(!disks.join("name").exists());
    let server = Server::start(["ondemand", &at, "1M", "command=truncate -s $size \"$disk\""]);
    assert_eq!(run_ok(["nbdinfo", "--size", &server.uri_of("name")]).trim(), "1048576");
    assert!(!run_ok(["nbdinfo", "--list", &server.uri()]).contains(".nbdkit"));
}

/// The disks of other chains as partitions.
#[test]
fn partitions_of_other_chains() {
    let dir = temp();
    let tree = tree(dir.path());
    let image = dir.path().join("image");
    let root = dir.path().join("root.img");
    sh(&format!("truncate -s 9M {0}; mkfs.ext4 -q -F -E offset=1048576 {0} 8M", root.display()));
    let esp = format!("[ floppy dir={tree} table=none ]");
    let rest = format!("[ --filter=offset file {} offset=1M ]", root.display());
    let words = [
        "partitioning",
        "partition-type=gpt",
        "type-guid=c12a7328-f81f-11d2-ba4b-00a0c93ec93b",
        &esp,
        "type-guid=default",
        &rest,
    ];
    copy(NBDKIT, &words, &image);
    let table = sh(&format!("sfdisk -V {0} >/dev/null; sfdisk -d {0}", image.display()));
    let kinds: Vec<_> = table.lines().filter(|line| line.contains("type=")).collect();
    assert!(kinds.len() == 2 && kinds[0].contains("C12A7328") && kinds[1].contains("0FC63DAF"), "{table}");
    let start: u64 = kinds[1]
        .split_once("start=")
        .and_then(|(_, rest)| rest.split(',').next()?.trim().parse().ok())
        .expect("a number");
    let first = dir.path().join("first");
    sh(&format!(
        "dd if={} of={} bs=512 count={start} conv=sparse status=none",
        image.display(),
        first.display()
    ));
    is_fat(&first, 1 << 20, &tree, 32);
    sh(&format!(
        "dd if={0} of={0}.fs bs=512 skip={start} count=16384 status=none; e2fsck -fn {0}.fs >/dev/null 2>&1
         cmp -n 8388608 -i {1}:1048576 {0} {2}",
        image.display(),
        start * 512,
        root.display()
    ));
    // What may be written to is written through, what may not is refused, in one request too.
    let server = Server::start(words);
    nbdsh(
        &server.uri(),
        &format!(
            "
at = {start} * 512
h.pwrite(b'written', at + 100, nbd.CMD_FLAG_FUA)
h.zero(4096, at + 8192)
h.trim(4096, at + 16384)
h.flush()
assert h.pread(7, at + 100) == b'written'
for offset in (1 << 20, (1 << 20) + 5000000):
    try:
        h.pwrite(b'no', offset); raise SystemExit('it was written')
    except nbd.Error as e:
        assert e.errno == 'EPERM', e.errno
"
        ),
    );
    let map = run_ok(["nbdinfo", "--map", "--totals", &server.uri()]);
    assert!(map.contains("hole,zero") && map.contains("data"), "{map}");
    sh(&format!(
        "test \"$(dd if={} bs=1 skip={} count=7 status=none)\" = written",
        root.display(),
        (1 << 20) + 100
    ));
    drop(server);
    // Each client has its own where the plugin gives each its own; chains within chains; one that is only read.
    let nested = "[ partitioning '[ memory 1M ]' '[ tmpdisk 16M type=ext2 ]' ]";
    let out = run_ok([
        NBDKIT,
        "-U",
        "-",
        "partitioning",
        nested,
        "--run",
        "nbdcopy \"$uri\" - | cat > $PWD/n; sfdisk -d n | grep -c start=; rm n",
    ]);
    assert_eq!(out.trim(), "1");
    for (text, message) in [
        ("[ nonesuch ]", "unknown plugin 'nonesuch'"),
        ("[ memory ]", "you must specify size=SIZE"),
        ("[ memory 1M", "ends with ]"),
        ("[ ]", "names no plugin"),
        ("[ --filter=nonesuch memory 1M ]", "unknown filter 'nonesuch'"),
        ("[ --threads=3 memory 1M ]", "--filter=FILTER"),
        ("[ memory 0 ]", "a partition cannot be empty"),
        ("[ memory 'x ]", "quote"),
    ] {
        let refused = run([NBDKIT, "-U", "-", "partitioning", text, "--run", "true"]).refused();
        assert!(refused.contains(message) && refused.contains("[ "), "{text}: {refused}");
    }
    let server = Server::start(["-r", "partitioning", "[ memory 1M ]"]);
    nbdsh(&server.uri(), "assert h.is_read_only()");
}
