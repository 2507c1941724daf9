//! `--run`: a command that lives as long as it needs the disk, and whose status becomes ours.

#![allow(unsafe_code)]

use std::{
    ffi::{OsStr, OsString},
    os::unix::process::{CommandExt, ExitStatusExt},
    process::{Child, Command},
    sync::{Arc, OnceLock},
    time::Duration,
};

use anyhow::{Context as _, Result};
use nbdkit_core::Stop;
use nix::{
    sys::signal::{SigSet, Signal, kill},
    unistd::Pid,
};

use crate::signals;

/// How long a command has to end after a signal ended the server.
const GRACE: Duration = Duration::from_secs(2);

/// The running command.
#[derive(Debug)]
pub(crate) struct Captive(Arc<State>);

#[derive(Debug, Default)]
struct State {
    /// The exit code: the command's, or that of the signal that it outlived.
    code: OnceLock<u8>,
    ended: Stop,
}

impl State {
    fn end(&self, code: i32) {
        let _ = self.code.set(u8::try_from(code).unwrap_or(1));
        self.ended.raise();
    }
}

/// Starts `command` by /bin/sh with `variables` set (not exported), and raises `stop` when it ends.
///
/// # Errors
/// If there is no shell.
pub(crate) fn run(command: &OsStr, variables: &[(&str, OsString)], stop: Arc<Stop>) -> Result<Captive> {
    let mut script = OsString::new();
    for (name, value) in variables {
        script.push(format!("{name}="));
        script.push(quote(value));
        script.push("\n");
    }
    script.push(command);
    let mut shell = Command::new("/bin/sh");
    shell.arg("-c").arg(script);
    // SAFETY: the closure makes one system call, which is allowed between fork and exec.
    unsafe {
        // The server's threads block the signals that end it; the command must not.
        shell.pre_exec(|| Ok(SigSet::empty().thread_set_mask()?));
    }
    let mut child = shell.spawn().context("cannot run /bin/sh")?;
    let state = Arc::new(State::default());
    end_with_signals(&child, &state);
    let captive = Captive(state.clone());
    std::thread::Builder::new()
        .name("captive".into())
        .spawn(move || {
            let status = child.wait().ok();
            state.end(status.and_then(|s| s.code().or_else(|| s.signal().map(|n| 128 + n))).unwrap_or(1));
            stop.raise();
        })
        .context("cannot start a thread")?;
    Ok(captive)
}

/// Passes on the signal that ends the server, unless it is one that a terminal has sent to the command too.
fn end_with_signals(child: &Child, state: &Arc<State>) {
    let (pid, state) = (Pid::from_raw(child.id().cast_signed()), state.clone());
    signals::on_receipt(move |signal| {
        if matches!(signal, Signal::SIGTERM | Signal::SIGHUP) && !state.ended.is_raised() {
            let _ = kill(pid, signal);
        }
        if !state.ended.wait_for(GRACE) {
            state.end(128 + signal as i32);
        }
    });
}

impl Captive {
    /// Waits for the command, which may outlive the server: a filter or an unmount can end that. Returns the
    /// command's exit code, 128+N if signal N killed it or ended the server before it.
    pub(crate) fn status(&self) -> u8 {
        self.0.ended.wait();
        self.0.code.get().copied().unwrap_or(1)
    }
}

/// Quotes a word for the shell.
pub(crate) fn quote(word: &OsStr) -> OsString {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let mut quoted = vec![b'\''];
    for &b in word.as_bytes() {
        match b {
            b'\'' => quoted.extend_from_slice(b"'\\''"),
            b => quoted.push(b),
        }
    }
    quoted.push(b'\'');
    OsString::from_vec(quoted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoting() {
        assert_eq!(quote(OsStr::new("it's")), "'it'\\''s'");
        assert_eq!(quote(OsStr::new("")), "''");
    }
}
