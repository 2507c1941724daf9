//! Socket activation: listening sockets that the service manager made, and the descriptor of `--ready-fd`.
//!
//! The protocol is that of sd_listen_fds(3), which needs no library.

#![allow(unsafe_code)]

use std::{
    ffi::OsStr,
    fs::File,
    os::fd::{OwnedFd, RawFd},
};

use anyhow::{Context as _, Result, ensure};
use nbdkit_cli::readiness;
use nbdkit_core::params;

/// The first descriptor that is handed over.
const FIRST: RawFd = 3;
/// As many as may be handed over.
const MAX: RawFd = 16;
/// What tells of them, and is not for the children of the server.
const VARIABLES: [&str; 3] = ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"];

/// The descriptors that the parent opened for this process.
#[derive(Debug, Default)]
pub(crate) struct Inherited {
    /// Listening sockets; none without socket activation.
    pub(crate) sockets: Vec<OwnedFd>,
    /// What to tell of readiness.
    pub(crate) ready: Option<File>,
}

impl Inherited {
    /// Takes them, so that no child of the server gets them. Call it once, before anything is opened and the first
    /// thread is started.
    ///
    /// # Errors
    /// For a count of sockets that is out of range, for what is not a listening socket, and for a `ready_fd` that is not
    /// open, or one of the sockets or of the standard three.
    pub(crate) fn take(ready_fd: Option<&OsStr>) -> Result<Self> {
        let sockets = sockets()?;
        let ready =
            ready_fd.map(|fd| ready(params::integer("--ready-fd", fd)?, sockets.len())).transpose()?;
        Ok(Inherited { sockets, ready })
    }
}

fn sockets() -> Result<Vec<OwnedFd>> {
    let Some(pid) = std::env::var_os("LISTEN_PID") else { return Ok(Vec::new()) };
    if pid.to_str().and_then(|pid| pid.parse().ok()) != Some(std::process::id()) {
        return Ok(Vec::new());
    }
    let Some(count) = std::env::var_os("LISTEN_FDS") else { return Ok(Vec::new()) };
    let number = count.to_str().and_then(|n| n.parse().ok()).filter(|n| (1..=MAX).contains(n));
    let number = number.with_context(|| {
        format!("socket activation: LISTEN_FDS={} is not a number from 1 to {MAX}", count.display())
    })?;
    for name in VARIABLES {
        // SAFETY: the process has one thread, so nobody reads the environment.
        unsafe { std::env::remove_var(name) };
    }
    (FIRST..FIRST + number).map(listening).collect()
}

/// Takes one descriptor, which no child will inherit.
fn listening(fd: RawFd) -> Result<OwnedFd> {
    let refused = || format!("socket activation: file descriptor {fd} is not a listening socket");
    let socket = readiness::take_fd(fd).with_context(refused)?;
    ensure!(rustix::net::sockopt::socket_acceptconn(&socket).with_context(refused)?, refused());
    Ok(socket)
}

/// Takes the descriptor for `--ready-fd`.
fn ready(fd: RawFd, sockets: usize) -> Result<File> {
    ensure!(
        fd > 2,
        "--ready-fd={fd}: standard input, output and error cannot be used: choose a number above 2"
    );
    let used = sockets.try_into().is_ok_and(|sockets: RawFd| fd < FIRST + sockets);
    ensure!(!used, "--ready-fd={fd} is a socket of socket activation: choose another number");
    let file = readiness::take_fd(fd);
    Ok(file.with_context(|| format!("--ready-fd={fd}: the file descriptor is not open"))?.into())
}
