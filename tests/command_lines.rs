//! What newcomers type, and what they are told: one line that names the fix, an exit code, nothing left behind.
//!
//! The rows are run in a directory with an image `disk.img`, an empty file `empty`, a text `notes.txt`, directories `images`
//! and `mnt`, and a file of parameters `params`.

use std::{collections::BTreeSet, path::Path};

use crate::util::{self, NBDKIT, NBDKIT_MOUNT, image, temp};

/// A command line without the program's name, the exit code, and what is said.
type Row = (&'static str, i32, &'static str);

const SERVER: &[Row] = &[
    // Typing errors.
    ("memroy 1M", 1, "unknown plugin 'memroy': did you mean 'memory'?"),
    ("Memory 1M", 1, "unknown plugin 'Memory': did you mean 'memory'?"),
    ("--filter=ofset memory 1M", 1, "unknown filter 'ofset': did you mean 'offset'?"),
    ("--filter=retry_request memory 1M", 1, "unknown filter 'retry_request': did you mean 'retry-request'?"),
    ("--filter=xyzzy memory 1M", 1, "unknown filter 'xyzzy': --help lists those there are"),
    ("blocksise memory", 1, "the plugin comes first, and 'blocksise' stands before memory: memory ..."),
    ("blocksise", 1, "unknown plugin 'blocksise': did you mean the filter --filter=blocksize?"),
    ("xyzzy", 1, "unknown plugin 'xyzzy': --help lists those there are"),
    ("memory sise=1M", 1, "unknown parameter 'sise': did you mean 'size'?"),
    ("memory 1M alocator=malloc", 1, "unknown parameter 'alocator': did you mean 'allocator'?"),
    ("file fiel=disk.img", 1, "unknown parameter 'fiel': did you mean 'file'?"),
    ("file disk.img fadvice=random", 1, "unknown parameter 'fadvice': did you mean 'fadvise'?"),
    ("--filter=offset memory 1M ofset=1", 1, "unknown parameter 'ofset': did you mean 'offset'?"),
    (
        "--filter=delay memory 1M delay-raed=1",
        1,
        "unknown parameter 'delay-raed': did you mean 'delay-read'?",
    ),
    (
        "memory 1M rdelai=1",
        1,
        "unknown parameter 'rdelai': did you mean 'rdelay' of the filter delay (add --filter=delay)?",
    ),
    ("zero colour=red", 1, "unknown parameter 'colour': zero takes no parameters"),
    ("null 1M colour=red", 1, "unknown parameter 'colour': null takes size"),
    (
        "--filter=offset null 1M colour=red",
        1,
        "unknown parameter 'colour': null and its filters take offset range size",
    ),
    (
        "--reedonly memory 1M",
        1,
        "unexpected argument '--reedonly' found; a similar argument exists: '--readonly' (see --help)",
    ),
    // Parameters of filters that are not there.
    (
        "memory 1M rdelay=1",
        1,
        "unknown parameter 'rdelay': it belongs to the filter delay: add --filter=delay",
    ),
    (
        "file disk.img wdelay=1",
        1,
        "unknown parameter 'wdelay': it belongs to the filter delay: add --filter=delay",
    ),
    (
        "memory 1M cow-file=x",
        1,
        "unknown parameter 'cow-file': it belongs to the filter cow: add --filter=cow",
    ),
    (
        "--filter=cow file disk.img partition=1",
        1,
        "unknown parameter 'partition': it belongs to the filter partition: add --filter=partition",
    ),
    (
        "memory 1M error-pread-rate=1",
        1,
        "unknown parameter 'error-pread-rate': it belongs to the filter error: add --filter=error",
    ),
    (
        "memory 1M dir=/x",
        1,
        "unknown parameter 'dir': memory does not take it, only file floppy iso linuxdisk ondemand",
    ),
    // Plugins and filters in each other's place.
    (
        "--filter=file memory 1M",
        1,
        "'file' is a plugin and not a filter: give it after the options, without --filter=",
    ),
    ("--filter=disk.img memory 1M", 1, "'disk.img' is a file and not a filter: --help lists those there are"),
    ("--filter=./none.so memory 1M", 1, "cannot open filter: ./none.so: the file does not exist"),
    ("--filter= memory 1M", 1, "the name of the filter is empty: --help lists those there are"),
    (
        "--filter=log,cow memory 1M",
        1,
        "--filter=log,cow: each filter has an option of its own: --filter=log --filter=cow",
    ),
    (
        "--filter=offset=1M memory 1M",
        1,
        "--filter=offset=1M: parameters follow the plugin: --filter=offset PLUGIN offset=1M",
    ),
    (
        "--filter=cow=x memory 1M",
        1,
        "--filter=cow=x: parameters follow the plugin: --filter=cow PLUGIN KEY=VALUE",
    ),
    ("memory 1M filter=cow", 1, "unknown parameter 'filter': a filter is added by an option, --filter=cow"),
    ("filter=cow memory 1M", 1, "'filter=cow' is no plugin: a filter is added by an option, --filter=cow"),
    ("cow file disk.img", 1, "'cow' is a filter, and the disk comes from a plugin: --filter=cow PLUGIN"),
    ("memory 1M cow", 1, "'cow' is a filter: --filter=cow adds it"),
    ("memory 1M file", 1, "'file' is a plugin, and the plugin is memory already: leave one out"),
    // Words too many, and in the wrong order.
    ("zero x", 1, "'x' is one word too many: zero takes no parameters"),
    (
        "memory 1M extra",
        1,
        "'extra' has no KEY= and is taken as size=: could not parse size 'extra': it must start with a number, such as 512, 10M or 1G",
    ),
    ("size=1M memory", 1, "the plugin comes first, and 'size=1M' stands before memory: memory ..."),
    ("size=1M", 1, "the plugin comes first, and 'size=1M' is a parameter: PLUGIN size=1M"),
    ("disk.img file", 1, "the plugin comes first, and 'disk.img' stands before file: file ..."),
    ("", 1, "no plugin was given: nbdkit [OPTIONS] PLUGIN [[KEY=]VALUE ...] (see --help)"),
    // Disks where a plugin is expected.
    ("disk.img", 1, "'disk.img' is a file and not a plugin: to serve it, file disk.img"),
    ("./disk.img", 1, "'./disk.img' is a file and not a plugin: to serve it, file ./disk.img"),
    ("./empty", 1, "'./empty' is a file and not a plugin: to serve it, file ./empty"),
    ("empty", 1, "'empty' is a file and not a plugin: to serve it, file empty"),
    ("images", 1, "'images' is a directory and not a plugin: to serve the files in it, file dir=images"),
    (
        "/none/disk.img",
        1,
        "there is no file '/none/disk.img'; and the plugin comes first, as in: file /none/disk.img",
    ),
    ("./none.so", 1, "cannot open plugin: ./none.so: the file does not exist"),
    // URLs.
    ("nbd://localhost", 1, "'nbd://localhost' is a URL, which the plugin nbd takes: nbd 'nbd://localhost'"),
    (
        "nbds+unix:///?socket=s",
        1,
        "'nbds+unix:///?socket=s' is a URL, which the plugin nbd takes: nbd 'nbds+unix:///?socket=s'",
    ),
    ("https://a/b", 1, "'https://a/b' is a URL, which the plugin curl takes: curl 'https://a/b'"),
    ("s3://b/k", 1, "'s3://b/k' is a URL, which the plugin S3 takes: S3 bucket=BUCKET key=KEY"),
    ("ssh://h/p", 1, "'ssh://h/p' is a URL, which the plugin ssh takes: ssh host=HOST /PATH"),
    (
        "file HTTP://a/b",
        1,
        "'HTTP://a/b' is a URL, and file serves files: the plugin curl takes it: curl 'HTTP://a/b'",
    ),
    (
        "split file=nbd://h",
        1,
        "'nbd://h' is a URL, and split serves files: the plugin nbd takes it: nbd 'nbd://h'",
    ),
    // Credentials.
    (
        "--tls=require --tls-certificates=/none memory 1M",
        1,
        "TLS cannot be used: there is no directory /none: name one with certificates, such as certtool makes",
    ),
    ("--tls=on --tls-psk=/ memory 1M", 1, "TLS cannot be used: cannot read /: Is a directory"),
    ("--tls-psk=/none memory 1M", 1, "TLS cannot be used: cannot read /none: No such file or directory"),
    ("--tls=maybe memory 1M", 1, "--tls=maybe: choose off, on or require"),
    // What the system says, without its numbers.
    ("sh /none", 1, "script=/none: No such file or directory"),
    (
        "cc /none.c",
        1,
        "'/none.c' has no KEY= and is taken as script=: script=/none.c: No such file or directory",
    ),
    ("file /none", 1, "file=/none does not exist: create it first, for example with truncate -s 1G /none"),
    ("-U /none/x memory 1M", 1, "cannot listen on the socket '/none/x': No such file or directory"),
    (
        "-U disk.img memory 1M",
        1,
        "cannot listen on '{dir}/disk.img': there is a file of that name; remove it or choose another path",
    ),
    ("-U - -P /none/x memory 1M", 1, "cannot write the pidfile /none/x: No such file or directory"),
    ("-p 0 -i 192.0.2.1 memory 1M", 1, "cannot listen on 192.0.2.1 port 0: Cannot assign requested address"),
    ("-p 99999 memory 1M", 1, "port 99999 is not between 0 and 65535"),
    ("--log=/none/x memory 1M", 1, "--log: cannot open /none/x: No such file or directory"),
    ("--ready-fd=77 memory 1M", 1, "--ready-fd=77: the file descriptor is not open: Bad file descriptor"),
    ("--time-out=0 memory 1M", 1, "--timeout must be longer than 0"),
    // Files of parameters.
    (
        "memory @none",
        1,
        "cannot read the parameters in none (from the word '@none'): No such file or directory",
    ),
    ("memory @", 1, "'@' needs the name of a file with parameters: @FILE"),
    ("memory 1M @params", 1, "params: unknown parameter 'colour': memory takes size allocator"),
];

const MOUNT: &[Row] = &[
    ("memroy 1M mnt", 1, "unknown plugin 'memroy': did you mean 'memory'?"),
    ("--filter=ofset memory 1M mnt", 1, "unknown filter 'ofset': did you mean 'offset'?"),
    ("memory sise=1M mnt", 1, "unknown parameter 'sise': did you mean 'size'?"),
    (
        "memory 1M rdelay=1 mnt",
        1,
        "unknown parameter 'rdelay': it belongs to the filter delay: add --filter=delay",
    ),
    ("memory", 2, "the mountpoint is missing: add a directory or an empty file as the last word"),
    (
        "memory size=1M",
        2,
        "the mountpoint is missing: the last word 'size=1M' is a parameter (add a directory or an empty file)",
    ),
    ("memory 1M /none", 4, "the mountpoint /none does not exist: create it with mkdir /none"),
    ("memory 1M notes.txt/x", 4, "cannot use {dir}/notes.txt/x as the mountpoint: Not a directory"),
    ("disk.img mnt", 1, "'disk.img' is a file and not a plugin: to serve it, file disk.img"),
    ("images mnt", 1, "'images' is a directory and not a plugin: to serve the files in it, file dir=images"),
    (
        "file nbd://h mnt",
        1,
        "'nbd://h' is a URL, and file serves files: the plugin nbd takes it: nbd 'nbd://h'",
    ),
    ("cow file disk.img mnt", 1, "'cow' is a filter, and the disk comes from a plugin: --filter=cow PLUGIN"),
    (
        "--filter=cow,log memory 1M mnt",
        1,
        "--filter=cow,log: each filter has an option of its own: --filter=cow --filter=log",
    ),
    (
        "--filter=null memory 1M mnt",
        1,
        "'null' is a plugin and not a filter: give it after the options, without --filter=",
    ),
    ("mnt file images", 1, "the plugin comes first, and 'mnt' stands before file: file ..."),
    ("memory 1M cow mnt", 1, "'cow' is a filter: --filter=cow adds it"),
    ("zero x mnt", 1, "'x' is one word too many: zero takes no parameters"),
    (
        "memory @none mnt",
        1,
        "cannot read the parameters in none (from the word '@none'): No such file or directory",
    ),
    ("--mount /none memory 1M mnt", 1, "--mount /none: No such file or directory"),
    ("--partition 1 memory 1M mnt", 1, "--partition is for --mount and --loop: add one, or use --partitions"),
    ("-U /none/x memory 1M mnt", 3, "cannot listen on the socket '/none/x': No such file or directory"),
    ("--ready-fd=77 memory 1M mnt", 1, "--ready-fd 77 is not an open file: Bad file descriptor"),
    ("--commit none memory 1M", 1, "cannot open the overlay {dir}/none: No such file or directory"),
    ("--stats mnt", 1, "mnt is not a mount of nbdkit-mount: Inappropriate ioctl for device"),
    ("-u mnt", 7, "nothing is mounted at {dir}/mnt"),
];

fn names(dir: &Path) -> BTreeSet<std::ffi::OsString> {
    std::fs::read_dir(dir).expect("list").map(|entry| entry.expect("an entry").file_name()).collect()
}

#[test]
fn what_newcomers_are_told() {
    let dir = temp();
    image(dir.path(), "disk.img", 1 << 20);
    image(dir.path(), "empty", 0);
    std::fs::write(dir.path().join("notes.txt"), "notes\n").expect("write");
    std::fs::write(dir.path().join("params"), "# the disk\n\nsize=2M\n  colour=red\n").expect("write");
    std::fs::create_dir(dir.path().join("images")).expect("mkdir");
    std::fs::create_dir(dir.path().join("mnt")).expect("mkdir");
    let before = names(dir.path());
    let here = dir.path().to_str().expect("UTF-8");
    let mut wrong = String::new();
    for (program, name, rows) in [(NBDKIT, "nbdkit", SERVER), (NBDKIT_MOUNT, "nbdkit-mount", MOUNT)] {
        for (line, code, says) in rows {
            let start = ["env", "-C", here, &format!("TMPDIR={here}"), program].map(String::from);
            let words = start.into_iter().chain(line.split_whitespace().map(String::from));
            let run = util::run(words.chain(["-f", "--exit-with-parent"].map(String::from)));
            let expected = format!("{name}: error: {}\n", says.replace("{dir}", here));
            if run.code != *code || run.stderr != expected || !run.stdout.is_empty() {
                wrong +=
                    &format!("{name} {line}\n  wanted {code}: {expected}  got {}: {}", run.code, run.stderr);
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
    assert_eq!(names(dir.path()), before, "left behind");
    assert!(SERVER.len() + MOUNT.len() >= 60);
}
