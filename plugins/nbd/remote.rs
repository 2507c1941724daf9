//! An export of a server: the connections to it, how to connect again, and what a lost connection means.
//!
//! Requests in flight are made again over a new connection, if there is to be one: each of NBD's may be done twice. What
//! cannot be repaired is the loss of writes that the server had acknowledged and nobody had flushed: the server may have
//! forgotten them when it ended. So the flush that would claim that they are durable fails, once, as fsync(2) would.

use std::{
    ffi::{OsStr, OsString},
    sync::{
        Arc, Weak,
        atomic::{
            AtomicBool, AtomicU64, AtomicUsize,
            Ordering::{Relaxed, SeqCst},
        },
    },
    time::{Duration, Instant},
};

use nbdkit_core::{Buffers, Errno, Error, Memory, Pending, Result, ShutdownFlag, Wakes, sync::Mutex};
use nbdkit_proto::{MAX_PAYLOAD, Replies, Request, cmd, export_flag};

use super::{
    flight::{Answer, Flight, Received, Who},
    handshake::{Agreed, Negotiation},
    lane::{Lane, MOST, outgoing},
    reactor::{Reactor, Reactors},
    receiver::Lost,
    target::Target,
    tls::Encryption,
    wire::Wire,
};
use crate::waiter::waiter;

/// Between two tries to connect.
const PAUSE: Duration = Duration::from_secs(1);
/// How long the requests of a client that has gone may take.
const GRACE: Duration = Duration::from_secs(3);
/// The largest data that every server takes.
const SAFE_PAYLOAD: u32 = 32 << 20;
/// Without a time limit: longer than anybody waits.
const FOREVER: Duration = Duration::from_secs(1 << 30);

/// Where exports come from.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) target: Target,
    pub(super) encryption: Encryption,
    /// How long a server may do nothing while it has something to do. None: for ever.
    pub(super) timeout: Option<Duration>,
    /// How often to try again.
    pub(super) retry: u32,
    /// Connections for each client, if the server allows it.
    pub(super) connections: usize,
}

impl Source {
    /// Greets the server.
    ///
    /// # Errors
    /// Those of the connection and of the handshake.
    pub(super) fn negotiate(&self) -> Result<Negotiation<'_>> {
        let deadline = Instant::now() + self.timeout.unwrap_or(FOREVER);
        let wire = Wire::new(self.target.connect(deadline)?);
        Negotiation::start(wire, &self.encryption, self.target.host(), deadline).map_err(|e| self.explain(e))
    }

    fn explain(&self, e: Error) -> Error {
        if let Target::Command(command) = &self.target
            && let Some(fate) = command.fate()
        {
            return fate;
        }
        e.context(&self.target)
    }

    /// Connects to an export, once.
    fn connect(&self, export: &OsStr) -> Result<(Wire, Agreed)> {
        self.negotiate()?.finish(export).map_err(|e| self.explain(e))
    }

    /// Connects to an export, as often as is wanted, unless `stop` is raised.
    ///
    /// # Errors
    /// Those of the last try.
    pub(super) fn connect_patiently(&self, export: &OsStr, stop: &ShutdownFlag) -> Result<(Wire, Agreed)> {
        let mut left = self.retry;
        loop {
            match self.connect(export) {
                Ok(connected) => return Ok(connected),
                Err(e) if left == 0 || self.target.is_single() => return Err(e),
                Err(e) => log::debug!("nbd: {e}: trying again"),
            }
            left -= 1;
            if stop.wait_for(PAUSE) {
                return Err(Error::new(Errno::ESHUTDOWN, "the client is gone"));
            }
        }
    }
}

/// See the module. Dropping it ends the connections.
pub(super) struct Remote {
    source: Arc<Source>,
    export: OsString,
    agreed: Agreed,
    lanes: Vec<Arc<Lane>>,
    buffers: Buffers,
    /// Who uses it next, which request is the next, and which connection has it.
    owners: AtomicU64,
    numbers: AtomicU64,
    next: AtomicUsize,
    /// Writes that were acknowledged, and how many of them are durable.
    acknowledged: AtomicU64,
    durable: AtomicU64,
    /// Writes may be lost, and nobody was told.
    lost: AtomicBool,
    closing: Arc<ShutdownFlag>,
    /// Those whose requests are to end, from that moment of the reactor on.
    leaving: Mutex<Vec<(u64, u64)>>,
    reactor: Arc<Reactor>,
}

impl std::fmt::Debug for Remote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Remote({:?} of {})", self.export, self.source.target)
    }
}

impl Remote {
    /// Makes use of a connection, and makes the others that there are to be.
    ///
    /// # Errors
    /// There can be no more threads or descriptors.
    pub(super) fn new(
        source: &Arc<Source>,
        export: &OsStr,
        (wire, agreed): (Wire, Agreed),
        reactors: &Reactors,
    ) -> Result<Arc<Self>> {
        let reactor = reactors.choose()?;
        let mut wires = vec![(wire, agreed.clone())];
        if source.connections > 1 && !agreed.has(export_flag::CAN_MULTI_CONN) {
            log::debug!("nbd: the server does not allow several connections, so there is one");
        } else {
            while wires.len() < source.connections && !source.target.is_single() {
                match source.connect(export).and_then(|new| same(&agreed, &new.1).map(|()| new)) {
                    Ok(new) => wires.push(new),
                    Err(e) => {
                        log::debug!("nbd: {} connections are enough: {e}", wires.len());
                        break;
                    }
                }
            }
        }
        let remote = Arc::new_cyclic(|weak: &Weak<Remote>| {
            let lane = |_: &(Wire, Agreed)| {
                let shared = reactor.shared();
                shared.add(|token| Arc::new(Lane::new(token, weak.clone(), shared.clone())))
            };
            Remote {
                source: source.clone(),
                export: export.to_owned(),
                agreed,
                lanes: wires.iter().map(lane).collect(),
                buffers: Buffers::default(),
                owners: AtomicU64::new(0),
                numbers: AtomicU64::new(0),
                next: AtomicUsize::new(0),
                acknowledged: AtomicU64::new(0),
                durable: AtomicU64::new(0),
                lost: AtomicBool::new(false),
                closing: Arc::default(),
                leaving: Mutex::default(),
                reactor,
            }
        });
        for (lane, (wire, agreed)) in remote.lanes.iter().zip(wires) {
            lane.install(wire, &agreed)?;
        }
        Ok(remote)
    }

    pub(super) fn agreed(&self) -> &Agreed {
        &self.agreed
    }

    /// Whether there is one connection: what it has flushed it has flushed for all who use it.
    pub(super) fn has_one_connection(&self) -> bool {
        self.lanes.len() == 1
    }

    /// Most bytes of data in a request.
    pub(super) fn max_payload(&self) -> u64 {
        let told = self.agreed.block_size.maximum;
        let most = if told == 0 { SAFE_PAYLOAD } else { told.min(MAX_PAYLOAD) };
        self.whole(most.into())
    }

    /// Most bytes in a request without data.
    pub(super) fn max_range(&self) -> u64 {
        match self.agreed.replies {
            Replies::Extended => i64::MAX as u64,
            _ => self.whole(u32::MAX.into()),
        }
    }

    /// Of so many bytes the whole blocks.
    fn whole(&self, bytes: u64) -> u64 {
        bytes - bytes % u64::from(self.agreed.block_size.minimum.max(1))
    }

    /// A number for one more user.
    pub(super) fn owner(&self) -> u64 {
        self.owners.fetch_add(1, Relaxed)
    }

    fn lane(&self) -> &Arc<Lane> {
        match &*self.lanes {
            [only] => only,
            lanes => &lanes[self.next.fetch_add(1, Relaxed) % lanes.len()],
        }
    }

    /// The connection for a request that is to be started. None: there are enough under way.
    pub(super) fn free_lane(&self) -> Option<&Arc<Lane>> {
        let lane = self.lane();
        (lane.len() < MOST).then_some(lane)
    }

    /// Starts a request whose data was made ready for it.
    fn submit(&self, lane: &Arc<Lane>, request: Request, owner: u64, who: Who, ready: Ready<'_>) {
        let Ready { memory, outgoing, data } = ready;
        let flight = Flight {
            request,
            number: self.numbers.fetch_add(1, Relaxed),
            owner,
            who,
            memory,
            data,
            covers: self.acknowledged.load(SeqCst),
            received: Received::default(),
            status: Vec::new(),
            failure: None,
        };
        lane.submit(flight, outgoing);
    }

    /// Makes ready what a request needs.
    ///
    /// # Errors
    /// `ENOMEM`; `EIO` for a flush that would be a lie.
    pub(super) fn prepare<'a>(&self, request: &Request, payload: &'a [u8]) -> Result<Ready<'a>> {
        if request.command == cmd::FLUSH {
            self.report_lost_writes()?;
        }
        let memory = match request.command {
            cmd::READ => self.buffers.take(request.length as usize)?,
            _ => Memory::default(),
        };
        let (outgoing, data) = outgoing(payload, request.payload && self.source.retry > 0, &self.buffers)?;
        Ok(Ready { memory, outgoing, data })
    }

    /// Starts a request.
    pub(super) fn start(
        &self,
        lane: &Arc<Lane>,
        request: Request,
        owner: u64,
        pending: Pending,
        ready: Ready<'_>,
    ) {
        self.submit(lane, request, owner, Who::Pending(pending), ready);
    }

    /// Makes a request and waits for the answer.
    ///
    /// # Errors
    /// The server's; `EIO` when there is no connection.
    pub(super) fn call(&self, request: Request, owner: u64, payload: &[u8]) -> Result<Answer> {
        let ready = self.prepare(&request, payload)?;
        let (waiter, promise) = waiter();
        self.submit(self.lane(), request, owner, Who::Thread(promise), ready);
        waiter.wait()
    }

    /// The requests of `owner` have some time to end.
    pub(super) fn leave(&self, owner: u64) {
        let shared = self.reactor.shared();
        self.leaving.lock().push((owner, shared.now() + GRACE.as_millis() as u64));
        shared.is_busy();
    }

    /// `owner` is no more.
    pub(super) fn left(&self, owner: u64) {
        self.leaving.lock().retain(|(other, _)| *other != owner);
    }

    /// Those whose requests end now.
    pub(super) fn late(&self) -> Vec<u64> {
        let now = self.reactor.shared().now();
        self.leaving.lock().iter().filter(|(_, at)| *at <= now).map(|(owner, _)| *owner).collect()
    }

    pub(super) fn timeout(&self) -> Option<Duration> {
        self.source.timeout
    }

    /// Why requests fail after a connection was lost.
    pub(super) fn explain(&self, why: &Lost) -> Error {
        let message = format!("{}: {why}", self.source.target);
        Error::new(Errno::EIO, message)
    }

    /// Whether a lost connection is made again.
    pub(super) fn is_kept(&self) -> bool {
        self.source.retry > 0 && !self.source.target.is_single() && !self.closing.is_raised()
    }

    /// Whether to try once more, after the last try was in vain.
    pub(super) fn may_retry(&self, since: Instant) -> bool {
        self.is_kept() && since.elapsed() >= PAUSE
    }

    /// Has a connection made again; false: there can be no thread for that.
    pub(super) fn reconnect(&self, lane: &Arc<Lane>) -> bool {
        let connector = Connector {
            lane: lane.clone(),
            source: self.source.clone(),
            export: self.export.clone(),
            agreed: self.agreed.clone(),
            closing: self.closing.clone(),
        };
        let thread = std::thread::Builder::new().name("nbd-connect".into());
        thread.spawn(move || connector.run()).inspect_err(|e| log::error!("nbd: {e}")).is_ok()
    }

    /// Whether no connection is left, nor will be.
    pub(super) fn is_down(&self) -> bool {
        !self.is_kept() && self.lanes.iter().all(|lane| lane.is_down())
    }

    /// A write was acknowledged.
    pub(super) fn acknowledged(&self) {
        self.acknowledged.fetch_add(1, SeqCst);
    }

    /// A flush has ended that covers so many of them.
    pub(super) fn flushed(&self, covers: u64) {
        self.durable.fetch_max(covers, SeqCst);
    }

    /// A connection was lost: whether writes may be lost with it.
    pub(super) fn lost_writes(&self) -> bool {
        let acknowledged = self.acknowledged.load(SeqCst);
        let lost = self.durable.swap(acknowledged, SeqCst) < acknowledged;
        if lost && self.agreed.has(export_flag::SEND_FLUSH) {
            self.lost.store(true, SeqCst);
        }
        lost
    }

    /// Tells of lost writes, once.
    ///
    /// # Errors
    /// `EIO`: there are some.
    pub(super) fn report_lost_writes(&self) -> Result<()> {
        if self.lost.swap(false, SeqCst) {
            return Err(Error::new(
                Errno::EIO,
                "the connection to the server was lost after writes that had not been flushed: they may be lost too",
            ));
        }
        Ok(())
    }
}

/// What a request needs to be made.
pub(super) struct Ready<'a> {
    memory: Memory,
    outgoing: super::lane::Outgoing<'a>,
    data: Option<Arc<Memory>>,
}

/// What the thread has that makes a connection again. Not the [`Remote`], whose owner may give it up meanwhile.
struct Connector {
    lane: Arc<Lane>,
    source: Arc<Source>,
    export: OsString,
    agreed: Agreed,
    closing: Arc<ShutdownFlag>,
}

impl Connector {
    fn run(self) {
        let Connector { lane, source, export, agreed, closing } = self;
        let connected = source.connect_patiently(&export, &closing).and_then(|(wire, new)| {
            same(&agreed, &new)?;
            Ok(lane.install(wire, &new)?)
        });
        match connected {
            Ok(()) => log::info!("nbd: {}: connected again", source.target),
            Err(e) => {
                let why = Error::new(Errno::EIO, e.to_string());
                if !closing.is_raised() {
                    log::error!("nbd: {why}");
                }
                lane.put_down(&why, &mut Wakes::default());
            }
        }
    }
}

/// Checks that an export is still what it was.
fn same(old: &Agreed, new: &Agreed) -> Result<()> {
    let name = |agreed: &Agreed| {
        let mut names: Vec<_> = agreed.contexts.iter().map(|(_, name)| name.clone()).collect();
        names.sort();
        names
    };
    let limits = |agreed: &Agreed| match agreed.block_size.maximum {
        0 => SAFE_PAYLOAD,
        most => most,
    };
    let what = match () {
        () if old.size != new.size => "its size",
        () if old.has(export_flag::READ_ONLY) != new.has(export_flag::READ_ONLY) => {
            "whether it can be written to"
        }
        () if old.flags & !new.flags != 0 => "what it can do",
        () if new.block_size.minimum > old.block_size.minimum.max(1) || limits(new) < limits(old) => {
            "its block sizes"
        }
        () if old.replies == Replies::Extended && new.replies != Replies::Extended => "how it speaks",
        () if name(old) != name(new) => "its metadata contexts",
        () => return Ok(()),
    };
    Err(Error::new(Errno::EIO, format!("the export has changed since it was opened: {what}")))
}

impl Drop for Remote {
    fn drop(&mut self) {
        self.closing.raise();
        let why = Error::new(Errno::ESHUTDOWN, "the connection was closed");
        for lane in &self.lanes {
            lane.disconnect();
            lane.put_down(&why.duplicate(), &mut Wakes::default());
            self.reactor.shared().remove(lane.token);
        }
    }
}
