//! What a server answers: the body into the memory of a request, and what its header says.

use nbdkit_core::Memory;

use super::libcurl::Sink;

/// Bytes of headers that are looked at.
const HEADERS: usize = 256 << 10;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Answer {
    pub(super) memory: Memory,
    /// So many bytes are wanted, and so many came.
    pub(super) wanted: usize,
    pub(super) got: usize,
    /// There were more than were wanted.
    pub(super) too_much: bool,
    pub(super) header: Header,
    seen: usize,
}

/// What the header of the last answer says: those of redirections before it are forgotten.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    /// `Accept-Ranges` names bytes, or something else.
    pub(super) ranges: Option<bool>,
    /// `Content-Range`: where the part begins, and how long all of it is.
    pub(super) part: Option<(u64, Option<u64>)>,
    pub(super) etag: Option<String>,
    pub(super) modified: Option<String>,
}

impl Answer {
    /// Ready for an answer of `wanted` bytes.
    pub(super) fn begin(&mut self, memory: Memory, wanted: usize) {
        *self = Answer { memory, wanted, ..Answer::default() };
    }
}

impl Sink for Answer {
    fn body(&mut self, bytes: &[u8]) -> bool {
        let fits = bytes.len() <= self.wanted - self.got;
        if fits {
            self.memory[self.got..self.got + bytes.len()].copy_from_slice(bytes);
            self.got += bytes.len();
        }
        self.too_much |= !fits;
        fits
    }

    fn header(&mut self, line: &[u8]) -> bool {
        self.seen += line.len();
        if line.starts_with(b"HTTP/") {
            self.header = Header::default();
        }
        let text = String::from_utf8_lossy(line);
        if let Some((name, value)) = text.split_once(':') {
            let value = value.trim();
            match name.trim().to_ascii_lowercase().as_str() {
                "accept-ranges" => self.header.ranges = Some(value.eq_ignore_ascii_case("bytes")),
                "content-range" => self.header.part = part(value),
                "etag" => self.header.etag = Some(value.into()),
                "last-modified" => self.header.modified = Some(value.into()),
                _ => {}
            }
        }
        self.seen <= HEADERS
    }
}

/// Reads `bytes START-END/TOTAL`, where the total may be a star.
fn part(value: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = value.strip_prefix("bytes")?.trim().split_once('/')?;
    let (start, _) = range.split_once('-')?;
    let total = if total == "*" { None } else { Some(total.trim().parse().ok()?) };
    Some((start.trim().parse().ok()?, total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        assert_eq!(part("bytes 5-9/100"), Some((5, Some(100))));
        assert_eq!(part("bytes 0-0/*"), Some((0, None)));
        for bad in ["5-9/100", "bytes */100", "bytes x-9/1", "bytes 1-2/-3"] {
            assert_eq!(part(bad), None, "{bad}");
        }
    }

    #[test]
    fn headers_of_the_last_answer() {
        let mut answer = Answer::default();
        for line in
            ["HTTP/1.1 302 Found\r\n", "ETag: x\r\n", "HTTP/1.1 200 OK\r\n", "accept-ranges: Bytes\r\n"]
        {
            assert!(answer.header(line.as_bytes()));
        }
        assert_eq!(answer.header, Header { ranges: Some(true), ..Header::default() });
        assert!(!answer.header(&[b'x'; HEADERS]));
    }

    #[test]
    fn a_body_is_as_long_as_was_asked() {
        let mut answer = Answer::default();
        answer.begin(nbdkit_core::Buffers::default().take(4).unwrap(), 4);
        assert!(answer.body(b"abc") && !answer.body(b"de") && answer.too_much);
        assert!(answer.body(b"d"));
        assert_eq!((answer.got, &answer.memory[..4]), (4, &b"abcd"[..]));
    }
}
