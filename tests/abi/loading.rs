//! Plugins and filters from shared libraries, through both front ends. Those of the distribution are the measure.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use super::distribution::{directory, filter, plugin};
use crate::util::{Mount, NBDKIT, NBDKIT_MOUNT, Server, image, nbdsh, patterned, run, run_ok, sh, temp};

#[test]
fn both_doors_serve_a_c_plugin_under_c_and_rust_filters() {
    let dir = temp();
    let disk = patterned(dir.path(), "disk", 3 << 20);
    let mut words = vec![filter("offset"), "--filter=cow".into()];
    words.extend([filter("swab"), filter("swab"), plugin("file"), disk.display().to_string()]);
    words.extend(["offset=1M".to_owned(), "range=1M".into(), "swab-bits=16".into()]);
    let want = &fs::read(&disk).unwrap()[1 << 20..2 << 20];

    let server = Server::start(&words);
    let copy = server.dir().join("copy");
    run_ok(["nbdcopy", &server.uri(), copy.to_str().unwrap()]);
    assert!(fs::read(&copy).unwrap() == want);
    let script = "h.pwrite(b'x' * 4096, 8192, nbd.CMD_FLAG_FUA)\nassert h.pread(4096, 8192) == b'x' * 4096";
    nbdsh(&server.uri(), script);

    let mut mount = Mount::start(&words);
    assert!(fs::read(mount.file()).unwrap() == want);
    fs::write(mount.file(), want).unwrap();
    assert_eq!(mount.unmount(), 0);
    assert!(fs::read(&disk).unwrap()[1 << 20..2 << 20] == *want, "cow kept the writes away from the disk");
}

#[test]
fn names_are_looked_for_in_directories() {
    let dir = temp();
    let name = dir.path().join("nbdkit-mine-plugin.so");
    fs::copy(plugin("memory"), &name).unwrap();
    fs::copy(directory("filter").join("nbdkit-offset-filter.so"), dir.path().join("nbdkit-moved-filter.so"))
        .unwrap();
    let here = dir.path().display();
    let dump = sh(&format!(
        "NBDKIT_PLUGINDIR={here} NBDKIT_FILTERDIR={here} {NBDKIT} --filter=moved mine --dump-plugin"
    ));
    assert!(dump.contains(&format!("path={}\n", name.display())), "{dump}");
    assert!(dump.contains(&format!("offset_path={here}/nbdkit-moved-filter.so\n")), "{dump}");
    // A bundled one has precedence; a path forces the file.
    let bundled = run_ok([NBDKIT, "memory", "--dump-plugin"]);
    let size =
        |dump: &str| dump.lines().find_map(|line| line.strip_prefix("struct_size=")?.parse::<u32>().ok());
    let library = run_ok([NBDKIT, &plugin("memory"), "--dump-plugin"]);
    // That of today's interface, and that of the distribution's.
    assert!(size(&bundled) >= size(&library) && size(&library) > Some(0), "{bundled}");
    assert!(library.contains(&format!("path={}\n", plugin("memory"))), "{library}");
}

/// Writes an executable script for the Python plugin.
fn script(path: &Path, first_line: &str) {
    let body = "def open(readonly):\n    return 1\n\
                def get_size(h):\n    return 65536\n\
                def pread(h, count, offset):\n    return b'z' * count\n";
    fs::write(path, format!("{first_line}\n{body}")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn a_script_is_a_plugin() {
    let dir = temp();
    let path = dir.path().join("nbdkit-zzz-plugin");
    script(&path, &format!("#!/any/where/nbdkit {}", plugin("python")));
    let serve = format!("{NBDKIT} -U - {} --run 'nbdcopy \"$uri\" - | head -c 3'", path.display());
    assert_eq!(sh(&serve), "zzz");
    let by_name = serve.replace(path.to_str().unwrap(), "zzz");
    assert_eq!(sh(&format!("NBDKIT_PLUGINDIR={} {by_name}", dir.path().display())), "zzz");

    script(&path, "#!/bin/bash");
    let refused = run([NBDKIT, path.to_str().unwrap()]);
    assert!(refused.refused().contains("must be #!/usr/sbin/nbdkit PLUGIN"));
}

#[test]
fn what_does_not_load_is_one_line() {
    let dir = temp();
    let disk = image(dir.path(), "disk", 512);
    let disk = disk.to_str().unwrap();
    for program in [NBDKIT, NBDKIT_MOUNT] {
        for (words, reason) in [
            (vec!["./none.so".to_owned()], "none.so: the file does not exist"),
            (vec![disk.to_owned()], "is a file and not a plugin"),
            (vec![format!("--filter={disk}"), "null".into()], "is a file and not a filter"),
            (vec![filter("cow").replace("--filter=", "")], "does not define plugin_init"),
            (vec![format!("--filter={}", plugin("file")), "null".into()], "does not define filter_init"),
            (vec![plugin("memory")], "you must specify size"),
            (vec![plugin("memory"), "1M".into(), "x=1".into()], "unknown parameter 'x'"),
            (vec![plugin("example1"), "x=1".into()], "'x'"),
        ] {
            let mountpoint = dir.path().display().to_string();
            let mut all = vec![program.to_owned()];
            all.extend(words.clone());
            if program == NBDKIT_MOUNT {
                all.push(mountpoint);
            }
            let said = run(&all).refused();
            assert!(said.contains(reason), "{words:?}: {said}");
        }
    }
}

#[test]
fn debug_flags() {
    let retry = plugin("memory");
    let warnings = |flag: &str| run([NBDKIT, "-D", flag, &retry, "--version"]).stderr;
    assert!(
        warnings("memory.x=1").contains(
            "warning: -D memory.x: memory does not contain a global variable called memory_debug_x"
        )
    );
    assert!(warnings("none.x=1").contains("warning: debug flag -D none.x was not used"));
    let bad = run([NBDKIT, "-D", "x", "null", "--version"]);
    assert!(bad.refused().contains("must have the format"));
    // The curl plugin has this one.
    let good = run([NBDKIT, "-D", "curl.verbose=1", &plugin("curl"), "--version"]);
    assert_eq!((good.code, &*good.stderr), (0, ""));
    let loud = |flags: &[&str]| {
        let words = [&[NBDKIT, "-v"], flags, &["-U", "-", "null", "1M", "--run", "nbdinfo --size \"$uri\""]];
        run(words.concat()).stderr
    };
    assert!(loud(&[]).contains("null: open"));
    let quiet = loud(&["-D", "nbdkit.backend.controlpath=0"]);
    assert!(!quiet.contains("null: open") && quiet.contains("debug:"), "{quiet}");
}

#[test]
fn the_retry_filter_opens_the_layers_anew() {
    let dir = temp();
    let (disk, marker) = (patterned(dir.path(), "disk", 1 << 20), dir.path().join("marker"));
    let pread = format!(
        "pread=if [ -f {m} ]; then dd if={d} skip=$4 count=$3 iflag=count_bytes,skip_bytes status=none; \
         else touch {m}; echo EIO not yet >&2; exit 1; fi",
        m = marker.display(),
        d = disk.display()
    );
    let get_size = format!("get_size=stat -c %s {}", disk.display());
    let server = Server::start([&filter("retry"), &plugin("eval"), "retry-delay=1", &get_size, &pread]);
    let copy = server.dir().join("copy");
    run_ok(["nbdcopy", &server.uri(), copy.to_str().unwrap()]);
    assert!(fs::read(copy).unwrap() == fs::read(disk).unwrap());
    assert!(server.stderr().contains("not yet"), "{}", server.stderr());
}

#[test]
fn a_filter_may_refuse_a_client_by_its_address() {
    let server = Server::start([&filter("ip"), &plugin("null"), "size=1M", "deny=all"]);
    assert_ne!(run(["nbdinfo", &server.uri()]).code, 0);
    let uid = format!("allow=uid:{}", rustix::process::getuid().as_raw());
    let server = Server::start([&filter("ip"), &plugin("null"), "size=1M", &uid, "deny=all"]);
    assert_eq!(run_ok(["nbdinfo", "--size", &server.uri()]), "1048576\n");
}

#[test]
fn the_exitlast_filter_stops_the_server() {
    let mut server = Server::start([&filter("exitlast"), &plugin("null"), "size=1M"]);
    run_ok(["nbdinfo", "--size", &server.uri()]);
    assert_eq!(server.wait(), 0);
}

/// Compiles one of the loader's test plugins.
fn compiled(name: &str, dir: &Path) -> String {
    let source = format!("{}/src/loader/tests/{name}.c", env!("CARGO_MANIFEST_DIR"));
    let library = dir.join(format!("{name}.so")).display().to_string();
    run_ok(["gcc", "-shared", "-fPIC", "-g", "-o", &library, &source]);
    library
}

#[test]
fn a_plugin_that_exits_is_heard() {
    let dir = temp();
    let plugin = compiled("plugin", dir.path());
    for program in [NBDKIT, NBDKIT_MOUNT] {
        let mountpoint = dir.path().to_str().unwrap();
        let words = [program, &plugin, "wrong=exit", mountpoint];
        let ended = run(&words[..if program == NBDKIT { 3 } else { 4 }]);
        assert_eq!(ended.code, 7, "{}", ended.stderr);
        assert!(ended.stderr.ends_with("error: the last words\n"), "{}", ended.stderr);
    }
}

#[test]
fn a_plugin_may_end_the_connection_or_sleep_until_it_ends() {
    let dir = temp();
    let mut server = Server::start([compiled("interface", dir.path())]);
    let uri = server.uri_of("name");
    // After the reply, before it, and while another request sleeps.
    let script = "
def gone(offset):
    try:
        h.pread(512, offset)
    except nbd.Error:
        return
    assert False, 'the connection is still there'
";
    nbdsh(&uri, &format!("{script}\nh.pread(512, 1536)\ngone(4096)"));
    nbdsh(&uri, &format!("{script}\ngone(2048)\ngone(4096)"));
    let sleeper =
        "h.aio_pread(nbd.Buffer(512), 512)\nwhile h.aio_in_flight() and h.poll(0): pass\nh.pread(512, 4096)";
    nbdsh(&uri, sleeper);
    let sleeping = "h.aio_pread(nbd.Buffer(512), 512)\nh.pread(512, 1024)";
    nbdsh(&uri, sleeping);
    assert_eq!(server.wait(), 0, "the plugin asked for it");
}
