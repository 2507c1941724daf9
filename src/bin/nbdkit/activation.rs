//! Socket activation: listening sockets that the service manager made, and telling it that the server is ready.
//!
//! The protocol is that of sd_listen_fds(3) and sd_notify(3), which needs no library.

#![allow(unsafe_code)]

use std::{
    ffi::OsStr,
    fs::File,
    os::{
        fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd},
        linux::net::SocketAddrExt,
        unix::{
            ffi::OsStrExt,
            net::{SocketAddr, UnixDatagram},
        },
    },
};

use anyhow::{Context as _, Result, ensure};
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
    // SAFETY: the number is only asked about, not used as a file.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    let listens = rustix::net::sockopt::socket_acceptconn(borrowed).with_context(refused)?;
    ensure!(listens, refused());
    rustix::io::fcntl_setfd(borrowed, rustix::io::FdFlags::CLOEXEC).with_context(refused)?;
    // SAFETY: the environment gave the open descriptor to this process, and nothing else in it owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Tells the service manager, if there is one that listens, that clients are served.
///
/// # Errors
/// If there is one and it cannot be told.
pub(crate) fn notify() -> Result<()> {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty()) else { return Ok(()) };
    let told =
        address(&path).and_then(|address| UnixDatagram::unbound()?.send_to_addr(b"READY=1\n", &address));
    told.map(drop).with_context(|| format!("cannot notify the service manager at {}", path.display()))
}

/// An address of the file system, or after `@` an abstract one.
fn address(path: &OsStr) -> std::io::Result<SocketAddr> {
    match path.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(path),
    }
}

/// Takes the descriptor for `--ready-fd`.
fn ready(fd: RawFd, sockets: usize) -> Result<File> {
    ensure!(
        fd > 2,
        "--ready-fd={fd}: standard input, output and error cannot be used: choose a number above 2"
    );
    let used = sockets.try_into().is_ok_and(|sockets: RawFd| fd < FIRST + sockets);
    ensure!(!used, "--ready-fd={fd} is a socket of socket activation: choose another number");
    // SAFETY: the number is only asked about, not used as a file.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    rustix::io::fcntl_setfd(borrowed, rustix::io::FdFlags::CLOEXEC)
        .with_context(|| format!("--ready-fd={fd}: the file descriptor is not open"))?;
    // SAFETY: it is open, and nothing in this process has opened it, nor owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
}
