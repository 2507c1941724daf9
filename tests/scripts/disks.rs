//! Disks out of scripts, through both front ends.

use std::{fs, path::Path};

use super::{captive, script};
use crate::util::{Mount, NBDKIT, Server, patterned, qemu_io, run, run_ok, sh, temp};

/// A disk in a file beside it.
fn file_words(disk: &Path) -> Vec<String> {
    let words = [
        "eval",
        "config=ln -s \"$3\" $tmpdir/disk",
        "thread_model=echo parallel",
        "get_size=stat -L -c %s $tmpdir/disk",
        "pread=dd if=$tmpdir/disk skip=$4 count=$3 iflag=skip_bytes,count_bytes,fullblock bs=1M status=none",
        "pwrite=dd of=$tmpdir/disk seek=$4 conv=notrunc oflag=seek_bytes iflag=fullblock bs=1M status=none",
        "flush=sync $tmpdir/disk",
        "zero=fallocate -z -o $4 -l $3 $tmpdir/disk",
        "trim=fallocate -p -o $4 -l $3 $tmpdir/disk",
    ];
    words.into_iter().map(String::from).chain([format!("disk={}", disk.display())]).collect()
}

#[test]
fn a_disk_is_read_and_written_over_nbd() {
    let dir = temp();
    let disk = patterned(dir.path(), "disk", 9 << 20);
    let before = fs::read(&disk).expect("read");
    let server = Server::start(file_words(&disk));
    let copy = dir.path().join("copy");
    run_ok(["nbdcopy", &server.uri(), copy.to_str().expect("UTF-8")]);
    assert!(fs::read(&copy).expect("read") == before);
    let commands = [
        "write -P 5 1000 5000000",
        "read -P 5 1000 5000000",
        "write -z 2M 1M",
        "read -P 0 2M 1M",
        "discard 0 512",
    ];
    qemu_io(&server.uri(), &commands);
    let after = fs::read(&disk).expect("read");
    assert!(after[5_001_000..] == before[5_001_000..] && after[2 << 20..3 << 20] == [0; 1 << 20]);
}

#[test]
fn a_disk_is_mounted() {
    let dir = temp();
    let disk = patterned(dir.path(), "disk", 4 << 20);
    let mut mount = Mount::start(file_words(&disk));
    assert!(fs::read(mount.file()).expect("read") == fs::read(&disk).expect("read"));
    sh(&format!("mkfs.ext4 -q -F {0} && e2fsck -fn {0}", mount.file().display()));
    assert_eq!(mount.unmount(), 0);
    sh(&format!("e2fsck -fn {}", disk.display()));
}

#[test]
fn a_script_comes_on_standard_input() {
    let text = "case $1 in get_size) echo 2M ;; *) exit 2 ;; esac";
    let size = |options: &str| {
        let command = format!("echo '{text}' | {NBDKIT} {options} sh - --run 'nbdinfo --size \"$uri\"'");
        run(["bash", "-c", &command])
    };
    assert_eq!(size("-U -").ok(), "2097152\n");
    let single = run(["bash", "-c", &format!("echo 'touch /nonexistent/x' | {NBDKIT} -s sh -")]);
    assert!(single.refused().contains("incompatible with -s"));
    let python =
        "#!/usr/bin/python3\nimport sys\nif sys.argv[1] == 'get_size': print('5K')\nelse: sys.exit(2)\n";
    let dir = temp();
    let path = script(dir.path(), "inline", python);
    let command = format!("{NBDKIT} -U - sh - --run 'nbdinfo --size \"$uri\"' < {}", path.display());
    assert_eq!(run_ok(["bash", "-c", &command]), "5120\n");
}

#[test]
fn the_commands_directory_and_environment_are_the_callers() {
    let run = captive(["eval", "get_size=echo $(pwd)$tmpdir | wc -c"], "echo \"<$tmpdir>\"; pwd");
    let lines = run.ok();
    assert!(lines.starts_with("<>\n"), "{lines}");
    assert!(
        lines.contains(std::env::current_dir().expect("a directory").to_str().expect("UTF-8")),
        "{lines}"
    );
}

/// The example of nbdkit-sh-plugin(3).
#[test]
fn a_disk_out_of_pieces() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("man/nbdkit-sh-plugin.3.scd");
    let page = fs::read_to_string(page).expect("the page");
    let text = page.split("```\n").find(|block| block.contains("pieces=(")).expect("the example");
    let dir = temp();
    let disk = patterned(dir.path(), "disk", (3 << 20) + 777);
    let path = script(dir.path(), "pieces.sh", text);
    let pieces = dir.path().join("pieces");
    fs::create_dir(&pieces).expect("make a directory");
    sh(&format!("split -b 1M {} {}/piece.", disk.display(), pieces.display()));
    let words = ["sh".to_owned(), path.display().to_string(), format!("dir={}", pieces.display())];
    let server = Server::start(&words);
    let copy = dir.path().join("copy");
    run_ok(["nbdcopy", &server.uri(), copy.to_str().expect("UTF-8")]);
    assert!(fs::read(&copy).expect("read") == fs::read(&disk).expect("read"));
    let mut mount = Mount::start(&words);
    assert!(fs::read(mount.file()).expect("read") == fs::read(&disk).expect("read"));
    assert_eq!(mount.unmount(), 0);
}
