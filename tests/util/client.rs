//! Foreign clients: whatever a test knows of a server, it knows through them.

use std::{
    ffi::OsStr,
    process::{Command, Output, Stdio},
};

/// What a command did.
pub(crate) struct Run {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl From<Output> for Run {
    fn from(output: Output) -> Self {
        use std::os::unix::process::ExitStatusExt;
        Run {
            code: output.status.code().or(output.status.signal().map(|n| 128 + n)).unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Run {
    /// The standard output of a command that must have succeeded.
    #[track_caller]
    pub(crate) fn ok(self) -> String {
        assert!(self.code == 0, "exit code {}\nstdout: {}\nstderr: {}", self.code, self.stdout, self.stderr);
        self.stdout
    }

    /// The one line that a command said when it failed with exit code 1.
    #[track_caller]
    pub(crate) fn refused(self) -> String {
        self.refused_with(1)
    }

    /// As [`refused`](Self::refused), with another exit code.
    #[track_caller]
    pub(crate) fn refused_with(self, code: i32) -> String {
        assert!(
            self.code == code,
            "exit code {}\nstdout: {}\nstderr: {}",
            self.code,
            self.stdout,
            self.stderr
        );
        assert!(self.stdout.is_empty(), "stdout: {}", self.stdout);
        assert_eq!(self.stderr.trim_end().lines().count(), 1, "stderr: {}", self.stderr);
        self.stderr
    }
}

/// Runs a command to its end. The distribution's python3 comes first in PATH: nbdsh belongs to it. A deadline
/// ends a command that hangs.
pub(crate) fn run<S: AsRef<OsStr>>(words: impl IntoIterator<Item = S>) -> Run {
    let mut command = Command::new("timeout");
    command.args(["-k", "5", "120"]).args(words).stdin(Stdio::null());
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("/usr/bin:/usr/sbin:/sbin:{path}"));
    command.output().expect("run a command").into()
}

/// Runs a command that must succeed.
#[track_caller]
pub(crate) fn run_ok<S: AsRef<OsStr>>(words: impl IntoIterator<Item = S>) -> String {
    run(words).ok()
}

/// Runs a shell script that must succeed.
#[track_caller]
pub(crate) fn sh(script: &str) -> String {
    run_ok(["bash", "-euo", "pipefail", "-c", script])
}

/// Runs a Python script in libnbd's shell, with `h` connected to the URI. It must succeed.
#[track_caller]
pub(crate) fn nbdsh(uri: &str, script: &str) -> String {
    run_ok(["nbdsh", "-u", uri, "-c", script])
}

/// Runs commands of qemu-io against a URI or a file. They must succeed.
#[track_caller]
pub(crate) fn qemu_io(target: &str, commands: &[&str]) -> String {
    let words = ["qemu-io", "-f", "raw", target].into_iter();
    let out = run_ok(words.chain(commands.iter().flat_map(|c| ["-c", c])));
    assert!(!out.contains("failed") && !out.contains("error"), "{out}");
    out
}
