//! The wire: numbers and messages of the NBD protocol, in network byte order. No I/O.
//!
//! Names follow `doc/proto.md` without the `NBD_` prefix, so that each can be found there.

use nbdkit_core::Errno;

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

/// Longest string (export name, description, query, message), in bytes.
pub const MAX_STRING: usize = 4096;
/// Most data in one READ or WRITE, in bytes.
pub const MAX_PAYLOAD: u32 = 64 << 20;
/// The only meta context there is.
pub const BASE_ALLOCATION: &[u8] = b"base:allocation";
/// Its ID.
pub const BASE_ALLOCATION_ID: u32 = 1;

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
    pub const ERR_UNKNOWN: u32 = ERR | 6;
    pub const ERR_TOO_BIG: u32 = ERR | 9;
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
}

const REPLY_FLAG_DONE: u16 = 1;
const REPLY_NONE: u16 = 0;
const REPLY_OFFSET_DATA: u16 = 1;
const REPLY_BLOCK_STATUS: u16 = 5;
const REPLY_ERROR: u16 = (1 << 15) | 1;

/// A request as it stands on the wire, without its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Bits of [`cmd_flag`].
    pub flags: u16,
    /// One of [`cmd`], or anything else.
    pub command: u16,
    /// The client's; goes back unchanged.
    pub cookie: u64,
    /// Start of the range, in bytes.
    pub offset: u64,
    /// Length of the range, in bytes.
    pub length: u32,
}

impl Request {
    /// Bytes on the wire.
    pub const LEN: usize = 28;

    /// Decodes a request; None when its magic is wrong.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Option<Self> {
        let mut fields = Fields(bytes);
        if fields.u32()? != REQUEST_MAGIC {
            return None;
        }
        Some(Request {
            flags: fields.u16()?,
            command: fields.u16()?,
            cookie: fields.u64()?,
            offset: fields.u64()?,
            length: fields.u32()?,
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

/// The head of a reply: at most 32 bytes, made on the stack.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    bytes: [u8; 32],
    len: usize,
}

impl Head {
    fn new() -> Self {
        Head { bytes: [0; 32], len: 0 }
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
}

impl Replies {
    fn simple(error: u32, cookie: u64) -> Head {
        Head::new()
            .with(SIMPLE_REPLY_MAGIC.to_be_bytes())
            .with(error.to_be_bytes())
            .with(cookie.to_be_bytes())
    }

    /// The only chunk of a reply, with `length` bytes of payload.
    fn chunk(kind: u16, cookie: u64, length: u32) -> Head {
        Head::new()
            .with(STRUCTURED_REPLY_MAGIC.to_be_bytes())
            .with(REPLY_FLAG_DONE.to_be_bytes())
            .with(kind.to_be_bytes())
            .with(cookie.to_be_bytes())
            .with(length.to_be_bytes())
    }

    /// What stands before the data of a READ of `length` bytes, at most [`MAX_PAYLOAD`].
    pub fn data(self, request: &Request) -> Head {
        match self {
            Replies::Simple => Self::simple(0, request.cookie),
            Replies::Structured => Self::chunk(REPLY_OFFSET_DATA, request.cookie, request.length + 8)
                .with(request.offset.to_be_bytes()),
        }
    }

    /// Success without data.
    pub fn done(self, request: &Request) -> Head {
        match self {
            Replies::Simple => Self::simple(0, request.cookie),
            Replies::Structured => Self::chunk(REPLY_NONE, request.cookie, 0),
        }
    }

    /// Failure: the head, and what of `message` follows it.
    pub fn error(self, request: &Request, error: u32, message: &str) -> (Head, usize) {
        match self {
            Replies::Simple => (Self::simple(error, request.cookie), 0),
            Replies::Structured => {
                let mut text = message.len().min(MAX_STRING);
                while !message.is_char_boundary(text) {
                    text -= 1;
                }
                let head = Self::chunk(REPLY_ERROR, request.cookie, 6 + text as u32)
                    .with(error.to_be_bytes())
                    .with((text as u16).to_be_bytes());
                (head, text)
            }
        }
    }

    /// What stands before `count` block status descriptors. Structured replies only.
    pub fn block_status(self, request: &Request, count: usize) -> Head {
        Self::chunk(REPLY_BLOCK_STATUS, request.cookie, 4 + 8 * count as u32)
            .with(BASE_ALLOCATION_ID.to_be_bytes())
    }
}

/// The error number of the protocol for an errno (proto.md, "Error values"); two of them only where the request's
/// flags allow them.
pub fn error_number(errno: Errno, flags: u16) -> u32 {
    const EPERM: u32 = 1;
    const EIO: u32 = 5;
    const ENOMEM: u32 = 12;
    const EINVAL: u32 = 22;
    const ENOSPC: u32 = 28;
    const EOVERFLOW: u32 = 75;
    const ENOTSUP: u32 = 95;
    const ESHUTDOWN: u32 = 108;
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
        let status = Replies::Structured.block_status(&r, 3);
        assert_eq!(status.as_slice()[16..], [0, 0, 0, 28, 0, 0, 0, 1]);
    }

    #[test]
    fn error_text_is_bounded_and_stays_text() {
        let message = "é".repeat(3000);
        let (head, text) = Replies::Structured.error(&request(), 5, &message);
        assert_eq!(text, 4096);
        assert!(message.is_char_boundary(text));
        assert_eq!(head.as_slice()[16..], [0, 0, 0x10, 6, 0, 0, 0, 5, 0x10, 0]);
        let (_, odd) = Replies::Structured.error(&request(), 5, &format!("x{message}"));
        assert_eq!(odd, 4095);
        assert_eq!(Replies::Simple.error(&request(), 5, "why").1, 0);
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
