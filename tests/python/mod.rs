//! Plugins in Python, in both programs and in the C nbdkit, through foreign clients.

mod errors;
mod examples;
mod life;
mod requests;
mod start;

use std::path::{Path, PathBuf};

use crate::util::{NBDKIT, Run, is_left_out, run, temp};

/// The bridge, beside the programs under test. None where it cannot be built.
fn bridge() -> Option<PathBuf> {
    (!is_left_out("python")).then(|| crate::util::bridge("nbdkit-python-plugin"))
}

/// Skips a test where the bridge cannot be built.
macro_rules! bridge_or_return {
    () => {
        match $crate::python::bridge() {
            Some(bridge) => bridge,
            None => return,
        }
    };
}
use bridge_or_return;

/// A script in a directory of its own.
struct Script {
    dir: tempfile::TempDir,
    path: String,
}

fn script(text: &str) -> Script {
    let dir = temp();
    let path = dir.path().join("script.py");
    std::fs::write(&path, text).expect("write a script");
    Script { path: path.to_str().expect("UTF-8").to_owned(), dir }
}

impl Script {
    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The lines of a file beside the script.
    #[track_caller]
    fn lines(&self, name: &str) -> Vec<String> {
        let text = std::fs::read_to_string(self.file(name)).expect("a file");
        text.lines().map(str::to_owned).collect()
    }
}

/// Runs a client's Python while a server does: the words are `NAME=VALUE…` for the environment, the program, and its
/// plugin with parameters. The client connects `h` by itself: `connect(export)`.
fn nbdsh_with(words: &[&str], client: &str) -> Run {
    let prelude = "
import errno, os, nbd
def connect(export=''):
    global h
    h = nbd.NBD()
    h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.set_full_info(True)
    h.set_export_name(export)
    h.connect_unix(os.environ['unixsocket'])
    return h
def fails(call, *arguments):
    try:
        call(*arguments)
    except nbd.Error as error:
        return errno.errorcode.get(error.errnum, error.errnum)
    raise SystemExit('did not fail')
def at_once(h, calls):
    cookies = [call() for call in calls]
    for cookie in cookies:
        while not h.aio_command_completed(cookie):
            h.poll(-1)
";
    let command = ["-U", "-", "--run", "export unixsocket; exec nbdsh -c \"$CLIENT\""];
    let client = format!("CLIENT={prelude}{client}");
    let program = words.iter().position(|word| !word.contains('=')).expect("a program");
    let (before, after) = words.split_at(program + 1);
    let words = [&["env", &client][..], before, &command, after].concat();
    run(words)
}

/// The same with our server, which must succeed. Returns what the server logged.
#[track_caller]
fn nbdsh(script: &Script, words: &[&str], client: &str) -> String {
    let run = nbdsh_with(&[&[NBDKIT, "python", &script.path], words].concat(), client);
    assert_eq!(run.code, 0, "{}{}", run.stdout, run.stderr);
    run.stderr
}

/// Our server and the C nbdkit, both with our bridge.
fn servers(bridge: &Path) -> [Vec<String>; 2] {
    let bridge = bridge.to_str().expect("UTF-8");
    [vec![NBDKIT.to_owned(), "python".to_owned()], vec!["/usr/bin/nbdkit".to_owned(), bridge.to_owned()]]
}
