//! The newstyle handshake: options, until one of them opens an export.
//!
//! Everything a client sends here is bounded, and so is the time it may take. The handshake holds no lock that a
//! request of another client needs. Input is received exactly as far as it is used, so that nothing sent in the
//! clear can reach past the start of TLS, and the first requests stay in the stream.

use std::{
    collections::HashSet,
    ffi::{OsStr, OsString},
    io,
    os::unix::ffi::OsStrExt,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use nbdkit_core::{Caps, Connection, Errno, Error, Session, Support};

use nbdkit_dispatch::buffer::grow;

use crate::{
    Config, Tls, complaints,
    proto::{
        BASE_ALLOCATION, Fields, INIT_PASSWD, MAX_STRING, OPTION_MAGIC, Replies, export_flag, handshake_flag,
        info, option, option_reply, rep,
    },
    requests::{Context, Requests},
    stream::{Interest, Stream},
};

/// Longest data of an option that is looked at.
const MAX_OPTION: usize = 64 << 10;
/// How long a client that fails to start TLS may take to hang up.
#[cfg(feature = "tls")]
const LINGER: Duration = Duration::from_secs(1);
/// Replies are sent when this much is there.
const FLUSH: usize = 64 << 10;

/// The stream during the handshake, with its deadline.
pub(crate) struct Wire {
    stream: Arc<dyn Stream>,
    deadline: Option<Instant>,
    encrypted: bool,
}

impl Wire {
    pub(crate) fn new(stream: Arc<dyn Stream>, timeout: Option<Duration>) -> Self {
        let deadline = timeout.and_then(|t| Instant::now().checked_add(t));
        Wire { stream, deadline, encrypted: false }
    }

    /// The stream, which another one covers once TLS has started.
    pub(crate) fn stream(&self) -> &Arc<dyn Stream> {
        &self.stream
    }

    /// Starts TLS, after telling the client so with `ready`. Returns the client's certificate, if there is one.
    #[cfg(feature = "tls")]
    fn encrypt(
        &mut self,
        credentials: &crate::tls::Credentials,
        ready: &[u8],
    ) -> anyhow::Result<Option<nbdkit_core::Certificate>> {
        use crate::encrypted::{Encrypted, Progress};
        // A client has nothing to say before the answer: this is somebody in between, or a broken client.
        match self.stream.recv(&mut [0], false) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Ok(0) => bail!("the client closed the connection"),
            Ok(_) => bail!("unencrypted data came between NBD_OPT_STARTTLS and TLS"),
            Err(e) => return Err(e.into()),
        }
        self.send(ready)?;
        let encrypted = Encrypted::new(credentials, self.stream.clone())?;
        let plain = self.stream.clone();
        while let Progress::Wants(interest) = encrypted.handshake().inspect_err(|_| self.linger())? {
            self.wait(&*plain, interest)?;
        }
        log::debug!("TLS: {}", encrypted.describe());
        let certificate = encrypted.certificate();
        self.stream = Arc::new(encrypted);
        self.encrypted = true;
        Ok(certificate)
    }

    /// Gives a client that is refused the time to read why: to it the handshake may be over, and a connection that
    /// is closed while it sends would be all that it sees.
    #[cfg(feature = "tls")]
    fn linger(&self) {
        let end = Instant::now() + LINGER;
        let end = self.deadline.map_or(end, |deadline| deadline.min(end));
        let read = Interest { read: true, ..Interest::default() };
        let mut left = MAX_OPTION;
        while left > 0 {
            match self.stream.recv(&mut [0; 4096], false) {
                Ok(0) => return,
                Ok(n) => left = left.saturating_sub(n),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let timeout = end.saturating_duration_since(Instant::now());
                    if timeout.is_zero() || self.stream.wait(read, Some(timeout)).is_err() {
                        return;
                    }
                }
                Err(_) => return,
            }
        }
    }

    /// The time that is left, if it is limited.
    fn check_time(&self) -> anyhow::Result<Option<Duration>> {
        let left = self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        ensure!(left != Some(Duration::ZERO), "the negotiation took too long");
        Ok(left)
    }

    /// Waits, within the deadline.
    fn wait(&self, stream: &dyn Stream, interest: Interest<'_>) -> anyhow::Result<()> {
        stream.wait(interest, self.check_time()?)?;
        Ok(())
    }

    /// Calls `transfer` until it does not have to wait.
    fn when_ready(
        &self,
        interest: Interest<'_>,
        mut transfer: impl FnMut() -> io::Result<usize>,
    ) -> anyhow::Result<usize> {
        loop {
            match transfer() {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                result => return Ok(result?),
            }
            self.wait(&*self.stream, interest)?;
        }
    }

    fn receive_some(&self, buf: &mut [u8]) -> anyhow::Result<usize> {
        let read = Interest { read: true, ..Interest::default() };
        self.when_ready(read, || self.stream.recv(buf, false))
    }

    /// Fills `buf`; false when the client has gone before the first byte.
    fn receive_or_end(&self, buf: &mut [u8]) -> anyhow::Result<bool> {
        let mut done = 0;
        while done < buf.len() {
            match self.receive_some(&mut buf[done..])? {
                0 if done == 0 => return Ok(false),
                0 => bail!("the client closed the connection in the middle of a message"),
                n => done += n,
            }
        }
        Ok(true)
    }

    fn receive(&self, buf: &mut [u8]) -> anyhow::Result<()> {
        ensure!(self.receive_or_end(buf)?, "the client closed the connection in the middle of a message");
        Ok(())
    }

    fn skip(&self, mut length: usize) -> anyhow::Result<()> {
        let mut waste = [0; 4096];
        while length > 0 {
            let n = length.min(waste.len());
            self.receive(&mut waste[..n])?;
            length -= n;
        }
        Ok(())
    }

    pub(crate) fn send(&self, mut bytes: &[u8]) -> anyhow::Result<()> {
        let write = Interest { write: true, ..Interest::default() };
        while !bytes.is_empty() {
            let n = self.when_ready(write, || self.stream.send(bytes, false))?;
            bytes = &bytes[n..];
        }
        Ok(())
    }
}

/// Negotiates with a client. None: it went away, as it may.
///
/// # Errors
/// What it did wrong: the connection has to end.
pub(crate) fn negotiate(
    wire: &mut Wire,
    connection: &Arc<Connection>,
    config: &Config,
) -> anyhow::Result<Option<Requests>> {
    let offered = (handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES) & config.mask_handshake;
    let mut hello = Vec::new();
    hello.extend(INIT_PASSWD.to_be_bytes());
    hello.extend(OPTION_MAGIC.to_be_bytes());
    hello.extend(offered.to_be_bytes());
    wire.send(&hello)?;
    let mut flags = [0; 4];
    if !wire.receive_or_end(&mut flags)? {
        return Ok(None);
    }
    let flags = u32::from_be_bytes(flags);
    ensure!(flags & !u32::from(offered) == 0, "client flags {flags:#x} were not offered");
    let mut negotiation = Negotiation {
        wire,
        connection,
        config,
        fixed: flags & u32::from(handshake_flag::FIXED_NEWSTYLE) != 0,
        no_zeroes: flags & u32::from(handshake_flag::NO_ZEROES) != 0,
        agreed: Agreed::default(),
        listed: false,
        most: config.handshake_options,
        bytes: config.handshake_bytes,
        out: Vec::new(),
    };
    negotiation.run()
}

/// What was agreed on so far. All of it is forgotten when TLS starts.
#[derive(Default)]
struct Agreed {
    replies: Option<Replies>,
    /// The contexts that were selected, and the name of the export that they were selected for.
    contexts: Option<(Vec<u8>, Vec<Context>)>,
}

struct Negotiation<'a> {
    wire: &'a mut Wire,
    connection: &'a Arc<Connection>,
    config: &'a Config,
    fixed: bool,
    no_zeroes: bool,
    agreed: Agreed,
    listed: bool,
    /// Options that the client may send.
    most: usize,
    /// Bytes of data in them that it may still send.
    bytes: u64,
    out: Vec<u8>,
}

/// What an option leads to.
enum Next {
    Option,
    End,
    Transmission(Box<Requests>),
}

impl Negotiation<'_> {
    fn run(&mut self) -> anyhow::Result<Option<Requests>> {
        let mut count = 0;
        loop {
            let mut header = [0; 16];
            if !self.wire.receive_or_end(&mut header)? {
                return Ok(None);
            }
            let mut fields = Fields(&header);
            let (magic, option, length) = (fields.u64(), fields.u32(), fields.u32());
            let (Some(magic), Some(option), Some(length)) = (magic, option, length) else {
                bail!("a short option");
            };
            ensure!(magic == OPTION_MAGIC, "an option begins with {magic:#018x}");
            count += 1;
            ensure!(count <= self.most, "the client sent {count} options without choosing an export");
            self.wire.check_time()?;
            log::debug!("option {option} ({}), {length} bytes", option::name(option));
            let next = self.option(option, length as usize)?;
            let out = std::mem::take(&mut self.out);
            match next {
                Next::Option => self.wire.send(&out)?,
                Next::Transmission(requests) => {
                    self.wire.send(&out)?;
                    return Ok(Some(*requests));
                }
                Next::End => {
                    // It need not wait for the answer.
                    let _ = self.wire.send(&out);
                    return Ok(None);
                }
            }
        }
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[&[u8]]) -> anyhow::Result<()> {
        // An option may have many, and layers may take their time for each.
        self.wire.check_time()?;
        option_reply(&mut self.out, option, kind, data);
        if self.out.len() >= FLUSH {
            self.wire.send(&self.out)?;
            self.out.clear();
        }
        Ok(())
    }

    /// Ends an option with a reply that says why, if it is an error.
    fn answer(&mut self, option: u32, kind: u32, why: &str) -> anyhow::Result<Next> {
        if !why.is_empty() {
            log::debug!("{} refused: {why}", option::name(option));
        }
        self.reply(option, kind, &[why.as_bytes()])?;
        Ok(Next::Option)
    }

    /// Handles one option; `length` bytes of data follow in the stream.
    fn option(&mut self, option: u32, length: usize) -> anyhow::Result<Next> {
        let left = self.bytes.checked_sub(length as u64);
        self.bytes = left.with_context(|| format!("{} with {length} bytes of data", option::name(option)))?;
        let secret = self.requires_tls();
        if option == option::EXPORT_NAME {
            ensure!(!secret, "the client wants an export before TLS, which is required");
            return self.export_name(length);
        }
        let looked_at = matches!(
            option,
            option::INFO | option::GO | option::LIST_META_CONTEXT | option::SET_META_CONTEXT
        ) && self.fixed
            && !secret;
        if !looked_at || length > MAX_OPTION {
            self.wire.skip(length)?;
        }
        if option == option::ABORT {
            self.answer(option, rep::ACK, "")?;
            return Ok(Next::End);
        }
        if !self.fixed {
            return self.answer(option, rep::ERR_INVALID, "fixed newstyle was not negotiated");
        }
        if secret && option != option::STARTTLS {
            return self.answer(option, rep::ERR_TLS_REQD, "the server requires TLS: start it first");
        }
        if looked_at {
            if option == option::SET_META_CONTEXT {
                // Even if it fails.
                self.agreed.contexts = None;
            }
            if length > MAX_OPTION {
                return self.answer(option, rep::ERR_TOO_BIG, "too much data");
            }
            let mut data = Vec::new();
            grow(&mut data, length)?;
            self.wire.receive(&mut data)?;
            return match option {
                option::INFO | option::GO => self.info(option, Fields(&data)),
                _ => self.meta_context(option, Fields(&data)),
            };
        }
        match option {
            option::LIST | option::STARTTLS | option::STRUCTURED_REPLY | option::EXTENDED_HEADERS
                if length > 0 =>
            {
                self.answer(option, rep::ERR_INVALID, "the option takes no data")
            }
            option::LIST => self.list(),
            option::STARTTLS => self.start_tls(),
            option::STRUCTURED_REPLY | option::EXTENDED_HEADERS if !self.config.structured_replies => {
                self.answer(option, rep::ERR_UNSUP, "structured replies are off")
            }
            option::STRUCTURED_REPLY => match self.agreed.replies {
                None => self.agree(option, Replies::Structured),
                Some(Replies::Extended) => {
                    self.answer(option, rep::ERR_EXT_HEADER_REQD, "extended headers are on already")
                }
                Some(_) => self.answer(option, rep::ERR_INVALID, "structured replies are on already"),
            },
            option::EXTENDED_HEADERS => match self.agreed.replies {
                Some(Replies::Extended) => {
                    self.answer(option, rep::ERR_INVALID, "extended headers are on already")
                }
                _ => self.agree(option, Replies::Extended),
            },
            _ => self.answer(option, rep::ERR_UNSUP, "the server does not know the option"),
        }
    }

    /// Whether a client has to start TLS before anything else.
    fn requires_tls(&self) -> bool {
        match self.config.tls {
            Tls::Off => false,
            #[cfg(feature = "tls")]
            Tls::On(_) => false,
            #[cfg(feature = "tls")]
            Tls::Require(_) => !self.wire.encrypted,
        }
    }

    fn start_tls(&mut self) -> anyhow::Result<Next> {
        if self.wire.encrypted {
            return self.answer(option::STARTTLS, rep::ERR_INVALID, "TLS has started already");
        }
        match &self.config.tls {
            Tls::Off => self.answer(option::STARTTLS, rep::ERR_POLICY, "the server does not offer TLS"),
            #[cfg(feature = "tls")]
            Tls::On(credentials) | Tls::Require(credentials) => {
                // Nothing that was said in the clear counts any more.
                self.agreed = Agreed::default();
                self.listed = false;
                self.most = self.config.handshake_options;
                let mut ready = Vec::new();
                option_reply(&mut ready, option::STARTTLS, rep::ACK, &[]);
                let certificate = self.wire.encrypt(credentials, &ready);
                let certificate =
                    certificate.inspect_err(|e| complaints::TLS.tell(format_args!("TLS: {e:#}")))?;
                if let Some(certificate) = certificate {
                    log::debug!("TLS: the client is {}", certificate.subject);
                    // TLS starts once.
                    let _ = self.connection.client().certificate.set(certificate);
                }
                Ok(Next::Option)
            }
        }
    }

    fn agree(&mut self, option: u32, replies: Replies) -> anyhow::Result<Next> {
        self.agreed.replies = Some(replies);
        self.answer(option, rep::ACK, "")
    }

    fn export_name(&mut self, length: usize) -> anyhow::Result<Next> {
        ensure!(length <= MAX_STRING, "an export name of {length} bytes");
        let mut name = Vec::new();
        grow(&mut name, length)?;
        self.wire.receive(&mut name)?;
        check_name(&name)?;
        let session = self.open(&name).context("the client chose an export that cannot be opened")?;
        self.out.extend(session.size().to_be_bytes());
        self.out.extend(export_flags(session.caps(), self.agreed.replies.is_some()).to_be_bytes());
        if !self.no_zeroes {
            self.out.extend([0; 124]);
        }
        Ok(Next::Transmission(Box::new(self.requests(session, &name))))
    }

    fn list(&mut self) -> anyhow::Result<Next> {
        if std::mem::replace(&mut self.listed, true) {
            return self.answer(option::LIST, rep::ERR_INVALID, "the exports were listed already");
        }
        let exports = match self.connection.list_exports(self.wire.encrypted) {
            Ok(exports) => exports,
            Err(e) => {
                complaints::REFUSED.tell(format_args!("list_exports: {e}"));
                let why = said(&e, "the exports cannot be listed");
                return self.answer(option::LIST, rep::ERR_PLATFORM, &why);
            }
        };
        for export in &exports {
            self.most = self.most.saturating_add(self.config.handshake_options);
            let name = export.name.as_bytes();
            let description = export.description.as_deref().unwrap_or_default();
            let length = (name.len() as u32).to_be_bytes();
            self.reply(option::LIST, rep::SERVER, &[&length, name, description.as_bytes()])?;
        }
        self.answer(option::LIST, rep::ACK, "")
    }

    /// INFO and GO.
    fn info(&mut self, option: u32, mut data: Fields<'_>) -> anyhow::Result<Next> {
        let Some((name, wanted)) = info_request(&mut data) else {
            return self.answer(option, rep::ERR_INVALID, "the option's data is malformed");
        };
        if let Err(e) = check_name(name) {
            return self.answer(option, rep::ERR_INVALID, &e.to_string());
        }
        let session = match self.open(name) {
            Ok(session) => session,
            Err(e) => {
                complaints::REFUSED.tell(format_args!("open: {e}"));
                let why = said(&e, "the export cannot be opened");
                return self.answer(option, rep::ERR_UNKNOWN, &why);
            }
        };
        let flags = export_flags(session.caps(), self.agreed.replies.is_some());
        let info_head = info::EXPORT.to_be_bytes();
        let size = session.size().to_be_bytes();
        self.reply(option, rep::INFO, &[&info_head, &size, &flags.to_be_bytes()])?;
        // Each once, however often it was asked for: a layer may have to run a script for it.
        let mut told = HashSet::new();
        for wanted in wanted.into_iter().filter(|wanted| told.insert(*wanted)) {
            let head = wanted.to_be_bytes();
            match wanted {
                info::NAME => self.reply(option, rep::INFO, &[&head, session.export_name().as_bytes()])?,
                info::DESCRIPTION => {
                    if let Ok(Some(text)) = session.export_description() {
                        self.reply(option, rep::INFO, &[&head, text.as_bytes()])?;
                    }
                }
                info::BLOCK_SIZE if !session.caps().block_size.is_unset() => {
                    let block = session.caps().block_size;
                    let (minimum, preferred) = (block.minimum.to_be_bytes(), block.preferred.to_be_bytes());
                    let maximum = block.maximum.to_be_bytes();
                    self.reply(option, rep::INFO, &[&head, &minimum, &preferred, &maximum])?;
                }
                _ => {}
            }
        }
        self.answer(option, rep::ACK, "")?;
        if option == option::INFO {
            return Ok(Next::Option);
        }
        Ok(Next::Transmission(Box::new(self.requests(session, name))))
    }

    fn meta_context(&mut self, option: u32, mut data: Fields<'_>) -> anyhow::Result<Next> {
        let set = option == option::SET_META_CONTEXT;
        if !self.config.meta_contexts {
            return self.answer(option, rep::ERR_UNSUP, "meta contexts are off");
        }
        if set && self.agreed.replies.is_none() {
            return self.answer(option, rep::ERR_INVALID, "structured replies come first");
        }
        let Some((name, queries)) = meta_queries(&mut data) else {
            return self.answer(option, rep::ERR_INVALID, "the option's data is malformed");
        };
        if let Err(e) = check_name(name) {
            return self.answer(option, rep::ERR_INVALID, &e.to_string());
        }
        let others = self.connection.meta_contexts();
        let others = others.inspect_err(|e| complaints::REFUSED.tell(format_args!("meta_contexts: {e}")));
        let mut contexts = vec![Context { id: 1, name: BASE_ALLOCATION.to_owned() }];
        contexts.extend((2..).zip(others.unwrap_or_default()).map(|(id, name)| Context { id, name }));
        contexts.retain(|context| context.matches(&queries, set));
        for context in &contexts {
            let id = if set { context.id } else { 0 };
            self.reply(option, rep::META_CONTEXT, &[&id.to_be_bytes(), context.name.as_bytes()])?;
        }
        if set {
            self.agreed.contexts = Some((name.to_vec(), contexts));
        }
        self.answer(option, rep::ACK, "")
    }

    fn open(&self, name: &[u8]) -> nbdkit_core::Result<Session> {
        open(self.connection, OsStr::from_bytes(name), self.wire.encrypted)
    }

    /// What was agreed on, for the export that the client called `name`.
    fn requests(&mut self, session: Session, name: &[u8]) -> Requests {
        let agreed = std::mem::take(&mut self.agreed);
        let contexts = agreed.contexts.filter(|(export, _)| export == name).map(|(_, contexts)| contexts);
        Requests::new(session, agreed.replies.unwrap_or(Replies::Simple), contexts.unwrap_or_default())
    }
}

/// Opens an export; the empty name stands for the default one.
pub(crate) fn open(connection: &Arc<Connection>, name: &OsStr, tls: bool) -> nbdkit_core::Result<Session> {
    if !name.is_empty() {
        return connection.open(name, tls);
    }
    let default: Option<OsString> = connection.default_export(tls)?;
    let name = default.ok_or_else(|| Error::new(Errno::ENOENT, "there is no default export: name one"))?;
    connection.open(&name, tls)
}

/// What a client is told of a failure: what happened, and the layer's own words.
fn said(error: &Error, what: &str) -> String {
    let mut text = format!("{what}: {error}");
    text.truncate(text.floor_char_boundary(MAX_STRING));
    text
}

/// The transmission flags of an export.
pub(crate) fn export_flags(caps: &Caps, structured: bool) -> u16 {
    let flags = [
        (true, export_flag::HAS_FLAGS),
        (!caps.write, export_flag::READ_ONLY),
        (caps.flush, export_flag::SEND_FLUSH),
        (caps.fua != Support::None, export_flag::SEND_FUA),
        (caps.rotational, export_flag::ROTATIONAL),
        (caps.trim, export_flag::SEND_TRIM),
        (caps.zero != Support::None, export_flag::SEND_WRITE_ZEROES),
        (caps.zero != Support::None && caps.fast_zero, export_flag::SEND_FAST_ZERO),
        (structured, export_flag::SEND_DF),
        (caps.multi_conn, export_flag::CAN_MULTI_CONN),
        (caps.cache != Support::None, export_flag::SEND_CACHE),
    ];
    flags.into_iter().filter(|(on, _)| *on).fold(0, |flags, (_, flag)| flags | flag)
}

fn check_name(name: &[u8]) -> anyhow::Result<()> {
    ensure!(name.len() <= MAX_STRING, "the export's name is over {MAX_STRING} bytes");
    ensure!(!name.contains(&0), "the export's name holds a NUL byte");
    Ok(())
}

/// The data of INFO and GO: the export's name and what is wanted.
fn info_request<'a>(data: &mut Fields<'a>) -> Option<(&'a [u8], Vec<u16>)> {
    let name = data.string()?;
    let count = data.u16()?;
    let wanted = (0..count).map(|_| data.u16()).collect::<Option<_>>()?;
    data.is_empty().then_some((name, wanted))
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT: the export's name and the queries.
fn meta_queries<'a>(data: &mut Fields<'a>) -> Option<(&'a [u8], Vec<&'a [u8]>)> {
    let name = data.string()?;
    let count = data.u32()?;
    let mut queries = Vec::new();
    for _ in 0..count {
        queries.push(data.string()?);
    }
    data.is_empty().then_some((name, queries))
}
