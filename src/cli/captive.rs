//! `--run`: a command that lives as long as it needs the disk, and whose status becomes ours.

use std::{
    ffi::{CString, OsStr, OsString},
    os::{
        fd::{AsFd, AsRawFd as _, OwnedFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::{
    spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn},
    sys::signal::{SigSet, Signal},
};
use parking_lot::{Condvar, Mutex, MutexGuard};
use rustix::{
    event::Timespec,
    process::{Pid, PidfdFlags, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid},
};

use crate::{
    descriptors,
    signals::{self, Events},
    stdio::Stdio,
};

/// How long a command has to end after a signal ended the server.
const GRACE: Duration = Duration::from_secs(2);

/// The running command.
#[derive(Debug)]
pub struct Captive(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    pidfd: OwnedFd,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The exit code of the command.
    code: Option<i32>,
    /// What ended the server, and until when the command may end.
    signal: Option<(Signal, Instant)>,
}

impl State {
    /// The exit code, if it is known; else how long to wait for it.
    fn code_or_patience(&self) -> Result<i32, Option<Duration>> {
        let patience = self.signal.map(|(signal, deadline)| {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() { Ok(128 + signal as i32) } else { Err(left) }
        });
        match (self.code, patience) {
            (Some(code), _) | (None, Some(Ok(code))) => Ok(code),
            (None, Some(Err(left))) => Err(Some(left)),
            (None, None) => Err(None),
        }
    }
}

impl Shared {
    /// Takes the command's exit code, now that it has ended.
    fn ended(&self) {
        let how = waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED).ok().flatten();
        let code = how.and_then(|how| how.exit_status().or(how.terminating_signal().map(|n| 128 + n)));
        self.state.lock().code = Some(code.unwrap_or(1));
        self.changed.notify_all();
    }

    /// Passes on the signal that ends the server, unless it is one that a terminal has sent to the command too.
    fn received(&self, signal: Signal) {
        let passed_on = match signal {
            Signal::SIGTERM => Some(rustix::process::Signal::TERM),
            Signal::SIGHUP => Some(rustix::process::Signal::HUP),
            _ => None,
        };
        if let Some(signal) = passed_on {
            // It may have ended this moment.
            let _ = pidfd_send_signal(&self.pidfd, signal);
        }
        self.state.lock().signal = Some((signal, Instant::now() + GRACE));
        self.changed.notify_all();
    }
}

/// Starts `command` by /bin/sh with `variables` set (not exported) and the user's standard input and output. Its end is
/// one of the [`Events`].
///
/// # Errors
/// If there is no shell.
pub fn run(command: &OsStr, variables: &[(impl AsRef<str>, OsString)], stdio: &Stdio) -> Result<Captive> {
    let mut script = OsString::new();
    if let Some(limit) = descriptors::former_limit() {
        script.push(format!("ulimit -Sn {limit}\n"));
    }
    for (name, value) in variables {
        script.push(format!("{}=", name.as_ref()));
        script.push(quote(value));
        script.push("\n");
    }
    script.push(command);
    let pidfd = spawn(script, stdio).context("cannot run /bin/sh")?;
    let shared = Arc::new(Shared { pidfd, state: Mutex::default(), changed: Condvar::new() });
    let (on_signal, on_end) = (shared.clone(), shared.clone());
    signals::on_signal(move |signal| on_signal.received(signal));
    signals::on_end(&shared.pidfd, move || on_end.ended())?;
    Ok(Captive(shared))
}

/// Starts a shell. By posix_spawn, which does not copy the server's memory first.
fn spawn(script: OsString, stdio: &Stdio) -> Result<OwnedFd> {
    let mut attributes = PosixSpawnAttr::init()?;
    // The server blocks the signals that end it, and ignores one; the command must not.
    attributes.set_sigmask(&SigSet::empty())?;
    attributes.set_sigdefault(&[Signal::SIGPIPE].into_iter().collect())?;
    attributes.set_flags(PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK | PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF)?;
    let words = [c"/bin/sh".to_owned(), c"-c".to_owned(), CString::new(script.into_vec())?];
    let environment = std::env::vars_os()
        .map(|(name, value)| CString::new([name.as_bytes(), b"=", value.as_bytes()].concat()));
    let environment = environment.collect::<Result<Vec<_>, _>>()?;
    let mut actions = PosixSpawnFileActions::init()?;
    actions.add_dup2(stdio.input.as_raw_fd(), 0)?;
    actions.add_dup2(stdio.output.as_raw_fd(), 1)?;
    let pid = posix_spawn(c"/bin/sh", &actions, &attributes, &words, &environment)?;
    let pid = Pid::from_raw(pid.as_raw()).context("it has no process ID")?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

impl Captive {
    /// Waits for the command, which may outlive the server: a filter or an unmount can end that. Returns the
    /// command's exit code, 128+N if signal N killed it or ended the server before it. `events`: unless a thread
    /// handles them.
    pub fn status(&self, events: Option<&Events>) -> u8 {
        let shared = &*self.0;
        let mut state = shared.state.lock();
        let code = loop {
            let patience = match state.code_or_patience() {
                Ok(code) => break code,
                Err(patience) => patience,
            };
            match (events, patience) {
                (Some(events), patience) => MutexGuard::unlocked(&mut state, || {
                    events.wait(patience.and_then(|left| Timespec::try_from(left).ok()).as_ref());
                }),
                (None, Some(left)) => {
                    shared.changed.wait_for(&mut state, left);
                }
                (None, None) => shared.changed.wait(&mut state),
            }
        };
        u8::try_from(code).unwrap_or(1)
    }
}

/// Quotes a word for the shell.
pub fn quote(word: &OsStr) -> OsString {
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
