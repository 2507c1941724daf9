//! Who the client is.

use std::{
    error,
    ffi::OsStr,
    mem::{MaybeUninit, offset_of},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6},
    os::{linux::net::SocketAddrExt, unix},
};

use crate::sys;

/// An address that [`peername`] can answer in.
///
/// It is implemented for [`std::net::SocketAddr`] (TCP clients) and [`std::os::unix::net::SocketAddr`] (clients of a
/// Unix socket), and with the feature `nix` for nix 0.24's `SockaddrIn`, `SockaddrIn6`, `UnixAddr` and
/// `SockaddrStorage`.
pub trait FromSockaddr: Sized {
    /// The address in the first `length` bytes of `storage`, or `None` if it is of another family.
    fn from_sockaddr(storage: &libc::sockaddr_storage, length: libc::socklen_t) -> Option<Self>;
}

/// The address of the current client.
///
/// Call it from [`Server::preconnect`](crate::Server::preconnect), [`Server::open`](crate::Server::open) or a method
/// of the handle.
///
/// ```no_run
/// # use nbdkit::*;
/// fn only_from_here() -> Result<()> {
///     match peername::<std::net::SocketAddr>() {
///         Ok(address) if address.ip().is_loopback() => Ok(()),
///         _ => Err(Error::new(libc::EPERM, "this disk is for local clients")),
///     }
/// }
/// ```
///
/// # Errors
///
/// There is no client on this thread, it has no address (`nbdkit -s`, a mount), or the address is of another family
/// than `T`.
pub fn peername<T: FromSockaddr>() -> std::result::Result<T, Box<dyn error::Error>> {
    // SAFETY: zeroes are a sockaddr_storage of the family AF_UNSPEC.
    let mut storage = unsafe { MaybeUninit::<libc::sockaddr_storage>::zeroed().assume_init() };
    let room = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
    let mut length = room;
    // SAFETY: the storage has room for every address, and length says how much.
    if unsafe { sys::nbdkit_peer_name((&raw mut storage).cast(), &raw mut length) } == -1 {
        return Err("the client's address is not known".into());
    }
    T::from_sockaddr(&storage, length.min(room))
        .ok_or_else(|| "the client's address is of another family".into())
}

impl FromSockaddr for SocketAddr {
    fn from_sockaddr(storage: &libc::sockaddr_storage, _length: libc::socklen_t) -> Option<Self> {
        match i32::from(storage.ss_family) {
            libc::AF_INET => {
                // SAFETY: a storage is larger than each kind of address, and the family says that it is this kind.
                let address = unsafe { &*(&raw const *storage).cast::<libc::sockaddr_in>() };
                let ip = Ipv4Addr::from(u32::from_be(address.sin_addr.s_addr));
                Some(SocketAddrV4::new(ip, u16::from_be(address.sin_port)).into())
            }
            libc::AF_INET6 => {
                // SAFETY: as above.
                let address = unsafe { &*(&raw const *storage).cast::<libc::sockaddr_in6>() };
                let ip = Ipv6Addr::from(address.sin6_addr.s6_addr);
                let port = u16::from_be(address.sin6_port);
                Some(SocketAddrV6::new(ip, port, address.sin6_flowinfo, address.sin6_scope_id).into())
            }
            _ => None,
        }
    }
}

impl FromSockaddr for unix::net::SocketAddr {
    fn from_sockaddr(storage: &libc::sockaddr_storage, length: libc::socklen_t) -> Option<Self> {
        if i32::from(storage.ss_family) != libc::AF_UNIX {
            return None;
        }
        // SAFETY: a storage is larger than each kind of address, and the family says that it is this kind.
        let address = unsafe { &*(&raw const *storage).cast::<libc::sockaddr_un>() };
        let name: Vec<u8> = address.sun_path.iter().map(|&byte| byte as u8).collect();
        let used = (length as usize).saturating_sub(offset_of!(libc::sockaddr_un, sun_path));
        match name.get(..used)? {
            [] => unix::net::SocketAddr::from_pathname(""),
            [0, name @ ..] => unix::net::SocketAddr::from_abstract_name(name),
            path => {
                let path = path.split(|&byte| byte == 0).next().unwrap_or_default();
                unix::net::SocketAddr::from_pathname(<OsStr as unix::ffi::OsStrExt>::from_bytes(path))
            }
        }
        .ok()
    }
}

#[cfg(feature = "nix")]
mod with_nix {
    use nix::sys::socket::{SockaddrIn, SockaddrIn6, SockaddrLike, SockaddrStorage, UnixAddr};

    macro_rules! addresses {
        ($($address:ty),*) => {
            $(impl super::FromSockaddr for $address {
                fn from_sockaddr(storage: &libc::sockaddr_storage, length: libc::socklen_t) -> Option<Self> {
                    // SAFETY: the pointer is to a whole sockaddr_storage, of which `length` bytes are the address.
                    unsafe { Self::from_raw((&raw const *storage).cast(), Some(length)) }
                }
            })*
        };
    }
    addresses!(SockaddrIn, SockaddrIn6, SockaddrStorage, UnixAddr);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Puts `bytes` after the family of an otherwise zero address.
    fn storage(family: i32, bytes: &[u8]) -> (libc::sockaddr_storage, libc::socklen_t) {
        assert!(2 + bytes.len() <= size_of::<libc::sockaddr_storage>());
        // SAFETY: zeroes are a sockaddr_storage.
        let mut storage = unsafe { MaybeUninit::<libc::sockaddr_storage>::zeroed().assume_init() };
        storage.ss_family = family as libc::sa_family_t;
        let start = (&raw mut storage).cast::<u8>();
        // SAFETY: checked above that they fit behind the two bytes of the family.
        let start = unsafe { start.add(2) };
        // SAFETY: the same.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), start, bytes.len()) };
        (storage, 2 + bytes.len() as libc::socklen_t)
    }

    fn parse<T: FromSockaddr>(family: i32, bytes: &[u8]) -> Option<T> {
        let (storage, length) = storage(family, bytes);
        T::from_sockaddr(&storage, length)
    }

    #[test]
    fn internet_addresses() {
        let v4: SocketAddr = parse(libc::AF_INET, &[0x2a, 0x39, 127, 0, 0, 1]).expect("IPv4");
        assert_eq!(v4.to_string(), "127.0.0.1:10809");
        let mut bytes = vec![0x2a, 0x39, 0, 0, 0, 0];
        bytes.extend([0; 15]);
        bytes.push(1);
        let v6: SocketAddr = parse(libc::AF_INET6, &bytes).expect("IPv6");
        assert_eq!(v6.to_string(), "[::1]:10809");
        assert!(parse::<SocketAddr>(libc::AF_UNIX, b"/x\0").is_none());
    }

    #[test]
    fn unix_addresses() {
        let parse = parse::<unix::net::SocketAddr>;
        let path = parse(libc::AF_UNIX, b"/run/x.sock\0").expect("a path");
        assert_eq!(path.as_pathname().expect("a path").to_str(), Some("/run/x.sock"));
        assert_eq!(parse(libc::AF_UNIX, b"\0name").expect("abstract").as_abstract_name(), Some(&b"name"[..]));
        assert!(parse(libc::AF_UNIX, b"").expect("unnamed").is_unnamed());
        assert!(parse(libc::AF_INET, &[0; 6]).is_none());
    }
}
