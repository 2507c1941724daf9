//! Statistics of a mount, read while it serves.

use std::{fs::File, os::unix::fs::FileExt, path::Path};

use serde_json::Value;

use crate::util::{self, Mount, NBDKIT_MOUNT, image, temp};

fn stats(mountpoint: &Path) -> Value {
    let out =
        util::run_ok([NBDKIT_MOUNT.as_ref(), "--json".as_ref(), "--stats".as_ref(), mountpoint.as_os_str()]);
    assert_eq!(out.lines().count(), 1, "{out}");
    serde_json::from_str(&out).expect("JSON")
}

#[test]
fn requests_are_counted_for_each_layer() {
    let mount =
        Mount::start(["--filter=error", "--filter=offset", "memory", "2M", "offset=1M", "error-zero-rate=1"]);
    assert_eq!(stats(mount.path())["requests"]["write"], Value::Null);
    let file = File::options().read(true).write(true).open(mount.file()).expect("open");
    for block in 0..10 {
        file.write_all_at(&[1; 4096], block * 4096).expect("write");
    }
    file.sync_all().expect("flush");
    let flags = rustix::fs::FallocateFlags::ZERO_RANGE | rustix::fs::FallocateFlags::KEEP_SIZE;
    assert!(rustix::fs::fallocate(&file, flags, 0, 4096).is_err());
    let counted = stats(mount.path());
    let layers = counted["layers"].as_array().expect("layers");
    let names: Vec<&str> = layers.iter().filter_map(|layer| layer["name"].as_str()).collect();
    assert_eq!(names, ["error-inject", "offset", "memory"]);
    for requests in layers.iter().map(|layer| &layer["requests"]).chain([&counted["requests"]]) {
        let write = &requests["write"];
        assert_eq!((&write["count"], &write["bytes"]), (&10.into(), &40960.into()), "{counted}");
        let [p50, p95, p99] = ["p50_ns", "p95_ns", "p99_ns"].map(|p| write[p].as_u64().expect("a latency"));
        assert!(0 < p50 && p50 <= p95 && p95 <= p99, "{counted}");
        assert_eq!(requests["flush"]["count"], 1, "{counted}");
    }
    assert_eq!(counted["requests"]["zero"]["errors"], 1, "{counted}");
    assert_eq!(layers[0]["requests"]["zero"]["errors"], 1, "{counted}");
    assert_eq!(layers[2]["requests"]["zero"], Value::Null, "{counted}");
}

#[test]
fn the_table_names_what_it_counts() {
    let dir = temp();
    let point = image(dir.path(), "point", 0);
    let mount = Mount::on(point.clone(), ["memory", "1M"], dir);
    File::open(&point).expect("open").read_exact_at(&mut [0; 4096], 0).expect("read");
    let table = util::run_ok([NBDKIT_MOUNT, "--stats", mount.path().to_str().expect("UTF-8")]);
    assert!(table.contains("\nmemory "), "{table}");
    assert!(table.contains("100.0 % of reads found their data in memory"), "{table}");
    assert!(!table.contains('\x1b'), "{table}");
}

#[test]
fn only_mounts_have_statistics() {
    let dir = temp();
    let path = dir.path().to_str().expect("UTF-8");
    assert!(util::run([NBDKIT_MOUNT, "--stats", path]).refused().contains("not a mount of nbdkit-mount"));
    let missing = format!("{path}/missing");
    assert!(util::run([NBDKIT_MOUNT, "--stats", &missing]).refused().contains("No such file"));
    let mut mount = Mount::start(["memory", "1M"]);
    mount.kill();
    let line = util::run([NBDKIT_MOUNT, "--stats", mount.path().to_str().expect("UTF-8")]).refused();
    assert!(line.contains("fusermount3 -u"), "{line}");
}

#[test]
fn progress_is_for_the_foreground() {
    let line = util::run([NBDKIT_MOUNT, "--progress", "memory", "1M", "/mnt"]).refused();
    assert!(line.contains("-f"), "{line}");
    // Nothing is shown where there is no terminal.
    let out = util::run([NBDKIT_MOUNT, "--progress", "--run", "true", "memory", "1M"]);
    assert_eq!((out.code, out.stderr.as_str()), (0, ""));
}
