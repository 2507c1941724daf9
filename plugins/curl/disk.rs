//! A file on a server as a disk: read-only, in parts.

use std::sync::Arc;

use nbdkit_core::{Caps, Client, Data, Errno, Error, Handle, Memory, Outcome, Request, Result};

use super::{
    answer::Header,
    engine::{Check, Engine, Job, Told, What, Who},
};
use crate::waiter::waiter;

/// Largest part that is asked for at once, in bytes.
const LARGEST: usize = 32 << 20;

/// What is known of a file since it was opened.
#[derive(Clone, Debug)]
struct Known {
    size: u64,
    header: Header,
    /// The protocol has statuses and ranges: it is HTTP.
    http: bool,
    may_change: bool,
}

/// See the module.
pub(super) struct Disk {
    engine: Arc<Engine>,
    owner: u64,
    size: u64,
    check: Arc<Check>,
}

fn refused(message: String) -> Error {
    Error::new(Errno::EIO, message)
}

/// What a status means that is no success.
fn meaning(status: i64) -> &'static str {
    match status {
        401 | 403 => "the server does not allow it: check user=, password=, cookie= and header=",
        404 | 410 => "there is no such file",
        407 => "the proxy wants proxy-user= and proxy-password=",
        416 => "the server says that the range is outside of the file, which has become shorter",
        429 => {
            "the server says that there are too many requests: --filter=rate or --filter=retry-request helps"
        }
        500..=599 => "the server has failed: --filter=retry-request tries again",
        300..=399 => "the server leads somewhere else: followlocation=true goes there",
        _ => "the server refuses it",
    }
}

fn has_failed(status: i64) -> Result<()> {
    match status {
        0..=299 => Ok(()),
        _ => Err(refused(format!("{} (status {status})", meaning(status)))),
    }
}

impl Known {
    /// Checks that an answer is the part that was asked for, of the file as it was.
    fn check(&self, what: &What, told: &Told) -> Result<()> {
        if !self.http {
            return Ok(());
        }
        has_failed(told.status)?;
        let What::Part { offset, .. } = what else { return Ok(()) };
        let part = told.header.part.filter(|_| told.status == 206);
        let Some((start, total)) = part else { return Err(no_ranges()) };
        if start != *offset {
            return Err(refused(format!("the server has sent what begins at {start} instead of {offset}")));
        }
        let differs =
            |old: &Option<String>, new: &Option<String>| old.is_some() && new.is_some() && old != new;
        let changed = differs(&self.header.etag, &told.header.etag)
            || differs(&self.header.modified, &told.header.modified)
            || total.is_some_and(|total| total != self.size);
        if changed && !self.may_change {
            return Err(refused(
                "the file on the server has changed since it was opened: open it again, or use change=ignore"
                    .into(),
            ));
        }
        Ok(())
    }
}

fn no_ranges() -> Error {
    refused(
        "the server does not send parts of the file (byte ranges), which a disk needs: download it first"
            .into(),
    )
}

impl Disk {
    /// Asks the server for the file. `http`: it is one that has ranges or not.
    ///
    /// # Errors
    /// There is no such file, or the server cannot send parts of it.
    pub(super) fn open(engine: &Arc<Engine>, client: &Client, http: bool, may_change: bool) -> Result<Self> {
        let owner = engine.owner();
        let (left, weak) = (owner, Arc::downgrade(engine));
        client.gone.on_raise(move || {
            if let Some(engine) = weak.upgrade() {
                engine.leave(left);
            }
        });
        let any: Arc<Check> = Arc::new(move |what, told| match (what, told.status) {
            (What::Part { .. }, 200) if http => Err(no_ranges()),
            (What::Part { .. }, status) if http => has_failed(status),
            _ => Ok(()),
        });
        let ask = |what, length| {
            let (waiter, promise) = waiter();
            let memory = engine.memory(length)?;
            engine.submit(Job { what, owner, who: Who::Thread(promise), check: any.clone(), memory });
            waiter.wait()
        };
        let head: Told = ask(What::Head, 0)?;
        let mut known = Known { size: 0, header: head.header.clone(), http, may_change };
        if !http {
            let size =
                head.length.ok_or_else(|| refused("the server does not tell the size of the file".into()));
            known.size = size?;
        } else if let Some(size) = head.length.filter(|size| {
            (200..300).contains(&head.status) && (head.header.ranges == Some(true) || *size == 0)
        }) {
            known.size = size;
        } else {
            if head.header.ranges == Some(false) && head.status < 300 {
                return Err(no_ranges());
            }
            // Servers that have an answer for GET only, and those that do not say whether they send parts.
            let first = ask(What::Part { offset: 0, length: 1 }, 1);
            let first: Told = first.or_else(|e| has_failed(head.status).and(Err(e)))?;
            let total = first.header.part.filter(|_| first.status == 206).ok_or_else(no_ranges)?;
            let size = total.1.ok_or_else(|| refused("the server does not tell the size of the file".into()));
            (known.size, known.header) = (size?, first.header);
        }
        let size = known.size;
        Ok(Disk {
            engine: engine.clone(),
            owner,
            size,
            check: Arc::new(move |what, told| known.check(what, told)),
        })
    }

    fn job(&self, what: What, memory: Memory, who: Who) -> Job {
        Job { what, owner: self.owner, who, check: self.check.clone(), memory }
    }

    /// Starts a read; None: it needs a thread.
    fn start(&self, request: &mut Request<'_>) -> Option<Outcome<'_>> {
        let (offset, length) = (request.offset(), request.length() as usize);
        if !request.may_start() || length > LARGEST || !matches!(request.data(), Data::Read(_)) {
            return None;
        }
        let memory = match self.engine.memory(length) {
            Ok(memory) => memory,
            Err(e) => return Some(Outcome::Done(Err(e))),
        };
        let (pending, started) = request.start()?;
        self.engine.submit(self.job(What::Part { offset, length }, memory, Who::Pending(pending)));
        Some(Outcome::Started(started))
    }
}

impl Handle for Disk {
    fn capabilities(&self) -> Result<Caps> {
        Ok(Caps::of_size(self.size).with_multi_conn(true))
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        match self.start(request) {
            Some(outcome) => outcome,
            None if request.may_wait() => request.run(self),
            None => Outcome::NeedsThread,
        }
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut offset = offset;
        for piece in buf.chunks_mut(LARGEST) {
            let length = piece.len();
            let (waiter, promise) = waiter();
            let memory = self.engine.memory(length)?;
            self.engine.submit(self.job(What::Part { offset, length }, memory, Who::Thread(promise)));
            piece.copy_from_slice(&waiter.wait()?.memory[..length]);
            offset += length as u64;
        }
        Ok(())
    }
}
