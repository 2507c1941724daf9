//! The client's side of the wire: requests are encoded, and heads of replies decoded.
//!
//! A server may be hostile: whatever does not fit what was negotiated is a [`Violation`], and what a length field says is
//! given to the caller to be checked against the request before memory is made for it.

use nix::errno::Errno;

use crate::{
    EINVAL, EIO, ENOMEM, ENOSPC, ENOTSUP, EOVERFLOW, EPERM, ESHUTDOWN, EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC, Fields, Head, OPTION_MAGIC, REPLY_BLOCK_STATUS, REPLY_BLOCK_STATUS_EXT,
    REPLY_ERROR_OFFSET, REPLY_FLAG_DONE, REPLY_IS_ERROR, REPLY_NONE, REPLY_OFFSET_DATA, REPLY_OFFSET_HOLE,
    REQUEST_MAGIC, Replies, Request, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, cmd_flag,
};

/// How a server broke the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Violation(pub &'static str);

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Violation {}

impl Request {
    /// The bytes on the wire, with an extended header or without. Without one `length` is below 2^32.
    pub fn encode(&self, extended: bool) -> Head {
        let magic = if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        let payload = if extended && self.payload { cmd_flag::PAYLOAD_LEN } else { 0 };
        let head = Head::new()
            .with(magic.to_be_bytes())
            .with((self.flags | payload).to_be_bytes())
            .with(self.command.to_be_bytes())
            .with(self.cookie.to_be_bytes())
            .with(self.offset.to_be_bytes());
        if extended {
            head.with(self.length.to_be_bytes())
        } else {
            head.with((self.length as u32).to_be_bytes())
        }
    }
}

/// Appends an option whose data is the concatenation of `data`.
pub fn put_option(out: &mut Vec<u8>, option: u32, data: &[&[u8]]) {
    let length: usize = data.iter().map(|d| d.len()).sum();
    out.extend(OPTION_MAGIC.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend((length as u32).to_be_bytes());
    for part in data {
        out.extend_from_slice(part);
    }
}

/// What follows the head of a reply, or of a chunk of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A simple reply: an error number, 0 for success. After success with a READ the data follows, of which the head does
    /// not tell the length.
    Simple(u32),
    /// Nothing.
    None,
    /// An offset, and data from there on.
    OffsetData,
    /// An offset and the length of a range of zeroes.
    OffsetHole,
    /// The status of blocks: a context and 32-bit descriptors.
    BlockStatus,
    /// The same with 64-bit descriptors after their number.
    BlockStatusExtended,
    /// An error number and a text, and with `offset` an offset.
    Error {
        /// Whether an offset comes last.
        offset: bool,
    },
}

/// The head of a reply, or of a chunk of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyHead {
    /// The request's.
    pub cookie: u64,
    /// What follows.
    pub kind: Kind,
    /// It ends the reply.
    pub done: bool,
    /// So many bytes follow, whatever the server says that they are; 0 for a simple reply.
    pub length: u64,
}

impl ReplyHead {
    /// Decodes the head at the start of `bytes`, and tells how long it was. None: more bytes are needed.
    ///
    /// # Errors
    /// It is no head that may come where `replies` were negotiated.
    pub fn decode(bytes: &[u8], replies: Replies) -> Result<Option<(Self, usize)>, Violation> {
        let Some((magic, _)) = bytes.split_first_chunk() else { return Ok(None) };
        let extended = match (u32::from_be_bytes(*magic), replies) {
            (SIMPLE_REPLY_MAGIC, Replies::Simple | Replies::Structured) => return Ok(Self::simple(bytes)),
            (STRUCTURED_REPLY_MAGIC, Replies::Structured) => false,
            (EXTENDED_REPLY_MAGIC, Replies::Extended) => true,
            _ => return Err(Violation("a reply begins with a wrong magic number")),
        };
        let length = if extended { 32 } else { 20 };
        let Some(bytes) = bytes.get(4..length) else { return Ok(None) };
        let mut fields = Fields(bytes);
        let decoded = (|| {
            let (flags, kind, cookie) = (fields.u16()?, fields.u16()?, fields.u64()?);
            // The offset is the request's and tells nothing.
            let payload =
                if extended { fields.u64().and_then(|_| fields.u64())? } else { fields.u32()?.into() };
            Some((flags, kind, cookie, payload))
        })();
        let Some((flags, kind, cookie, payload)) = decoded else { return Ok(None) };
        let (kind, least) = match kind {
            REPLY_NONE => (Kind::None, 0),
            REPLY_OFFSET_DATA => (Kind::OffsetData, 9),
            REPLY_OFFSET_HOLE => (Kind::OffsetHole, 12),
            REPLY_BLOCK_STATUS => (Kind::BlockStatus, 12),
            REPLY_BLOCK_STATUS_EXT => (Kind::BlockStatusExtended, 24),
            REPLY_ERROR_OFFSET => (Kind::Error { offset: true }, 14),
            kind if kind & REPLY_IS_ERROR != 0 => (Kind::Error { offset: false }, 6),
            _ => return Err(Violation("a chunk of a reply has an unknown type")),
        };
        let exact = matches!(kind, Kind::None | Kind::OffsetHole);
        if payload < least || (exact && payload != least) {
            return Err(Violation("the length of a chunk does not fit its type"));
        }
        let done = flags & REPLY_FLAG_DONE != 0;
        if kind == Kind::None && !done {
            return Err(Violation("a chunk without content does not end its reply"));
        }
        Ok(Some((ReplyHead { cookie, kind, done, length: payload }, length)))
    }

    fn simple(bytes: &[u8]) -> Option<(Self, usize)> {
        let mut fields = Fields(bytes.get(4..16)?);
        let kind = Kind::Simple(fields.u32()?);
        Some((ReplyHead { cookie: fields.u64()?, kind, done: true, length: 0 }, 16))
    }
}

/// The errno of an error number on the wire; `EINVAL` where it is none of the protocol's.
pub fn errno(number: u32) -> Errno {
    match number {
        EPERM => Errno::EPERM,
        EIO => Errno::EIO,
        ENOMEM => Errno::ENOMEM,
        EINVAL => Errno::EINVAL,
        ENOSPC => Errno::ENOSPC,
        EOVERFLOW => Errno::EOVERFLOW,
        ENOTSUP => Errno::EOPNOTSUPP,
        ESHUTDOWN => Errno::ESHUTDOWN,
        _ => Errno::EINVAL,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cmd;

    #[test]
    fn requests_are_what_a_server_decodes() {
        let request = Request {
            flags: cmd_flag::FUA,
            command: cmd::WRITE,
            cookie: 7,
            offset: 1 << 40,
            length: 512,
            payload: true,
        };
        let plain = request.encode(false);
        assert_eq!(Request::decode(plain.as_slice().try_into().unwrap()), Some(request));
        let extended = request.encode(true);
        assert_eq!(extended.as_slice()[5], 0x21);
        assert_eq!(Request::decode_extended(extended.as_slice().try_into().unwrap()), Some(request));
    }

    #[test]
    fn heads_come_byte_by_byte() {
        let structured = [&[0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 1][..], &[0; 7], &[9, 0, 0, 2, 8]].concat();
        for end in 0..20 {
            assert_eq!(ReplyHead::decode(&structured[..end], Replies::Structured), Ok(None), "{end}");
        }
        let (head, length) = ReplyHead::decode(&structured, Replies::Structured).unwrap().unwrap();
        assert_eq!(
            (head, length),
            (ReplyHead { cookie: 9, kind: Kind::OffsetData, done: true, length: 520 }, 20)
        );
        assert!(ReplyHead::decode(&structured, Replies::Simple).is_err());
        assert!(ReplyHead::decode(&structured, Replies::Extended).is_err());
    }

    #[test]
    fn chunks_that_make_no_sense() {
        let chunk = |flags: u8, kind: [u8; 2], length: u32| {
            let start = [0x66, 0x8e, 0x33, 0xef, 0, flags, kind[0], kind[1], 0, 0, 0, 0, 0, 0, 0, 1];
            ReplyHead::decode(&[&start[..], &length.to_be_bytes()].concat(), Replies::Structured)
        };
        assert!(chunk(1, [0, 0], 0).is_ok());
        assert!(chunk(0, [0, 0], 0).is_err());
        assert!(chunk(1, [0, 0], 1).is_err());
        assert!(chunk(1, [0, 1], 8).is_err());
        assert!(chunk(1, [0, 2], 13).is_err());
        assert!(chunk(1, [0, 3], 13).is_err());
        assert!(chunk(1, [0x80, 9], 6).is_ok());
        assert!(chunk(1, [0x80, 1], 5).is_err());
    }

    #[test]
    fn errors() {
        assert_eq!(errno(28), Errno::ENOSPC);
        assert_eq!(errno(95), Errno::EOPNOTSUPP);
        assert_eq!(errno(4711), Errno::EINVAL);
    }
}
