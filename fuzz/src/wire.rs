//! The client's side of the protocol, as far as the targets need it: written from doc/proto.md of NetworkBlockDevice/nbd,
//! apart from the server's own.

/// How the server is to answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, arbitrary::Arbitrary)]
pub enum Mode {
    /// Simple replies.
    Simple,
    /// Structured replies.
    Structured,
    /// Extended headers.
    Extended,
}

/// Commands of the transmission phase.
pub const READ: u16 = 0;
/// See [`READ`].
pub const WRITE: u16 = 1;
/// See [`READ`].
pub const FLUSH: u16 = 3;
/// See [`READ`].
pub const TRIM: u16 = 4;
/// See [`READ`].
pub const CACHE: u16 = 5;
/// See [`READ`].
pub const WRITE_ZEROES: u16 = 6;
/// See [`READ`].
pub const BLOCK_STATUS: u16 = 7;

/// A handshake that ends with the default export open, `base:allocation` selected where that can be.
pub fn handshake(mode: Mode) -> Vec<u8> {
    let mut out = 3u32.to_be_bytes().to_vec();
    match mode {
        Mode::Simple => {}
        Mode::Structured => option(&mut out, 8, &[]),
        Mode::Extended => option(&mut out, 11, &[]),
    }
    if mode != Mode::Simple {
        let mut data = 0u32.to_be_bytes().to_vec();
        data.extend(1u32.to_be_bytes());
        data.extend(15u32.to_be_bytes());
        data.extend(b"base:allocation");
        option(&mut out, 10, &data);
    }
    option(&mut out, 7, &[0; 6]);
    out
}

/// An option with its data.
pub fn option(out: &mut Vec<u8>, option: u32, data: &[u8]) {
    out.extend(b"IHAVEOPT");
    out.extend(option.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
}

/// A request; `payload` follows a write.
pub fn request(
    out: &mut Vec<u8>,
    mode: Mode,
    (flags, command): (u16, u16),
    cookie: u64,
    (offset, length): (u64, u64),
) {
    let magic: u32 = if mode == Mode::Extended { 0x21e4_1c71 } else { 0x2560_9513 };
    out.extend(magic.to_be_bytes());
    out.extend(flags.to_be_bytes());
    out.extend(command.to_be_bytes());
    out.extend(cookie.to_be_bytes());
    out.extend(offset.to_be_bytes());
    if mode == Mode::Extended {
        out.extend(length.to_be_bytes());
    } else {
        out.extend((length as u32).to_be_bytes());
    }
}

/// A part of an answer.
#[derive(Debug, PartialEq, Eq)]
pub enum Part<'a> {
    /// The request succeeded, so far.
    Nothing,
    /// Data at an offset; of a simple reply, the offset is not known.
    Data(Option<u64>, &'a [u8]),
    /// Zeroes at an offset.
    Hole(u64, u64),
    /// Block status: descriptors that cover so many bytes.
    Status(u64),
    /// The request failed.
    Error(u32),
}

/// One reply or chunk.
#[derive(Debug)]
pub struct Reply<'a> {
    /// Whose it is.
    pub cookie: u64,
    /// Whether the request has ended.
    pub last: bool,
    /// What it says.
    pub part: Part<'a>,
}

/// Reads replies from the bytes that a server has sent after the handshake.
pub struct Replies<'a> {
    rest: &'a [u8],
    mode: Mode,
}

impl<'a> Replies<'a> {
    /// Of everything that the server has said: what follows on the handshake, which ends with the acknowledgement of GO.
    /// None: it did not get there.
    pub fn new(said: &'a [u8], mode: Mode) -> Option<Self> {
        let mut rest = said.get(18..)?;
        loop {
            let head = rest.get(..20)?;
            let (option, kind) = (be32(&head[8..12]), be32(&head[12..16]));
            rest = rest.get(20 + be32(&head[16..20]) as usize..)?;
            if option == 7 && kind == 1 {
                return Some(Replies { rest, mode });
            }
        }
    }

    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(length)?;
        self.rest = rest;
        Some(taken)
    }

    /// The next one. `expected` is the length of the data of a simple reply to the read with that cookie.
    ///
    /// # Panics
    /// When the server breaks the protocol.
    pub fn next(&mut self, expected: impl Fn(u64) -> usize) -> Option<Reply<'a>> {
        let magic = be32(self.take(4)?);
        if magic == 0x6744_6698 {
            assert!(self.mode != Mode::Extended, "a simple reply");
            let head = self.take(12)?;
            let (error, cookie) = (be32(&head[..4]), be64(&head[4..]));
            let part = match (error, expected(cookie)) {
                (0, 0) => Part::Nothing,
                (0, length) => {
                    assert!(self.mode == Mode::Simple, "a simple reply to a read");
                    Part::Data(None, self.take(length)?)
                }
                (error, _) => Part::Error(error),
            };
            return Some(Reply { cookie, last: true, part });
        }
        let extended = match (magic, self.mode) {
            (0x668e_33ef, Mode::Structured) => false,
            (0x6e8a_278c, Mode::Extended) => true,
            _ => panic!("a reply begins with {magic:#x}"),
        };
        let head = self.take(if extended { 28 } else { 16 })?;
        let (flags, kind, cookie) = (be16(&head[..2]), be16(&head[2..4]), be64(&head[4..12]));
        let length = if extended { be64(&head[20..28]) as usize } else { be32(&head[12..16]) as usize };
        let data = self.take(length)?;
        let part = match kind {
            0 => Part::Nothing,
            1 => Part::Data(Some(be64(&data[..8])), &data[8..]),
            2 => Part::Hole(be64(&data[..8]), u64::from(be32(&data[8..12]))),
            5 => {
                assert!(data.len() % 8 == 4 && data.len() > 4, "{length} bytes of block status");
                Part::Status(data[4..].chunks(8).map(|one| u64::from(be32(&one[..4]))).sum())
            }
            6 => {
                assert!(data.len() % 16 == 8 && data.len() > 8, "{length} bytes of extended block status");
                Part::Status(data[8..].chunks(16).map(|one| be64(&one[..8])).sum())
            }
            kind if kind & 0x8000 != 0 => Part::Error(be32(&data[..4])),
            kind => panic!("a chunk of kind {kind}"),
        };
        Some(Reply { cookie, last: flags & 1 != 0, part })
    }

    /// Whether all of it was read.
    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }
}

fn be16(bytes: &[u8]) -> u16 {
    u16::from_be_bytes(bytes.try_into().expect("two bytes"))
}

fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes.try_into().expect("four bytes"))
}

fn be64(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes.try_into().expect("eight bytes"))
}
