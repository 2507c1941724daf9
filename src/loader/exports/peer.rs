//! Who the client is.

use std::{
    ffi::{c_char, c_int},
    net::SocketAddr,
    ptr,
};

use nbdkit_core::{Certificate, Client, Errno, Peer};
use nix::{
    libc,
    sys::socket::{SockaddrIn, SockaddrIn6, SockaddrLike, UnixAddr, VsockAddr},
};

use super::{messages::error_with, strings::allocate};
use crate::{context::current, panic::boundary, strings::c_string};

/// Looks at the client of this thread; None after an error was reported.
fn of_client<T>(what: &str, look: impl FnOnce(&Client) -> T) -> Option<T> {
    let seen = current(|frame| frame.and_then(|f| f.scope.client).map(|client| look(client)));
    if seen.is_none() {
        error_with(Errno::ENOTCONN, format!("{what}: this thread serves no connection"));
    }
    seen
}

/// Answers about the client of this thread; None after an error was reported.
fn ask<T>(what: &str, answer: impl FnOnce(&Peer) -> Option<T>) -> Option<T> {
    let answer = of_client(what, |client| answer(&client.peer))?;
    if answer.is_none() {
        error_with(Errno::EOPNOTSUPP, format!("{what}: not known of this kind of client"));
    }
    answer
}

/// A copy that C may free.
fn copy(text: &str) -> *mut c_char {
    allocate(&c_string(text.as_bytes()))
}

/// The address of the client, as getpeername(2) gives it.
///
/// # Safety
/// Room for `*length` bytes, and a length.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn nbdkit_peer_name(
    address: *mut libc::sockaddr,
    length: *mut libc::socklen_t,
) -> c_int {
    boundary(-1, || {
        if address.is_null() || length.is_null() {
            error_with(Errno::EFAULT, "nbdkit_peer_name: there is no place for the address");
            return -1;
        }
        // SAFETY: the caller promises both.
        let give = |from: &dyn Address| unsafe { from.give(address, length) };
        let given = ask("nbdkit_peer_name", |peer| {
            Some(match peer {
                Peer::Tcp(SocketAddr::V4(from)) => give(&SockaddrIn::from(*from)),
                Peer::Tcp(SocketAddr::V6(from)) => give(&SockaddrIn6::from(*from)),
                Peer::Unix { .. } => give(&UnixAddr::new_unnamed()),
                Peer::Vsock { cid, port } => give(&VsockAddr::new(*cid, *port)),
                Peer::Local | Peer::Other => return None,
            })
        });
        given.unwrap_or(-1)
    })
}

/// An address that can be copied out.
trait Address {
    /// Copies it, or as much of it as there is room for, and tells its length. Returns 0.
    ///
    /// # Safety
    /// Room for `*length` bytes at `to`.
    unsafe fn give(&self, to: *mut libc::sockaddr, length: *mut libc::socklen_t) -> c_int;
}

impl<A: SockaddrLike> Address for A {
    unsafe fn give(&self, to: *mut libc::sockaddr, length: *mut libc::socklen_t) -> c_int {
        // SAFETY: the caller promises it.
        let room = unsafe { length.read() };
        let count = room.min(self.len()) as usize;
        // SAFETY: both have at least that many, and they are apart.
        unsafe { ptr::copy_nonoverlapping(self.as_ptr().cast::<u8>(), to.cast(), count) };
        // SAFETY: as above.
        unsafe { length.write(self.len()) };
        0
    }
}

fn credential(what: &str, get: impl FnOnce(i32, u32, u32) -> i64) -> i64 {
    boundary(-1, || {
        let answer = ask(what, |peer| match peer {
            Peer::Unix { pid, uid, gid } => Some(get(*pid, *uid, *gid)),
            _ => None,
        });
        answer.unwrap_or(-1)
    })
}

/// The process ID of a client on a Unix socket; else -1.
#[unsafe(no_mangle)]
pub(super) extern "C" fn nbdkit_peer_pid() -> i64 {
    credential("nbdkit_peer_pid", |pid, _, _| if pid > 0 { pid.into() } else { -1 })
}

/// The user ID of a client on a Unix socket; else -1.
#[unsafe(no_mangle)]
pub(super) extern "C" fn nbdkit_peer_uid() -> i64 {
    credential("nbdkit_peer_uid", |_, uid, _| uid.into())
}

/// The group ID of a client on a Unix socket; else -1.
#[unsafe(no_mangle)]
pub(super) extern "C" fn nbdkit_peer_gid() -> i64 {
    credential("nbdkit_peer_gid", |_, _, gid| gid.into())
}

/// The SELinux label of a client; else null.
#[unsafe(no_mangle)]
pub(super) extern "C" fn nbdkit_peer_security_context() -> *mut c_char {
    const WHAT: &str = "nbdkit_peer_security_context";
    boundary(ptr::null_mut(), || match of_client(WHAT, |client| client.security_context.get().cloned()) {
        Some(Some(label)) => copy(&label),
        Some(None) => ask(WHAT, |_| None).unwrap_or(ptr::null_mut()),
        None => ptr::null_mut(),
    })
}

/// A name of the client's certificate, empty when it showed none; null after an error was reported.
fn certificate(what: &str, name: fn(&Certificate) -> &String) -> *mut c_char {
    boundary(ptr::null_mut(), || {
        let name = of_client(what, |client| client.certificate.get().map(name).cloned().unwrap_or_default());
        name.map_or(ptr::null_mut(), |name| copy(&name))
    })
}

/// The distinguished name in the client's certificate.
#[unsafe(no_mangle)]
pub(super) extern "C" fn nbdkit_peer_tls_dn() -> *mut c_char {
    certificate("nbdkit_peer_tls_dn", |certificate| &certificate.subject)
}

/// The distinguished name of the issuer of the client's certificate.
#[unsafe(no_mangle)]
pub(super) extern "C" fn nbdkit_peer_tls_issuer_dn() -> *mut c_char {
    certificate("nbdkit_peer_tls_issuer_dn", |certificate| &certificate.issuer)
}
