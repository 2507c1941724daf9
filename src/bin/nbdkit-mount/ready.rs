//! Telling others that the mount answers, or that it ends: a file descriptor (`--ready-fd`) and systemd (sd_notify(3)).

#![allow(unsafe_code)]

use std::{
    ffi::OsStr,
    fs::File,
    io::Write,
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

/// The descriptor of `--ready-fd`.
#[derive(Debug)]
pub(crate) struct ReadyFd(File);

impl ReadyFd {
    /// Takes the descriptor over. To be called once for a number, before files are opened that could get it.
    ///
    /// # Errors
    /// A number that is no open file, or that of standard input, output or error.
    pub(crate) fn take(number: RawFd) -> Result<Self> {
        ensure!(number > 2, "--ready-fd {number}: give the number of an open file from 3 up");
        // SAFETY: the number is only asked about, and refused unless it is open.
        let fd = unsafe { BorrowedFd::borrow_raw(number) };
        rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC)
            .with_context(|| format!("--ready-fd {number} is not an open file"))?;
        // SAFETY: it is open, it was handed to this program for this, and nothing else in it has that number.
        let fd = unsafe { OwnedFd::from_raw_fd(number) };
        Ok(ReadyFd(fd.into()))
    }

    /// Writes a newline and closes it.
    pub(crate) fn tell(mut self) {
        if let Err(e) = self.0.write_all(b"\n") {
            log::warn!("--ready-fd: {e}");
        }
    }
}

/// Tells the service manager, if one waits.
pub(crate) fn notify(message: &str) {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET") else { return };
    if let Err(e) = send(&socket, message) {
        log::warn!("cannot tell the service manager ({}): {e}", socket.display());
    }
}

fn send(socket: &OsStr, message: &str) -> std::io::Result<()> {
    let address = match socket.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(socket)?,
    };
    UnixDatagram::unbound()?.send_to_addr(message.as_bytes(), &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_are_not_open() {
        for number in [-1, 0, 2, 9999] {
            assert!(ReadyFd::take(number).is_err(), "{number}");
        }
    }

    #[test]
    fn the_service_manager_hears() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        send(path.as_os_str(), "READY=1").unwrap();
        let mut text = [0; 16];
        assert_eq!(manager.recv(&mut text).unwrap(), 7);
        assert_eq!(&text[..7], b"READY=1");
    }
}
