//! Compressed disks, made by the tools of their formats and read by foreign clients through both front ends.

use std::path::{Path, PathBuf};

use super::{captive, info, refused};
use crate::util::{Mount, Server, run, sh, temp};

/// A filter, what makes a file for it out of `disk`, and whether the distribution's nbdkit has it.
const FORMATS: &[(&str, &str, bool)] = &[
    ("xz", "xz -c --block-size=256KiB disk", true),
    ("gzip", "gzip -c disk", true),
    ("zstd", "zstd -c disk", false),
    ("zstd", "split -b 512K --filter 'zstd -c' disk", false),
    ("bzip2", "bzip2 -c disk", false),
    ("lzip", "split -b 512K --filter 'lzip -c' disk", false),
];

/// Text, noise and zeroes in `disk`, 5 MB.
fn disk(dir: &Path) -> PathBuf {
    sh(&format!(
        "cd {} && {{ seq 200000; head -c 1000000 /dev/urandom; head -c 2000000 /dev/zero; seq 100000; }} > disk && truncate -s 5M disk",
        dir.display()
    ));
    dir.join("disk")
}

fn compressed(dir: &Path, command: &str) -> PathBuf {
    sh(&format!("cd {} && {command} > file", dir.display()));
    dir.join("file")
}

#[test]
fn disks_are_what_was_compressed() {
    let dir = temp();
    let disk = disk(dir.path());
    for (filter, command, _) in FORMATS {
        let file = compressed(dir.path(), command);
        let (filter, file) = (format!("--filter={filter}"), file.to_str().expect("UTF-8"));
        let words = [&filter, "file", file];
        captive(words, &format!("qemu-img compare -f raw -F raw {} \"$uri\"", disk.display())).ok();
        captive(words, &format!("nbdcopy \"$uri\" - | cmp - {}", disk.display())).ok();
        let told = info(&words);
        for line in ["\"is_read_only\": true", "\"can_multi_conn\": true", "\"can_cache\": true"] {
            assert!(told.contains(line), "{filter}: {line} is not in {told}");
        }
    }
}

#[test]
fn mounts_show_them_too() {
    let dir = temp();
    let disk = disk(dir.path());
    for (filter, command, _) in FORMATS {
        let file = compressed(dir.path(), command);
        let mount =
            Mount::start(["-r", &format!("--filter={filter}"), "file", file.to_str().expect("UTF-8")]);
        sh(&format!("cmp {} {}", disk.display(), mount.file().display()));
    }
}

/// The same files in the C nbdkit.
#[test]
fn the_c_nbdkit_reads_the_same() {
    let dir = temp();
    disk(dir.path());
    for (filter, command, theirs) in FORMATS.iter().filter(|format| format.2) {
        assert!(theirs);
        let file = compressed(dir.path(), command);
        let (filter, file) = (format!("--filter={filter}"), file.to_str().expect("UTF-8"));
        let command = "nbdcopy \"$uri\" - | sha256sum; nbdinfo --size \"$uri\"";
        let ours = captive([&filter, "file", file], command).ok();
        let theirs = run(["/usr/bin/nbdkit", "-U", "-", &filter, "file", file, "--run", command]).ok();
        assert_eq!(ours, theirs, "{filter}");
    }
}

#[test]
fn what_was_decompressed_to_zeroes_is_a_hole() {
    let dir = temp();
    disk(dir.path());
    for (filter, command, _) in FORMATS {
        let file = compressed(dir.path(), command);
        let server = Server::start([&format!("--filter={filter}"), "file", file.to_str().expect("UTF-8")]);
        let map =
            sh(&format!("nbdsh -u '{0}' -c 'h.pread(h.get_size(), 0)' && nbdinfo --map '{0}'", server.uri()));
        let holes: u64 = map
            .lines()
            .filter(|line| line.contains("hole,zero"))
            .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
            .sum();
        assert!((1_800_000..2_300_000).contains(&holes), "{filter}: {map}");
    }
}

#[test]
fn many_clients_at_once() {
    let dir = temp();
    disk(dir.path());
    for (filter, command, _) in FORMATS {
        let file = compressed(dir.path(), command);
        let server = Server::start([&format!("--filter={filter}"), "file", file.to_str().expect("UTF-8")]);
        sh(&format!(
            "cd {}; for i in 1 2 3 4; do {{ nbdcopy --connections=4 '{}' copy$i && cmp copy$i disk; }} & pids=\"${{pids-}} $!\"; done
            for pid in $pids; do wait $pid; done",
            dir.path().display(),
            server.uri(),
        ));
    }
}

#[test]
fn other_files_are_refused() {
    let dir = temp();
    let disk = disk(dir.path());
    for (filter, ..) in FORMATS {
        let filter = format!("--filter={filter}");
        let run = captive([&filter, "file", disk.to_str().expect("UTF-8")], "nbdinfo \"$uri\"");
        assert_ne!(run.code, 0, "{filter}");
        assert!(run.stderr.contains("this is not a"), "{filter}: {}", run.stderr);
    }
    assert!(refused(&["--filter=xz", "null", "xz-max-depth=0"]).contains("must be 1 or more"));
}

#[test]
fn a_gzip_index_is_kept() {
    let dir = temp();
    let disk = disk(dir.path());
    let file = compressed(dir.path(), "gzip -c disk");
    let (file, index) = (file.display(), dir.path().join("index"));
    let words = format!("--filter=indexed-gzip file {file} gzip-index-path={} span=256K", index.display());
    for _ in 0..2 {
        captive(words.split(' '), &format!("nbdcopy \"$uri\" - | cmp - {}", disk.display())).ok();
        assert!(index.exists());
    }
    let error = refused(&["--filter=indexed-gzip", "file", "/dev/null"]);
    assert!(error.contains("gzip-index-path=PATH"), "{error}");
}

/// A disk that is not read to its end costs no decompression of all of it when its size is known.
#[test]
fn gzip_trusts_a_size_it_is_given() {
    let dir = temp();
    disk(dir.path());
    let file = compressed(dir.path(), "gzip -c disk > whole && head -c 1400000 whole");
    let words = ["--filter=gzip", "file", file.to_str().expect("UTF-8")];
    let run = captive(words, "nbdinfo \"$uri\"");
    assert!(run.stderr.contains("gzip-size="), "{}", run.stderr);
    let command = "nbdsh -u \"$uri\" -c 'assert h.pread(6, 0) == b\"1\\n2\\n3\\n\"
try:
    h.pread(512, 5 * 1024 * 1024 - 512); raise SystemExit(\"it was cut off\")
except nbd.Error as e:
    assert e.errno == \"EIO\"'";
    captive(words.iter().chain(&["gzip-size=5M"]), command).ok();
}
