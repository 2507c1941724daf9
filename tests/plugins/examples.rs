//! The examples and the random disks: they offer what those of the C nbdkit offer.

use std::fs;

use super::{C_NBDKIT, both, captive};
use crate::util::{NBDKIT, run, sh, temp};

/// Size and capabilities, as a client sees them.
const OFFERED: &str =
    "nbdinfo --json \"$uri\" | grep -E '\"(export-size|is_read_only|is_rotational|can_[a-z_]*)\"'";

#[test]
fn they_offer_what_those_of_the_c_nbdkit_offer() {
    let dir = temp();
    fs::write(dir.path().join("file"), "some data").expect("write");
    let file = format!("file={}", dir.path().join("file").display());
    for words in [
        &["example1"][..],
        &["example2", &file],
        &["example3"],
        &["example3", "size=3M"],
        &["random", "1M"],
        &["random", "size=12345", "seed=1"],
        &["sparse-random", "1M"],
        &["sparse-random", "1M", "percent=50%", "random-content=true", "seed=0x10"],
        &["memory", "1M"],
        &["data", "1 2 @512"],
    ] {
        let [ours, theirs] = both(words, OFFERED);
        assert_eq!(ours, theirs, "{words:?}");
    }
}

/// Scripts ask before they use a plugin.
#[test]
fn they_tell_what_those_of_the_c_nbdkit_tell() {
    for plugin in ["example1", "example2", "example3", "example4", "random", "sparse-random", "memory"] {
        let [ours, theirs] = [NBDKIT, C_NBDKIT].map(|program| {
            // A script is asked when it has what it needs.
            let size = (plugin == "example4").then_some("size=1048576");
            let dump = run([program, plugin, "--dump-plugin"].into_iter().chain(size)).ok();
            let keys = ["max_thread_model", "thread_model", "magic_config_key", "mlock", "zstd"];
            let wanted = |line: &&str| {
                let key = line.split('=').next().unwrap_or_default();
                keys.contains(&key) || key.ends_with("_extra")
            };
            let mut lines: Vec<_> = dump.lines().filter(wanted).map(str::to_owned).collect();
            // A script of ours could be made to do better.
            lines.retain(|line| plugin != "example4" || !line.starts_with("max_thread_model"));
            lines.sort();
            lines
        });
        assert_eq!(ours, theirs, "{plugin}");
    }
}

#[test]
fn both_refuse_what_is_missing_or_wrong() {
    for (words, message) in [
        (&["example1", "foo=1"][..], "foo"),
        (
            &["example2"],
            "you must supply the file=<FILENAME> parameter after the plugin name on the command line",
        ),
        (&["example2", "file=/nonexistent"], "/nonexistent"),
        (&["example2", "foo=1"], "unknown parameter 'foo'"),
        (&["example3", "foo=1"], "unknown parameter 'foo'"),
        (&["example4"], "size was not set"),
        (&["example4", "foo=1"], "unknown parameter foo"),
        (&["random", "1M", "seed=x"], "seed"),
        (&["random", "1M", "seed=99999999999"], "seed"),
        (&["sparse-random", "1M", "percent=101"], "cannot parse percent parameter: 101"),
        (&["sparse-random", "1M", "runlength=0"], "runlength parameter must be > 0"),
        (&["sparse-random", "1M", "random-content=x"], "could not decipher boolean"),
    ] {
        let ours = captive(NBDKIT, words, "true").refused();
        assert!(ours.contains(message), "{words:?}: {ours}");
        let theirs = captive(C_NBDKIT, words, "nbdinfo \"$uri\"");
        assert!(theirs.code != 0 || theirs.stderr.contains(message), "{words:?}: {}", theirs.stderr);
    }
}

#[test]
fn example1_has_the_partition_of_the_original() {
    let dir = temp();
    let disk = dir.path().join("disk").display().to_string();
    let command = format!(
        "nbdcopy \"$uri\" {disk} && sfdisk -d {disk} && tail -c +513 {disk} | sha256sum && rm {disk}"
    );
    let [ours, theirs] = both(&["example1"], &command);
    assert_eq!(ours, theirs);
    assert!(ours.contains("start=         128, size=      204545, type=83"), "{ours}");
    let partition =
        captive(NBDKIT, &["example1", "--filter=partition", "partition=1"], "nbdinfo --size \"$uri\"");
    assert_eq!(partition.ok().trim(), (204_545 * 512).to_string());
}

#[test]
fn example3_is_another_disk_for_each_connection() {
    let script = "
import os
uri = os.environ[\"uri\"]
a, b = nbd.NBD(), nbd.NBD()
a.connect_uri(uri)
a.pwrite(b\"a\" * 512, 1000)
assert a.pread(512, 1000) == b\"a\" * 512
a.flush()
a.shutdown()
b.connect_uri(uri)
assert b.pread(512, 1000) == bytes(512)";
    for program in [NBDKIT, C_NBDKIT] {
        let command = format!("export uri; nbdsh -c '{script}'");
        captive(program, &["example3", "size=1M"], &command).ok();
    }
}

#[test]
fn example4_is_one_disk_for_all() {
    let command = "qemu-io -f raw -c 'write -P 7 1000 5000' -c 'read -P 7 1000 5000' -c 'read -P 0 0 1000' \"$uri\" \
        && qemu-io -f raw -r -c 'read -P 7 1000 5000' \"$uri\"";
    captive(NBDKIT, &["example4", "size=1M"], command).ok();
}

/// The disk is the one that its client believes it copies.
#[test]
fn random_disks_copy_onto_themselves() {
    for words in [
        &["random", "10M"][..],
        &["sparse-random", "100M", "percent=30", "runlength=1M"],
        &["sparse-random", "50M", "percent=30", "runlength=64k", "random-content=true"],
    ] {
        let command = "nbdcopy \"$uri\" \"$uri\" && qemu-img compare -f raw -F raw \"$uri\" \"$uri\"";
        captive(NBDKIT, words, command).ok();
        let other = captive(NBDKIT, words, "nbdsh -u \"$uri\" -c 'h.pwrite(b\"!?\" * 512, 0)'");
        assert!(
            other.code != 0 && other.stderr.contains("data written does not match expected"),
            "{}",
            other.stderr
        );
    }
}

#[test]
fn seeds_make_the_same_disk_again() {
    for plugin in ["random 1M seed=5", "sparse-random 50M percent=30 runlength=1M seed=5"] {
        let digests = sh(&format!(
            "for i in 1 2; do {NBDKIT} -U - {plugin} --run 'nbdcopy \"$uri\" - | sha256sum'; done; \
             {NBDKIT} -U - {plugin}6 --run 'nbdcopy \"$uri\" - | sha256sum'"
        ));
        let lines: Vec<_> = digests.lines().collect();
        assert!(lines[0] == lines[1] && lines[1] != lines[2], "{plugin}: {digests}");
    }
}
