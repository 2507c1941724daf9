//! What scripts ask the program about itself, and how it reads a command line.

use std::{collections::BTreeMap, fs, os::unix::fs::PermissionsExt, path::Path};

use crate::util::{self, NBDKIT, NBDKIT_MOUNT, temp};

fn lines(words: &[&str]) -> Vec<String> {
    util::run_ok([NBDKIT].into_iter().chain(words.iter().copied())).lines().map(str::to_owned).collect()
}

#[test]
fn lists_of_options_have_those_of_the_c_nbdkit() {
    for list in ["--short-options", "--long-options"] {
        let ours = lines(&[list]);
        assert!(ours.is_sorted());
        let theirs = util::run_ok(["/usr/bin/nbdkit", list]);
        for option in theirs.lines() {
            assert!(ours.iter().any(|o| o == option) || option.starts_with("--tls"), "{option}: {ours:?}");
        }
    }
    let long = lines(&["--long-options"]);
    for option in [
        "--print-url",
        "--show-uri",
        "--show-url",
        "--no-meta-contexts",
        "--no-structured-replies",
        "--timeout",
    ] {
        assert!(long.iter().any(|o| o == option), "{option}");
    }
}

#[test]
fn dump_config_has_the_keys_that_scripts_ask_for() {
    let config: BTreeMap<String, String> = lines(&["--dump-config"])
        .into_iter()
        .map(|line| line.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned())).expect("key=value"))
        .collect();
    let theirs = util::run_ok(["/usr/bin/nbdkit", "--dump-config"]);
    let newer = ["max_api_version", "run_default_socket", "soext", "timeout_option", "vsock_option"];
    for key in theirs.lines().filter_map(|line| line.split('=').next()).chain(newer) {
        assert!(config.contains_key(key), "{key}: {config:?}");
    }
    assert_eq!(config["binary"], NBDKIT);
    assert_eq!(config["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(format!("{}.{}", config["version_major"], config["version_minor"]), "1.46");
    for key in ["bindir", "libdir", "sbindir", "sysconfdir", "plugindir", "filterdir", "mandir"] {
        assert!(Path::new(&config[key]).is_absolute(), "{key}={}", config[key]);
    }
}

#[test]
fn dump_plugin_is_in_order_and_ignores_where_to_listen() {
    let dump = lines(&["-U", "-", "--filter=offset", "file", "--dump-plugin"]);
    let keys: Vec<&str> = dump.iter().filter_map(|line| line.split('=').next()).collect();
    let order = [
        "path",
        "name",
        "version",
        "api_version",
        "struct_size",
        "max_thread_model",
        "thread_model",
        "errno_is_preserved",
        "magic_config_key",
    ];
    assert_eq!(keys[..order.len()], order);
    assert!(
        dump.contains(&"has_thread_model=1".to_owned()) && dump.contains(&"offset_name=offset".to_owned())
    );
    let run = util::run([NBDKIT, "-s", "memory", "--dump-plugin"]);
    assert!(run.refused().contains("-s and --dump-plugin"));
}

#[test]
fn versions_and_help_tell_of_the_layers() {
    let version = env!("CARGO_PKG_VERSION");
    let own = format!("nbdkit {version} (nbdkit-rs ");
    let all = lines(&["--filter=offset", "memory", "-V"]);
    assert!(all[0].starts_with(&own), "{all:?}");
    assert_eq!(all[1..], ["offset", "memory"].map(|name| format!("{name} {version}")));
    let help = lines(&["memory", "--filter=offset", "--help"]).join("\n");
    assert!(help.contains("filter: offset - show a byte range of a disk"), "{help}");
    assert!(help.contains("plugin: memory - "), "{help}");
    assert!(help.find("plugin: memory") < help.find("Usage:"), "{help}");
}

/// `-h` fits on a screen, `--list` has everything that can be named, and JSON what it takes.
#[test]
fn short_help_and_lists() {
    for program in [NBDKIT, NBDKIT_MOUNT] {
        let short = util::run_ok([program, "-h"]);
        assert!(short.lines().count() <= 24, "{short}");
        assert!(short.lines().all(|line| line.chars().count() <= 80), "{short}");
        let list = util::run_ok([program, "--list"]);
        for line in ["  cow ", "  memory ", "  cc "] {
            assert!(list.lines().any(|l| l.starts_with(line) && l.len() > 20), "{line}: {list}");
        }
        // What is installed in files, such as the distribution's.
        assert!(list.contains("nbdkit-perl-plugin.so"), "{list}");
        let default = "import json, sys; layers = json.load(sys.stdin); \
                       rate = next(l for l in layers['filters'] if l['name'] == 'rate'); \
                       print(next(p['default'] for p in rate['parameters'] if p['key'] == 'burstiness'))";
        let out = util::sh(&format!("{program} --list --json | /usr/bin/python3 -c \"{default}\""));
        assert_eq!(out, "2\n");
    }
}

#[test]
fn bare_words() {
    let out = util::run_ok([NBDKIT, "data", "raw=", "size=1M", "--run", "nbdinfo --size $uri"]);
    assert_eq!(out.trim(), "1048576");
    // Without a magic parameter the first is a script, where one is taken, and there is no other.
    assert!(util::run([NBDKIT, "zero", "word"]).refused().contains("one word too many"));
    assert!(util::run([NBDKIT, "zero", "a=1", "word"]).refused().contains("'a'"));
    // Only what looks like a key is one.
    let dir = temp();
    let file = util::image(dir.path(), "a=b", 512);
    let out = util::run_ok([NBDKIT, "file", file.to_str().expect("UTF-8"), "--run", "nbdinfo --size $uri"]);
    assert_eq!(out.trim(), "512");
}

#[test]
fn scripts_whose_interpreter_is_the_server() {
    let dir = temp();
    for (n, (line, words)) in [
        ("file", vec!["--run", "nbdinfo --size \"$uri\""]),
        ("--readonly  --run=nbdinfo${IFS}--size${IFS}$uri file", vec![]),
    ]
    .into_iter()
    .enumerate()
    {
        let script = dir.path().join(format!("script{n}"));
        let text = format!("#!{NBDKIT} {line}\nmore\n");
        fs::write(&script, &text).expect("write");
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).expect("chmod");
        // The kernel refuses a program that is still open for writing anywhere, such as in a child of another test.
        let run = [vec!["sh", "-c", "exec \"$@\"", "sh", script.to_str().expect("UTF-8")], words].concat();
        assert_eq!(util::run_ok(run).trim(), text.len().to_string(), "{line}");
    }
}

#[test]
fn the_uri_and_how_to_connect() {
    let command = format!("{NBDKIT} -U - --print-uri memory 1M --run true");
    let plain = util::sh(&command);
    let lines: Vec<&str> = plain.lines().collect();
    let uri = lines[0];
    assert!(uri.starts_with("nbd+unix://?socket=/"), "{plain}");
    assert_eq!(lines[1..], [format!("In a shell: '{uri}'"), format!("To connect: nbdinfo '{uri}'")]);
}

#[test]
fn a_server_that_is_killed_under_run() {
    for (signal, code) in [("KILL", 137), ("ABRT", 134)] {
        let dir = temp();
        let pid = dir.path().join("pid");
        let pid = pid.display();
        let script =
            format!("{NBDKIT} -P {pid} memory 1M --run 'kill -{signal} $(cat {pid}); true'; exit $?");
        assert_eq!(util::run(["bash", "-c", &script]).code, code, "{signal}");
    }
}

#[test]
fn the_command_runs_where_the_caller_is() {
    let dir = temp();
    let out = util::sh(&format!("cd {}; {NBDKIT} memory 1M --run pwd", dir.path().display()));
    assert_eq!(Path::new(out.trim()), fs::canonicalize(dir.path()).expect("a path"));
}

#[test]
fn a_failed_start_leaves_nothing_behind() {
    let dir = temp();
    let path = dir.path().display();
    let script = format!("cd {path}; export TMPDIR={path}; {NBDKIT} -U - -P /no/such/dir/pid memory 1M");
    assert!(util::run(["sh", "-c", &script]).refused().contains("pidfile"));
    let script = format!("cd {path}; {NBDKIT} -U sock -P /no/such/dir/pid memory 1M");
    assert!(util::run(["sh", "-c", &script]).refused().contains("pidfile"));
    assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), 0);
}
