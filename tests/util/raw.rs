//! A client that speaks byte by byte: for what no honest client says, and for what the installed libnbd is too old
//! to ask.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    time::Duration,
};

use super::Server;

pub(crate) const OPTION_MAGIC: u64 = 0x4948_4156_454F_5054;
const REQUEST_MAGIC: u32 = 0x2560_9513;

/// A client of our own, since no honest one would say these things.
pub(crate) struct Raw(UnixStream);

impl Raw {
    pub(crate) fn connect(server: &Server) -> Self {
        let stream = UnixStream::connect(server.socket()).expect("connect");
        stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a timeout");
        stream.set_write_timeout(Some(Duration::from_secs(30))).expect("a timeout");
        let mut raw = Raw(stream);
        raw.read(18);
        raw
    }

    /// After the client flags: in the option phase.
    pub(crate) fn options(server: &Server) -> Self {
        let mut raw = Self::connect(server);
        raw.send(&3_u32.to_be_bytes());
        raw
    }

    /// After EXPORT_NAME: in the transmission phase.
    pub(crate) fn transmission(server: &Server) -> Self {
        let mut raw = Self::options(server);
        raw.option(1, b"");
        raw.read(10);
        raw
    }

    /// After GO with structured replies and `base:allocation`.
    pub(crate) fn structured(server: &Server) -> Self {
        let mut raw = Self::options(server);
        raw.option(8, b"");
        raw.option(10, &contexts("", &["base:allocation"]));
        raw.option(7, &go(""));
        assert_eq!([(); 5].map(|()| raw.reply()), [1, 4, 1, 3, 1]);
        raw
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        // The server may have closed already.
        let _ = self.0.write_all(bytes);
    }

    pub(crate) fn option(&mut self, option: u32, payload: &[u8]) {
        let length = u32::try_from(payload.len()).expect("a length");
        self.send(
            &[&OPTION_MAGIC.to_be_bytes()[..], &option.to_be_bytes(), &length.to_be_bytes(), payload]
                .concat(),
        );
    }

    /// Sends an option; false: the server has closed the connection instead of an answer.
    pub(crate) fn option_answered(&mut self, option: u32) -> bool {
        self.option(option, b"");
        let mut header = [0; 20];
        let answered = self.0.read_exact(&mut header).is_ok();
        if answered {
            self.read(usize::from(header[19]));
        }
        answered
    }

    pub(crate) fn request(&mut self, flags: u16, command: u16, offset: u64, length: u32) {
        self.send(&Self::encoded(flags, command, offset, length));
    }

    /// The bytes of a request.
    pub(crate) fn encoded(flags: u16, command: u16, offset: u64, length: u32) -> Vec<u8> {
        let cookie = 42_u64;
        [
            &REQUEST_MAGIC.to_be_bytes()[..],
            &flags.to_be_bytes(),
            &command.to_be_bytes(),
            &cookie.to_be_bytes(),
            &offset.to_be_bytes(),
            &length.to_be_bytes(),
        ]
        .concat()
    }

    pub(crate) fn read(&mut self, n: usize) -> Vec<u8> {
        let mut buf = vec![0; n];
        self.0.read_exact(&mut buf).expect("an answer");
        buf
    }

    /// The chunks of a structured reply.
    pub(crate) fn chunks(&mut self) -> Vec<Chunk> {
        let mut chunks = Vec::new();
        loop {
            let header = self.read(20);
            assert_eq!(header[..4], 0x668e_33ef_u32.to_be_bytes(), "no structured reply");
            let length = u32::from_be_bytes(header[16..].try_into().expect("4 bytes"));
            let kind = u16::from_be_bytes([header[6], header[7]]);
            chunks.push(Chunk { kind, payload: self.read(length as usize) });
            if header[5] & 1 != 0 {
                return chunks;
            }
        }
    }

    /// The type of the next option reply, whose payload is skipped.
    pub(crate) fn reply(&mut self) -> u32 {
        self.whole_reply().0
    }

    /// The type of the next option reply, and its payload.
    pub(crate) fn whole_reply(&mut self) -> (u32, Vec<u8>) {
        let header = self.read(20);
        let word = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().expect("4 bytes"));
        (word(12), self.read(word(16) as usize))
    }

    /// The server closes the connection, whatever it says before.
    #[track_caller]
    pub(crate) fn ends(mut self) {
        self.read_to_end();
    }

    /// Sends no more, and returns what the server says until it closes the connection.
    #[track_caller]
    pub(crate) fn rest(mut self) -> Vec<u8> {
        // The server may have closed already.
        let _ = self.0.shutdown(std::net::Shutdown::Write);
        self.read_to_end()
    }

    #[track_caller]
    fn read_to_end(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        match self.0.read_to_end(&mut rest) {
            Ok(_) => {}
            Err(e) => assert_eq!(e.kind(), std::io::ErrorKind::ConnectionReset, "still open after 30 s: {e}"),
        }
        rest
    }

    /// Reads no more.
    pub(crate) fn deafen(&self) {
        self.0.shutdown(std::net::Shutdown::Read).expect("shutdown");
    }

    /// Closes its side without a word.
    pub(crate) fn vanish(&self) {
        self.0.shutdown(std::net::Shutdown::Both).expect("shutdown");
    }
}

/// A chunk of a structured reply.
#[derive(Debug)]
pub(crate) struct Chunk {
    pub(crate) kind: u16,
    pub(crate) payload: Vec<u8>,
}

impl Chunk {
    /// 32 bits of the payload.
    pub(crate) fn u32(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.payload[at..at + 4].try_into().expect("4 bytes"))
    }

    /// 64 bits of the payload.
    pub(crate) fn u64(&self, at: usize) -> u64 {
        u64::from_be_bytes(self.payload[at..at + 8].try_into().expect("8 bytes"))
    }
}

/// The payload of INFO and GO.
pub(crate) fn go(export: &str) -> Vec<u8> {
    [&string(export)[..], &[0, 0]].concat()
}

/// The payload of LIST_META_CONTEXT and SET_META_CONTEXT.
pub(crate) fn contexts(export: &str, queries: &[&str]) -> Vec<u8> {
    let count = u32::try_from(queries.len()).expect("a length");
    let mut payload = [&string(export)[..], &count.to_be_bytes()].concat();
    for query in queries {
        payload.extend(string(query));
    }
    payload
}

/// A string with its length before it.
fn string(text: &str) -> Vec<u8> {
    let length = u32::try_from(text.len()).expect("a length");
    [&length.to_be_bytes()[..], text.as_bytes()].concat()
}
