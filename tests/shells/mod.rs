//! Completion in the real shells, on a terminal: what a person types with the Tab key, and what the command gets.

use std::path::Path;

use crate::util::{NBDKIT, NBDKIT_MOUNT, image, run_ok, sh, temp};

/// Lines with a `^` for each Tab, and the words that they become.
const LINES: [(&str, &str); 9] = [
    ("nbdkit memo^", "<memory>"),
    ("nbdkit --filter=partit^ mem^ si^1M", "<--filter=partition><memory><size=1M>"),
    ("nbdkit --filter partit^ null", "<--filter><partition><null>"),
    ("nbdkit file my^", "<file><my disk.img>"),
    ("nbdkit file file=my^", "<file><file=my disk.img>"),
    ("nbdkit file file=fol^in^", "<file><file=folder/inner.img>"),
    (
        "nbdkit --filter=partition file my^ partition-s^a^",
        "<--filter=partition><file><my disk.img><partition-sectorsize=auto>",
    ),
    (
        "nbdkit --filter=partition file my^ partition=^",
        "<--filter=partition><file><my disk.img><partition=1>",
    ),
    (
        "nbdkit-mount --cache wr^ --partitions file my^ fold^",
        "<--cache><writeback><--partitions><file><my disk.img><folder/>",
    ),
];

fn completes(shell: &str) {
    let dir = temp();
    let disk = image(dir.path(), "my disk.img", 10 << 20);
    sh(&format!(
        "echo 'start=2048' | sfdisk -q '{}'; mkdir {1}/folder; touch {1}/folder/inner.img",
        disk.display(),
        dir.path().display()
    ));
    let script = dir.path().join("script");
    std::fs::write(&script, run_ok([NBDKIT, "--completions", shell])).expect("write");
    let programs = Path::new(NBDKIT).parent().expect("a folder").display().to_string();
    let terminal = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/shells/terminal.py");
    let lines: Vec<_> = LINES.iter().map(|(line, _)| line.to_string()).collect();
    let words = [
        vec!["env".into(), format!("--chdir={}", dir.path().display()), "/usr/bin/python3".into()],
        vec![terminal.display().to_string(), shell.into(), programs, script.display().to_string()],
        lines,
    ];
    let said = run_ok(words.concat());
    let found: Vec<_> = said.lines().collect();
    for ((line, wanted), found) in LINES.iter().zip(&found) {
        assert!(found.ends_with(wanted), "{shell}: {line} became {found}, not {wanted}\n{said}");
    }
    assert_eq!(found.len(), LINES.len());
}

#[test]
fn in_bash() {
    completes("bash");
}

#[test]
fn in_zsh() {
    completes("zsh");
}

#[test]
fn in_fish() {
    completes("fish");
}

/// What all three get.
#[test]
fn candidates() {
    let dir = temp();
    for name in ["a.img", "b.img"] {
        image(dir.path(), name, 1 << 20);
    }
    let here = dir.path().display().to_string();
    let complete = |words: &[&str]| {
        let out = run_ok([&[words[0], "--complete", "--"], words].concat());
        out.lines().map(|line| line.split('\t').next().unwrap_or_default().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(complete(&[NBDKIT, "--tls", ""]), ["off", "on", "require"]);
    assert_eq!(complete(&[NBDKIT, "--tls=o"]), ["--tls=off", "--tls=on"]);
    assert_eq!(complete(&[NBDKIT, "--readon"]), ["--readonly"]);
    assert_eq!(complete(&[NBDKIT, "--pidf"]), ["--pidfile="]);
    assert_eq!(complete(&[NBDKIT, "-P", "x", "nul"]), ["null"]);
    assert_eq!(complete(&[NBDKIT, "--", "nul"]), ["null"]);
    assert_eq!(complete(&[NBDKIT_MOUNT, "file", &format!("dir={here}"), "-e", ""]), ["a.img", "b.img"]);
    assert_eq!(complete(&[NBDKIT, "--filter=delay", "null", "rd"]), ["rdelay="]);
    assert_eq!(complete(&[NBDKIT, "--filter=delay", "null", "delay-fast-zero="]).len(), 2);
    // Nonsense is silence.
    assert!(complete(&[NBDKIT, "no such plugin", ""]).is_empty());
    assert!(complete(&[NBDKIT, "--nonsense=x"]).is_empty());
}

/// A live mount is what can be unmounted.
#[test]
fn live_mounts() {
    if crate::util::is_left_out("fuse") {
        return;
    }
    let mount = crate::util::Mount::start(["null", "1M"]);
    let place = mount.file().parent().expect("a folder").display().to_string();
    let out = run_ok([NBDKIT_MOUNT, "--complete", "--", "nbdkit-mount", "-u", &place[..place.len() - 1]]);
    assert_eq!(out.split('\t').next(), Some(&*place), "{out}");
}
