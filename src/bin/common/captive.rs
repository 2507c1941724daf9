//! `--run`: a command that lives as long as it needs the disk, and whose status becomes ours.

#![allow(unsafe_code)]

use std::{
    ffi::{OsStr, OsString},
    os::unix::process::{CommandExt, ExitStatusExt},
    process::{Command, ExitStatus},
    sync::{Arc, OnceLock},
};

use anyhow::{Context as _, Result};
use nbdkit_core::Stop;
use nix::sys::signal::SigSet;

/// The running command.
#[derive(Debug)]
pub(crate) struct Captive(Arc<OnceLock<ExitStatus>>);

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
    let status = Arc::new(OnceLock::new());
    let captive = Captive(status.clone());
    std::thread::Builder::new()
        .name("captive".into())
        .spawn(move || {
            if let Ok(ended) = child.wait() {
                let _ = status.set(ended);
            }
            stop.raise();
        })
        .context("cannot start a thread")?;
    Ok(captive)
}

impl Captive {
    /// The command's exit code, 128+N if signal N killed it; None if it still runs, because the server was
    /// stopped first.
    pub(crate) fn status(&self) -> Option<u8> {
        let status = self.0.get()?;
        let code = status.code().or_else(|| status.signal().map(|n| 128 + n));
        Some(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
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
