//! The wire: numbers and messages of the NBD protocol, in network byte order. No I/O.
//!
//! Names follow `doc/proto.md` without the `NBD_` prefix, so that each can be found there. The server's side is here, the
//! client's in [`client`].

#![forbid(unsafe_code)]

use nix::errno::Errno;

pub mod client;

/// Start of every handshake: `NBDMAGIC`.
pub const INIT_PASSWD: u64 = 0x4e42_444d_4147_4943;
/// Newstyle, and the start of each option: `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Oldstyle.
pub const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// Start of a reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Start of a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Start of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Start of a structured reply chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Start of a request with extended headers.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Start of a reply chunk with extended headers.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Longest string (export name, description, query, message), in bytes.
pub const MAX_STRING: usize = 4096;
/// Most data in one READ or WRITE, in bytes.
pub const MAX_PAYLOAD: u32 = 64 << 20;
/// The meta context that every export has.
pub const BASE_ALLOCATION: &str = "base:allocation";

/// Handshake flags, server and client.
pub mod handshake_flag {
    /// Options may be refused with a reply.
    pub const FIXED_NEWSTYLE: u16 = 1;
    /// No padding after EXPORT_NAME.
    pub const NO_ZEROES: u16 = 2;
}

/// Options that a client may send.
#[expect(missing_docs, reason = "the names are those of the specification")]
pub mod option {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;

    /// The name, for messages.
    pub fn name(option: u32) -> &'static str {
        match option {
            EXPORT_NAME => "NBD_OPT_EXPORT_NAME",
            ABORT => "NBD_OPT_ABORT",
            LIST => "NBD_OPT_LIST",
            STARTTLS => "NBD_OPT_STARTTLS",
            INFO => "NBD_OPT_INFO",
            GO => "NBD_OPT_GO",
            STRUCTURED_REPLY => "NBD_OPT_STRUCTURED_REPLY",
            LIST_META_CONTEXT => "NBD_OPT_LIST_META_CONTEXT",
            SET_META_CONTEXT => "NBD_OPT_SET_META_CONTEXT",
            EXTENDED_HEADERS => "NBD_OPT_EXTENDED_HEADERS",
            _ => "unknown option",
        }
    }
}

/// Kinds of replies to options.
#[expect(missing_docs, reason = "the names are those of the specification")]
pub mod rep {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    const ERR: u32 = 1 << 31;
    pub const ERR_UNSUP: u32 = ERR | 1;
    pub const ERR_POLICY: u32 = ERR | 2;
    pub const ERR_INVALID: u32 = ERR | 3;
    pub const ERR_PLATFORM: u32 = ERR | 4;
    pub const ERR_TLS_REQD: u32 = ERR | 5;
    pub const ERR_UNKNOWN: u32 = ERR | 6;
    pub const ERR_TOO_BIG: u32 = ERR | 9;
    pub const ERR_EXT_HEADER_REQD: u32 = ERR | 10;
}

/// Kinds of information about an export.
#[expect(missing_docs, reason = "the names are those of the specification")]
pub mod info {
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags: what an export can do.
#[expect(missing_docs, reason = "the names are those of the specification")]
pub mod export_flag {
    pub const HAS_FLAGS: u16 = 1 << 0;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const ROTATIONAL: u16 = 1 << 4;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_CACHE: u16 = 1 << 10;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Commands.
#[expect(missing_docs, reason = "the names are those of the specification")]
pub mod cmd {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Command flags.
#[expect(missing_docs, reason = "the names are those of the specification")]
pub mod cmd_flag {
    pub const FUA: u16 = 1 << 0;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

const REPLY_FLAG_DONE: u16 = 1;
const REPLY_NONE: u16 = 0;
const REPLY_OFFSET_DATA: u16 = 1;
const REPLY_OFFSET_HOLE: u16 = 2;
const REPLY_BLOCK_STATUS: u16 = 5;
const REPLY_BLOCK_STATUS_EXT: u16 = 6;
const REPLY_IS_ERROR: u16 = 1 << 15;
const REPLY_ERROR: u16 = REPLY_IS_ERROR | 1;
const REPLY_ERROR_OFFSET: u16 = REPLY_IS_ERROR | 2;

/// A request as it stands on the wire, without its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Bits of [`cmd_flag`], without PAYLOAD_LEN of an extended header.
    pub flags: u16,
    /// One of [`cmd`], or anything else.
    pub command: u16,
    /// The client's; goes back unchanged.
    pub cookie: u64,
    /// Start of the range, in bytes.
    pub offset: u64,
    /// Length of the range, in bytes.
    pub length: u64,
    /// So many bytes of data follow the header.
    pub payload: bool,
}

impl Request {
    /// Bytes on the wire.
    pub const LEN: usize = 28;
    /// Bytes on the wire with extended headers.
    pub const EXTENDED_LEN: usize = 32;

    /// Decodes a request; None when its magic is wrong.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Option<Self> {
        let mut fields = Fields(bytes);
        if fields.u32()? != REQUEST_MAGIC {
            return None;
        }
        let (flags, command) = (fields.u16()?, fields.u16()?);
        Some(Request {
            flags,
            command,
            cookie: fields.u64()?,
            offset: fields.u64()?,
            length: fields.u32()?.into(),
            payload: command == cmd::WRITE,
        })
    }

    /// Decodes a request with an extended header; None when its magic is wrong.
    pub fn decode_extended(bytes: &[u8; Self::EXTENDED_LEN]) -> Option<Self> {
        let mut fields = Fields(bytes);
        if fields.u32()? != EXTENDED_REQUEST_MAGIC {
            return None;
        }
        let (flags, command) = (fields.u16()?, fields.u16()?);
        Some(Request {
            flags: flags & !cmd_flag::PAYLOAD_LEN,
            command,
            cookie: fields.u64()?,
            offset: fields.u64()?,
            length: fields.u64()?,
            // The specification asks for the flag on a WRITE too, but qemu 10 sends the data without it.
            payload: flags & cmd_flag::PAYLOAD_LEN != 0 || command == cmd::WRITE,
        })
    }

    /// Whether a flag of [`cmd_flag`] is set.
    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// Takes fields off the front of a message. None: the message is too short.
#[derive(Clone, Copy, Debug)]
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    /// The next `n` bytes.
    pub fn bytes(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(n)?;
        self.0 = tail;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk()?;
        self.0 = tail;
        Some(*head)
    }

    /// The next 16 bits.
    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    /// The next 32 bits.
    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// The next 64 bits.
    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string after its 32-bit length.
    pub fn string(&mut self) -> Option<&'a [u8]> {
        let length = self.u32()?;
        self.bytes(usize::try_from(length).ok()?)
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Appends a reply to an option whose data is the concatenation of `data`.
pub fn option_reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[&[u8]]) {
    let length: usize = data.iter().map(|d| d.len()).sum();
    out.extend(OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend((length as u32).to_be_bytes());
    for part in data {
        out.extend_from_slice(part);
    }
}

/// The head of a reply: at most 44 bytes, made on the stack.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    bytes: [u8; 44],
    len: usize,
}

impl Head {
    fn new() -> Self {
        Head { bytes: [0; 44], len: 0 }
    }

    fn with<const N: usize>(mut self, field: [u8; N]) -> Self {
        self.bytes[self.len..self.len + N].copy_from_slice(&field);
        self.len += N;
        self
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// How replies look on a connection, as negotiated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replies {
    /// Simple replies.
    Simple,
    /// Structured replies, for every request.
    Structured,
    /// Structured replies with extended headers, which requests have too.
    Extended,
}

impl Replies {
    fn simple(error: u32, cookie: u64) -> Head {
        Head::new()
            .with(SIMPLE_REPLY_MAGIC.to_be_bytes())
            .with(error.to_be_bytes())
            .with(cookie.to_be_bytes())
    }

    /// The head of a chunk with `length` bytes of payload; `last` says that it ends the reply.
    fn chunk(self, kind: u16, request: &Request, length: u64, last: bool) -> Head {
        let flags = if last { REPLY_FLAG_DONE } else { 0 };
        let extended = self == Replies::Extended;
        let magic = if extended { EXTENDED_REPLY_MAGIC } else { STRUCTURED_REPLY_MAGIC };
        let head = Head::new()
            .with(magic.to_be_bytes())
            .with(flags.to_be_bytes())
            .with(kind.to_be_bytes())
            .with(request.cookie.to_be_bytes());
        if extended {
            return head.with(request.offset.to_be_bytes()).with(length.to_be_bytes());
        }
        head.with((length as u32).to_be_bytes())
    }

    /// What stands before the data of a READ of at most [`MAX_PAYLOAD`] bytes.
    pub fn data(self, request: &Request) -> Head {
        match self {
            Replies::Simple => Self::simple(0, request.cookie),
            _ => self.part(request, request.offset, request.length, true),
        }
    }

    /// What stands before the data of a part of a READ. Not for simple replies.
    pub fn part(self, request: &Request, offset: u64, length: u64, last: bool) -> Head {
        self.chunk(REPLY_OFFSET_DATA, request, length + 8, last).with(offset.to_be_bytes())
    }

    /// A part of a READ that is zeroes, at most [`MAX_PAYLOAD`] bytes. Not for simple replies.
    pub fn hole(self, request: &Request, offset: u64, length: u64, last: bool) -> Head {
        self.chunk(REPLY_OFFSET_HOLE, request, 12, last)
            .with(offset.to_be_bytes())
            .with((length as u32).to_be_bytes())
    }

    /// Success without data.
    pub fn done(self, request: &Request) -> Head {
        match self {
            Replies::Simple => Self::simple(0, request.cookie),
            _ => self.chunk(REPLY_NONE, request, 0, true),
        }
    }

    /// Failure: the head, what of `message` follows it, and what follows that: the offset of a READ from which on it
    /// failed, if that is not all of it.
    pub fn error<'a>(
        self,
        request: &Request,
        error: u32,
        message: &'a str,
        offset: Option<u64>,
    ) -> (Head, &'a str, Head) {
        if self == Replies::Simple {
            return (Self::simple(error, request.cookie), "", Head::new());
        }
        let mut text = message.len().min(MAX_STRING);
        while !message.is_char_boundary(text) {
            text -= 1;
        }
        let text = &message[..text];
        let (kind, tail) = match offset {
            None => (REPLY_ERROR, Head::new()),
            Some(offset) => (REPLY_ERROR_OFFSET, Head::new().with(offset.to_be_bytes())),
        };
        let length = 6 + text.len() + tail.len;
        let head = self
            .chunk(kind, request, length as u64, true)
            .with(error.to_be_bytes())
            .with((text.len() as u16).to_be_bytes());
        (head, text, tail)
    }

    /// What stands before `count` block status descriptors of the context `id`. Not for simple replies.
    pub fn block_status(self, request: &Request, id: u32, count: usize, last: bool) -> Head {
        let (count, id) = (count as u64, id.to_be_bytes());
        if self == Replies::Extended {
            let head = self.chunk(REPLY_BLOCK_STATUS_EXT, request, 8 + 16 * count, last);
            return head.with(id).with((count as u32).to_be_bytes());
        }
        self.chunk(REPLY_BLOCK_STATUS, request, 4 + 8 * count, last).with(id)
    }

    /// One block status descriptor. Without extended headers, `length` is below 2^32.
    pub fn descriptor(self, length: u64, kind: u32) -> Head {
        if self == Replies::Extended {
            return Head::new().with(length.to_be_bytes()).with(u64::from(kind).to_be_bytes());
        }
        Head::new().with((length as u32).to_be_bytes()).with(kind.to_be_bytes())
    }
}

const EPERM: u32 = 1;
const EIO: u32 = 5;
const ENOMEM: u32 = 12;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const EOVERFLOW: u32 = 75;
const ENOTSUP: u32 = 95;
const ESHUTDOWN: u32 = 108;

/// The error number of the protocol for an errno (proto.md, "Error values"); two of them only where the request's
/// flags allow them.
pub fn error_number(errno: Errno, flags: u16) -> u32 {
    match errno {
        Errno::EROFS | Errno::EPERM => EPERM,
        Errno::EIO => EIO,
        Errno::ENOMEM => ENOMEM,
        Errno::EDQUOT | Errno::EFBIG | Errno::ENOSPC => ENOSPC,
        Errno::ESHUTDOWN => ESHUTDOWN,
        Errno::EOPNOTSUPP if flags & cmd_flag::FAST_ZERO != 0 => ENOTSUP,
        Errno::EOVERFLOW if flags & cmd_flag::DF != 0 => EOVERFLOW,
        _ => EINVAL,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> Request {
        Request {
            flags: 1,
            command: cmd::READ,
            cookie: 0x0102_0304_0506_0708,
            offset: 0x1_0000_0000,
            length: 512,
            payload: false,
        }
    }

    #[test]
    fn a_request_is_decoded() {
        let mut bytes = [0; Request::LEN];
        bytes[..4].copy_from_slice(&[0x25, 0x60, 0x95, 0x13]);
        bytes[5] = 1;
        bytes[8..16].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
        bytes[19] = 1;
        bytes[26] = 2;
        assert_eq!(Request::decode(&bytes), Some(request()));
        bytes[0] = 0x26;
        assert_eq!(Request::decode(&bytes), None);
    }

    #[test]
    fn an_extended_request_is_decoded() {
        let mut bytes = [0; Request::EXTENDED_LEN];
        bytes[..8].copy_from_slice(&[0x21, 0xe4, 0x1c, 0x71, 0, 0x21, 0, 4]);
        bytes[24] = 1;
        let request = Request::decode_extended(&bytes).unwrap();
        assert_eq!((request.flags, request.command, request.payload), (1, cmd::TRIM, true));
        assert_eq!(request.length, 1 << 56);
        bytes[3] = 0x13;
        assert_eq!(Request::decode_extended(&bytes), None);
    }

    #[test]
    fn heads_of_extended_replies() {
        let r = request();
        let start = [&[0x6e, 0x8a, 0x27, 0x8c, 0, 1, 0, 2][..], &r.cookie.to_be_bytes()].concat();
        let hole = Replies::Extended.hole(&r, 5, 6, true);
        let rest = [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 6];
        assert_eq!(hole.as_slice(), [&start[..], &rest].concat());
        let status = Replies::Extended.block_status(&r, 1, 3, true);
        assert_eq!(status.as_slice()[6..8], [0, 6]);
        assert_eq!(status.as_slice()[24..], [0, 0, 0, 0, 0, 0, 0, 56, 0, 0, 0, 1, 0, 0, 0, 3]);
        assert_eq!(Replies::Extended.descriptor(1 << 40, 3).as_slice().len(), 16);
        let (head, text, tail) = Replies::Extended.error(&r, 5, "why", Some(9));
        assert_eq!(
            (head.as_slice().len(), text, tail.as_slice()),
            (38, "why", &[0, 0, 0, 0, 0, 0, 0, 9][..])
        );
        assert_eq!(head.as_slice()[6..8], [0x80, 2]);
        assert_eq!(head.as_slice()[31], 17);
    }

    #[test]
    fn heads_of_replies() {
        let r = request();
        let cookie = [1, 2, 3, 4, 5, 6, 7, 8];
        let simple = Replies::Simple.data(&r);
        assert_eq!(simple.as_slice(), [&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0][..], &cookie].concat());
        let data = Replies::Structured.data(&r);
        let expected =
            [&[0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 1][..], &cookie, &[0, 0, 2, 8, 0, 0, 0, 1, 0, 0, 0, 0]]
                .concat();
        assert_eq!(data.as_slice(), expected);
        assert_eq!(Replies::Structured.done(&r).as_slice().len(), 20);
        let status = Replies::Structured.block_status(&r, 1, 3, true);
        assert_eq!(status.as_slice()[16..], [0, 0, 0, 28, 0, 0, 0, 1]);
    }

    #[test]
    fn error_text_is_bounded_and_stays_text() {
        let message = "é".repeat(3000);
        let (head, text, _) = Replies::Structured.error(&request(), 5, &message, None);
        assert_eq!(text.len(), 4096);
        assert_eq!(head.as_slice()[16..], [0, 0, 0x10, 6, 0, 0, 0, 5, 0x10, 0]);
        let message = format!("x{message}");
        assert_eq!(Replies::Structured.error(&request(), 5, &message, None).1.len(), 4095);
        assert_eq!(Replies::Simple.error(&request(), 5, "why", None).1, "");
    }

    #[test]
    fn error_numbers() {
        assert_eq!(error_number(Errno::EROFS, 0), 1);
        assert_eq!(error_number(Errno::EFBIG, 0), 28);
        assert_eq!(error_number(Errno::EOPNOTSUPP, 0), 22);
        assert_eq!(error_number(Errno::EOPNOTSUPP, cmd_flag::FAST_ZERO), 95);
        assert_eq!(error_number(Errno::EOVERFLOW, 0), 22);
        assert_eq!(error_number(Errno::EOVERFLOW, cmd_flag::DF), 75);
        assert_eq!(error_number(Errno::ESHUTDOWN, 0), 108);
        assert_eq!(error_number(Errno::ENOENT, 0), 22);
    }

    #[test]
    fn fields_never_read_past_the_end() {
        let mut f = Fields(&[0, 0, 0, 9, b'a']);
        assert_eq!(f.string(), None);
        let mut f = Fields(&[0, 0, 0, 1, b'a', 7]);
        assert_eq!(f.string(), Some(&b"a"[..]));
        assert_eq!(f.u16(), None);
        assert!(!f.is_empty());
    }
}
