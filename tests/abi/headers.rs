//! Our headers: whatever is compiled against them runs here, plugins in the C nbdkit too; and they promise binaries
//! what the distribution's do.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
};

use crate::util::{Mount, NBDKIT, NBDKIT_MOUNT, run, run_ok, sh, temp};

/// The C nbdkit, of the distribution.
pub(super) const C_NBDKIT: &str = "nbdkit";

/// Our headers, before those of the distribution.
fn include() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("include")
}

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/abi").join(name)
}

/// Compiles one of this folder's sources as strictly as the language allows. C++ is told by the name.
#[track_caller]
fn compile<S: AsRef<OsStr>>(name: &str, out: &Path, more: impl IntoIterator<Item = S>) {
    let source = source(name);
    let words = if name.ends_with(".cpp") { ["g++", "-std=c++11"] } else { ["gcc", "-std=c99"] };
    let strict = ["-Wall", "-Wextra", "-Werror", "-pedantic", "-Wmissing-declarations", "-o"];
    let mut all: Vec<&OsStr> = words.iter().chain(&strict).map(OsStr::new).collect();
    all.extend([out.as_os_str(), source.as_os_str()]);
    let more: Vec<S> = more.into_iter().collect();
    all.extend(more.iter().map(AsRef::as_ref));
    run_ok(all);
}

/// Compiles a plugin or filter against our headers. `-fvisibility=hidden` must not hide its entry point.
#[track_caller]
fn module(dir: &Path, name: &str) -> String {
    let out = dir.join(name).with_extension("so");
    let include = format!("-I{}", include().display());
    compile(name, &out, ["-shared", "-fPIC", "-fvisibility=hidden", &include]);
    out.into_os_string().into_string().expect("UTF-8")
}

/// Runs a script with `h` connected to the server's default export, with `base:allocation`. It must succeed.
#[track_caller]
pub(super) fn serve(program: &str, words: &[&str], script: &str) -> String {
    let dir = temp();
    let path = dir.path().join("script.py");
    fs::write(&path, script).expect("write a file");
    let command = format!("nbdsh --base-allocation -u \"$uri\" -c - < {}", path.display());
    let mut all = vec![program, "-U", "-"];
    all.extend(words);
    all.extend(["--run", &command]);
    run_ok(all)
}

/// What holds of each of the disks, of 2 MiB.
pub(super) const DISK: &str = "
assert h.get_size() == 2 << 20
assert not h.is_read_only() and h.can_flush()
assert h.pread(8192, 0) == bytes(8192)
data = bytes(range(256)) * 40
h.pwrite(data, 4000)
h.pwrite(b'end', (2 << 20) - 3)
h.flush()
assert h.pread(len(data) + 200, 3900) == bytes(100) + data + bytes(100)
assert h.pread(3, (2 << 20) - 3) == b'end'
h.zero(5000, 4100)
assert h.pread(len(data), 4000) == data[:100] + bytes(5000) + data[5100:]
";

/// What only the disk of ramdisk_v2.c can do.
const V2: &str = "
assert h.get_block_size(nbd.SIZE_PREFERRED) == 4096
assert h.can_fua() and h.can_cache() and h.can_multi_conn() and h.can_fast_zero()
seen = []
h.block_status(2 << 20, 0, lambda context, at, entries, error: seen.extend(entries))
assert seen == [16384, 0, (2 << 20) - 16384 - 4096, 3, 4096, 0], seen
h.pwrite(b'x' * 512, 1 << 20, nbd.CMD_FLAG_FUA)
h.cache(4096, 1 << 20)
h.trim(4096, 1 << 20)
seen = []
h.block_status(4096, 1 << 20, lambda context, at, entries, error: seen.extend(entries))
assert seen[1] == 3, seen
assert h.pread(512, 1 << 20) == bytes(512)
";

#[test]
fn a_plugin_of_version_1() {
    let dir = temp();
    let plugin = module(dir.path(), "ramdisk_v1.c");
    for program in [C_NBDKIT, NBDKIT] {
        serve(program, &[&plugin, "2M"], DISK);
        serve(program, &[&plugin, "2M"], "h.pwrite(b'x' * 512, 512); h.trim(512, 512)\nassert h.can_fua()");
        let dump = run_ok([program, "--dump-plugin", &plugin]);
        assert!(dump.contains("api_version=1\n"), "{dump}");
        assert!(dump.contains("thread_model=serialize_all_requests\n"), "{dump}");
        let refused = run([program, &plugin, "colour=red"]);
        assert_eq!(refused.code, 1);
        assert!(refused.stderr.contains("unknown parameter 'colour'"), "{}", refused.stderr);
    }
}

#[test]
fn a_plugin_of_version_2() {
    let dir = temp();
    let plugin = module(dir.path(), "ramdisk_v2.c");
    for program in [C_NBDKIT, NBDKIT] {
        let words = [&plugin[..], "2M", "description=for a test"];
        serve(program, &words, &format!("{DISK}{V2}"));
        let run_with = |command| run_ok([program, "-U", "-"].iter().chain(&words).chain(&["--run", command]));
        let info = run_with("nbdinfo $uri");
        assert!(info.contains("description: for a test"), "{info}");
        let list = run_with("nbdinfo --list $uri");
        assert!(list.contains("export=\"ram\""), "{list}");
        let missing = run([program, "-U", "-", "-e", "rom", &plugin, "2M", "--run", "nbdinfo $uri"]);
        assert_ne!(missing.code, 0);
        assert!(missing.stderr.contains("there is no export 'rom', only 'ram'"), "{}", missing.stderr);
        let dump = run_ok([program, "--dump-plugin", &plugin]);
        for line in ["api_version=2\n", "thread_model=parallel\n", "has_extents=1\n", "ramdisk_block=4096\n"]
        {
            assert!(dump.contains(line), "{line}: {dump}");
        }
    }
}

#[test]
fn a_plugin_in_cpp() {
    let dir = temp();
    let plugin = module(dir.path(), "ramdisk.cpp");
    for program in [C_NBDKIT, NBDKIT] {
        serve(program, &[&plugin, "2M"], DISK);
        let refused = run([program, &plugin, "colour=red"]);
        assert!(refused.stderr.contains("unknown parameter 'colour'"), "{}", refused.stderr);
    }
}

/// A filter goes by the version in the headers: ours loads it, with the layout of that version.
#[test]
fn a_filter() {
    let dir = temp();
    let filter = format!("--filter={}", module(dir.path(), "invert.c"));
    let plugin = module(dir.path(), "ramdisk_v1.c");
    for words in [&[&filter, "memory", "2M"][..], &[&filter, &plugin, "2M"]] {
        let script = "
assert h.pread(512, 0) == b'\\xff' * 512
h.pwrite(bytes(range(256)), 100)
assert h.pread(256, 100) == bytes(range(256))
h.zero(100, 100)
assert h.pread(256, 100) == bytes(100) + bytes(range(100, 256))
";
        serve(NBDKIT, words, script);
    }
    // Twice is not at all, and so is off. Below it is what it should be.
    serve(NBDKIT, &[&filter, &filter, "memory", "2M"], DISK);
    serve(NBDKIT, &[&filter, &plugin, "2M", "invert=off"], DISK);
    let image = crate::util::image(dir.path(), "image", 1 << 20);
    serve(NBDKIT, &[&filter, "file", image.to_str().expect("UTF-8")], "h.pwrite(b'\\x0f' * 512, 512)");
    assert_eq!(fs::read(&image).expect("read")[512..1024], [0xf0; 512]);
    let dump = run_ok([NBDKIT, "--dump-plugin", &filter, "memory"]);
    assert!(dump.contains("invert_is_on=1\n"), "{dump}");
    let refused = run([C_NBDKIT, &filter, "null"]);
    assert_eq!(refused.code, 1, "a filter of another layout");
    assert!(refused.stderr.contains("1.46.0"), "{}", refused.stderr);
}

/// All of them behind the other front end.
#[test]
fn as_mounts() {
    let dir = temp();
    let filter = format!("--filter={}", module(dir.path(), "invert.c"));
    for name in ["ramdisk_v1.c", "ramdisk_v2.c", "ramdisk.cpp"] {
        let plugin = module(dir.path(), name);
        for words in [&[&plugin[..], "2M"][..], &[&filter, &filter, &plugin, "2M"]] {
            let mut mount = Mount::start(words);
            let file = mount.file();
            sh(&format!(
                "test $(stat -c %s {0}) = 2097152
                 head -c 300000 /dev/urandom > {1}/data
                 dd if={1}/data of={0} bs=4k seek=100 oflag=seek_bytes conv=notrunc,fsync status=none
                 cmp -n 300000 -i 0:100 {1}/data {0}
                 dd if={0} of={1}/copy bs=4k iflag=direct status=none
                 cmp -n 300000 -i 0:100 {1}/data {1}/copy",
                file.display(),
                dir.path().display()
            ));
            assert_eq!(mount.unmount(), 0);
        }
    }
}

/// Lines of layout.c, compiled for a version of the interface.
fn layout(dir: &Path, version: u32, flags: &[&str]) -> Vec<(String, String)> {
    let out = dir.join("layout");
    let version = format!("-DNBDKIT_API_VERSION={version}");
    compile("layout.c", &out, flags.iter().copied().chain([&version[..]]));
    let lines = run_ok([&out]);
    lines
        .lines()
        .map(|line| {
            line.rsplit_once(' ').map(|(name, value)| (name.into(), value.into())).expect("two words")
        })
        .collect()
}

/// Binaries compiled for the distribution's nbdkit and for ours agree about every field and every constant; filters
/// but for the field that came with 1.36, which their version tells.
#[test]
fn layout_is_the_distributions() {
    let dir = temp();
    let ours = format!("-I{}", include().display());
    for version in [1, 2] {
        let theirs = layout(dir.path(), version, &[]);
        let ours = layout(dir.path(), version, &[&ours]);
        assert!(theirs.len() > 100);
        let mut is_late = false;
        for ((name, theirs), (same, ours)) in theirs.iter().zip(&ours) {
            assert_eq!(name, same);
            is_late |= name == "nbdkit_filter.get_ready";
            let want = match (name.as_str(), theirs.split_once('+')) {
                ("sizeof struct nbdkit_filter", _) => {
                    (theirs.parse::<u64>().expect("a size") + 8).to_string()
                }
                (_, Some((offset, size))) if is_late => {
                    format!("{}+{size}", offset.parse::<u64>().expect("an offset") + 8)
                }
                _ => theirs.clone(),
            };
            assert_eq!(*ours, want, "{name}, version {version}");
        }
        assert_eq!(theirs.len(), ours.len());
    }
}

/// The functions that headers declare.
fn declared(folder: &Path) -> BTreeSet<String> {
    let script = format!(
        "printf '#include <nbdkit-plugin.h>\\n#include <nbdkit-filter.h>\\n' |
         gcc -E -P -I{} - | tr '\\n' ' ' | grep -oE 'extern [^;(]*nbdkit_[a-z0-9_]+ *\\(' |
         grep -oE 'nbdkit_[a-z0-9_]+ *\\($' | tr -d ' ('",
        folder.display()
    );
    sh(&script).lines().map(String::from).collect()
}

/// What is declared is there, in both programs, and nothing that the distribution declares is missing.
#[test]
fn every_function_exists() {
    let ours = declared(&include());
    let theirs = declared(Path::new("/usr/include"));
    assert!(theirs.len() > 40, "{theirs:?}");
    let missing: Vec<_> = theirs.difference(&ours).collect();
    assert!(missing.is_empty(), "not declared: {missing:?}");
    for program in [NBDKIT, NBDKIT_MOUNT] {
        let exported = run_ok(["nm", "-D", "--defined-only", program]);
        let exported: BTreeSet<&str> =
            exported.lines().filter_map(|line| line.split_ascii_whitespace().nth(2)).collect();
        let missing: Vec<_> = ours.iter().filter(|name| !exported.contains(name.as_str())).collect();
        assert!(missing.is_empty(), "not in {program}: {missing:?}");
        let more: Vec<_> =
            exported.iter().filter(|name| name.starts_with("nbdkit_") && !ours.contains(**name)).collect();
        assert!(more.is_empty(), "exported but not declared: {more:?}");
    }
}

/// Each header is complete in itself, in C and in C++, and says what is wrong with a wrong version.
#[test]
fn headers_stand_alone() {
    let dir = temp();
    let include = include();
    let (dir, include) = (dir.path().display(), include.display());
    for header in ["nbdkit-plugin.h", "nbdkit-filter.h", "nbdkit-version.h"] {
        sh(&format!(
            "printf '#include <{header}>\\nextern int x;\\n' > {dir}/x.c; cp {dir}/x.c {dir}/x.cpp
             gcc -std=c99 -Wall -Wextra -pedantic -Werror -I{include} -c {dir}/x.c -o {dir}/x.o
             g++ -std=c++11 -Wall -Wextra -pedantic -Werror -I{include} -c {dir}/x.cpp -o {dir}/x.o"
        ));
    }
    let failure = |text: &str| {
        let script = format!("printf '{text}' | gcc -I{include} -xc -c - -o {dir}/x.o");
        let run = run(["bash", "-c", &script]);
        assert_ne!(run.code, 0);
        run.stderr
    };
    let wrong = failure("#define NBDKIT_API_VERSION 3\\n#include <nbdkit-plugin.h>\\n");
    assert!(wrong.contains("NBDKIT_API_VERSION must be 1 or 2"), "{wrong}");
    let alone = failure("#include <nbdkit-common.h>\\n");
    assert!(alone.contains("include <nbdkit-plugin.h>"), "{alone}");
    let unfit = failure(
        "#include <nbdkit-plugin.h>\\n#pragma GCC diagnostic error \"-Wformat\"\\n\
         void f (void) {{ nbdkit_error (\"%%s\", 1); }}\\n",
    );
    assert!(unfit.contains("expects argument of type"), "{unfit}");
}

#[test]
fn the_version_is_the_products() {
    let text = fs::read_to_string(include().join("nbdkit-version.h")).expect("the header");
    let value = |name: &str| {
        let line = format!("#define NBDKIT_VERSION_{name} ");
        text.lines().find_map(|l| l.strip_prefix(&line)).expect("a definition").to_owned()
    };
    assert_eq!(value("STRING"), concat!('"', env!("CARGO_PKG_VERSION"), '"'));
    assert_eq!(value("MAJOR"), env!("CARGO_PKG_VERSION_MAJOR"));
    assert_eq!(value("MINOR"), env!("CARGO_PKG_VERSION_MINOR"));
    assert_eq!(value("MICRO"), env!("CARGO_PKG_VERSION_PATCH"));
}
