//! Disks in memory: what their allocators keep, what they tell, and what they cost a start.

use super::captive;
use crate::util::{NBDKIT, run_ok, temp};

/// System calls of a start with a command that does nothing, and of its end.
fn calls(words: &[&str]) -> usize {
    let dir = temp();
    let trace = dir.path().join("trace");
    let path = trace.to_str().expect("UTF-8");
    let before = ["strace", "-f", "-o", path, NBDKIT, "-U", "-"];
    run_ok(before.into_iter().chain(words.iter().copied()).chain(["--run", "true"]));
    let trace = std::fs::read_to_string(trace).expect("a trace");
    // Calls that another one has interrupted are in two lines.
    trace.lines().filter(|line| !line.contains(" resumed>") && line.ends_with(|c: char| c != '+')).count()
}

/// Many a disk in memory lives as long as one command. A call or two more or less are those of threads that wait for
/// each other.
#[test]
fn a_start_makes_few_calls_for_the_disk() {
    let without = calls(&["null", "1M"]);
    for words in
        [&["memory", "1M"][..], &["memory", "1T"], &["memory", "1M", "allocator=zstd"], &["data", "1 @1M"]]
    {
        let with = calls(words);
        assert!(with < without + 20, "{words:?}: {with} calls, {without} without a disk");
    }
}

#[test]
fn preferred_block_sizes_reach_the_client() {
    for (words, preferred) in [
        (&["memory", "1M"][..], 32768),
        (&["memory", "1M", "allocator=malloc"], 512),
        (&["memory", "1M", "allocator=zstd"], 32768),
        (&["data", "1"], 32768),
        (&["data", "1", "allocator=malloc"], 512),
    ] {
        let output = captive(NBDKIT, words, "nbdinfo \"$uri\"").ok();
        for line in [
            "block_size_minimum: 1",
            &format!("block_size_preferred: {preferred}"),
            "block_size_maximum: 4294967295",
        ] {
            assert!(output.contains(line), "{words:?}: no {line} in {output}");
        }
    }
}

/// Each allocator is the same disk, and a data disk starts with its data in each.
#[test]
fn allocators_keep_what_is_written() {
    for allocator in ["sparse", "malloc", "malloc,mlock=true", "zstd", "zstd,level=1"] {
        let allocator = format!("allocator={allocator}");
        let command = "qemu-io -f raw -c 'read -P 0x55 0 100000' -c 'write -P 7 50000 200000' -c 'write -z 60000 70000' \
            -c 'read -P 7 50000 10000' -c 'read -P 0 60000 70000' -c 'read -P 7 130000 120000' -c 'discard 0 1M' \"$uri\"";
        captive(NBDKIT, &["data", "0x55*100000", "size=1M", &allocator], command).ok();
        captive(NBDKIT, &["memory", "64M", &allocator], "nbdcopy \"$uri\" null: && fio --name=x --ioengine=nbd \
            --uri=\"$uri\" --rw=randrw --bsrange=512-64k --size=8M --verify=crc32c --verify_fatal=1 --output=/dev/null").ok();
    }
}
