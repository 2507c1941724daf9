//! How a script is given, what is refused, and what is said about it.

use std::os::unix::fs::PermissionsExt;

use super::{bridge_or_return, nbdsh, script, servers};
use crate::util::{NBDKIT, NBDKIT_MOUNT, run, run_ok};

const GOOD: &str =
    "def open(r): return 1\ndef get_size(h): return 4096\ndef pread(h, c, o): return bytes(c)\n";

/// What both programs say when they refuse to start.
fn refused(words: &[&str]) -> String {
    let mut said = Vec::new();
    for program in [&[NBDKIT, "-U", "-", "--run", "true"][..], &[NBDKIT_MOUNT, "--run", "true"]] {
        let run = run(program.iter().chain(words));
        assert_ne!(run.code, 0, "{words:?}: {}{}", run.stdout, run.stderr);
        said.push(run.stderr);
    }
    let [nbd, fuse] = [said.remove(0), said.remove(0)];
    assert_eq!(nbd, fuse.replace("nbdkit-mount: ", "nbdkit: "));
    nbd
}

#[test]
fn bad_scripts() {
    bridge_or_return!();
    for (text, message) in [
        ("def open(r:\n  pass\n".to_owned(), "SyntaxError"),
        ("def open(r): return 1\n\tx = 1".to_owned(), "IndentationError"),
        (GOOD.replace("pread", "read"), "the script must define the function pread"),
        (GOOD.replace("def open(r)", "def start(r)"), "the script must define the function open"),
        (
            GOOD.replace("def get_size(h): return", "get_size ="),
            "the script must define the function get_size",
        ),
        (format!("API_VERSION = 3\n{GOOD}"), "API version 3 is not known: it must be between 1 and 2"),
        (format!("API_VERSION = 0\n{GOOD}"), "must be between 1 and 2"),
        (format!("API_VERSION = 'two'\n{GOOD}"), "API version two is not known"),
        (
            format!("def api_version(): return 99\n{GOOD}"),
            "API version 99 is not known: it must be between 1 and 2",
        ),
        (format!("def api_version(): raise ValueError('unsure')\n{GOOD}"), "ValueError: unsure"),
        (format!("import sys\nsys.exit('not today')\n{GOOD}"), "SystemExit: not today"),
        (format!("import no_such_module\n{GOOD}"), "No module named 'no_such_module'"),
        (
            format!("def config_complete(): raise ValueError('size= is needed')\n{GOOD}"),
            "ValueError: size= is needed",
        ),
        (format!("def get_ready(): raise ValueError('no disk today')\n{GOOD}"), "ValueError: no disk today"),
        (
            format!("def thread_model(): return 4\n{GOOD}"),
            "it must return one of nbdkit.THREAD_MODEL_*, and not 4",
        ),
        (format!("def thread_model(): return 'all'\n{GOOD}"), "and not 'all'"),
        ("\0".to_owned(), "null bytes"),
        ("x = '\u{0}'".to_owned(), "null bytes"),
    ] {
        let script = script(&text);
        let said = refused(&["python", &script.path]);
        assert!(said.contains(message) && said.contains(&script.path), "{text}: {said}");
    }
}

#[test]
fn bad_parameters() {
    bridge_or_return!();
    let script = script(GOOD);
    let strict = super::script(&format!("def config(key, value): raise KeyError(key)\n{GOOD}"));
    for (words, message) in [
        (&["python"][..], "no script was given: nbdkit python SCRIPT.py"),
        (&["python", "size=1M"], "the first parameter must be the script"),
        (&["python", "size=1M", &script.path], "the first parameter must be the script"),
        (&["python", "/none.py"], "/none.py: cannot read the script: No such file"),
        (&["python", "/tmp"], "/tmp: cannot read the script: Is a directory"),
        (&["python", &script.path, "size=1M"], "the script takes no parameters, and there is size=1M"),
        (&["python", &strict.path, "size=1M"], "KeyError: 'size'"),
    ] {
        let said = refused(words);
        assert!(said.contains(message), "{words:?}: {said}");
    }
}

#[test]
fn parameters_reach_the_script() {
    let bridge = bridge_or_return!();
    let script = script(&format!(
        "import os, sys, __main__\nwords = []\ndef config(key, value): words.append((key, os.fsencode(value)))\n\
         def after_fork():\n  with __builtins__.open(os.environ['RESULT'], 'w') as f:\n    \
         print(words, __name__, __main__.words is words, sys.argv, __file__, file=f)\n{GOOD}"
    ));
    let result = script.file("result");
    for server in servers(&bridge) {
        let result = format!("RESULT={}", result.display());
        let (program, bridge) = (&server[0], &server[1]);
        let parameters = ["b=c=d", "script=again", "name=\u{e9}"];
        let words = ["env", &result, program, "-U", "-", "--run", "true", bridge, &script.path];
        run_ok(words.iter().chain(&parameters));
        let want = format!(
            "[('b', b'c=d'), ('script', b'again'), ('name', b'\\xc3\\xa9')] __main__ True ['{0}'] {0}",
            script.path
        );
        assert_eq!(script.lines("result"), [want]);
    }
}

/// Modules beside the script are found, after those of Python.
#[test]
fn modules_beside_the_script() {
    bridge_or_return!();
    let script = script("import json\nfrom helper import *\njson.dumps(1)\n");
    std::fs::write(script.file("json.py"), "").expect("write a module");
    std::fs::write(script.file("helper.py"), GOOD).expect("write a module");
    nbdsh(&script, &[], "connect(); assert h.pread(5, 0) == bytes(5)");
}

#[test]
fn an_executable_script() {
    bridge_or_return!();
    let script = script(&format!("#!{NBDKIT} python\n{GOOD}"));
    let path = &script.path;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).expect("chmod");
    let size = ["-U", "-", "--run", "nbdinfo --size \"$uri\""];
    // By the kernel, as a plugin with a path, and as one in the directory of plugins.
    assert_eq!(run_ok([&**path].iter().chain(&size)).trim(), "4096");
    assert_eq!(run_ok([NBDKIT, path].iter().chain(&size)).trim(), "4096");
    std::fs::rename(path, script.file("nbdkit-mine-plugin")).expect("rename");
    let plugins = format!("NBDKIT_PLUGINDIR={}", script.dir.path().display());
    assert_eq!(run_ok(["env", &plugins, NBDKIT, "mine"].iter().chain(&size)).trim(), "4096");
    let stat = ["--run", "stat -c %s \"$file\""];
    assert_eq!(run_ok(["env", &plugins, NBDKIT_MOUNT, "mine"].iter().chain(&stat)).trim(), "4096");
}

/// Our bridge wins over the one of an installed nbdkit when it is beside the program.
#[test]
fn what_is_told_about_the_plugin() {
    let bridge = bridge_or_return!();
    let dump = run_ok([NBDKIT, "python", "--dump-plugin"]);
    let version = run_ok(["/usr/bin/python3", "-c", "import platform; print(platform.python_version())"]);
    let path = format!("path={}", bridge.display());
    for line in [
        &*path,
        "name=python",
        "api_version=2",
        "max_thread_model=parallel",
        "thread_model=serialize_all_requests",
        "errno_is_preserved=0",
        "magic_config_key=script",
        "has_thread_model=1",
        "has_block_size=1",
        "python_pep_384_abi_version=3",
        "nbdkit_python_maximum_api_version=2",
        &format!("python_version={}", version.trim()),
    ] {
        assert!(dump.lines().any(|l| l == line), "{line}: {dump}");
    }

    let script = script(&format!(
        "'''A disk full of zeroes.\n\n    It takes no parameters.\n'''\nimport nbdkit\n\
         def thread_model(): return nbdkit.THREAD_MODEL_PARALLEL\ndef dump_plugin(): print('zeroes=many')\n{GOOD}"
    ));
    for server in servers(&bridge) {
        let dump = run_ok([&server[0], &server[1], &script.path, "--dump-plugin"]);
        for line in ["thread_model=parallel", "zeroes=many", &format!("python_script={}", script.path)] {
            assert!(dump.lines().any(|l| l == line), "{line}: {dump}");
        }
        let last = dump.lines().last();
        assert_eq!(last, Some("zeroes=many"), "{dump}");
    }
    for program in [NBDKIT, NBDKIT_MOUNT] {
        let help = run_ok([program, "python", &script.path, "--help"]);
        assert!(help.contains("A disk full of zeroes.\n\nIt takes no parameters.\n"), "{help}");
        assert!(help.contains("script=<FILENAME>"), "{help}");
        let help = run_ok([program, "python", "--help"]);
        assert!(help.contains("script=<FILENAME>"), "{help}");
    }
}

/// The programs themselves have nothing of Python in them.
#[test]
fn no_interpreter_in_the_programs() {
    for program in [NBDKIT, NBDKIT_MOUNT] {
        let libraries = run_ok(["ldd", program]);
        assert!(libraries.contains("libc.so") && !libraries.contains("python"), "{libraries}");
    }
}
