//! The sockets that clients come to.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use anyhow::{Context as _, bail, ensure};
use nbdkit_core::Peer;
use rustix::{
    io::Errno,
    net::{
        AddressFamily, SocketAddrAny, SocketAddrUnix, SocketFlags, SocketType, acceptfrom_with, bind,
        getpeername, getsockname, listen, socket_with, sockopt,
    },
};

/// Connections that may wait to be accepted; the kernel has a limit of its own.
const BACKLOG: i32 = 4096;
/// Bytes that a Unix socket takes in each direction.
const UNIX_BUFFER: usize = 4 << 20;
/// `VMADDR_CID_ANY`.
const ANY_CID: u32 = u32::MAX;
/// Longest path of a Unix socket, in bytes.
pub const UNIX_PATH_MAX: usize = 107;

/// Which kinds of internet addresses to listen on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Family {
    /// Both.
    #[default]
    Any,
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    fn takes(self, address: &IpAddr) -> bool {
        match self {
            Family::Any => true,
            Family::V4 => address.is_ipv4(),
            Family::V6 => address.is_ipv6(),
        }
    }
}

/// A socket that clients can connect to.
#[derive(Debug)]
pub struct Listener(OwnedFd);

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Listener {
    /// The TCP port, if it is a TCP socket.
    pub fn local_port(&self) -> Option<u16> {
        let address = getsockname(&self.0).ok()?;
        SocketAddr::try_from(address).ok().map(|a| a.port())
    }

    /// Takes a client that waits.
    pub(crate) fn accept(&self) -> Result<(OwnedFd, Peer), Errno> {
        let (socket, _) = acceptfrom_with(&self.0, SocketFlags::CLOEXEC)?;
        let peer = peer(socket.as_fd());
        Ok((socket, peer))
    }
}

/// Who is at the other end of a socket.
pub(crate) fn peer(socket: BorrowedFd<'_>) -> Peer {
    let family = getsockname(socket).map(|a: SocketAddrAny| a.address_family());
    match family {
        Ok(AddressFamily::UNIX) => match sockopt::socket_peercred(socket) {
            Ok(cred) => Peer::Unix {
                pid: cred.pid.as_raw_nonzero().get(),
                uid: cred.uid.as_raw(),
                gid: cred.gid.as_raw(),
            },
            Err(_) => Peer::Other,
        },
        Ok(AddressFamily::INET | AddressFamily::INET6) => match getpeername(socket) {
            Ok(Some(address)) => SocketAddr::try_from(address).map_or(Peer::Other, Peer::Tcp),
            _ => Peer::Other,
        },
        Ok(AddressFamily::VSOCK) => {
            match nix::sys::socket::getpeername::<nix::sys::socket::VsockAddr>(socket.as_raw_fd()) {
                Ok(address) => Peer::Vsock { cid: address.cid(), port: address.port() },
                Err(_) => Peer::Other,
            }
        }
        _ => Peer::Other,
    }
}

/// Sets what a client's socket should have. A socket that does not know an option works without it.
pub(crate) fn prepare(socket: &OwnedFd, peer: &Peer, keepalive: bool) {
    match peer {
        Peer::Unix { .. } => {
            // The kernel's limit is far below; with the right to pass it, pass it.
            if sockopt::set_socket_send_buffer_size_force(socket, UNIX_BUFFER).is_err() {
                let _ = sockopt::set_socket_send_buffer_size(socket, UNIX_BUFFER);
            }
            if sockopt::set_socket_recv_buffer_size_force(socket, UNIX_BUFFER).is_err() {
                let _ = sockopt::set_socket_recv_buffer_size(socket, UNIX_BUFFER);
            }
        }
        Peer::Tcp(_) => {
            let _ = sockopt::set_tcp_nodelay(socket, true);
            if keepalive {
                let _ = sockopt::set_socket_keepalive(socket, true);
            }
        }
        _ => {}
    }
}

/// A socket that was made by another: systemd, or a parent.
pub fn from_fd(fd: OwnedFd) -> Listener {
    // A client that leaves between poll and accept must not block us; without this it merely might.
    if let Ok(flags) = rustix::fs::fcntl_getfl(&fd) {
        let _ = rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK);
    }
    Listener(fd)
}

fn stream_socket(family: AddressFamily) -> Result<OwnedFd, Errno> {
    socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)
}

/// Listens on a TCP port of `host` (None: of all addresses). `port` is a number or a service; with 0 the kernel
/// chooses one, the same for all addresses.
///
/// # Errors
/// When the host or the service is not known, or no address can be listened on: one line for people.
pub fn tcp(host: Option<&str>, port: &str, family: Family) -> anyhow::Result<Vec<Listener>> {
    let mut number = port_number(port)?;
    let addresses: Vec<IpAddr> = match host {
        None => vec![Ipv6Addr::UNSPECIFIED.into(), Ipv4Addr::UNSPECIFIED.into()],
        Some(host) => {
            let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
            let found = (bare, number).to_socket_addrs();
            found.with_context(|| format!("cannot find the address of '{host}'"))?.map(|a| a.ip()).collect()
        }
    };
    let mut addresses: Vec<_> = addresses.into_iter().filter(|a| family.takes(a)).collect();
    let mut seen = std::collections::HashSet::new();
    addresses.retain(|a| seen.insert(*a));
    ensure!(!addresses.is_empty(), "'{}' has no address of the family asked for", host.unwrap_or_default());
    let mut listeners = Vec::new();
    for address in addresses {
        match tcp_on(SocketAddr::new(address, number)) {
            Ok(listener) => {
                number = listener.local_port().unwrap_or(number);
                listeners.push(listener);
            }
            // A machine need not have both kinds of addresses.
            Err(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL) if host.is_none() => {}
            Err(Errno::ADDRINUSE) => {
                bail!("cannot listen on port {number}: it is in use; choose another with -p, or 0 for any")
            }
            Err(Errno::ACCESS) => {
                bail!("cannot listen on port {number}: permission denied; choose one above 1023 with -p")
            }
            Err(e) => {
                return Err(io::Error::from(e))
                    .with_context(|| format!("cannot listen on {address} port {number}"));
            }
        }
    }
    ensure!(!listeners.is_empty(), "cannot listen on port {number}: the machine has no such addresses");
    Ok(listeners)
}

fn tcp_on(address: SocketAddr) -> Result<Listener, Errno> {
    let family = if address.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
    let socket = stream_socket(family)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    bind(&socket, &address)?;
    listen(&socket, BACKLOG)?;
    Ok(Listener(socket))
}

fn port_number(port: &str) -> anyhow::Result<u16> {
    if port.bytes().all(|b| b.is_ascii_digit()) && !port.is_empty() {
        return port.parse().map_err(|_| anyhow::anyhow!("port {port} is not between 0 and 65535"));
    }
    let services = std::fs::read_to_string("/etc/services").unwrap_or_default();
    service(&services, port)
        .with_context(|| format!("port '{port}' is neither a number nor a TCP service in /etc/services"))
}

/// The TCP port of a service, in the format of services(5).
fn service(services: &str, wanted: &str) -> Option<u16> {
    services.lines().find_map(|line| {
        let mut words = line.split('#').next()?.split_whitespace();
        let (name, port) = (words.next()?, words.next()?);
        let port = port.strip_suffix("/tcp")?.parse().ok()?;
        (name == wanted || words.any(|alias| alias == wanted)).then_some(port)
    })
}

/// Listens on a Unix socket, which is made at `path`. A socket that a server left there when it ended is replaced.
///
/// # Errors
/// When the path is too long or taken, or the socket cannot be made there: one line for people.
pub fn unix(path: &Path) -> anyhow::Result<Listener> {
    if is_stale(path) {
        // If it is gone by now, so much the better; if not, that is an error below.
        let _ = std::fs::remove_file(path);
    }
    private(path)
}

/// Whether there is a socket that nobody listens on any more: a connect is refused.
fn is_stale(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
    let refuses = || {
        let socket = stream_socket(AddressFamily::UNIX).ok()?;
        let address = SocketAddrUnix::new(path).ok()?;
        Some(rustix::net::connect(&socket, &address) == Err(Errno::CONNREFUSED))
    };
    is_socket && refuses().unwrap_or_default()
}

/// As [`unix`], but leaves alone what is there: for a name that was chosen by chance.
///
/// # Errors
/// As `unix`.
pub fn private(path: &Path) -> anyhow::Result<Listener> {
    let length = path.as_os_str().len();
    let shown = path.display();
    ensure!(
        length <= UNIX_PATH_MAX,
        "the socket path '{shown}' has {length} bytes and the limit is {UNIX_PATH_MAX}: choose a shorter one"
    );
    ensure!(!path.as_os_str().as_bytes().is_empty(), "the socket path is empty");
    let failed = || format!("cannot listen on the socket '{shown}'");
    let address = SocketAddrUnix::new(path).map_err(io::Error::from).with_context(failed)?;
    let socket = stream_socket(AddressFamily::UNIX).map_err(io::Error::from).with_context(failed)?;
    match bind(&socket, &address) {
        Err(Errno::ADDRINUSE) => {
            let is_socket = std::os::unix::net::UnixStream::connect(path).is_ok();
            match is_socket {
                true => {
                    bail!("cannot listen on '{shown}': another server listens there; choose another path")
                }
                false => bail!(
                    "cannot listen on '{shown}': there is a file of that name; remove it or choose another path"
                ),
            }
        }
        result => result.map_err(io::Error::from).with_context(failed)?,
    }
    listen(&socket, BACKLOG).map_err(io::Error::from).with_context(failed)?;
    Ok(Listener(socket))
}

/// Listens on a port of AF_VSOCK, for clients in virtual machines and on the host.
///
/// # Errors
/// When the kernel does not have it or the port is taken.
pub fn vsock(port: u32) -> anyhow::Result<Listener> {
    use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, listen, socket};
    let failed = || format!("cannot listen on AF_VSOCK port {port}");
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Vsock, SockType::Stream, flags, None).with_context(failed)?;
    bind(fd.as_raw_fd(), &VsockAddr::new(ANY_CID, port)).with_context(failed)?;
    listen(&fd, Backlog::MAXCONN).with_context(failed)?;
    Ok(Listener(fd))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_and_services() {
        assert_eq!(port_number("0").unwrap(), 0);
        assert!(port_number("65536").unwrap_err().to_string().contains("65535"));
        assert!(port_number("").is_err());
        let services = "# x\nnbd 10809/tcp  disk # block\nnbd 10810/udp\nhttp 80/tcp www";
        assert_eq!(service(services, "nbd"), Some(10809));
        assert_eq!(service(services, "disk"), Some(10809));
        assert_eq!(service(services, "www"), Some(80));
        assert_eq!(service(services, "block"), None);
    }

    #[test]
    fn one_port_for_all_addresses_and_in_use() {
        let listeners = tcp(None, "0", Family::Any).unwrap();
        let port = listeners[0].local_port().unwrap();
        assert!(listeners.iter().all(|l| l.local_port() == Some(port)));
        let error = tcp(None, &port.to_string(), Family::Any).unwrap_err().to_string();
        assert!(error.contains("in use"), "{error}");
    }

    #[test]
    fn unix_paths() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = unix(&path).unwrap();
        assert_eq!(listener.local_port(), None);
        assert!(unix(&path).unwrap_err().to_string().contains("another server listens there"));
        // One that is not listened on any more is replaced, and nothing else.
        drop(listener);
        drop(unix(&path).unwrap());
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "precious").unwrap();
        assert!(unix(&path).unwrap_err().to_string().contains("remove it"));
        let long = dir.path().join("x".repeat(108));
        assert!(unix(&long).unwrap_err().to_string().contains("107"));
    }
}
