//! The transmission loop: one thread receives, decodes, runs what cannot block and sends.
//!
//! Every complete request in the input is answered before the replies leave together. A request that may block goes
//! to the pool; under a thread model below parallel, or with one thread, so do all that come behind it, to keep
//! their order, unless they have been quick for some time: then the one thread runs them too. A client that does not
//! take its replies is waited for, first only for that, then while receiving more, up to a bound.

use std::{fmt, io, ops::Range, sync::Arc, time::Duration};

use nbdkit_core::{Client, Completion, Errno, Error, ThreadModel};

use crate::{
    batch::Batch,
    buffer::{Buffer, grow},
    idle::{IDLE, give_back},
    later::Later,
    output::{Flushed, Outbox},
    pace::Pace,
    pool::{Job, Pool, Worker},
    proto::{MAX_PAYLOAD, Replies, Request, cmd, cmd_flag},
    requests::{Requests, changes_data},
    spin::{Busy, Spin},
    splice::Pipe,
    stream::{Interest, Stream},
};

mod large;
mod lead;

use lead::Stage;

/// Bytes received at once.
const INPUT: usize = 256 << 10;
/// After a payload of its own: the next header and not much of the next payload, which would be copied.
const INPUT_AFTER_LARGE: usize = 4 << 10;
/// A payload up to this size is completed in the input buffer; a larger one is received where it will be used.
const LARGE: usize = 64 << 10;
/// A write of this size is worth a wake-up.
const PARALLEL: usize = 256 << 10;
/// Replies are sent when this much is there.
const FLUSH: usize = 128 << 10;
/// While a client takes no replies, requests are run until this much is there.
const OUTPUT_MAX: usize = 16 << 20;
/// How long to wait for a client that takes no replies before receiving more.
const PATIENCE: Duration = Duration::from_millis(20);
/// How often to look whether a client is still there while it is not listened to.
const LOOK: Duration = Duration::from_millis(100);

/// How a transmission ended.
#[derive(Debug)]
pub(crate) enum End {
    /// The client said so.
    Disconnect,
    /// The client is gone, or the server stops.
    Eof,
    /// The client broke the protocol.
    Broken(String),
    /// The connection failed.
    Io(io::Error),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::Disconnect => f.write_str("the client disconnected"),
            End::Eof => f.write_str("the connection was closed"),
            End::Broken(why) => write!(f, "the client broke the protocol: {why}"),
            End::Io(e) => write!(f, "the connection failed: {e}"),
        }
    }
}

impl From<io::Error> for End {
    fn from(e: io::Error) -> Self {
        End::Io(e)
    }
}

/// What the connection's thread shares with its workers.
struct Shared {
    requests: Requests,
    outbox: Arc<Outbox>,
    pool: Arc<Pool>,
    later: Arc<Later>,
    pace: Pace,
}

impl Shared {
    fn client(&self) -> &Client {
        self.requests.session.client()
    }

    /// Runs a request that may block, unless nobody waits for it any more, and appends its reply.
    fn execute(&self, job: &Job, out: &mut Buffer) {
        if changes_data(job.request.command) || !self.client().gone.is_raised() {
            self.pace.measure(|| self.requests.run(&job.request, &job.payload, out));
        } else if !self.outbox.is_dead() {
            // Nobody waits for the data; a client of a server that stops waits for a reply.
            let gone = Error::new(Errno::ESHUTDOWN, "the client or the server stops");
            self.requests.fail(&job.request, &gone, None, out);
        }
    }

    fn worker(self: &Arc<Self>) -> Worker {
        let shared = self.clone();
        Box::new(move || {
            let mut out = Buffer::default();
            shared.pool.work(|job| {
                shared.execute(job, &mut out);
                shared.outbox.send(&mut out);
            });
            out.give_back();
        })
    }
}

/// Answers the requests of one client until it or the server ends that. All are answered or given up on return, and
/// the session is closed.
pub(crate) fn run(
    stream: &Arc<dyn Stream>,
    client: &Client,
    requests: Requests,
    threads: usize,
    name: &str,
    busy: Busy,
) -> End {
    let serial = threads <= 1 || requests.session.chain().thread_model() != ThreadModel::Parallel;
    let extended = requests.replies == Replies::Extended;
    let outbox = Arc::new(Outbox::new(stream.clone()));
    let pool = Arc::new(Pool::new(if serial { 1 } else { threads }));
    let shared = Arc::new(Shared {
        requests,
        later: Arc::new(Later::new(outbox.clone(), pool.clone())),
        outbox,
        pool,
        pace: Pace::new(serial),
    });
    let mut input = Vec::new();
    if grow(&mut input, INPUT).is_err() {
        return End::Io(io::ErrorKind::OutOfMemory.into());
    }
    let spin = Spin::new(busy);
    let reader = Reader {
        shared,
        stream: &**stream,
        client,
        name,
        serial,
        extended,
        input,
        start: 0,
        end: 0,
        at_once: INPUT,
        drained: true,
        out: Buffer::default(),
        pending: false,
        stalled: false,
        batch: Batch::new(spin.cpus()),
        spin,
        pipe: None,
        no_pipe: false,
        ahead: None,
        reply: Buffer::default(),
    };
    stream.set_patience(IDLE);
    Stage::new(reader).run()
}

/// What the thread needs that listens to the client.
struct Reader<'a> {
    shared: Arc<Shared>,
    stream: &'a dyn Stream,
    client: &'a Client,
    /// For workers.
    name: &'a str,
    /// Requests keep their order.
    serial: bool,
    /// Requests have extended headers.
    extended: bool,
    input: Vec<u8>,
    /// What was received and not yet used is `input[start..end]`.
    start: usize,
    end: usize,
    /// How much to receive at once.
    at_once: usize,
    /// The last receive took all there was.
    drained: bool,
    out: Buffer,
    /// `out` could not be sent completely; this thread is the one who sends.
    pending: bool,
    /// Waiting for the client to take more was in vain.
    stalled: bool,
    batch: Batch,
    spin: Spin,
    /// For large data; empty between two requests.
    pipe: Option<Pipe>,
    /// There cannot be one.
    no_pipe: bool,
    /// To be run by this thread, though it may block.
    ahead: Option<Job>,
    /// For the replies of those; empty.
    reply: Buffer,
}

impl Reader<'_> {
    /// Listens until there is a request that this thread is to run though it may block, to be
    /// [answered](Self::answer).
    fn run(&mut self) -> Result<Job, End> {
        loop {
            while let Some(request) = self.next_request()? {
                self.handle(&request)?;
                if let Some(job) = self.ahead.take() {
                    return Ok(job);
                }
                self.answered()?;
            }
            self.receive()?;
        }
    }

    fn answered(&mut self) -> Result<(), End> {
        if self.batch.add() || self.out.len() >= FLUSH { self.relieve() } else { Ok(()) }
    }

    /// Takes the reply to a request that this thread has run.
    fn answer(&mut self, mut reply: Buffer) -> Result<(), End> {
        if self.out.is_empty() && !self.pending {
            std::mem::swap(&mut self.out, &mut reply);
        } else if reply.is_spoilt() || self.out.put(reply.as_slice()).is_err() {
            self.out.spoil();
        }
        reply.clear();
        self.reply = reply;
        self.answered()
    }

    /// Decodes the next request, if its header is complete.
    fn next_request(&mut self) -> Result<Option<Request>, End> {
        let input = &self.input[self.start..self.end];
        let (request, length) = if self.extended {
            let Some(header) = input.first_chunk() else { return Ok(None) };
            (Request::decode_extended(header), Request::EXTENDED_LEN)
        } else {
            let Some(header) = input.first_chunk() else { return Ok(None) };
            (Request::decode(header), Request::LEN)
        };
        if request.is_none() {
            return Err(End::Broken(format!("a request begins with {:02x?}", &input[..4])));
        }
        self.start += length;
        Ok(request)
    }

    fn handle(&mut self, request: &Request) -> Result<(), End> {
        let checked = match request.command {
            cmd::DISC => return Err(End::Disconnect),
            _ => self.shared.requests.check(request),
        };
        if let Err(e) = checked {
            return self.refuse(request, &e);
        }
        if request.command == cmd::WRITE {
            return self.write(request);
        }
        self.at_once = INPUT;
        let inline = self.may_overtake();
        let mut request = *request;
        if inline && request.command == cmd::READ {
            if self.splice_read(&mut request)? || self.shared.requests.read_now(&request, &mut self.out) {
                return Ok(());
            }
        } else if inline && !self.shared.requests.may_block(&request) {
            self.shared.requests.run(&request, &[], &mut self.out);
            return Ok(());
        }
        if self.start_without_worker(&request, 0..0) {
            return Ok(());
        }
        if self.may_be_quick() {
            return self.run_quick(&request, 0..0);
        }
        self.give(Job { request, payload: Vec::new() })
    }

    /// Has a request run that may block: by this thread if those before it were quick, or by a worker.
    fn give(&mut self, job: Job) -> Result<(), End> {
        let plain = matches!(job.request.command, cmd::READ | cmd::WRITE) && !job.request.has(cmd_flag::FUA);
        if plain && !self.serial && self.shared.pace.is_quick() {
            self.ahead = Some(job);
            return Ok(());
        }
        self.submit(job)
    }

    /// Answers a request that is not run, and forgets the payload that comes behind it. Replies may overtake each
    /// other; refusing early breaks no order that matters.
    fn refuse(&mut self, request: &Request, why: &Error) -> Result<(), End> {
        if request.payload {
            self.skip(request.length)?;
        }
        self.shared.requests.fail(request, why, None, &mut self.out);
        Ok(())
    }

    fn write(&mut self, request: &Request) -> Result<(), End> {
        let length = request.length as usize;
        let inline = self.may_overtake() && !self.shared.requests.may_block(request);
        if length > LARGE && self.end - self.start < length {
            if inline && self.splice_write(request)? {
                return Ok(());
            }
            let mut payload = match self.shared.pool.payload(length) {
                Ok(payload) => payload,
                Err(e) => return self.refuse(request, &e),
            };
            self.receive_into(&mut payload)?;
            self.at_once = INPUT_AFTER_LARGE;
            if inline && !self.parallel(length) {
                self.shared.requests.run(request, &payload, &mut self.out);
                self.shared.pool.recycle(payload);
                return Ok(());
            }
            return self.submit(Job { request: *request, payload });
        }
        self.at_once = INPUT;
        while self.end - self.start < length {
            self.receive()?;
        }
        let payload = self.start..self.start + length;
        self.start += length;
        if inline {
            self.shared.requests.run(request, &self.input[payload], &mut self.out);
            return Ok(());
        }
        if self.start_without_worker(request, payload.clone()) {
            return Ok(());
        }
        if self.may_be_quick() {
            return self.run_quick(request, payload);
        }
        let mut copy = match self.shared.pool.payload(length) {
            Ok(copy) => copy,
            Err(e) => {
                self.shared.requests.fail(request, &e, None, &mut self.out);
                return Ok(());
            }
        };
        copy.copy_from_slice(&self.input[payload]);
        self.give(Job { request: *request, payload: copy })
    }

    /// Whether so much data is better copied by a worker, while this thread receives or sends.
    fn parallel(&self, length: usize) -> bool {
        length >= PARALLEL && !self.serial && self.spin.cpus() > 1
    }

    /// Whether a request that may block is better run here, going by those before it.
    fn may_be_quick(&self) -> bool {
        self.serial && self.shared.pace.is_quick() && self.may_overtake()
    }

    /// Runs a request that may block; its payload is that part of the input. What is ready is sent first, for this may
    /// be the one that is not quick after all. While it runs nobody sees the client leave: it ends by itself or with
    /// the server.
    fn run_quick(&mut self, request: &Request, payload: Range<usize>) -> Result<(), End> {
        self.flush()?;
        let Reader { shared, input, out, .. } = self;
        shared.pace.measure(|| shared.requests.run(request, &input[payload], out));
        Ok(())
    }

    /// Starts a READ or a WRITE, if the chain can run it without a worker; its payload is that part of the input.
    fn start_without_worker(&self, request: &Request, payload: Range<usize>) -> bool {
        if self.serial || !matches!(request.command, cmd::READ | cmd::WRITE) {
            return false;
        }
        let Some(running) = self.shared.later.begin(request.length as usize) else { return false };
        let (shared, asked) = (self.shared.clone(), *request);
        let done = Completion::new(move |result| {
            shared.later.end(running, |out| shared.requests.reply(&asked, result, out));
            Some(shared.later.clone())
        });
        match self.shared.requests.submit(request, &self.input[payload], done) {
            None => true,
            Some(done) => {
                done.withdraw();
                false
            }
        }
    }

    /// Whether this thread may run a request that came after those of the workers, and send its reply.
    fn may_overtake(&self) -> bool {
        !self.serial || (!self.pending && self.shared.pool.is_idle())
    }

    /// Hands a request to a worker, when there is room.
    fn submit(&mut self, job: Job) -> Result<(), End> {
        let shared = self.shared.clone();
        if self.serial {
            self.flush()?;
        }
        if !shared.pool.wait_for_room(Duration::ZERO) {
            self.flush()?;
            while !shared.pool.wait_for_room(LOOK) {
                self.watch()?;
            }
        }
        if let Err(job) = shared.pool.submit(job, self.name, || shared.worker()) {
            self.flush()?;
            shared.requests.run(&job.request, &job.payload, &mut self.out);
        }
        Ok(())
    }

    /// Ends the sleeping requests of a client who is gone while nothing is received from it, and goes on sending
    /// what could not be sent.
    fn watch(&mut self) -> Result<(), End> {
        if self.pending {
            self.flush()?;
        }
        let hangup = Interest { hangup: true, ..Interest::default() };
        if self.stream.wait(hangup, Some(Duration::ZERO))?.hangup {
            self.client.gone.raise();
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), End> {
        self.batch.sent();
        let flushed = self.shared.outbox.flush(&mut self.out, self.pending)?;
        self.pending = flushed == Flushed::Pending;
        Ok(())
    }

    /// Sends when much is there. A client that does not take it is waited for, but not for long, unless it is
    /// too much.
    fn relieve(&mut self) -> Result<(), End> {
        let length = self.out.len();
        self.flush()?;
        self.stalled &= self.pending && self.out.len() == length;
        while self.pending && self.out.len() >= FLUSH {
            let patience = match self.out.len() {
                OUTPUT_MAX.. => None,
                _ if self.stalled => return Ok(()),
                _ => Some(PATIENCE),
            };
            let write = Interest { write: true, ..Interest::default() };
            let ready = self.stream.wait(write, patience)?;
            self.stalled = !ready.write && !ready.hangup;
            if !self.stalled {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Receives some more input behind what is there, after the replies were sent.
    fn receive(&mut self) -> Result<(), End> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.end == self.input.len()
            || self.input.len() - self.start <= LARGE + Request::EXTENDED_LEN
        {
            self.input.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let mut input = std::mem::take(&mut self.input);
        let most = input.len().min(self.end + self.at_once);
        let received = self.receive_some(&mut input[self.end..most], false);
        self.input = input;
        self.end += received?;
        Ok(())
    }

    /// Fills `payload` from what was received and then from the stream.
    fn receive_into(&mut self, payload: &mut [u8]) -> Result<(), End> {
        let (head, mut rest) = payload.split_at_mut((self.end - self.start).min(payload.len()));
        head.copy_from_slice(&self.input[self.start..self.start + head.len()]);
        self.start += head.len();
        while !rest.is_empty() {
            let n = self.receive_some(rest, true)?;
            rest = &mut rest[n..];
        }
        Ok(())
    }

    /// Receives the payload of a WRITE that is refused, and forgets it.
    fn skip(&mut self, length: u64) -> Result<(), End> {
        if length > 2 * u64::from(MAX_PAYLOAD) {
            return Err(End::Broken(format!("a payload of {length} bytes")));
        }
        let mut left = length as usize;
        loop {
            let n = left.min(self.end - self.start);
            self.start += n;
            left -= n;
            if left == 0 {
                return Ok(());
            }
            self.receive()?;
        }
    }

    /// Receives at least one byte, or what `buf` takes if that is known to come. Sends the replies before it waits.
    fn receive_some(&mut self, buf: &mut [u8], full: bool) -> Result<usize, End> {
        if !self.drained
            && let Some(n) = self.try_receive(buf)?
        {
            self.batch.received(true);
            return Ok(n);
        }
        self.drained = true;
        if !full && self.batch.is_worth_a_look() {
            let found = self.try_receive(buf)?;
            self.batch.looked(found.is_some());
            if let Some(n) = found {
                self.batch.received(true);
                return Ok(n);
            }
        }
        loop {
            self.flush()?;
            while self.pending {
                if let Some(n) = self.receive_while_pending(buf)? {
                    return Ok(n);
                }
            }
            let stream = self.stream;
            if full {
                let result = stream.recv_full(buf);
                if let Some(n) = self.received(buf, result)? {
                    return Ok(n);
                }
                continue;
            }
            if self.shared.pool.is_idle()
                && let Some(result) = self.spin.find(|| match stream.recv(buf, false) {
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => None,
                    result => Some(result),
                })
            {
                if let Some(n) = self.received(buf, result)? {
                    self.batch.received(self.spin.was_at_once());
                    return Ok(n);
                }
                continue;
            }
            let result = self.spin.sleep(|| stream.recv(buf, true));
            if let Some(n) = self.received(buf, result)? {
                self.batch.received(self.spin.was_at_once());
                return Ok(n);
            }
            self.rest(buf)?;
        }
    }

    /// Nothing was received for some time: does without the memory until something is.
    fn rest(&mut self, buf: &mut [u8]) -> Result<(), End> {
        if !self.shared.pool.is_idle() {
            return Ok(());
        }
        give_back(buf);
        self.out.give_back();
        self.reply.give_back();
        self.shared.outbox.give_back();
        self.shared.later.give_back();
        self.stream.give_back();
        let read = Interest { read: true, ..Interest::default() };
        loop {
            let timeout = (!self.shared.pool.give_back()).then_some(IDLE);
            let ready = self.spin.sleep(|| self.stream.wait(read, timeout))?;
            if timeout.is_none() || ready.read || ready.hangup {
                break;
            }
        }
        Ok(())
    }

    fn try_receive(&mut self, buf: &mut [u8]) -> Result<Option<usize>, End> {
        let result = self.stream.recv(buf, false);
        self.received(buf, result)
    }

    fn received(&mut self, buf: &[u8], result: io::Result<usize>) -> Result<Option<usize>, End> {
        match result {
            Ok(0) => Err(End::Eof),
            Ok(n) => {
                self.drained = n < buf.len();
                Ok(Some(n))
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(None),
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => Err(End::Eof),
            Err(e) => Err(e.into()),
        }
    }

    /// The client does not take its replies: waits for that, then for either that or more requests.
    fn receive_while_pending(&mut self, buf: &mut [u8]) -> Result<Option<usize>, End> {
        let write = Interest { write: true, ..Interest::default() };
        let mut ready = self.stream.wait(write, Some(PATIENCE))?;
        if !ready.write && !ready.hangup {
            let read = self.out.len() < OUTPUT_MAX;
            ready = self.stream.wait(Interest { read, ..write }, None)?;
        }
        if ready.read
            && let Some(n) = self.try_receive(buf)?
        {
            return Ok(Some(n));
        }
        self.flush()?;
        Ok(None)
    }

    /// Lets the requests in flight end and sends their replies.
    fn finish(&mut self, end: &End) {
        if !matches!(end, End::Disconnect) {
            self.client.gone.raise();
        }
        if matches!(end, End::Broken(_) | End::Io(_)) {
            let _ = self.flush();
            self.stream.close();
        }
        self.shared.outbox.drain(&mut self.out, self.pending);
        self.pending = false;
        while !self.shared.pool.wait_for_idle(LOOK) {
            // An error here is a client who is gone, which is what is looked for.
            if self.watch().is_err() {
                self.client.gone.raise();
            }
        }
        self.shared.pool.close();
    }
}
