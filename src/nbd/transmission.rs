//! The transmission loop: one thread receives, decodes, runs what cannot block and sends.
//!
//! Every complete request in the input is answered before the replies leave together. A request that may block goes
//! to the executor; under a thread model below parallel, or with one thread, so do all that come behind it, to keep
//! their order, unless they have been quick for some time: then the one thread runs them too. A client that does not
//! take its replies is waited for, first only for that, then while receiving more, up to a bound.

use std::{fmt, io, ops::Range, sync::Arc, time::Duration};

use nbdkit_core::{Client, Completed, Data, Error, ThreadModel};
use nbdkit_dispatch::{
    Awake, BusyPoll, CompletionQueue, Executor, InlinePolicy, Offered, Started,
    buffer::{Payloads, grow},
    leader_follower::{self, Lead},
    reclaim::IDLE,
};

use crate::{
    buffer::Buffer,
    output::Outbox,
    proto::{Replies, Request, cmd, cmd_flag},
    reply_coalescing::ReplyCoalescing,
    requests::Requests,
    splice::Pipe,
    stream::{Interest, Stream},
};

mod receive;
mod runner;
mod splice_path;

use runner::{Job, Shared};

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

/// Answers the requests of one client until it or the server ends that. All are answered or given up on return, and
/// the session is closed.
pub(crate) fn run(
    stream: &Arc<dyn Stream>,
    client: &Client,
    requests: Requests,
    threads: usize,
    name: &str,
    awake: Awake,
) -> End {
    let serial = threads <= 1 || requests.session.chain().thread_model() != ThreadModel::Parallel;
    let extended = requests.replies == Replies::Extended;
    let shared = Arc::new(Shared {
        requests,
        outbox: Arc::new(Outbox::new(stream.clone())),
        executor: Executor::new(if serial { 1 } else { threads }),
        payloads: Payloads::default(),
        policy: InlinePolicy::new(serial),
    });
    let mut input = Vec::new();
    if grow(&mut input, INPUT).is_err() {
        return End::Io(io::ErrorKind::OutOfMemory.into());
    }
    let busy_poll = BusyPoll::new(awake);
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
        coalescing: ReplyCoalescing::new(busy_poll.cpus()),
        busy_poll,
        pipe: None,
        no_pipe: false,
        ahead: None,
        reply: Buffer::default(),
        started: Started::new(Arc::<CompletionQueue>::default()),
        completed: Vec::new(),
    };
    stream.set_patience(IDLE);
    leader_follower::run(reader)
}

/// What the thread needs that leads a connection.
struct Reader<'a> {
    shared: Arc<Shared>,
    stream: &'a dyn Stream,
    client: &'a Client,
    /// For threads that run requests.
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
    coalescing: ReplyCoalescing,
    busy_poll: BusyPoll,
    /// For large data; empty between two requests.
    pipe: Option<Pipe>,
    /// There cannot be one.
    no_pipe: bool,
    /// To be run by this thread, though it may wait.
    ahead: Option<Job>,
    /// For the replies of those; empty.
    reply: Buffer,
    /// Requests that were started, as they came.
    started: Started<Request>,
    /// For completions that are taken from the queue; empty.
    completed: Vec<Completed>,
}

impl Lead for Reader<'_> {
    type Runner = Shared;
    type End = End;

    fn runner(&self) -> Arc<Shared> {
        self.shared.clone()
    }

    fn name(&self) -> &str {
        self.name
    }

    fn lead(&mut self) -> Result<Job, End> {
        loop {
            while let Some(request) = self.next_request()? {
                self.handle(&request)?;
                if let Some(job) = self.ahead.take() {
                    return Ok(job);
                }
                self.answered()?;
                self.answer_completed()?;
            }
            self.receive()?;
        }
    }

    fn hand_over(&mut self, job: Job) -> Result<(), End> {
        self.execute(job)
    }

    fn take_reply(&mut self) -> Buffer {
        std::mem::take(&mut self.reply)
    }

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

    fn taken_over(&mut self) {
        self.shared.policy.forget();
    }

    fn finish(&mut self, end: &End) {
        self.finish_all(end);
    }

    fn lost() -> End {
        End::Eof
    }
}

/// What became of a request that was offered to the chain.
enum Way {
    /// It was answered, or will be by its completion.
    Taken,
    /// It needs a thread.
    Thread,
}

impl Reader<'_> {
    fn answered(&mut self) -> Result<(), End> {
        if self.coalescing.add() || self.out.len() >= FLUSH { self.relieve() } else { Ok(()) }
    }

    /// Answers the started requests that have ended.
    fn answer_completed(&mut self) -> Result<(), End> {
        if self.started.queue().is_empty() {
            return Ok(());
        }
        let shared = self.shared.clone();
        let mut ready = std::mem::take(&mut self.completed);
        self.started.queue().take(&mut ready);
        let mut result = Ok(());
        for mut completed in ready.drain(..) {
            shared.requests.session.finish(&mut completed);
            if let Some(request) = self.started.take(&completed) {
                let ended = std::mem::replace(&mut completed.result, Ok(()));
                let ended = ended.map(|()| completed.payload.bytes());
                shared.requests.reply(&request, ended, &mut self.out);
            }
            completed.payload = nbdkit_core::Payload::None;
            self.started.recycle(completed);
            if result.is_ok() {
                result = self.answered();
            }
        }
        self.completed = ready;
        result
    }

    /// Offers a request with memory of the caller's: it is answered at once or started, or needs a thread.
    fn offer(&mut self, request: &Request, data: Data<'_>) -> Offered<Request> {
        let Reader { shared, started, serial, .. } = self;
        offer(started, *serial, &shared.requests, request, data)
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
        let mut request = *request;
        if self.may_overtake() {
            if request.command == cmd::READ && self.splice_read(&mut request)? {
                return Ok(());
            }
            if let Way::Taken = self.try_now(&request)? {
                return Ok(());
            }
        }
        if self.may_be_quick() {
            return self.run_quick(&request, 0..0);
        }
        self.give(Job { request, payload: Vec::new() })
    }

    /// Offers a request without data of the client's to the chain.
    fn try_now(&mut self, request: &Request) -> Result<Way, End> {
        let Reader { shared, started, serial, out, .. } = self;
        let requests = &shared.requests;
        match request.command {
            cmd::READ if requests.may_have_holes(request) => {
                Ok(if requests.read_now(request, out) { Way::Taken } else { Way::Thread })
            }
            cmd::READ => {
                let mark = out.mark();
                let length = request.length as usize;
                let offered = out
                    .put(requests.replies.data(request).as_slice())
                    .and_then(|()| out.space(length))
                    .map(|buf| offer(started, *serial, requests, request, Data::Read(buf)));
                match offered {
                    Ok(Offered::Done(Ok(()), _)) => Ok(Way::Taken),
                    Ok(Offered::Done(Err(e), _)) | Err(e) => {
                        out.rewind(mark);
                        requests.fail(request, &e, None, out);
                        Ok(Way::Taken)
                    }
                    Ok(Offered::Started) => {
                        out.rewind(mark);
                        Ok(Way::Taken)
                    }
                    Ok(Offered::NeedsThread(_)) => {
                        out.rewind(mark);
                        Ok(Way::Thread)
                    }
                }
            }
            cmd::BLOCK_STATUS => {
                Ok(if requests.block_status_now(request, out) { Way::Taken } else { Way::Thread })
            }
            _ => Ok(self.conclude(request, Data::None)),
        }
    }

    /// Offers a request whose reply has no data.
    fn conclude(&mut self, request: &Request, data: Data<'_>) -> Way {
        match self.offer(request, data) {
            Offered::Done(result, _) => {
                self.shared.requests.done(request, result, &mut self.out);
                Way::Taken
            }
            Offered::Started => Way::Taken,
            Offered::NeedsThread(_) => Way::Thread,
        }
    }

    /// Has a request run that may wait: by this thread if those before it were quick, or by another one.
    fn give(&mut self, job: Job) -> Result<(), End> {
        let plain = matches!(job.request.command, cmd::READ | cmd::WRITE) && !job.request.has(cmd_flag::FUA);
        if plain && !self.serial && self.shared.policy.is_quick() {
            self.ahead = Some(job);
            return Ok(());
        }
        self.execute(job)
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
        let overtakes = self.may_overtake();
        if length > LARGE && self.end - self.start < length {
            if overtakes && self.splice_write(request)? {
                return Ok(());
            }
            let mut payload = match self.shared.payloads.take(length) {
                Ok(payload) => payload,
                Err(e) => return self.refuse(request, &e),
            };
            self.receive_into(&mut payload)?;
            self.at_once = INPUT_AFTER_LARGE;
            if overtakes
                && !self.parallel(length)
                && let Way::Taken = self.conclude(request, Data::Write(&payload))
            {
                self.shared.payloads.recycle(payload);
                return Ok(());
            }
            return self.execute(Job { request: *request, payload });
        }
        self.at_once = INPUT;
        while self.end - self.start < length {
            self.receive()?;
        }
        let payload = self.start..self.start + length;
        self.start += length;
        if overtakes {
            let Reader { shared, started, serial, input, out, .. } = self;
            let data = Data::Write(&input[payload.clone()]);
            match offer(started, *serial, &shared.requests, request, data) {
                Offered::Done(result, _) => {
                    shared.requests.done(request, result, out);
                    return Ok(());
                }
                Offered::Started => return Ok(()),
                Offered::NeedsThread(_) => {}
            }
        }
        if self.may_be_quick() {
            return self.run_quick(request, payload);
        }
        let mut copy = match self.shared.payloads.take(length) {
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
        length >= PARALLEL && !self.serial && self.busy_poll.cpus() > 1
    }

    /// Whether a request that may block is better run here, going by those before it.
    fn may_be_quick(&self) -> bool {
        self.serial && self.shared.policy.is_quick() && self.may_overtake()
    }

    /// Runs a request that may block; its payload is that part of the input. What is ready is sent first, for this may
    /// be the one that is not quick after all. While it runs nobody sees the client leave: it ends by itself or with
    /// the server.
    fn run_quick(&mut self, request: &Request, payload: Range<usize>) -> Result<(), End> {
        self.flush()?;
        let Reader { shared, input, out, .. } = self;
        shared.policy.measure(|| shared.requests.run(request, &input[payload], out));
        Ok(())
    }

    /// Whether this thread may run a request that came after those of the workers, and send its reply.
    fn may_overtake(&self) -> bool {
        !self.serial || (!self.pending && self.shared.executor.is_idle())
    }

    /// Hands a request to a thread of the executor, when there is room.
    fn execute(&mut self, job: Job) -> Result<(), End> {
        let shared = self.shared.clone();
        if self.serial {
            self.flush()?;
        }
        if !shared.executor.wait_for_room(Duration::ZERO) {
            self.flush()?;
            while !shared.executor.wait_for_room(LOOK) {
                self.watch()?;
            }
        }
        if let Err(job) = shared.executor.submit(job, self.name, || shared.worker()) {
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
}

/// Offers a request to the chain. Where requests keep their order none is started.
fn offer(
    started: &mut Started<Request>,
    serial: bool,
    requests: &Requests,
    request: &Request,
    data: Data<'_>,
) -> Offered<Request> {
    let length = match data {
        Data::None => 0,
        _ => request.length as usize,
    };
    let call = nbdkit_core::Request::new(requests.call(request), data);
    let offered = started.offer(&requests.session, call, *request, length, !serial);
    if let Offered::Done(Ok(()), _) = &offered {
        requests.succeeded(request);
    }
    offered
}
