//! Going to the background: the parent waits until the child serves, then exits 0; if the child fails, the
//! parent exits with its status, after the child's message.

#![allow(unsafe_code)]

use std::{
    io::{PipeWriter, Read, Write},
    os::fd::AsFd,
    process::exit,
};

use anyhow::{Context as _, Result};
use nix::{
    sys::{
        signal::SigSet,
        wait::{WaitStatus, waitpid},
    },
    unistd::{ForkResult, Pid, chdir, dup2_stderr, dup2_stdin, dup2_stdout, fork, getppid, setsid},
};
use rustix::process::set_parent_process_death_signal;

/// The child's promise to tell the parent that it serves. Dropping it without that is a failure.
#[derive(Debug)]
pub struct Ready(Option<PipeWriter>);

impl Ready {
    /// For a process that stays in the foreground: nobody waits.
    pub fn nobody() -> Self {
        Ready(None)
    }

    /// Lets go of the terminal and lets the parent exit. `keep_stderr`: go on writing debug messages there.
    ///
    /// # Errors
    /// If /dev/null cannot be opened.
    pub fn tell(self, keep_stderr: bool) -> Result<()> {
        let Some(mut pipe) = self.0 else { return Ok(()) };
        set_parent_process_death_signal(None)?;
        null_stdio(keep_stderr)?;
        // The parent may have been killed meanwhile: serve all the same.
        let _ = pipe.write_all(b"R");
        Ok(())
    }
}

/// Points stdin and stdout, and stderr unless it is kept, to /dev/null.
fn null_stdio(keep_stderr: bool) -> Result<()> {
    let null = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")
        .context("cannot open /dev/null")?;
    dup2_stdin(null.as_fd())?;
    dup2_stdout(null.as_fd())?;
    if !keep_stderr {
        dup2_stderr(null.as_fd())?;
    }
    Ok(())
}

/// Forks. Returns in the child only; the parent waits for it and exits. A signal that ends the parent before the
/// child serves ends the child too.
///
/// The process must have one thread.
///
/// # Errors
/// If the kernel refuses.
pub fn fork_to_background() -> Result<Ready> {
    let (mut reader, writer) = std::io::pipe().context("cannot make a pipe")?;
    let parent = Pid::this();
    // SAFETY: called before any thread is started, so the child may do all that the parent may.
    match unsafe { fork() }.context("cannot fork")? {
        ForkResult::Child => {
            drop(reader);
            set_parent_process_death_signal(Some(rustix::process::Signal::TERM))?;
            if getppid() != parent {
                exit(1);
            }
            setsid().context("setsid")?;
            chdir("/").context("chdir to /")?;
            Ok(Ready(Some(writer)))
        }
        ForkResult::Parent { child } => {
            drop(writer);
            // The child has its own way to end.
            SigSet::all().thread_unblock()?;
            let mut word = [0];
            if matches!(reader.read(&mut word), Ok(1)) {
                exit(0);
            }
            match waitpid(child, None) {
                Ok(WaitStatus::Exited(_, status)) if status != 0 => exit(status),
                _ => exit(1),
            }
        }
    }
}
