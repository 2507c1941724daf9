//! The conformance suite: what a front end may rely on, checked for every plugin through the chain and the dispatcher
//! that the front ends use.
//!
//! To add a plugin, add its row to [`ROWS`]: a test fails until it is there.

use std::{ffi::OsString, path::Path, sync::Arc};

use nbdkit_core::{Chain, Errno};

use self::suite::{Row, Writes, image};

#[path = "conformance/model.rs"]
mod model;
#[path = "conformance/suite.rs"]
pub(crate) mod suite;

/// All that a plugin can offer.
const EVERYTHING: &str = "write flush trim zero=Native fast_zero fua=Native multi_conn cache=Native extents";

/// A size that is no multiple of anything.
const ODD: u64 = (1 << 20) + 4097;

const ROWS: &[Row] = &[
    Row {
        plugin: "curl",
        params: |dir| {
            let image = image(dir, "disk", ODD).into_string().unwrap();
            vec![("url", format!("file://{image}").into())]
        },
        export: "",
        size: ODD,
        caps: "multi_conn",
        writes: Writes::Refused,
        area: 0..ODD,
    },
    Row {
        plugin: "data",
        params: |_| vec![("raw", "hello".into()), ("size", ODD.to_string().into())],
        export: "",
        size: ODD,
        caps: EVERYTHING,
        writes: Writes::Kept,
        area: 0..ODD,
    },
    Row {
        plugin: "eval",
        params: |dir| {
            let disk = image(dir, "disk", 8193);
            let disk = disk.to_str().unwrap();
            let pread = format!("dd if={disk} skip=$4 count=$3 iflag=skip_bytes,count_bytes status=none");
            let pwrite = format!("dd of={disk} seek=$4 conv=notrunc oflag=seek_bytes status=none");
            vec![
                ("get_size", "echo 8193".into()),
                ("pread", pread.into()),
                ("pwrite", pwrite.into()),
                ("flush", "true".into()),
            ]
        },
        export: "",
        size: 8193,
        caps: "write flush zero=Emulate fast_zero fua=Emulate",
        writes: Writes::Kept,
        area: 0..8193,
    },
    Row {
        plugin: "example1",
        params: |_| vec![],
        export: "",
        size: 100 << 20,
        caps: "",
        writes: Writes::Refused,
        area: 0..1024,
    },
    Row {
        plugin: "example2",
        params: |dir| vec![("file", image(dir, "disk", ODD))],
        export: "",
        size: ODD,
        caps: "",
        writes: Writes::Refused,
        area: 0..ODD,
    },
    Row {
        plugin: "example3",
        params: |_| vec![("size", ODD.to_string().into())],
        export: "",
        size: ODD,
        caps: "write flush zero=Emulate fast_zero fua=Emulate",
        writes: Writes::Kept,
        // Another connection has another disk.
        area: 0..0,
    },
    Row {
        plugin: "example4",
        params: |_| vec![("size", "8193".into())],
        export: "",
        size: 8193,
        caps: "write zero=Emulate fast_zero",
        writes: Writes::Kept,
        area: 0..8193,
    },
    Row {
        plugin: "file",
        params: |dir| vec![("file", image(dir, "disk", ODD))],
        export: "",
        size: ODD,
        caps: EVERYTHING,
        writes: Writes::Kept,
        area: 0..ODD,
    },
    Row {
        plugin: "file",
        params: |dir| {
            vec![("file", image(dir, "disk", ODD)), ("cache", "none".into()), ("fadvise", "random".into())]
        },
        export: "",
        size: ODD,
        caps: EVERYTHING,
        writes: Writes::Kept,
        area: 0..ODD,
    },
    Row {
        plugin: "file",
        params: |dir| {
            image(dir, "one", 512);
            image(dir, "two", 4096);
            vec![("dir", dir.into())]
        },
        export: "two",
        size: 4096,
        caps: EVERYTHING,
        writes: Writes::Kept,
        area: 0..4096,
    },
    Row {
        plugin: "file",
        params: |dir| vec![("file", image(dir, "empty", 0))],
        export: "",
        size: 0,
        caps: EVERYTHING,
        writes: Writes::Kept,
        area: 0..0,
    },
    Row {
        plugin: "floppy",
        params: |dir| {
            image(dir, "file", ODD);
            vec![("dir", dir.into()), ("type", "fat16".into()), ("size", "16M".into())]
        },
        export: "",
        size: 16 << 20,
        caps: "multi_conn cache=Native extents",
        writes: Writes::Refused,
        area: 0..4 << 20,
    },
    Row {
        plugin: "full",
        params: |_| vec![("size", ODD.to_string().into())],
        export: "",
        size: ODD,
        caps: "write trim zero=Emulate fast_zero multi_conn cache=Native extents",
        writes: Writes::Fail(Errno::ENOSPC),
        area: 0..ODD,
    },
    Row {
        plugin: "info",
        params: |_| vec![("mode", "exportname".into())],
        export: "hello",
        size: 5,
        caps: "multi_conn cache=Native",
        writes: Writes::Refused,
        area: 0..0,
    },
    Row {
        plugin: "iso",
        params: |dir| {
            // Makes an image of a size that is known.
            let program = dir.join("program");
            std::fs::write(&program, "#!/bin/sh\ntruncate -s 8193 \"$3\"\n").unwrap();
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            std::fs::set_permissions(&program, mode).unwrap();
            vec![("dir", dir.into()), ("prog", program.into())]
        },
        export: "",
        size: 8193,
        caps: "multi_conn cache=Native extents",
        writes: Writes::Refused,
        area: 0..8193,
    },
    Row {
        plugin: "linuxdisk",
        params: |dir| {
            image(dir, "file", 8193);
            vec![("dir", dir.into()), ("size", "4M".into())]
        },
        export: "",
        size: (5 << 20) + 33 * 512,
        caps: "multi_conn cache=Native extents",
        writes: Writes::Refused,
        area: 0..4 << 20,
    },
    Row {
        plugin: "memory",
        params: |_| vec![("size", ODD.to_string().into())],
        export: "",
        size: ODD,
        caps: EVERYTHING,
        writes: Writes::Kept,
        area: 0..ODD,
    },
    Row {
        plugin: "memory",
        params: |_| vec![("size", i64::MAX.to_string().into())],
        export: "",
        size: i64::MAX as u64,
        caps: EVERYTHING,
        writes: Writes::Kept,
        area: i64::MAX as u64 - 100_000..i64::MAX as u64,
    },
    Row {
        plugin: "memory",
        params: |_| vec![("size", "64K".into()), ("allocator", "malloc,mlock=true".into())],
        export: "",
        size: 65536,
        caps: EVERYTHING,
        writes: Writes::Kept,
        area: 0..65536,
    },
    Row {
        plugin: "memory",
        params: |_| vec![("size", ODD.to_string().into()), ("allocator", "zstd".into())],
        export: "",
        size: ODD,
        caps: EVERYTHING,
        writes: Writes::Kept,
        area: 0..ODD,
    },
    Row {
        plugin: "nbd",
        params: |dir| {
            let image = image(dir, "disk", (1 << 20) + 4096);
            let words = ["--format=raw".into(), "--discard=unmap".into(), "--persistent".into(), image];
            let arguments = words.into_iter().map(|word| ("arg", word));
            std::iter::once(("command", "qemu-nbd".into())).chain(arguments).collect()
        },
        export: "",
        size: (1 << 20) + 4096,
        caps: EVERYTHING,
        writes: Writes::Kept,
        area: 0..(1 << 20) + 4096,
    },
    Row {
        plugin: "null",
        params: |_| vec![("size", ODD.to_string().into())],
        export: "",
        size: ODD,
        caps: EVERYTHING,
        writes: Writes::Discarded,
        area: 0..ODD,
    },
    Row {
        plugin: "ondemand",
        params: |dir| {
            let command = "truncate -s $size \"$disk\"";
            vec![
                ("dir", dir.into()),
                ("size", "8193".into()),
                ("command", command.into()),
                ("share", "1".into()),
            ]
        },
        export: "name",
        size: 8193,
        caps: EVERYTHING,
        writes: Writes::Kept,
        area: 0..8193,
    },
    Row {
        plugin: "ones",
        params: |_| vec![("size", ODD.to_string().into())],
        export: "",
        size: ODD,
        caps: EVERYTHING,
        writes: Writes::Discarded,
        area: 0..ODD,
    },
    Row {
        plugin: "ones",
        params: |_| vec![("size", "1M".into()), ("byte", "0".into())],
        export: "",
        size: 1 << 20,
        caps: EVERYTHING,
        writes: Writes::Discarded,
        area: 0..1 << 20,
    },
    Row {
        plugin: "partitioning",
        params: |dir| vec![("file", image(dir, "disk", ODD))],
        export: "",
        size: (1 << 20) + ODD.next_multiple_of(512),
        caps: EVERYTHING,
        writes: Writes::Kept,
        area: 1 << 20..(1 << 20) + ODD,
    },
    Row {
        plugin: "pattern",
        params: |_| vec![("size", ODD.to_string().into())],
        export: "",
        size: ODD,
        caps: "multi_conn cache=Native",
        writes: Writes::Refused,
        area: 0..ODD,
    },
    Row {
        plugin: "random",
        params: |_| vec![("size", ODD.to_string().into()), ("seed", "1".into())],
        export: "",
        size: ODD,
        caps: "write trim zero=Native multi_conn cache=Native",
        writes: Writes::Fail(Errno::EIO),
        area: 0..ODD,
    },
    Row {
        plugin: "sh",
        params: |dir| vec![("script", script(dir)), ("disk", image(dir, "disk", 8193))],
        export: "",
        size: 8193,
        caps: EVERYTHING,
        writes: Writes::Kept,
        area: 0..8193,
    },
    Row {
        plugin: "sparse-random",
        params: |_| vec![("size", ODD.to_string().into()), ("percent", "100".into())],
        export: "",
        size: ODD,
        caps: "write flush trim zero=Native fua=Emulate multi_conn cache=Native extents",
        writes: Writes::Fail(Errno::EIO),
        area: 0..ODD,
    },
    Row {
        plugin: "split",
        params: |dir| {
            let sizes = [("one", 5000), ("two", 0), ("three", 1), ("four", ODD - 5001)];
            sizes.map(|(name, size)| ("file", image(dir, name, size))).into()
        },
        export: "",
        size: ODD,
        caps: EVERYTHING,
        writes: Writes::Kept,
        area: 0..ODD,
    },
    Row {
        plugin: "tmpdisk",
        params: |_| vec![("size", "8193".into()), ("command", "truncate -s $size \"$disk\"".into())],
        export: "",
        size: 8193,
        caps: "write flush trim zero=Native fast_zero fua=Native cache=Native extents",
        writes: Writes::Kept,
        // Another connection has another disk.
        area: 0..0,
    },
    Row {
        plugin: "zero",
        params: |_| vec![],
        export: "",
        size: 0,
        caps: "multi_conn cache=Native",
        writes: Writes::Refused,
        area: 0..0,
    },
];

/// A chain of one plugin, ready for connections.
fn start(plugin: &str, params: Vec<(&str, OsString)>) -> anyhow::Result<Arc<Chain>> {
    let mut chain = Chain::new(crate::load(plugin).unwrap(), vec![]);
    for (key, value) in params {
        chain.config(key, &value)?;
    }
    chain.config_complete()?;
    chain.get_ready()?;
    let chain = Arc::new(chain);
    chain.after_fork()?;
    Ok(chain)
}

#[test]
fn every_plugin_has_a_row() {
    for name in crate::names() {
        assert!(ROWS.iter().any(|row| row.plugin == name), "conformance.rs has no row for {name}");
    }
}

/// Scripts ask `--dump-plugin` what a plugin can do before they use it.
#[test]
fn what_a_plugin_can_do_is_among_its_callbacks() {
    for row in ROWS {
        let Some(told) = crate::load(row.plugin).unwrap().callbacks() else { continue };
        for word in row.caps.split_whitespace().filter(|word| !word.ends_with("Emulate")) {
            let capability = word.split('=').next().unwrap_or(word);
            let callbacks: &[&str] = match capability {
                "write" => &["pwrite"],
                "fua" => &["can_fua", "flush"],
                "fast_zero" => &[],
                "multi_conn" => &["can_multi_conn"],
                "rotational" => &["is_rotational"],
                other => &[other],
            };
            for callback in callbacks {
                assert!(told.contains(callback), "{} does not tell of {callback}", row.plugin);
            }
        }
    }
}

/// Makes a script that can do everything and returns its path.
fn script(dir: &Path) -> OsString {
    use std::os::unix::fs::PermissionsExt as _;
    let text = r#"
disk=$tmpdir/disk
case $1 in
config) ln -s "$3" $disk ;;
thread_model) echo parallel ;;
get_size) stat -L -c %s $disk ;;
can_fua | can_cache) echo native ;;
can_write | can_flush | can_trim | can_zero | can_fast_zero | can_extents | can_multi_conn) exit 0 ;;
pread) dd if=$disk skip=$4 count=$3 iflag=skip_bytes,count_bytes status=none ;;
pwrite) dd of=$disk seek=$4 conv=notrunc oflag=seek_bytes status=none ;;
zero) head -c $3 /dev/zero | dd of=$disk seek=$4 conv=notrunc oflag=seek_bytes status=none ;;
flush | trim | cache) exit 0 ;;
extents) echo 0 8193 ;;
*) exit 2 ;;
esac
"#;
    let path = dir.join("script");
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
    path.into()
}
