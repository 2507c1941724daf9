//! The negotiation with a server: from its greeting to an export that is agreed on, in a bounded time and with bounded
//! memory, whatever the server says.
//!
//! What is asked for is the best there is, and what the server does not know is done without: TLS, extended headers or
//! structured replies, all metadata contexts, `NBD_OPT_GO`. Servers that speak oldstyle or the first newstyle are understood.

use std::{ffi::OsStr, io, os::unix::ffi::OsStrExt as _, time::Instant};

use nbdkit_core::{BlockSize, Errno, Error, Exports, Result};
use nbdkit_proto::{
    BASE_ALLOCATION, Fields, INIT_PASSWD, MAX_STRING, OLDSTYLE_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC,
    Replies, client::put_option, export_flag, handshake_flag, info, option, rep,
};

use super::{tls::Encryption, wire::Wire};

/// Most bytes in the reply to an option: two strings and some numbers.
const REPLY: usize = 3 * MAX_STRING;
/// Most replies to an option.
const MANY: usize = Exports::MAX + 16;
/// Contexts that are passed on beside `base:allocation`.
const CONTEXTS: usize = 16;
/// `NBD_REP_ERR_BLOCK_SIZE_REQD`.
const ERR_BLOCK_SIZE_REQD: u32 = (1 << 31) | 8;
/// `NBD_REP_ERR_SHUTDOWN`.
const ERR_SHUTDOWN: u32 = (1 << 31) | 7;

/// What server and client have agreed on.
#[derive(Clone, Debug)]
pub(super) struct Agreed {
    pub(super) size: u64,
    /// Bits of [`export_flag`].
    pub(super) flags: u16,
    pub(super) block_size: BlockSize,
    pub(super) description: Option<String>,
    pub(super) replies: Replies,
    /// Identifier and name of each metadata context.
    pub(super) contexts: Vec<(u32, String)>,
}

impl Agreed {
    /// Whether a flag of [`export_flag`] is set.
    pub(super) fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// Whether the server tells its extents.
    pub(super) fn has_extents(&self) -> bool {
        self.contexts.iter().any(|(_, name)| name == BASE_ALLOCATION)
    }

    /// The contexts beside `base:allocation`.
    pub(super) fn others(&self) -> Vec<String> {
        self.contexts.iter().map(|(_, name)| name).filter(|name| *name != BASE_ALLOCATION).cloned().collect()
    }
}

/// A server that was greeted, in the option phase.
#[derive(Debug)]
pub(super) struct Negotiation<'a> {
    wire: Wire,
    deadline: Instant,
    /// The server understands more than EXPORT_NAME.
    fixed: bool,
    no_zeroes: bool,
    /// Oldstyle: there is nothing to negotiate.
    oldstyle: bool,
    encryption: &'a Encryption,
}

fn error(message: impl Into<String>) -> Error {
    Error::new(Errno::ENOTCONN, message.into())
}

/// What a server says, fit for a message.
pub(super) fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(200)]);
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect::<String>().trim().to_owned()
}

fn broken(what: &str) -> Error {
    error(format!("the server broke the protocol in the handshake: {what}"))
}

fn io_error(e: &io::Error) -> Error {
    match e.kind() {
        io::ErrorKind::UnexpectedEof => error("the server closed the connection in the handshake"),
        io::ErrorKind::TimedOut => Error::new(
            Errno::ETIMEDOUT,
            "the server did not finish the handshake in time: it may be busy with another client, or is no NBD server",
        ),
        _ => error(format!("the connection failed in the handshake: {e}")),
    }
}

/// A reply to an option.
struct Reply {
    kind: u32,
    data: Vec<u8>,
}

impl Reply {
    /// Why the server refused the option.
    fn refusal(&self) -> String {
        match printable(&self.data) {
            text if text.is_empty() => format!("error {:#x}", self.kind),
            text => text,
        }
    }

    fn is_error(&self) -> bool {
        self.kind & (1 << 31) != 0
    }
}

impl<'a> Negotiation<'a> {
    /// Greets a server over a new connection, and has the connection encrypted as is wanted. `host` is its name.
    ///
    /// # Errors
    /// It is no server of NBD, does not answer in time, or does not encrypt.
    pub(super) fn start(
        wire: Wire,
        encryption: &'a Encryption,
        host: Option<&str>,
        deadline: Instant,
    ) -> Result<Self> {
        let mut this =
            Negotiation { wire, deadline, fixed: false, no_zeroes: false, oldstyle: false, encryption };
        let mut greeting = [0; 16];
        this.read(&mut greeting)?;
        let mut fields = Fields(&greeting);
        if fields.u64() != Some(INIT_PASSWD) {
            return Err(error(format!(
                "this is no NBD server: it begins with '{}'",
                printable(&greeting).escape_default()
            )));
        }
        match fields.u64() {
            Some(OPTION_MAGIC) => {}
            Some(OLDSTYLE_MAGIC) => this.oldstyle = true,
            _ => return Err(broken("an unknown style of greeting")),
        }
        if this.oldstyle {
            if encryption.is_required() {
                return Err(error("the server speaks oldstyle, which cannot be encrypted"));
            }
            return Ok(this);
        }
        let mut flags = [0; 2];
        this.read(&mut flags)?;
        let flags = u16::from_be_bytes(flags);
        this.fixed = flags & handshake_flag::FIXED_NEWSTYLE != 0;
        this.no_zeroes = flags & handshake_flag::NO_ZEROES != 0;
        let ours = flags & (handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
        this.write(&u32::from(ours).to_be_bytes())?;
        if encryption.is_wanted() {
            this.encrypt(host)?;
        }
        Ok(this)
    }

    fn read(&self, buf: &mut [u8]) -> Result<()> {
        self.wire.read_exact(buf, self.deadline).map_err(|e| io_error(&e))
    }

    fn write(&self, bytes: &[u8]) -> Result<()> {
        self.wire.write_all(bytes, self.deadline).map_err(|e| io_error(&e))
    }

    fn send(&self, option: u32, data: &[&[u8]]) -> Result<()> {
        let mut bytes = Vec::new();
        put_option(&mut bytes, option, data);
        self.write(&bytes)
    }

    fn reply(&self, to: u32) -> Result<Reply> {
        let mut head = [0; 20];
        self.read(&mut head)?;
        let mut fields = Fields(&head);
        if fields.u64() != Some(OPTION_REPLY_MAGIC) || fields.u32() != Some(to) {
            return Err(broken("a reply to an option that was not sent"));
        }
        let kind = fields.u32().unwrap_or_default();
        let length = fields.u32().unwrap_or_default() as usize;
        if length > REPLY {
            return Err(broken("a reply to an option is too long"));
        }
        let mut data = vec![0; length];
        self.read(&mut data)?;
        Ok(Reply { kind, data })
    }

    /// Sends an option, hands the replies but the last to `each`, and returns the last: an ACK or an error.
    fn ask(&self, option: u32, data: &[&[u8]], mut each: impl FnMut(&Reply) -> Result<()>) -> Result<Reply> {
        self.send(option, data)?;
        for _ in 0..MANY {
            let reply = self.reply(option)?;
            if reply.kind == rep::ACK || reply.is_error() {
                return Ok(reply);
            }
            each(&reply)?;
        }
        Err(broken("no end of replies to an option"))
    }

    /// Whether the server agrees to an option without data.
    fn agrees(&self, option: u32) -> Result<bool> {
        let unasked = |_: &Reply| Err(broken("a reply to an option that has none"));
        Ok(self.ask(option, &[], unasked)?.kind == rep::ACK)
    }

    fn encrypt(&mut self, host: Option<&str>) -> Result<()> {
        let agreed = self.fixed && self.agrees(option::STARTTLS)?;
        if !agreed {
            if self.encryption.is_required() {
                return Err(error("the server does not offer TLS (tls=off connects without)"));
            }
            log::debug!("nbd: the server does not offer TLS, so nothing is encrypted");
            return Ok(());
        }
        self.encryption.start(&mut self.wire, host, self.deadline)
    }

    /// The exports that the server lists.
    ///
    /// # Errors
    /// It does not list them.
    pub(super) fn list(self) -> Result<Exports> {
        let mut exports = Exports::new();
        if self.oldstyle || !self.fixed {
            exports.use_default();
            return Ok(exports);
        }
        let last = self.ask(option::LIST, &[], |reply| {
            let mut fields = Fields(&reply.data);
            let name = fields.string().filter(|_| reply.kind == rep::SERVER);
            let name = name.ok_or_else(|| broken("an export without a name"))?;
            let about = fields.0;
            let about = (!about.is_empty()).then(|| String::from_utf8_lossy(about).into_owned());
            exports.add(OsStr::from_bytes(name), about)
        })?;
        // What is said now is of no interest.
        let _ = self.send(option::ABORT, &[]);
        self.wire.close();
        match last.kind {
            rep::ACK => Ok(exports),
            _ => Err(error(format!("the server does not list its exports: {}", last.refusal()))),
        }
    }

    /// Goes on to the transmission of an export.
    ///
    /// # Errors
    /// There is no such export, or the server cannot be understood.
    pub(super) fn finish(self, export: &OsStr) -> Result<(Wire, Agreed)> {
        let name = export.as_bytes();
        if name.len() > MAX_STRING {
            return Err(Error::new(Errno::EINVAL, "the name of the export is over 4096 bytes"));
        }
        let mut agreed = Agreed {
            size: 0,
            flags: 0,
            block_size: BlockSize::default(),
            description: None,
            replies: Replies::Simple,
            contexts: Vec::new(),
        };
        if self.oldstyle {
            return self.oldstyle(agreed);
        }
        if self.fixed {
            agreed.replies = match () {
                () if self.agrees(option::EXTENDED_HEADERS)? => Replies::Extended,
                () if self.agrees(option::STRUCTURED_REPLY)? => Replies::Structured,
                () => Replies::Simple,
            };
            if agreed.replies != Replies::Simple {
                self.contexts(name, &mut agreed)?;
            }
            if self.go(name, &mut agreed)? {
                return self.done(agreed);
            }
        }
        self.send(option::EXPORT_NAME, &[name])?;
        let mut told = [0; 10];
        self.read(&mut told).map_err(|e| match e.errno() {
            Errno::ETIMEDOUT => e,
            _ => error(format!("the server has no export '{}', or needs TLS", printable(name))),
        })?;
        let mut fields = Fields(&told);
        agreed.size = fields.u64().unwrap_or_default();
        agreed.flags = fields.u16().unwrap_or_default();
        if !self.no_zeroes {
            self.read(&mut [0; 124])?;
        }
        self.done(agreed)
    }

    fn oldstyle(self, mut agreed: Agreed) -> Result<(Wire, Agreed)> {
        let mut told = [0; 136];
        self.read(&mut told)?;
        let mut fields = Fields(&told);
        agreed.size = fields.u64().unwrap_or_default();
        agreed.flags = fields.u32().unwrap_or_default() as u16;
        self.done(agreed)
    }

    /// Asks for all metadata contexts there are.
    fn contexts(&self, export: &[u8], agreed: &mut Agreed) -> Result<()> {
        let length = |bytes: &[u8]| (bytes.len() as u32).to_be_bytes();
        let mut names = Vec::new();
        let entry = |reply: &Reply| -> Result<(u32, String)> {
            let mut fields = Fields(&reply.data);
            let id = fields.u32().filter(|_| reply.kind == rep::META_CONTEXT);
            let id = id.ok_or_else(|| broken("a metadata context without a number"))?;
            let name =
                std::str::from_utf8(fields.0).map_err(|_| broken("a metadata context is not UTF-8"))?;
            Ok((id, name.to_owned()))
        };
        let listed =
            self.ask(option::LIST_META_CONTEXT, &[&length(export), export, &0_u32.to_be_bytes()], |reply| {
                let (_, name) = entry(reply)?;
                if names.len() < CONTEXTS && !name.is_empty() && name != BASE_ALLOCATION {
                    names.push(name);
                }
                Ok(())
            })?;
        if listed.is_error() {
            log::debug!("nbd: the server does not list its metadata contexts: {}", listed.refusal());
        }
        names.push(BASE_ALLOCATION.into());
        let mut query = Vec::new();
        for name in &names {
            query.extend(length(name.as_bytes()));
            query.extend(name.as_bytes());
        }
        let count = (names.len() as u32).to_be_bytes();
        let contexts = &mut agreed.contexts;
        let set =
            self.ask(option::SET_META_CONTEXT, &[&length(export), export, &count, &query], |reply| {
                let (id, name) = entry(reply)?;
                let twice = contexts.iter().any(|(i, n)| *i == id || *n == name);
                if twice || !names.contains(&name) {
                    return Err(broken("a metadata context that was not asked for"));
                }
                contexts.push((id, name));
                Ok(())
            })?;
        if set.is_error() {
            agreed.contexts.clear();
        }
        Ok(())
    }

    /// Whether the server knows GO, and has agreed.
    fn go(&self, export: &[u8], agreed: &mut Agreed) -> Result<bool> {
        let wanted = [info::NAME, info::DESCRIPTION, info::BLOCK_SIZE].map(u16::to_be_bytes).concat();
        let mut told = false;
        let last = self.ask(
            option::GO,
            &[&(export.len() as u32).to_be_bytes(), export, &3_u16.to_be_bytes(), &wanted],
            |reply| {
                if reply.kind != rep::INFO {
                    return Err(broken("a reply to GO that is no information"));
                }
                let mut fields = Fields(&reply.data);
                let short = || broken("information about the export is too short");
                match fields.u16().ok_or_else(short)? {
                    info::EXPORT => {
                        agreed.size = fields.u64().ok_or_else(short)?;
                        agreed.flags = fields.u16().ok_or_else(short)?;
                        told = true;
                    }
                    info::DESCRIPTION => {
                        agreed.description = Some(String::from_utf8_lossy(fields.0).into_owned());
                    }
                    info::BLOCK_SIZE => {
                        agreed.block_size = BlockSize {
                            minimum: fields.u32().ok_or_else(short)?,
                            preferred: fields.u32().ok_or_else(short)?,
                            maximum: fields.u32().ok_or_else(short)?,
                        };
                    }
                    _ => {}
                }
                Ok(())
            },
        )?;
        let shown = printable(export);
        let why = match last.kind {
            rep::ACK if told => return Ok(true),
            rep::ACK => return Err(broken("GO without a size")),
            rep::ERR_UNSUP => return Ok(false),
            rep::ERR_UNKNOWN => format!("the server has no export '{shown}'"),
            rep::ERR_TLS_REQD => "the server requires TLS: add tls=require, and what it needs".into(),
            rep::ERR_POLICY => "the server does not allow it".into(),
            ERR_BLOCK_SIZE_REQD => "the server wants its block sizes to be obeyed".into(),
            ERR_SHUTDOWN => "the server shuts down".into(),
            _ => format!("the server refuses the export '{shown}'"),
        };
        let text = printable(&last.data);
        Err(error(if text.is_empty() { why } else { format!("{why} ({text})") }))
    }

    fn done(self, mut agreed: Agreed) -> Result<(Wire, Agreed)> {
        if agreed.size > i64::MAX as u64 {
            return Err(broken("the size of the export is over 2^63-1"));
        }
        if agreed.flags & export_flag::HAS_FLAGS == 0 {
            agreed.flags = 0;
        }
        let told = agreed.block_size;
        agreed.block_size = match told.validate() {
            Ok(good) => good,
            // Not what the others may depend on: only how large requests should be.
            Err(_) if told.minimum.is_power_of_two() && told.minimum <= 65536 => {
                let preferred = told.minimum.max(4096);
                BlockSize { minimum: told.minimum, preferred, maximum: u32::MAX }
            }
            Err(e) => return Err(broken(&e.to_string())),
        };
        Ok((self.wire, agreed))
    }
}
