//! The registry of live connections: accepting them, and ending them when the server stops.

use std::{
    collections::HashMap,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use nbdkit_core::{Chain, Client, Peer, ShutdownFlag};
use parking_lot::{Condvar, Mutex};
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, eventfd, poll},
    fs::{FileType, fstat},
    io::Errno,
};

use nbdkit_dispatch::Awake;

use crate::{
    AuxiliaryDescriptor, Config, Listener, complaints, connection, listen,
    stream::{Pipes, Socket, Stream},
};

/// How long requests in flight may take to end when the server stops.
const GRACE: Duration = Duration::from_secs(3);
/// How long connections that were cut off may take to end.
const CUT_OFF: Duration = Duration::from_secs(2);
/// How often, while others stay, the memory of connections that have left is given back.
const RECLAIM: Duration = Duration::from_secs(1);
/// How long to wait before accepting again when that failed for want of something.
const SHORTAGE: Duration = Duration::from_millis(100);

/// See the module.
pub(crate) struct Server {
    chain: Arc<Chain>,
    config: Config,
    stop: Arc<ShutdownFlag>,
    awake: Awake,
    registry: Arc<Registry>,
}

/// The live connections. Apart from the server, since a connection drops its reference to that, and to the chain with it,
/// before it leaves the registry.
#[derive(Default)]
struct Registry {
    connections: Mutex<Connections>,
    ended: Condvar,
}

#[derive(Default)]
struct Connections {
    /// How many there have been.
    count: u64,
    live: HashMap<u64, Live>,
    /// When the allocator was asked last to give back what it keeps of those that have left.
    reclaimed: Option<Instant>,
    /// To be told when one leaves, if others wait for its place.
    left: Option<Arc<OwnedFd>>,
}

/// What is needed to end a connection from outside.
struct Live {
    client: Arc<Client>,
    stream: Arc<dyn Stream>,
}

impl Server {
    pub(crate) fn new(chain: Arc<Chain>, config: Config, stop: Arc<ShutdownFlag>) -> Arc<Self> {
        nbdkit_dispatch::reclaim::bound();
        Arc::new(Server { chain, config, stop, awake: Awake::default(), registry: Arc::default() })
    }

    /// Takes clients until the server stops.
    pub(crate) fn run(
        self: &Arc<Self>,
        listeners: &[Listener],
        auxiliary: Option<AuxiliaryDescriptor<'_>>,
    ) -> anyhow::Result<()> {
        let event = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let wake = Arc::new(eventfd(0, event).context("cannot make an event descriptor")?);
        let raised = wake.clone();
        self.registry.connections.lock().left = self.config.max_connections.map(|_| wake.clone());
        self.stop.on_raise(move || {
            let _ = rustix::io::write(&*raised, &1u64.to_ne_bytes());
        });
        while !self.stop.is_raised() {
            let open = if self.has_room() { listeners } else { &[] };
            let mut fds: Vec<_> = open.iter().map(|l| PollFd::new(l, PollFlags::IN)).collect();
            fds.push(PollFd::new(&*wake, PollFlags::IN));
            fds.extend(auxiliary.map(|auxiliary| PollFd::from_borrowed_fd(auxiliary.fd, PollFlags::IN)));
            match poll(&mut fds, None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(e) => return Err(e).context("cannot wait for clients"),
            }
            let is_ready = fds.get(open.len() + 1).is_some_and(|fd| !fd.revents().is_empty());
            if let Some(auxiliary) = auxiliary.filter(|_| is_ready) {
                (auxiliary.ready)();
            }
            // If that was it, a client left or the server stops.
            let _ = rustix::io::read(&*wake, &mut [0; 8]);
            for (listener, fd) in open.iter().zip(&fds) {
                if !fd.revents().is_empty() && self.has_room() {
                    self.accept(listener);
                }
            }
        }
        self.wind_down();
        Ok(())
    }

    /// Whether one more client may be served.
    fn has_room(&self) -> bool {
        self.config.max_connections.is_none_or(|max| self.registry.connections.lock().live.len() < max)
    }

    fn accept(self: &Arc<Self>, listener: &Listener) {
        match listener.accept() {
            Ok((socket, peer)) => {
                listen::prepare(&socket, &peer, self.config.keepalive);
                self.start(Arc::new(Socket::new(socket)), peer);
            }
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
            Err(e) => {
                complaints::ACCEPT.tell(format_args!("cannot accept a connection: {e}"));
                self.stop.wait_for(SHORTAGE);
            }
        }
    }

    /// Serves one client until it or the server ends.
    pub(crate) fn run_one(self: &Arc<Self>, input: OwnedFd, output: OwnedFd) -> anyhow::Result<()> {
        let stat = |fd: &OwnedFd| fstat(fd).context("cannot use standard input and output as a connection");
        let (from, to) = (stat(&input)?, stat(&output)?);
        let socket = FileType::from_raw_mode(from.st_mode) == FileType::Socket;
        let (stream, peer): (Arc<dyn Stream>, Peer) = if socket && from.st_ino == to.st_ino {
            let peer = listen::peer(input.as_fd());
            listen::prepare(&input, &peer, self.config.keepalive);
            (Arc::new(Socket::new(input)), peer)
        } else {
            let pipes = Pipes::new(input, output).context("cannot make an event descriptor")?;
            (Arc::new(pipes), Peer::Other)
        };
        let registry = self.registry.clone();
        self.stop.on_raise(move || {
            let _connections = registry.connections.lock();
            registry.ended.notify_all();
        });
        self.start(stream, peer);
        let mut connections = self.registry.connections.lock();
        while !connections.live.is_empty() && !self.stop.is_raised() {
            self.registry.ended.wait(&mut connections);
        }
        drop(connections);
        self.wind_down();
        Ok(())
    }

    /// Starts the thread of a connection.
    fn start(self: &Arc<Self>, stream: Arc<dyn Stream>, peer: Peer) {
        let mut connections = self.registry.connections.lock();
        connections.count += 1;
        let number = connections.count;
        let client = Arc::new(Client::new(number, peer, self.stop.clone()));
        connections.live.insert(number, Live { client: client.clone(), stream: stream.clone() });
        drop(connections);
        let ended = Ended { registry: self.registry.clone(), number };
        let server = self.clone();
        let name = format!("{}[{number}]", self.chain.plugin_name());
        let thread = std::thread::Builder::new().name(name.clone()).spawn(move || {
            let _ended = ended;
            let server = server; // dropped before the connection leaves the registry
            let Server { chain, config, awake, .. } = &*server;
            connection::run(chain, config, &client, &stream, &name, awake.clone());
        });
        if let Err(e) = thread {
            complaints::ACCEPT.tell(format_args!("cannot start a thread for connection {number}: {e}"));
        }
    }

    /// Ends all connections: requests in flight first get the time to end.
    fn wind_down(&self) {
        for live in self.registry.connections.lock().live.values() {
            live.stream.close_input();
        }
        // Not under the lock: it runs what filters and plugins wait for.
        let clients: Vec<_> =
            self.registry.connections.lock().live.values().map(|l| l.client.clone()).collect();
        for client in clients {
            client.gone.raise();
        }
        if self.wait_until_none(GRACE) {
            return;
        }
        let connections = self.registry.connections.lock();
        log::debug!("{} connections did not end and are cut off", connections.live.len());
        for live in connections.live.values() {
            live.stream.close();
        }
        drop(connections);
        self.wait_until_none(CUT_OFF);
    }

    fn wait_until_none(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut connections = self.registry.connections.lock();
        while !connections.live.is_empty() {
            if self.registry.ended.wait_until(&mut connections, deadline).timed_out() {
                return connections.live.is_empty();
            }
        }
        true
    }
}

/// Removes a connection from the registry when its thread ends, however it ends.
struct Ended {
    registry: Arc<Registry>,
    number: u64,
}

impl Drop for Ended {
    fn drop(&mut self) {
        let mut connections = self.registry.connections.lock();
        let live = connections.live.remove(&self.number);
        if let Some(left) = &connections.left {
            let _ = rustix::io::write(left, &1u64.to_ne_bytes());
        }
        self.registry.ended.notify_all();
        let now = Instant::now();
        let reclaims = connections.live.is_empty()
            || connections.reclaimed.is_none_or(|then| now.duration_since(then) > RECLAIM);
        if reclaims {
            connections.reclaimed = Some(now);
        }
        drop(connections);
        if let Some(live) = live {
            live.stream.close();
        }
        if reclaims {
            nbdkit_dispatch::reclaim::all();
        }
    }
}
