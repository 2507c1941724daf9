//! `--auto-unmount`: a second process that unmounts when the server dies without having done so.
//!
//! fusermount3 has an option for that, which needs `allow_root` and with it `user_allow_other`. This needs nothing.

#![allow(unsafe_code)]

use std::{
    io::{PipeWriter, Read, Write},
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::PathBuf,
    process::exit,
};

use anyhow::{Context as _, Result};
use nbdkit_fuse::UnmountMode;
use nix::{
    sys::signal::{SigSet, Signal},
    unistd::{ForkResult, dup2_stderr, dup2_stdin, dup2_stdout, fork, setsid},
};

/// The server's end. Dropping it says that the mount is gone; a server that dies cannot say that.
#[derive(Debug)]
pub(crate) struct Watcher {
    pipe: PipeWriter,
}

impl Watcher {
    /// Starts the process. To be called before any thread is started, and by the process that serves.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(crate) fn start() -> Result<Self> {
        let (mut reader, pipe) = std::io::pipe().context("cannot make a pipe")?;
        // SAFETY: called before any thread is started, so the child may do all that the parent may.
        match unsafe { fork() }.context("cannot fork")? {
            ForkResult::Parent { .. } => Ok(Watcher { pipe }),
            ForkResult::Child => {
                drop(pipe);
                let _ = setsid();
                // What ends the server must not end its watcher first.
                let signals: SigSet =
                    [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT].into_iter().collect();
                let _ = signals.thread_block();
                let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null");
                if let Ok(null) = &null {
                    let _ = (dup2_stdin(null), dup2_stdout(null), dup2_stderr(null));
                }
                drop(null);
                let mut told = Vec::new();
                let _ = reader.read_to_end(&mut told);
                after(&told);
                exit(0)
            }
        }
    }

    /// Says what is mounted, and where.
    pub(crate) fn watch(&mut self, device: &str, target: &std::path::Path) {
        let text = [device.as_bytes(), b"\0", target.as_os_str().as_bytes(), b"\0"].concat();
        if let Err(e) = self.pipe.write_all(&text) {
            log::warn!("--auto-unmount: {e}");
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let _ = self.pipe.write_all(b"gone");
    }
}

/// The server has ended: `told` is all it said.
fn after(told: &[u8]) {
    let mut words = told.split(|b| *b == 0);
    let (Some(device), Some(target), Some(b"")) = (words.next(), words.next(), words.next()) else { return };
    let target = PathBuf::from(std::ffi::OsString::from_vec(target.to_vec()));
    let mounts = nbdkit_fuse::mounts().unwrap_or_default();
    let top = mounts.iter().rev().find(|mount| mount.target == target);
    if top.is_some_and(|mount| mount.device.as_bytes() == device) {
        let _ = nbdkit_fuse::unmount(&target, UnmountMode::Lazy);
    }
}
