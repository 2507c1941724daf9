//! Plugins in Rust, made with this project's SDK and with the crate nbdkit 0.3.0 from crates.io: each runs here and in the
//! C nbdkit, and what was written for that crate compiles against ours.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use super::headers::{C_NBDKIT, DISK, serve};
use crate::util::{Mount, NBDKIT, run, run_ok};

/// What a plugin is made with: a line of Cargo.toml.
fn sdk() -> String {
    format!("nbdkit = {{ path = \"{}/plugins/rust\" }}", env!("CARGO_MANIFEST_DIR"))
}

const CRATE: &str = "nbdkit = \"=0.3.0\"";

/// Builds a plugin outside the workspace from its one source file.
#[track_caller]
fn build(name: &str, nbdkit: &str, source: &Path) -> String {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let folder = target.join(name);
    fs::create_dir_all(&folder).expect("make a folder");
    let manifest = format!(
        "[package]\nname = \"{name}\"\nedition = \"2021\"\n\n\
         [lib]\ncrate-type = [\"cdylib\"]\npath = \"{}\"\n\n\
         [dependencies]\nlazy_static = \"1\"\nlibc = \"0.2\"\n{nbdkit}\n\n[workspace]\n",
        source.display()
    );
    fs::write(folder.join("Cargo.toml"), manifest).expect("write a file");
    let cargo = |offline: &[&str]| {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--quiet", "--target-dir"]).arg(target.join("rust-plugins")).args(offline);
        cargo.current_dir(&folder).output().expect("run cargo")
    };
    // What has been fetched before need not be again.
    let mut output = cargo(&["--offline"]);
    if !output.status.success() {
        output = cargo(&[]);
    }
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let library = target.join("rust-plugins/debug").join(format!("lib{}.so", name.replace('-', "_")));
    library.to_str().expect("UTF-8").to_owned()
}

fn ramdisk() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/abi/ramdisk.rs")
}

/// What this plugin can do, at every front end it has.
#[track_caller]
fn works(plugin: &str) {
    let more = "
assert h.can_fua() and h.can_cache() and h.can_multi_conn() and h.can_trim()
h.pwrite(b'x' * 512, 1 << 20, nbd.CMD_FLAG_FUA)
h.cache(4096, 1 << 20)
h.trim(4096, 1 << 20)
seen = []
h.block_status(4096, 1 << 20, lambda context, at, entries, error: seen.extend(entries))
assert seen[1] == 3, seen
try:
    h.pwrite(b'no space left', 0)
    assert False
except nbd.Error as error:
    assert error.errno in ('ENOSPC', 28), error.errno
";
    for program in [C_NBDKIT, NBDKIT] {
        serve(program, &[plugin, "2M"], &format!("{DISK}{more}"));
        let dump = run_ok([program, "--dump-plugin", plugin]);
        for line in
            ["api_version=2\n", "\nthread_model=parallel\n", "has_extents=1\n", "ramdisk_is_rust=yes\n"]
        {
            assert!(dump.contains(line), "{line}: {dump}");
        }
        assert!(!dump.contains("has_preconnect"), "{dump}");
        let refused = run([program, plugin, "colour=red"]);
        assert!(
            refused.code == 1 && refused.stderr.contains("unknown parameter 'colour'"),
            "{}",
            refused.stderr
        );
        let none = run([program, "-U", "-", "-e", "none", plugin, "--run", "nbdinfo $uri"]);
        assert!(none.code != 0 && none.stderr.contains("there is no such disk"), "{}", none.stderr);
    }
    let mut mount = Mount::start([plugin, "2M"]);
    fs::write(mount.file(), [7; 100_000]).expect("write");
    let seen = fs::read(mount.file()).expect("read");
    assert!(
        seen.len() == 2 << 20 && seen[..100_000] == [7; 100_000] && seen[100_000..].iter().all(|b| *b == 0)
    );
    assert_eq!(mount.unmount(), 0);
}

#[test]
fn made_with_the_sdk() {
    works(&build("ramdisk-sdk", &sdk(), &ramdisk()));
}

#[test]
fn made_with_the_crate() {
    works(&build("ramdisk-crate", CRATE, &ramdisk()));
}

/// The crate's own example, unchanged, against ours.
#[test]
fn the_example_of_the_crate() {
    build("crate-unpacked", CRATE, &ramdisk());
    let manifest = Path::new(env!("CARGO_TARGET_TMPDIR")).join("crate-unpacked/Cargo.toml");
    let metadata = run_ok([
        env!("CARGO"),
        "metadata",
        "--offline",
        "--format-version=1",
        "--manifest-path",
        manifest.to_str().expect("UTF-8"),
    ]);
    let metadata: serde_json::Value = serde_json::from_str(&metadata).expect("JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    let unpacked = packages.iter().find(|package| package["name"] == "nbdkit").expect("the crate");
    assert_eq!(unpacked["version"], "0.3.0");
    let folder = Path::new(unpacked["manifest_path"].as_str().expect("a path")).parent().expect("a folder");
    let plugin = build("crate-example", &sdk(), &folder.join("examples/ramdisk.rs"));
    let script = "
assert h.get_size() == 2 << 20
h.pwrite(b'written', 12345)
assert h.pread(8, 12345) == b'written' + bytes(1)
";
    for program in [C_NBDKIT, NBDKIT] {
        serve(program, &[&plugin, "size=2M"], script);
    }
}

/// Buffers in hexadecimal, as far as the server can.
#[test]
fn hexadecimal_dumps() {
    let dir = crate::util::temp();
    let source = dir.path().join("dump.rs");
    let text = r#"
use nbdkit::*;
struct Dump;
impl Server for Dump {
    fn name() -> &'static str { "dump" }
    fn config_complete() -> Result<()> {
        debug_hexdump(b"0123456789abcdefXYZ", "is ", 3);
        debug_hexdiff(&[0; 20], &[[0; 16].as_slice(), &[0, 1, 0, 0]].concat(), "diff ", 0);
        Ok(())
    }
    fn open(_: bool) -> Result<Box<dyn Server>> { Ok(Box::new(Dump)) }
    fn get_size(&self) -> Result<i64> { Ok(512) }
    fn read_at(&self, _: &mut [u8], _: u64) -> Result<()> { Ok(()) }
}
plugin!(Dump { config_complete });
"#;
    fs::write(&source, text).expect("write");
    let plugin = build("hexdump", &sdk(), &source);
    let said = |program| run([program, "-v", "-U", "-", &plugin, "--run", "true"]).stderr;
    let ours = said(NBDKIT);
    for line in [
        "debug: is 00000000:          30 31 32",
        "debug: is 00000010: 64 65 66 58",
        "diff -00000010: 00",
        "diff +00000010:    01",
    ] {
        assert!(ours.contains(line), "{line}: {ours}");
    }
    let theirs = said(C_NBDKIT);
    for line in ["debug: is 19 bytes at 0x3", "debug: diff 1 bytes differ from 0x0 on"] {
        assert!(theirs.contains(line), "{line}: {theirs}");
    }
}

/// The SDK's own examples.
#[test]
fn the_examples_of_the_sdk() {
    let example = |name: &str| {
        let source = format!("{}/plugins/rust/examples/{name}.rs", env!("CARGO_MANIFEST_DIR"));
        build(&format!("example-{}", name.replace('_', "-")), &sdk(), Path::new(&source))
    };
    let (ramdisk, extents, thread_model) = (example("ramdisk"), example("extents"), example("thread_model"));
    for program in [C_NBDKIT, NBDKIT] {
        serve(program, &[&ramdisk, "2M"], DISK);
        let map = run_ok([program, "-U", "-", &extents, "--run", "nbdinfo --map $uri"]);
        let kinds: Vec<&str> = map.lines().filter_map(|line| line.split_whitespace().last()).collect();
        assert_eq!(kinds[..4], ["data", "hole,zero", "zero", "data"], "{map}");
        let dump = run_ok([program, "--dump-plugin", &thread_model, "serialize-requests"]);
        assert!(dump.contains("\nthread_model=serialize_requests\n"), "{dump}");
    }
}
