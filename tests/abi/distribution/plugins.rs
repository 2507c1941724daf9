//! Plugins in C.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
};

use super::*;
use crate::util::{patterned, run, run_ok};

/// Those that need what a test cannot have: containers, a hypervisor, a remote machine, peers. And the Ruby plugin, which
/// crashes in the C nbdkit too: Ruby may be called from its first thread only.
const ONLY_DUMPED: [&str; 5] = ["cdi", "libvirt", "ruby", "ssh", "torrent"];

/// A disk of the plugin with these words, which need no files.
fn of<'a>(name: &'a str, more: &'a [&'a str]) -> Disk<'a> {
    Disk::new(move |_| [vec![plugin(name)], words(more.iter().copied())].concat())
}

#[test]
fn each_loads_and_is_put_to_work_here() {
    let own = [include_str!("plugins.rs"), include_str!("languages.rs")].concat();
    let is_missing = |name: &&String| {
        let named = own.contains(&format!("of(\"{name}\"")) || own.contains(&format!("plugin(\"{name}\""));
        !named && !ONLY_DUMPED.contains(&name.as_str())
    };
    let all: BTreeSet<String> = libraries("plugin")
        .iter()
        .map(|path| path.file_name().unwrap().to_str().unwrap().to_owned())
        .map(|file| file.replace("nbdkit-", "").replace("-plugin.so", ""))
        .collect();
    let missing: Vec<_> = all.iter().filter(is_missing).collect();
    assert!(missing.is_empty(), "{missing:?}");
    for path in libraries("plugin") {
        let dump = |program: &str| run([program, path.to_str().unwrap(), "--dump-plugin"]).ok();
        assert_eq!(dump(NBDKIT), dump(C_NBDKIT), "{}", path.display());
        let help = run_ok([NBDKIT, path.to_str().unwrap(), "--help"]);
        assert!(help.contains("plugin: "), "{help}");
    }
}

#[test]
fn file() {
    Disk::new(|dir| words([plugin("file"), word(&patterned(dir, "disk", 1 << 20))]))
        .writable()
        .through_both_doors();
}

#[test]
fn memory() {
    of("memory", &["1M"]).writable().through_both_doors();
    of("memory", &["1M", "allocator=malloc"]).writable().through_both_doors();
}

#[test]
fn data() {
    let disk = of("data", &["size=1M", "data=@0x1000 ( 0x55 0xAA )*512 \"text\""]).writable();
    for seen in disk.through_both_doors() {
        assert_eq!(seen[0x1000..0x1004], [0x55, 0xaa, 0x55, 0xaa]);
        assert_eq!(seen[0x1400..0x1404], *b"text");
    }
}

#[test]
fn pattern() {
    for seen in of("pattern", &["1M"]).through_both_doors() {
        assert_eq!(seen[512..520], 512_u64.to_be_bytes());
    }
}

#[test]
fn split() {
    // What is written is on the first part: this version of the plugin writes past the first to the wrong place.
    let parts = |dir: &Path| {
        let part = |name, size| word(&patterned(dir, name, size));
        words([plugin("split"), part("a", 1 << 20), part("b", 65536), part("c", 4096)])
    };
    Disk::new(parts).writable().through_both_doors();
}

#[test]
fn partitioning() {
    let parts = |dir: &Path| {
        let part = |name, size| word(&patterned(dir, name, size));
        words([plugin("partitioning"), part("a", 1 << 20), part("b", 2 << 20), "partition-type=gpt".into()])
    };
    for seen in Disk::new(parts).writable().differs().through_both_doors() {
        assert_eq!((&seen[510..512], &seen[512..520]), (&[0x55, 0xaa][..], &b"EFI PART"[..]));
    }
}

/// A directory with one file in it.
fn tree(dir: &Path) -> String {
    let tree = dir.join("tree");
    fs::create_dir(&tree).expect("make a directory");
    fs::write(tree.join("hello.txt"), "a file on the disk of a test").expect("write a file");
    word(&tree)
}

#[track_caller]
fn has_the_file(seen: &[u8]) {
    let text = b"a file on the disk of a test";
    assert!(seen.windows(text.len()).any(|part| part == text), "the file is not on the disk");
}

#[test]
fn floppy() {
    let disk = Disk::new(|dir| words([plugin("floppy"), tree(dir)])).differs();
    for seen in disk.through_both_doors() {
        assert_eq!(seen[510..512], [0x55, 0xaa]);
        has_the_file(&seen);
    }
}

#[test]
fn iso() {
    let disk = Disk::new(|dir| words([plugin("iso"), tree(dir)])).differs();
    for seen in disk.through_both_doors() {
        assert_eq!(seen[0x8001..0x8006], *b"CD001");
        has_the_file(&seen);
    }
}

#[test]
fn linuxdisk() {
    let disk = Disk::new(|dir| words([plugin("linuxdisk"), tree(dir)])).differs();
    for seen in disk.through_both_doors() {
        assert_eq!((&seen[510..512], &seen[512..520]), (&[0x55, 0xaa][..], &b"EFI PART"[..]));
        has_the_file(&seen);
    }
}

/// Where the superblock of an ext file system says that it is one.
const EXT: std::ops::Range<usize> = 0x438..0x43a;

#[test]
fn tmpdisk() {
    for seen in of("tmpdisk", &["16M"]).writable().differs().through_both_doors() {
        assert_eq!(seen[EXT], [0x53, 0xef]);
    }
}

#[test]
fn ondemand() {
    let disk = Disk::new(|dir| {
        let exports = dir.join("exports");
        fs::create_dir(&exports).expect("make a directory");
        words([plugin("ondemand"), format!("dir={}", word(&exports)), "size=16M".into()])
    });
    for seen in disk.export("mine").writable().differs().through_both_doors() {
        assert_eq!(seen[EXT], [0x53, 0xef]);
    }
}

/// A web server with one file that may be read in parts.
struct Web {
    child: Child,
    url: String,
}

impl Web {
    fn start(file: &Path) -> Self {
        let script = "
import http.server, re, sys
data = open(sys.argv[1], 'rb').read()
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def do_HEAD(self, part=data, status=200):
        self.send_response(status)
        self.send_header('Accept-Ranges', 'bytes')
        self.send_header('Content-Length', str(len(part)))
        self.end_headers()
    def do_GET(self):
        first, last = map(int, re.match(r'bytes=(\\d+)-(\\d+)', self.headers['Range']).groups())
        part = data[first:last + 1]
        self.do_HEAD(part, 206)
        self.wfile.write(part)
    def log_message(self, *ignored):
        pass
server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
";
        let mut child = Command::new("/usr/bin/python3")
            .args(["-c", script])
            .arg(file)
            .stdout(Stdio::piped())
            .spawn()
            .expect("start Python");
        let mut port = String::new();
        let stdout = child.stdout.take().expect("a pipe");
        BufReader::new(stdout).read_line(&mut port).expect("read the port");
        Web { child, url: format!("http://127.0.0.1:{}/disk", port.trim()) }
    }
}

impl Drop for Web {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn curl() {
    let dir = temp();
    let disk = patterned(dir.path(), "disk", 300_000);
    let web = Web::start(&disk);
    for seen in of("curl", &["-r", &web.url, "protocols=http"]).through_both_doors() {
        assert!(seen == fs::read(&disk).expect("read"));
    }
}

#[test]
fn nbd() {
    // Each connection gets a server of its own: ours.
    let command = format!("command={NBDKIT}");
    let rest = ["arg=--exit-with-parent", "arg=memory", "arg=1M"];
    of("nbd", &[&[&*command][..], &rest].concat()).writable().through_both_doors();
}

#[test]
fn sh() {
    let disk = Disk::new(|dir| {
        let (script, disk) = (dir.join("script"), patterned(dir, "disk", 100_000));
        let text = format!(
            "#!/bin/bash\ndisk={}\ncase \"$1\" in\n\
             get_size) stat -c %s $disk ;;\n\
             can_write|can_flush) ;;\n\
             flush) sync $disk ;;\n\
             pread) dd if=$disk skip=$4 count=$3 iflag=count_bytes,skip_bytes status=none ;;\n\
             pwrite) dd of=$disk seek=$4 conv=notrunc oflag=seek_bytes status=none ;;\n\
             *) exit 2 ;;\nesac\n",
            word(&disk)
        );
        fs::write(&script, text).expect("write a script");
        crate::util::run_ok(["chmod", "755", &word(&script)]);
        words([plugin("sh"), word(&script)])
    });
    disk.writable().through_both_doors();
}

#[test]
fn eval() {
    let disk = Disk::new(|dir| {
        let disk = word(&patterned(dir, "disk", 100_000));
        words([
            plugin("eval"),
            format!("get_size=stat -c %s {disk}"),
            format!("pread=dd if={disk} skip=$4 count=$3 iflag=count_bytes,skip_bytes status=none"),
            format!("pwrite=dd of={disk} seek=$4 conv=notrunc oflag=seek_bytes status=none"),
        ])
    });
    disk.writable().through_both_doors();
}

#[test]
fn cc() {
    let source = format!("{}/tests/abi/ramdisk_v2.c", env!("CARGO_MANIFEST_DIR"));
    of("cc", &[&source, "size=1M"]).export("ram").writable().through_both_doors();
}

#[test]
fn info() {
    for seen in of("info", &["mode=exportname"]).export("a name").through_both_doors() {
        assert_eq!(seen, b"a name");
    }
}

#[test]
fn random() {
    of("random", &["-r", "1M", "seed=1"]).through_both_doors();
}

#[test]
fn sparse_random() {
    let seen = of("sparse-random", &["-r", "16M", "seed=1", "percent=50"]).through_both_doors();
    assert!(seen[0].iter().any(|byte| *byte != 0));
}

#[test]
fn null_full_zero_and_the_examples() {
    for disk in [of("null", &["-r", "1M"]), of("full", &["-r", "1M"])] {
        for seen in disk.through_both_doors() {
            assert!(seen == vec![0; 1 << 20]);
        }
    }
    assert_eq!(run_ok([NBDKIT, "-U", "-", &plugin("zero"), "--run", "nbdinfo --size $uri"]), "0\n");
    of("example1", &[]).through_both_doors();
    of("example3", &["size=1M"]).writable().through_both_doors();
    let example2 = |dir: &Path| {
        let disk = word(&patterned(dir, "disk", 1 << 20));
        words([plugin("example2"), format!("file={disk}")])
    };
    Disk::new(example2).through_both_doors();
}

/// What the distribution's plugin tells of in `--dump-plugin`, the bundled one of that name tells of too, if a client could
/// see the difference.
#[test]
fn bundled_plugins_have_the_callbacks_of_the_distributions() {
    let callbacks = |plugin: &str| -> BTreeSet<String> {
        let dump = run_ok([NBDKIT, "--dump-plugin", plugin]);
        dump.lines().filter_map(|l| Some(l.strip_prefix("has_")?.strip_suffix("=1")?.to_owned())).collect()
    };
    let inside = ["load", "unload", "close", "get_ready", "longname", "config_complete"];
    for name in ["data", "file", "full", "info", "memory", "null", "pattern", "split", "zero"] {
        let mut theirs = callbacks(&plugin(name));
        theirs.retain(|callback| !callback.starts_with('_') && !inside.contains(&callback.as_str()));
        assert!(theirs.len() > 3, "{theirs:?}");
        let missing: Vec<_> = theirs.difference(&callbacks(name)).cloned().collect();
        assert!(missing.is_empty(), "{name}: {missing:?}");
    }
}
