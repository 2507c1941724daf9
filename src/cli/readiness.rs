//! Telling others how far this program is: by a file descriptor that they gave it (`--ready-fd`), and the service manager
//! (sd_notify(3), which needs no library).

#![allow(unsafe_code)]

use std::{
    ffi::OsStr,
    io,
    os::{
        fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd},
        linux::net::SocketAddrExt,
        unix::{
            ffi::OsStrExt,
            net::{SocketAddr, UnixDatagram},
        },
    },
};

use anyhow::{Context as _, Result};

/// Takes over a descriptor that the parent opened for this process, so that no child gets it. To be called once for a
/// number, before files are opened that could get it.
///
/// # Errors
/// `EBADF` if it is not open.
pub fn take_fd(number: RawFd) -> io::Result<OwnedFd> {
    if number < 0 {
        return Err(rustix::io::Errno::BADF.into());
    }
    // SAFETY: the number is only asked about, not used as a file, and refused unless it is open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    rustix::io::fcntl_setfd(borrowed, rustix::io::FdFlags::CLOEXEC)?;
    // SAFETY: it is open, it was handed to this process, and nothing else in it owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Tells the service manager, if there is one that listens.
///
/// # Errors
/// If there is one and it cannot be told.
pub fn notify(message: &str) -> Result<()> {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty()) else {
        return Ok(());
    };
    send(&socket, message)
        .with_context(|| format!("cannot notify the service manager at {}", socket.display()))
}

/// Sends to an address of the file system, or after `@` an abstract one.
fn send(socket: &OsStr, message: &str) -> io::Result<()> {
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
