//! Where a server is, and how to get a socket to it.

use std::{
    fmt, io,
    net::{TcpStream, ToSocketAddrs},
    os::fd::{AsRawFd, OwnedFd},
    path::PathBuf,
    time::{Duration, Instant},
};

use nbdkit_core::{Errno, Error, Result, sync::Mutex};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, sockopt},
};

use super::command::Command;

/// The port of NBD.
pub(super) const DEFAULT_PORT: u16 = 10809;
/// Between two tries at a Unix socket whose server is busy.
const PAUSE: Duration = Duration::from_millis(10);

/// An address of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Address {
    Tcp { host: String, port: u16 },
    Unix(PathBuf),
    Vsock { cid: u32, port: u32 },
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Address::Tcp { host, port } => write!(f, "{host}:{port}"),
            Address::Unix(path) => write!(f, "{}", path.display()),
            Address::Vsock { cid, port } => write!(f, "vsock {cid}:{port}"),
        }
    }
}

/// What is connected to.
#[derive(Debug)]
pub(super) enum Target {
    Address(Address),
    /// A socket that the caller has passed, until it is taken.
    Socket(Mutex<Option<OwnedFd>>),
    /// A server that the plugin runs.
    Command(Command),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Address(address) => address.fmt(f),
            Target::Socket(_) => f.write_str("the socket of socket-fd="),
            Target::Command(command) => command.fmt(f),
        }
    }
}

impl Target {
    /// Whether one connection is all that can be had.
    pub(super) fn is_single(&self) -> bool {
        matches!(self, Target::Socket(_))
    }

    /// The name that a certificate of the server has to have.
    pub(super) fn host(&self) -> Option<&str> {
        match self {
            Target::Address(Address::Tcp { host, .. }) => Some(host),
            _ => None,
        }
    }

    /// A connected socket, which does not block.
    ///
    /// # Errors
    /// `ENOTCONN` and a sentence about what is wrong; `ETIMEDOUT` after the deadline.
    pub(super) fn connect(&self, deadline: Instant) -> Result<OwnedFd> {
        let socket = match self {
            Target::Address(Address::Tcp { host, port }) => tcp(host, *port, deadline),
            Target::Address(Address::Unix(path)) => unix(path, deadline),
            Target::Address(Address::Vsock { cid, port }) => vsock(*cid, *port, deadline),
            Target::Socket(fd) => fd.lock().take().ok_or_else(|| {
                Error::new(Errno::ENOTCONN, "the connection of socket-fd= has ended, and there is no other")
            }),
            Target::Command(command) => command.connect(deadline),
        }?;
        let prepared = || -> io::Result<()> {
            rustix::io::ioctl_fionbio(&socket, true)?;
            if matches!(sockopt::socket_domain(&socket)?, AddressFamily::INET | AddressFamily::INET6) {
                sockopt::set_tcp_nodelay(&socket, true)?;
                sockopt::set_socket_keepalive(&socket, true)?;
            }
            Ok(())
        };
        prepared().map_err(|e| self.failed(&e))?;
        Ok(socket)
    }

    fn failed(&self, e: &io::Error) -> Error {
        Error::new(Errno::ENOTCONN, format!("cannot use {self}: {e}"))
    }
}

fn refused(what: impl fmt::Display, e: &io::Error) -> Error {
    let hint = match e.kind() {
        io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => ": no server listens there",
        _ => "",
    };
    let errno = if e.kind() == io::ErrorKind::TimedOut { Errno::ETIMEDOUT } else { Errno::ENOTCONN };
    Error::new(errno, format!("cannot connect to {what}{hint}: {e}"))
}

fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

fn tcp(host: &str, port: u16, deadline: Instant) -> Result<OwnedFd> {
    let what = Address::Tcp { host: host.into(), port };
    let addresses = (host, port).to_socket_addrs().map_err(|e| {
        Error::new(Errno::ENOTCONN, format!("cannot find the host {host}: check the name, or DNS: {e}"))
    })?;
    let mut failure = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for address in addresses {
        match left(deadline).and_then(|left| TcpStream::connect_timeout(&address, left)) {
            Ok(stream) => return Ok(stream.into()),
            Err(e) => failure = e,
        }
    }
    Err(refused(what, &failure))
}

/// Waits until a socket that was connecting is connected.
fn connected(socket: &OwnedFd, deadline: Instant) -> io::Result<()> {
    let mut fds = [PollFd::new(socket, PollFlags::OUT)];
    loop {
        let left = left(deadline)?;
        let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        match poll(&mut fds, Some(&left)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => break,
            Err(e) => return Err(e.into()),
        }
    }
    sockopt::socket_error(socket)?.map_err(io::Error::from)
}

/// Connects to a Unix socket.
///
/// # Errors
/// As [`Target::connect`].
pub(super) fn unix(path: &std::path::Path, deadline: Instant) -> Result<OwnedFd> {
    let failed = |e: io::Error| refused(format!("the socket {}", path.display()), &e);
    let address = SocketAddrUnix::new(path).map_err(|e| failed(e.into()))?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket =
        socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(|e| failed(e.into()))?;
    loop {
        match connect(&socket, &address) {
            Ok(()) => return Ok(socket),
            // The server has not accepted those before us; nothing tells when it has.
            Err(rustix::io::Errno::AGAIN) => {
                let left = left(deadline).map_err(failed)?;
                std::thread::sleep(PAUSE.min(left));
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(failed(e.into())),
        }
    }
}

fn vsock(cid: u32, port: u32, deadline: Instant) -> Result<OwnedFd> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket};
    let failed = |e: io::Error| refused(Address::Vsock { cid, port }, &e);
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Vsock, SockType::Stream, flags, None).map_err(|e| failed(e.into()))?;
    match connect(fd.as_raw_fd(), &VsockAddr::new(cid, port)) {
        Ok(()) => {}
        Err(Errno::EINPROGRESS) => connected(&fd, deadline).map_err(failed)?,
        Err(e) => return Err(failed(e.into())),
    }
    Ok(fd)
}

/// The number of a port, by itself or by the name of its service.
///
/// # Errors
/// It is neither.
pub(super) fn port_number(text: &str) -> anyhow::Result<u32> {
    if let Ok(number) = text.parse() {
        return Ok(number);
    }
    anyhow::ensure!(
        !text.is_empty() && text.starts_with(|c: char| c.is_ascii_alphabetic()),
        "port={text}: give a number, or the name of a service in /etc/services"
    );
    let services = std::fs::read_to_string("/etc/services").unwrap_or_default();
    let line = services.lines().find_map(|line| {
        let mut words = line.split('#').next()?.split_whitespace();
        let (name, number) = (words.next()?, words.next()?.strip_suffix("/tcp")?);
        (name == text || words.any(|alias| alias == text)).then(|| number.parse().ok())?
    });
    line.ok_or_else(|| {
        anyhow::anyhow!("port={text}: no such service in /etc/services; give the port's number")
    })
}
