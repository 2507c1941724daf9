//! Plugins in OCaml, compiled by the command line of the manual, through both front ends and in the C nbdkit.

mod examples;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use crate::util::{Mount, NBDKIT, Server, is_left_out, nbdsh, patterned, run, run_ok, sh, temp};

/// The programs that run them; the second is the distribution's.
const SERVERS: [&str; 2] = [NBDKIT, "nbdkit"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The folder with what plugins are compiled with, or None where it was declared that there is no OCaml.
fn sdk() -> Option<&'static Path> {
    if is_left_out("ocaml") {
        return None;
    }
    static SDK: OnceLock<tempfile::TempDir> = OnceLock::new();
    let built = SDK.get_or_init(|| {
        let dir = temp();
        let output =
            Command::new(root().join("scripts/ocaml")).arg(dir.path()).output().expect("run the script");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        eprint!("{said}");
        assert!(dir.path().join("libnbdkitocaml.a").exists(), "{said}");
        dir
    });
    Some(built.path())
}

/// Compiles a plugin of this folder as the manual says, in a folder of its own, with libraries of OCaml's before it.
#[track_caller]
fn compiled(dir: &Path, sdk: &Path, name: &str, libraries: &str) -> String {
    let text = fs::read_to_string(root().join(format!("tests/ocaml/{name}.ml"))).expect("the source");
    compiled_text(dir, sdk, name, &text, libraries)
}

#[track_caller]
fn compiled_text(dir: &Path, sdk: &Path, name: &str, text: &str, libraries: &str) -> String {
    fs::write(dir.join(format!("{name}.ml")), text).expect("write a file");
    sh(&format!(
        "cd {}; cp {sdk}/* .
         LIBRARY_PATH={sdk} \
         ocamlopt.opt {libraries} -output-obj -runtime-variant _pic \
            -o nbdkit-{name}-plugin.so \
            NBDKit.cmx {name}.ml \
            -cclib -lnbdkitocaml",
        dir.display(),
        sdk = sdk.display()
    ));
    dir.join(format!("nbdkit-{name}-plugin.so")).into_os_string().into_string().expect("UTF-8")
}

const THREADS: &str = "-I +threads -I +unix unix.cmxa threads.cmxa";

/// Without the library threads, and with it.
const KINDS: [&str; 2] = ["", THREADS];

/// Runs a Python script with `h` connected to a captive server's default export. It must succeed.
#[track_caller]
fn serve(program: &str, words: &[&str], python: &str) -> String {
    let dir = temp();
    let path = dir.path().join("script.py");
    fs::write(&path, python).expect("write a file");
    let command = format!("nbdsh --base-allocation -u \"$uri\" -c - < {}", path.display());
    let mut all = vec![program, "-U", "-"];
    all.extend(words);
    all.extend(["--run", &command]);
    run_ok(all)
}

/// The page's plugin by its path, by its name, and mounted.
#[test]
fn the_plugin_of_the_page() {
    let Some(sdk) = sdk() else { return };
    let dir = temp();
    let plugin = compiled(dir.path(), sdk, "myplugin", "");
    let python = "
assert h.get_size() == 1048576 and not h.is_read_only() and not h.can_flush() and not h.can_multi_conn()
h.pwrite(bytes(range(256)) * 20, 1000)
assert h.pread(5120, 1000) == bytes(range(256)) * 20
h.zero(100, 1000)
assert h.pread(101, 1000) == bytes(100) + b'd'
try:
    h.pread(512, 666 * 512)
    raise SystemExit('did not fail')
except nbd.Error as error:
    assert error.errno == 'EIO', error
";
    for program in SERVERS {
        serve(program, &[&plugin], python);
        let dump = run_ok([program, &plugin, "--dump-plugin"]);
        for line in [
            "name=myplugin\n",
            "version=1.0\n",
            "max_thread_model=parallel\n",
            "thread_model=serialize_connections\n",
        ] {
            assert!(dump.contains(line), "{line}: {dump}");
        }
        let here =
            sh(&format!("cd {}; {program} ./nbdkit-myplugin-plugin.so --dump-plugin", dir.path().display()));
        assert_eq!(here, dump);
    }
    let by_name = sh(&format!("NBDKIT_PLUGINDIR={} {NBDKIT} myplugin --dump-plugin", dir.path().display()));
    assert!(by_name.contains("name=myplugin\n"), "{by_name}");

    let mut mount = Mount::start([&plugin]);
    sh(&format!("mkfs.ext2 -q {0}; e2fsck -fn {0}", mount.file().display()));
    assert_eq!(mount.unmount(), 0);
}

/// Every callback and every function, in both servers, with and without the library threads.
#[test]
fn every_callback() {
    let Some(sdk) = sdk() else { return };
    for libraries in KINDS {
        let dir = temp();
        let plugin = compiled(dir.path(), sdk, "everything", libraries);
        for program in SERVERS {
            let log = dir.path().join("log");
            let _ = fs::remove_file(&log);
            let log_is = log.to_str().expect("UTF-8");
            let python = "
assert h.get_size() == 1048576
assert [h.get_block_size(k) for k in range(3)] == [512, 4096, 0xffffffff]
assert h.can_fua() and h.can_cache() and h.can_multi_conn() and h.can_fast_zero() and not h.is_rotational()
assert h.pread(1024, 512) == b'r' * 1024
h.pwrite(b'x' * 512, 512, nbd.CMD_FLAG_FUA)
h.pwrite(b'x' * 1024, 0)
h.trim(4096, 8192, nbd.CMD_FLAG_FUA)
h.zero(512, 0)
h.zero(512, 512, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
h.zero(512, 1024, nbd.CMD_FLAG_FAST_ZERO)
h.cache(4096, 0)
h.flush()
seen = []
h.block_status(h.get_size(), 0, lambda context, at, entries, error: seen.extend(entries))
assert seen == [4096, 0, 8192, 3, 4096, 2, h.get_size() - 16384, 0], seen
h.block_status(512, 8192, lambda context, at, entries, error: 0, nbd.CMD_FLAG_REQ_ONE)
";
            serve(program, &[&plugin, log_is], python);
            let said = fs::read_to_string(&log).expect("the log");
            for line in [
                "get_ready",
                "after_fork",
                "preconnect false",
                "open false plain false",
                "pwrite 512 512 fua",
                "pwrite 1024 0 ",
                "trim 4096 8192 fua",
                "zero 512 0 may_trim",
                "zero 512 512 fua",
                "zero 512 1024 may_trim,fast_zero",
                "cache 4096 0",
                "flush ",
                "extents 512 8192 req_one",
                "close plain",
                "cleanup",
                "unload",
            ] {
                assert!(said.lines().any(|l| l == line), "{program}: {line}: {said}");
            }
            assert_eq!(said.contains("too old"), program != NBDKIT, "{said}");
            let order = ["get_ready", "after_fork", "preconnect", "open", "close", "cleanup", "unload"];
            let places: Vec<_> = order.iter().map(|word| said.find(word)).collect();
            assert!(places.is_sorted(), "{said}");

            let with = |command: &str| {
                run(["timeout", "60", program, "-U", "-", "-v", &plugin, log_is, "--run", command])
            };
            let list = with("nbdinfo --list \"$uri\"");
            assert!(list.stderr.contains("debug: hello from OCaml and 42"), "{}", list.stderr);
            let list = list.ok();
            for text in
                ["export=\"plain\"", "export=\"described\"", "description: with words", "is_rotational: true"]
            {
                assert!(list.contains(text), "{text}: {list}");
            }
            let of = |export: &str, python: &str| {
                let connect = format!(
                    "nbdsh -c 'h.set_export_name(\"{export}\")' -c 'h.connect_unix(\"'$unixsocket'\")'"
                );
                with(&format!("{connect} -c '{python}'"))
            };
            of("readonly", "assert h.is_read_only()").ok();
            let refused = of("forbidden", "pass");
            assert_ne!(refused.code, 0);
            assert!(refused.stderr.contains("error: open: not for you"), "{}", refused.stderr);

            serve(program, &[&plugin, log_is, "zero=EOPNOTSUPP"], "h.zero(1024, 4096)");
            assert!(fs::read_to_string(&log).expect("the log").contains("pwrite 1024 4096 "));
            let python = "
try:
    h.zero(1024, 4096)
    raise SystemExit('did not fail')
except nbd.Error as error:
    assert error.errno == 'ENOSPC', error";
            serve(program, &[&plugin, log_is, "zero=ENOSPC"], python);

            let dump = run_ok([program, &plugin, log_is, "--dump-plugin"]);
            for line in [
                "magic_config_key=log\n",
                "version=1.2\n",
                "thread_model=serialize_requests\n",
                "\neverything_ocaml=yes\n",
            ] {
                assert!(dump.contains(line), "{line}: {dump}");
            }
            let help = run_ok([program, &plugin, "--help"]);
            assert!(help.contains("all there is") && help.contains("log=FILE"), "{help}");
            let refused = run([program, &plugin]);
            assert_eq!(refused.code, 1);
            assert!(refused.stderr.contains("config_complete: log= is missing"), "{}", refused.stderr);
            let refused = run([program, &plugin, "colour=red"]);
            assert!(refused.stderr.contains("config: unknown parameter colour"), "{}", refused.stderr);
        }
    }
}

/// Each exception is one message, and the errno of set_error if it was called.
#[test]
fn exceptions() {
    let Some(sdk) = sdk() else { return };
    let dir = temp();
    let plugin = compiled(dir.path(), sdk, "faults", "");
    for program in SERVERS {
        let errors = dir.path().join("errors");
        let script = dir.path().join("script.py");
        let python = "
def read(n):
    try:
        return h.pread(512, n * 512)[:1].decode()
    except nbd.Error as error:
        return error.errno
print(' '.join(read(n) for n in range(14)))
h.pread(512, 0)
assert h.pread(512, 14 * 512) == bytes(512), 'what the buffer held before'
";
        fs::write(&script, python).expect("write a file");
        let out = sh(&format!(
            "{program} -U - {plugin} --run 'nbdsh -u \"$uri\" -c - < {}' 2>{}",
            script.display(),
            errors.display()
        ));
        assert_eq!(out.trim(), "a EIO EIO EIO EIO ENOSPC ESHUTDOWN a EIO EIO a EIO a EIO", "{program}");
        let said = fs::read_to_string(&errors).expect("messages");
        for message in [
            "error: pread: plain\n",
            "error: pread: Not_found\n",
            "error: pread: mine: 5 words\n",
            "error: pread: index out of bounds\n",
            "error: pread: no room\n",
            "error: pread: over\n",
            "error: pread: File \"faults.ml\", line",
            "error: pread: returned 5 bytes where 512 were asked for\n",
            "error: pread: NBDKit.parse_size\n",
        ] {
            assert!(said.contains(message), "{program}: {message}: {said}");
        }
        for (wrong, message) in [
            ("open", "open: not today"),
            ("size", "get_size: the size is negative: -1"),
            ("block", "block_size: the maximum must be from 0 to 2^32-1, not -1"),
            ("thread_model", "thread_model: no model"),
        ] {
            let wrong = format!("wrong={wrong}");
            let refused = run([program, "-U", "-", &plugin, &wrong, "--run", "nbdinfo --size \"$uri\""]);
            assert_ne!(refused.code, 0, "{wrong}");
            assert!(refused.stderr.contains(message), "{message}: {}", refused.stderr);
        }
        let refused = run(["env", "TWICE=1", program, &plugin]);
        assert_eq!(refused.code, 1, "{}", refused.stderr);
        assert!(refused.stderr.contains("NBDKit.register_plugin was called twice"), "{}", refused.stderr);
    }
}

/// A library that does not register, or lacks something, is refused with the reason.
#[test]
fn what_is_no_plugin() {
    let Some(sdk) = sdk() else { return };
    for (text, message) in [
        ("let () = print_string \"\"", "has not called NBDKit.register_plugin"),
        ("let () = failwith \"at the top\"", "at the top"),
        (
            "let () = NBDKit.register_plugin { NBDKit.default_callbacks with name = \"x\" }",
            "NBDKit.register_plugin: open_connection is required",
        ),
    ] {
        let dir = temp();
        // NBDKit must be linked for plugin_init to be there.
        let text = format!("let _ = NBDKit.version\n{text}\n");
        fs::write(dir.path().join("x.ml"), text).expect("write a file");
        sh(&format!(
            "cd {}; cp {sdk}/* .; LIBRARY_PATH=. ocamlopt.opt -output-obj -runtime-variant _pic -o nbdkit-x-plugin.so \
             NBDKit.cmx x.ml -cclib -lnbdkitocaml",
            dir.path().display(),
            sdk = sdk.display()
        ));
        let plugin = dir.path().join("nbdkit-x-plugin.so").display().to_string();
        for program in SERVERS {
            let refused = run([program, &plugin]);
            assert_eq!(refused.code, 1, "{}", refused.stderr);
            assert!(refused.stderr.contains(message), "{message}: {}", refused.stderr);
        }
    }
}

/// Sixteen threads, four connections, and a collector that never rests.
#[test]
fn the_collector_under_stress() {
    let Some(sdk) = sdk() else { return };
    for libraries in KINDS {
        let dir = temp();
        let plugin = compiled(dir.path(), sdk, "stress", libraries);
        let server = Server::start(["-t", "16", &plugin]);
        let image = patterned(dir.path(), "image", 2 << 20);
        let copy = dir.path().join("copy");
        for _ in 0..3 {
            let words = ["--connections=4", "--requests=16", "--request-size=8192"];
            run_ok(["nbdcopy"].iter().chain(&words).chain(&[image.to_str().expect("UTF-8"), &server.uri()]));
            run_ok(["nbdcopy"].iter().chain(&words).chain(&[&*server.uri(), copy.to_str().expect("UTF-8")]));
            assert!(fs::read(&image).expect("read") == fs::read(&copy).expect("read"));
            nbdsh(&server.uri(), "h.zero(65536, 0); h.flush()");
            run_ok(["nbdinfo", "--map", &server.uri()]);
            run_ok(["nbdinfo", "--list", &server.uri()]);
        }
    }
}

/// The same, watched by valgrind, in the C nbdkit: its errors are the plugin's.
#[test]
fn valgrind_finds_nothing() {
    let Some(sdk) = sdk() else { return };
    for libraries in KINDS {
        let dir = temp();
        let plugin = compiled(dir.path(), sdk, "stress", libraries);
        let image = patterned(dir.path(), "image", 512 << 10);
        let command = format!(
            "nbdcopy --connections=4 --requests=16 --request-size=8192 {0} \"$uri\" &&
             nbdcopy --connections=4 --requests=16 --request-size=8192 \"$uri\" {1} && cmp -n 524288 {0} {1} &&
             nbdinfo --map \"$uri\" && nbdsh -u \"$uri\" -c 'h.zero(4096, 0)'",
            image.display(),
            dir.path().join("copy").display()
        );
        let log = dir.path().join("valgrind.%p");
        let valgrind = format!("--log-file={}", log.display());
        let server = ["valgrind", "--quiet", &valgrind, "nbdkit", "-U", "-", "-t", "16", &plugin];
        run_ok(server.iter().chain(&["--run", &command]));
        let files = fs::read_dir(dir.path()).expect("a folder").map(|entry| entry.expect("an entry").path());
        let logs = files.filter(|path| path.to_string_lossy().contains("valgrind."));
        let logs: Vec<_> = logs.map(|path| fs::read_to_string(path).expect("a log")).collect();
        assert!(!logs.is_empty() && logs.iter().all(String::is_empty), "{logs:?}");
    }
}

/// Linked with threads, callbacks run while another sleeps, OCaml's own threads run, and both survive the fork into the
/// background.
#[test]
fn threads_overlap() {
    let Some(sdk) = sdk() else { return };
    let dir = temp();
    let plugin = compiled(dir.path(), sdk, "threads", THREADS);
    let two_at_once = "
buffers = [nbd.Buffer(512), nbd.Buffer(512)]
cookies = [h.aio_pread(buffers[0], 0), h.aio_pread(buffers[1], 512)]
while not all([h.aio_command_completed(c) for c in cookies if c is not None] if h.aio_in_flight() == 0 else [False]):
    h.poll(-1)
assert buffers[0].to_bytearray()[:1] == b'2', buffers[0].to_bytearray()[:1]
";
    for program in SERVERS {
        serve(program, &[&plugin], two_at_once);
        // In the background: the server forks with the runtime in it.
        let (socket, pidfile) = (dir.path().join("sock"), dir.path().join("pid"));
        run_ok([
            program,
            "-U",
            socket.to_str().expect("UTF-8"),
            "-P",
            pidfile.to_str().expect("UTF-8"),
            &plugin,
        ]);
        let uri = format!("nbd+unix://?socket={}", socket.display());
        let served = std::panic::catch_unwind(|| nbdsh(&uri, two_at_once));
        let pid = fs::read_to_string(&pidfile).expect("the pidfile");
        sh(&format!("kill {0}; tail --pid={0} -f /dev/null; rm -f {1}", pid.trim(), socket.display()));
        assert!(served.is_ok());
    }
}

/// What `make install` puts in place compiles plugins where it is.
#[test]
fn it_is_installed() {
    let Some(sdk) = sdk() else { return };
    let dir = temp();
    let binaries = Path::new(NBDKIT).parent().expect("a folder").display();
    let (here, root) = (dir.path().display(), root().display());
    sh(&format!(
        "mkdir {here}/built; cp -r {0} {here}/built/ocaml; ln -s {binaries}/nbdkit {binaries}/nbdkit-mount {here}/built
         NBDKIT_BINARIES={here}/built {root}/scripts/install {here}/usr
         cd {here}/usr/lib/nbdkit/plugins
         cp {root}/tests/ocaml/myplugin.ml .
         ocamlopt.opt -output-obj -runtime-variant _pic -I {here}/usr/lib/ocaml -ccopt -L{here}/usr/lib \
            -o nbdkit-myplugin-plugin.so NBDKit.cmx myplugin.ml -cclib -lnbdkitocaml
         {here}/usr/bin/nbdkit -U - myplugin --run 'nbdinfo --size $uri' | grep 1048576",
        sdk.display()
    ));
}

/// The page's example is a disk.
#[test]
fn the_example_of_the_manual() {
    let Some(sdk) = sdk() else { return };
    let dir = temp();
    let page = fs::read_to_string(root().join("man/nbdkit-ocaml-plugin.3.scd")).expect("the page");
    let example = page.split("```").find(|text| text.contains("let pwrite")).expect("the example");
    let plugin = compiled_text(dir.path(), sdk, "ramdisk", &example.replace("\\\\", "\\"), "");
    let python = "
h.pwrite(b'x' * 8192, 4096)
assert h.pread(16384, 0) == bytes(4096) + b'x' * 8192 + bytes(4096)
h.zero(4096, 8192)
assert h.pread(4096, 8192) == bytes(4096)
assert h.get_size() == 2 << 20";
    for program in SERVERS {
        serve(program, &[&plugin, "2M"], python);
        let refused = run([program, &plugin, "many"]);
        assert!(refused.stderr.contains("many"), "{}", refused.stderr);
    }
}

/// The C part's table of errors has the constructors of Unix.error in their order.
#[test]
fn errors_are_those_of_unix() {
    if sdk().is_none() {
        return;
    }
    let folder = PathBuf::from(run_ok(["ocamlopt.opt", "-where"]).trim());
    let interface = [folder.join("unix/unix.mli"), folder.join("unix.mli")];
    let interface = interface.iter().find_map(|path| fs::read_to_string(path).ok()).expect("unix.mli");
    let constructors: Vec<&str> = interface
        .split("type error =")
        .nth(1)
        .expect("the type")
        .lines()
        .take_while(|line| !line.contains("EUNKNOWNERR"))
        .flat_map(|line| line.split([' ', '|', '(']).filter(|word| word.starts_with('E')).take(1))
        .collect();
    let source = fs::read_to_string(root().join("plugins/ocaml/functions.c")).expect("the source");
    let table =
        source.split("unix_errors[] = {").nth(1).and_then(|rest| rest.split("};").next()).expect("the table");
    let table: Vec<&str> = table.split([',', '\n', ' ']).filter(|word| !word.is_empty()).collect();
    assert!(constructors.len() > 60);
    assert_eq!(table, constructors);
}

/// What current sources of others write: labels, and copies from and to buffers.
#[test]
fn plugins_with_labels() {
    let Some(sdk) = sdk() else { return };
    let dir = temp();
    let plugin = compiled(dir.path(), sdk, "labelled", "");
    let wrong =
        "blit_string_to_buf NBDKit.blit_bytes_to_buf NBDKit.blit_buf_to_bytes NBDKit.blit_buf_to_bytes";
    let python = format!(
        "assert h.get_size() == 1048576
text = bytes(h.pread(1000, 0)).rstrip(b'\\0').decode().split('\\n')
assert text[1:] == ['12d-'] + 'NBDKit.{wrong}'.split(), text
assert text[0].startswith('unix '), text
h.pwrite(b'x' * 512, 4096); assert h.pread(513, 4096) == b'x' * 512 + b'\\0'"
    );
    for program in SERVERS {
        serve(program, &[&plugin], &python);
        let dump = run_ok([program, &plugin, "--dump-plugin"]);
        let version = run_ok(["ocamlopt.opt", "-version"]);
        assert!(dump.contains(&format!("\nocaml_version={version}")), "{dump}");
        let major = version.split('.').next().expect("a number");
        assert!(dump.contains(&format!("\nocaml_version_major={major}\nocaml_version_minor=")), "{dump}");
    }
    let ours = "let () = NBDKit.register_plugin 7";
    let wrong = compiled_text(dir.path(), sdk, "wrong", ours, "");
    let said = run([NBDKIT, &wrong]);
    assert_eq!(said.code, 1);
    assert!(said.stderr.contains("required"), "{}", said.stderr);
}

/// The plugin cc compiles with any compiler that makes a library.
#[test]
fn a_source_is_a_plugin() {
    let Some(sdk) = sdk() else { return };
    let dir = temp();
    let source = dir.path().join("labelled.ml");
    fs::copy(root().join("tests/ocaml/labelled.ml"), &source).expect("copy the source");
    let flags = format!(
        "CFLAGS=-I {sdk} -ccopt -L{sdk} -output-obj -runtime-variant _pic NBDKit.cmx -cclib -lnbdkitocaml",
        sdk = sdk.display()
    );
    let words = ["cc", source.to_str().expect("UTF-8"), "CC=ocamlopt.opt", &flags];
    serve(NBDKIT, &words, "assert h.get_size() == 1048576");
}
