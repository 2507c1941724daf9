//! The examples of the documentation run as they are printed: in README, man pages, the pages of docs and the comments
//! at the head of what is in the folder `examples`.
//!
//! A block of commands is one that has a line that begins with `$ `, or whose first word is one of the programs. Each block
//! runs on a stage of its own (`stage.sh`): namespaces for mounts, processes and the network, in which the usual paths and
//! ports are free, servers end with the example, and images of the usual names lie in the current directory. It runs twice,
//! as root and as an ordinary user who has sudo.
//!
//! Before a block a comment that readers do not see may say more: `; test: WORDS` in a man page, `<!-- test: WORDS -->` in
//! Markdown. The words are one of
//!
//! * `not run, REASON`
//! * `root`: not as an ordinary user
//! * `fails`: the last command has to
//! * `first COMMAND`: to run before the block, to make what it works on
//! * `needs WHAT`: a word of `NBDKIT_LEFT_OUT` with which it is left out.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use crate::util::{NBDKIT, Run, bridge, is_left_out, temp};

const STAGE: &str = include_str!("stage.sh");
const FIXTURES: &str = include_str!("fixtures.sh");

/// What commands begin with when there is no prompt.
const PROGRAMS: [&str; 2] = ["nbdkit", "nbdkit-mount"];

/// Names in the documentation, and what is there on the stage.
const STANDS_FOR: [(&str, &str); 9] = [
    ("/var/lib/images", "/tmp/images"),
    ("/path/to/pieces", "/tmp/images"),
    ("/var/images", "/tmp/images"),
    ("/srv/", "/tmp/images/srv/"),
    ("=/images", "=/tmp/images"),
    ("/etc/pki/", "/tmp/pki/"),
    ("server.example.com", "localhost"),
    ("/dev/sdX", "/tmp/work/disk.img"),
    ("$(id -u libvirt-qemu)", "$(id -u)"),
];

/// A block of commands, with what the hidden comment before it says.
struct Example {
    place: String,
    commands: String,
    first: Vec<String>,
    not_run: bool,
    as_root: bool,
    fails: bool,
    needs: Vec<String>,
}

impl Example {
    /// Whether it can run here.
    fn is_possible(&self, user: bool) -> bool {
        let needs = |what: &str, words: &[&str]| {
            !is_left_out(what)
                || !words.iter().any(|word| self.commands.contains(word))
                    && !self.needs.iter().any(|n| n == what)
        };
        let refused = self.not_run || user && self.as_root;
        !refused
            && needs("fuse", &["nbdkit-mount", "mount -t"])
            && needs("loop", &["--mount", "--loop", "-o loop"])
            && needs("python", &["nbdkit python", "nbdkit-mount python"])
            && self.needs.iter().all(|what| !is_left_out(what))
    }

    /// Runs it; what went wrong, if anything did.
    fn run(&self, user: bool, stage: &Path, fixtures: &Path) -> Result<(), String> {
        let mut script = String::from(STAGE);
        let mut body = String::from("set -e\n");
        for command in &self.first {
            let _ = writeln!(body, "{command}");
        }
        body.push_str(&self.commands);
        for (name, place) in STANDS_FOR {
            body = body.replace(name, place);
        }
        fs::write(stage.join("example.sh"), &body).map_err(|e| e.to_string())?;
        if user {
            script += "chown -R nobody /tmp/work /tmp/images /mnt/* 2>/dev/null || true\n";
        }
        // To a file that is the user's own, so that /dev/stderr can be opened; and nobody waits for servers that keep it.
        let user = if user { "setpriv --reuid=nobody --regid=nogroup --init-groups" } else { "" };
        let _ = writeln!(
            script,
            "status=0
            {user} bash -c 'exec bash -x /dev/fd/3 >/tmp/output 2>&1' || status=$?
            cat /tmp/output
            exit $status"
        );
        let mut command = Command::new("timeout");
        command.args([
            "-k",
            "5",
            "100",
            "unshare",
            "--mount",
            "--net",
            "--ipc",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ]);
        if is_left_out("root") {
            command.args(["--user", "--map-root-user"]);
        }
        let source = Path::new(env!("CARGO_MANIFEST_DIR"));
        command
            .args(["bash", "-c", "exec 3<\"$1\"; eval \"$2\"", "example"])
            .arg(stage.join("example.sh"))
            .arg(script)
            .env("stage", stage)
            .env("programs", Path::new(NBDKIT).parent().expect("the target folder"))
            .env("source", source)
            .env("fixtures", fixtures)
            .stdin(Stdio::null());
        let done = Run::from(command.output().map_err(|e| e.to_string())?);
        if done.code != 124 && (done.code == 0) != self.fails {
            return Ok(());
        }
        let who = if user.is_empty() { "root" } else { "an ordinary user" };
        Err(format!("{}, as {who}: exit code {}\n{}{}\n", self.place, done.code, done.stdout, done.stderr))
    }
}

/// Takes the prompts from a block, and what the commands print. None: it has no commands.
fn commands(block: &[String]) -> Option<String> {
    let word = |line: &str| line.split_whitespace().next().map(str::to_owned);
    let has_prompt = block.iter().any(|line| line.starts_with("$ "));
    let is_program = block.first().and_then(|line| word(line)).is_some_and(|w| PROGRAMS.contains(&&*w));
    if !has_prompt {
        return is_program.then(|| block.join("\n") + "\n");
    }
    let mut text = String::new();
    let mut goes_on = false;
    for line in block {
        let command = line.strip_prefix("$ ");
        if command.is_none() && !goes_on {
            continue;
        }
        let line = command.unwrap_or(line);
        text += line;
        text.push('\n');
        // To the end of a quotation too.
        goes_on = line.ends_with('\\') || text.matches('\'').count() % 2 == 1;
    }
    Some(text)
}

/// What a file has of examples. `hidden` takes the words from a comment that readers do not see.
fn examples(path: &Path, root: &Path) -> Vec<Example> {
    let text = fs::read_to_string(path).expect("a page");
    let is_page = path.extension().is_some_and(|e| e == "scd");
    let hidden = |line: &str| match is_page {
        true => line.strip_prefix("; test: ").map(str::to_owned),
        false => Some(line.strip_prefix("<!-- test: ")?.strip_suffix(" -->")?.to_owned()),
    };
    let name = path.strip_prefix(root).unwrap_or(path).display();
    let mut found = Vec::new();
    let mut words = Vec::new();
    let mut block: Option<(usize, Vec<String>)> = None;
    let mut synopsis = false;
    for (number, line) in text.lines().enumerate() {
        let trimmed = if is_page { line } else { line.trim_start() };
        if trimmed.starts_with("```") {
            let Some((start, lines)) = block.take() else {
                block = Some((number + 1, Vec::new()));
                continue;
            };
            let words = std::mem::take(&mut words);
            let Some(commands) = commands(&lines).filter(|_| !synopsis) else { continue };
            found.push(example(format!("{name}:{start}"), commands, &words));
        } else if let Some((_, lines)) = &mut block {
            lines.push(if is_page { line.replace("\\\\", "\\") } else { line.to_owned() });
        } else if let Some(said) = hidden(line) {
            words.push(said);
        } else if line.starts_with('#') {
            synopsis = line == "# SYNOPSIS";
            words.clear();
        }
    }
    found
}

fn example(place: String, commands: String, words: &[String]) -> Example {
    let mut example = Example {
        place,
        commands,
        first: vec![],
        not_run: false,
        as_root: false,
        fails: false,
        needs: vec![],
    };
    for word in words {
        match word.split_once([' ', ',']) {
            None if word == "root" => example.as_root = true,
            None if word == "fails" => example.fails = true,
            Some(("first", command)) => example.first.push(command.into()),
            Some(("needs", what)) => example.needs.push(what.into()),
            Some(("not", reason)) if reason.starts_with("run, ") => example.not_run = true,
            _ => panic!("{}: the comment 'test: {word}' says nothing that this test knows", example.place),
        }
    }
    example
}

/// All of them.
fn collect() -> Vec<Example> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut pages: Vec<PathBuf> = vec![root.join("README.md")];
    for folder in ["man", "docs"] {
        let Ok(entries) = fs::read_dir(root.join(folder)) else { continue };
        pages.extend(entries.map(|entry| entry.expect("an entry").path()).filter(|path| path.is_file()));
    }
    pages.sort();
    let mut found: Vec<_> = pages.iter().flat_map(|page| examples(page, root)).collect();
    for language in ["lua", "python", "sh"] {
        let folder = root.join("examples").join(language);
        for entry in fs::read_dir(folder).expect("the examples") {
            found.extend(head(&entry.expect("an entry").path(), root));
        }
    }
    found
}

/// The indented commands in the comment at the head of a script.
fn head(path: &Path, root: &Path) -> Option<Example> {
    path.extension().filter(|extension| ["lua", "py", "sh"].iter().any(|known| extension == known))?;
    let text = fs::read_to_string(path).expect("a script");
    let lines = text.lines().map(|line| line.trim_start_matches(['#', '-']));
    let lines: Vec<_> =
        lines.filter_map(|line| line.strip_prefix("   ")).take_while(|l| !l.is_empty()).collect();
    let commands: Vec<_> = lines
        .into_iter()
        .filter(|line| PROGRAMS.iter().any(|program| line.trim_start().starts_with(program)))
        .map(|line| line.trim().to_owned())
        .collect();
    let place = path.strip_prefix(root).unwrap_or(path).display().to_string();
    let folder = Path::new(&place).parent()?.display().to_string();
    let first = [format!("cd {folder}")];
    let mut example = example(place, commands.join("\n"), &[]);
    example.first.extend(first);
    (!commands.is_empty()).then_some(example)
}

/// Runs them all, several at a time.
fn run_all(user: bool) {
    bridge("nbdkit-lua-plugin");
    if !is_left_out("python") {
        bridge("nbdkit-python-plugin");
    }
    let chosen = std::env::var("NBDKIT_EXAMPLE").unwrap_or_default();
    let dir = temp();
    let fixtures = dir.path().join("fixtures");
    fs::create_dir(&fixtures).expect("a directory");
    let made = Command::new("bash")
        .args(["-c", FIXTURES])
        .env("source", env!("CARGO_MANIFEST_DIR"))
        .current_dir(&fixtures)
        .output()
        .expect("bash");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));

    let mut examples = collect();
    assert!(examples.len() > 100, "only {} examples were found", examples.len());
    examples.retain(|example| example.is_possible(user) && example.place.contains(&chosen));
    let (next, failures) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for worker in 0..3 {
            let stage = dir.path().join(format!("stage{worker}"));
            fs::create_dir(&stage).expect("a directory");
            let (examples, next, failures, fixtures) = (&examples, &next, &failures, &fixtures);
            scope.spawn(move || {
                while let Some(example) = examples.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let start = std::time::Instant::now();
                    if let Err(failure) = example.run(user, &stage, fixtures) {
                        failures.lock().expect("the list").push(failure);
                    }
                    println!("{:>6} ms {}", start.elapsed().as_millis(), example.place);
                }
            });
        }
    });
    let failures = failures.into_inner().expect("the list");
    assert!(failures.is_empty(), "{} of {}:\n\n{}", failures.len(), examples.len(), failures.join("\n"));
}

#[test]
fn examples_run_as_root() {
    run_all(false);
}

#[test]
fn examples_run_as_an_ordinary_user() {
    // In a namespace where root is nobody else there is no further user.
    if !is_left_out("root") {
        run_all(true);
    }
}

/// A command is told from what it prints, and goes on over lines.
#[test]
fn commands_are_told_from_their_output() {
    let block = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
    let all = commands(&block("$ one \\\n  two\nprinted\n$ three 'a\nb'\nmore")).expect("commands");
    assert_eq!(all, "one \\\n  two\nthree 'a\nb'\n");
    assert_eq!(commands(&block("nbdkit null\ntrue")).as_deref(), Some("nbdkit null\ntrue\n"));
    assert_eq!(commands(&block("#!/bin/sh\nexit 2")), None);
}
