//! Who the client is, as far as the kernel or TLS vouches for it.

use std::ffi::CStr;

use crate::{Error, Result, sys, values::taken};

macro_rules! numbers {
    ($($(#[$documentation:meta])* $function:ident = $c:ident, $what:literal;)*) => {
        $($(#[$documentation])*
        ///
        /// # Errors
        ///
        /// There is no client on this thread, or it is not connected through a Unix socket.
        pub fn $function() -> Result<i64> {
            // SAFETY: it may be called at any time and answers -1 where there is no client.
            match unsafe { sys::$c() } {
                -1 => Err(Error::new(libc::EINVAL, concat!("the client's ", $what, " is not known"))),
                number => Ok(number),
            }
        })*
    };
}
numbers! {
    /// The process ID of a client on a Unix socket.
    peer_pid = nbdkit_peer_pid, "process ID";
    /// The user ID of a client on a Unix socket.
    peer_uid = nbdkit_peer_uid, "user ID";
    /// The group ID of a client on a Unix socket.
    peer_gid = nbdkit_peer_gid, "group ID";
}

macro_rules! texts {
    ($($(#[$documentation:meta])* $function:ident = $c:literal, $what:literal;)*) => {
        $($(#[$documentation])*
        ///
        /// # Errors
        ///
        /// There is no client on this thread or it has none. `ENOTSUP`: the server is too old to tell.
        pub fn $function() -> Result<String> {
            text($c, $what)
        })*
    };
}
texts! {
    /// The security label of a client, as SELinux has it.
    peer_security_context = c"nbdkit_peer_security_context", "security context";
    /// The distinguished name in a client's TLS certificate; empty without one.
    peer_tls_dn = c"nbdkit_peer_tls_dn", "distinguished name";
    /// The distinguished name of who issued a client's TLS certificate; empty without one.
    peer_tls_issuer_dn = c"nbdkit_peer_tls_issuer_dn", "issuer";
}

fn text(function: &CStr, what: &str) -> Result<String> {
    // SAFETY: all of them have that type.
    let Some(function) = (unsafe { sys::newer_function::<sys::Text>(function) }) else {
        return Err(Error::new(libc::ENOTSUP, format!("this server is too old to tell the client's {what}")));
    };
    // SAFETY: it may be called at any time and answers null where there is no client.
    let answer = unsafe { function() };
    // SAFETY: the server allocates it for its caller.
    let answer = unsafe { taken(answer) };
    let bytes =
        answer.ok_or_else(|| Error::new(libc::EINVAL, format!("the client's {what} is not known")))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
