//! Limits the bandwidth of the server, of each connection and of each client address.
//!
//! Reads and writes are limited apart, as the two directions of a wire are. What costs next to nothing on the wire
//! (zero, trim, extents) is free.

mod bucket;

use std::{
    collections::HashMap,
    ffi::OsStr,
    fs,
    net::IpAddr,
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use nbdkit_core::{
    Below, Call, Client, Filter, Handle, Info, Next, NextConfig, Op, Open, Outcome, Peer, Request, Result,
    params,
};
use parking_lot::Mutex;

use self::bucket::Bucket;

const HELP: &str = "\
rate=<BITSPERSEC>                 Bandwidth of the whole server, for reads and for writes.
connection-rate=<BITSPERSEC>      Bandwidth of each connection.
address-rate=<BITSPERSEC>         Bandwidth of each client address.
rate-file=<FILE>                  A file with the current rate=.
connection-rate-file=<FILE>       A file with the current connection-rate=.
address-rate-file=<FILE>          A file with the current address-rate=.
burstiness=<SECS>                 How long one may exceed its rate after a pause (default 2).";

pub(crate) fn new() -> Box<dyn Filter> {
    Box::new(Rate {
        burst: Duration::from_secs(2),
        server: Source::default(),
        connection: Source::default(),
        address: Source::default(),
        whole: None,
        addresses: Mutex::default(),
    })
}

struct Rate {
    burst: Duration,
    server: Source,
    connection: Source,
    address: Source,
    whole: Option<Arc<Limit>>,
    /// Those of clients that are here, and of those who left while they owed time.
    addresses: Mutex<HashMap<Address, Arc<Limit>>>,
}

/// Where a rate comes from.
#[derive(Clone, Default)]
struct Source {
    /// In bits per second; 0: no limit.
    rate: u64,
    /// Absolute, since the server leaves its directory when it goes to the background.
    file: Option<PathBuf>,
}

/// What clients of one bandwidth have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Address {
    Ip(IpAddr),
    User(u32),
    Machine(u32),
    Other,
}

impl Address {
    fn of(peer: &Peer) -> Self {
        match peer {
            Peer::Tcp(address) => Address::Ip(address.ip().to_canonical()),
            Peer::Unix { uid, .. } => Address::User(*uid),
            Peer::Vsock { cid, .. } => Address::Machine(*cid),
            Peer::Local | Peer::Other => Address::Other,
        }
    }
}

/// One limited bandwidth.
struct Limit {
    read: Bucket,
    write: Bucket,
    file: Option<Mutex<RateFile>>,
}

/// A file whose content is a rate.
struct RateFile {
    path: PathBuf,
    /// Tells the last state that was read from others.
    version: Option<(u64, u64, i64, i64)>,
}

impl RateFile {
    /// The rate, if the file has changed. One that cannot be read changes nothing.
    fn poll(&mut self) -> Option<u64> {
        // Of a pipe it would wait for somebody to write.
        let metadata = fs::metadata(&self.path).ok().filter(fs::Metadata::is_file)?;
        let version = (metadata.dev(), metadata.ino(), metadata.ctime(), metadata.ctime_nsec());
        if self.version.replace(version) == Some(version) {
            return None;
        }
        let text = fs::read_to_string(&self.path).ok()?;
        let line = text.lines().next().unwrap_or_default().trim();
        params::size(OsStr::new(line))
            .inspect_err(|e| log::error!("rate: {}: {e:#}; the rate stays", self.path.display()))
            .ok()
    }
}

impl Source {
    /// A bandwidth of its own; None when nothing limits it.
    fn limit(&self, burst: Duration) -> Option<Arc<Limit>> {
        if self.rate == 0 && self.file.is_none() {
            return None;
        }
        let now = Instant::now();
        let file = self.file.clone().map(|path| Mutex::new(RateFile { path, version: None }));
        Some(Arc::new(Limit {
            read: Bucket::new(self.rate, burst, now),
            write: Bucket::new(self.rate, burst, now),
            file,
        }))
    }
}

impl Limit {
    /// The bucket for requests of one direction, and what one of `bytes` needs of it.
    fn bucket(&self, op: Op, bytes: u64) -> (&Bucket, u64) {
        let bucket = if op == Op::Read { &self.read } else { &self.write };
        (bucket, bytes.saturating_mul(8))
    }

    /// Takes what a request of `bytes` needs and returns how long it must wait.
    fn take(&self, op: Op, bytes: u64) -> Duration {
        let (bucket, bits) = self.bucket(op, bytes);
        bucket.take(bits, Instant::now())
    }

    /// Whether a request of `bytes` would not have to wait.
    fn has(&self, op: Op, bytes: u64) -> bool {
        let (bucket, bits) = self.bucket(op, bytes);
        bucket.has(bits, Instant::now())
    }

    /// Looks whether the rate has changed.
    fn poll(&self) {
        if let Some(rate) = self.file.as_ref().and_then(|file| file.lock().poll()) {
            self.read.set_rate(rate);
            self.write.set_rate(rate);
        }
    }

    fn is_in_debt(&self) -> bool {
        let now = Instant::now();
        self.read.is_in_debt(now) || self.write.is_in_debt(now)
    }
}

impl Rate {
    fn address_limit(&self, peer: &Peer) -> Option<Arc<Limit>> {
        let new = self.address.limit(self.burst)?;
        let mut addresses = self.addresses.lock();
        addresses.retain(|_, limit| Arc::strong_count(limit) > 1 || limit.is_in_debt());
        Some(addresses.entry(Address::of(peer)).or_insert(new).clone())
    }
}

impl Filter for Rate {
    fn info(&self) -> Info {
        Info::bundled("rate", "nbdkit rate filter", HELP)
    }

    fn config(&mut self, key: &str, value: &OsStr, next: &mut NextConfig<'_>) -> anyhow::Result<()> {
        let (kind, is_file) = match key.strip_suffix("-file") {
            Some(kind) => (kind, true),
            None => (key, false),
        };
        let source = match kind {
            "rate" => &mut self.server,
            "connection-rate" => &mut self.connection,
            "address-rate" => &mut self.address,
            "burstiness" if !is_file => {
                self.burst = params::delay(value).context("burstiness")?;
                return Ok(());
            }
            _ => return next(key, value),
        };
        if is_file {
            let path = std::path::absolute(PathBuf::from(value))
                .with_context(|| format!("{key}='{}' is not a path", value.display()))?;
            source.file = Some(path);
        } else {
            source.rate = params::size(value).with_context(|| key.to_owned())?;
        }
        Ok(())
    }

    fn get_ready(&mut self, _: nbdkit_core::ThreadModel) -> anyhow::Result<()> {
        self.whole = self.server.limit(self.burst);
        Ok(())
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        let next = next.open(open)?;
        let limits =
            [self.whole.clone(), self.connection.limit(self.burst), self.address_limit(&open.client.peer)];
        let limits = limits.into_iter().flatten().collect();
        Ok(Box::new(Limited { limits, client: open.client.clone(), next }))
    }
}

struct Limited {
    /// All that count for this connection; none: the filter is off.
    limits: Vec<Arc<Limit>>,
    client: Arc<Client>,
    next: Next,
}

impl Limited {
    /// Takes what the request needs and returns how long it must wait.
    fn take(&self, call: &Call) -> Duration {
        self.limits.iter().map(|limit| limit.take(call.op, call.length)).max().unwrap_or_default()
    }
}

impl Handle for Limited {
    fn next(&self) -> Option<&Next> {
        Some(&self.next)
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        let call = *request.call();
        if self.limits.is_empty() || !matches!(call.op, Op::Read | Op::Write) {
            return self.next.pass(request);
        }
        self.limits.iter().for_each(|limit| limit.poll());
        if request.may_wait() {
            if let Err(e) = self.client.sleep(self.take(&call)) {
                return Outcome::Done(Err(e));
            }
            return self.next.watch(self, request, 0);
        }
        if !self.limits.iter().all(|limit| limit.has(call.op, call.length)) {
            return Outcome::NeedsThread;
        }
        // Each request has to come by here: watched, a loan is for this one only.
        let outcome = self.next.watch(self, request, 0);
        if !matches!(outcome, Outcome::NeedsThread) {
            self.take(&call);
        }
        outcome
    }
}

#[cfg(test)]
mod tests;
