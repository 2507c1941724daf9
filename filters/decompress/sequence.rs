//! Whether a client reads in sequence: then what follows is decoded before it asks.
//!
//! A client may have several requests under way that arrive in any order, and read in several places at once. So there are a
//! few streams, and a request belongs to one if it begins near the place where that one is.

use std::ops::Range;

/// Streams that are followed.
const STREAMS: usize = 8;
/// How far from its expected place a request of a stream may begin, in bytes.
const NEAR: u64 = 2 << 20;
/// Requests that make a stream of it.
const ENOUGH: u32 = 2;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Sequence {
    streams: [Stream; STREAMS],
    clock: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Stream {
    next: u64,
    requests: u32,
    used: u64,
}

impl Sequence {
    /// Notes a read. True: it goes on where others have ended.
    pub(super) fn note(&mut self, range: &Range<u64>) -> bool {
        self.clock += 1;
        let near = |stream: &&mut Stream| stream.used > 0 && stream.next.abs_diff(range.start) <= NEAR;
        if let Some(stream) = self.streams.iter_mut().find(near) {
            // Rereading the same place is none.
            if range.end > stream.next {
                stream.requests = stream.requests.saturating_add(1);
                stream.next = range.end;
            }
            stream.used = self.clock;
            return stream.requests >= ENOUGH;
        }
        if let Some(oldest) = self.streams.iter_mut().min_by_key(|stream| stream.used) {
            *oldest = Stream { next: range.end, requests: 1, used: self.clock };
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const K: u64 = 1 << 10;

    #[test]
    fn requests_in_order_and_nearly() {
        let mut sequence = Sequence::default();
        assert!(!sequence.note(&(0..256 * K)));
        assert!(sequence.note(&(256 * K..512 * K)));
        assert!(sequence.note(&(768 * K..1024 * K)));
        assert!(sequence.note(&(512 * K..768 * K)));
        assert!(!sequence.note(&(1 << 40..(1 << 40) + 1)));
    }

    #[test]
    fn several_at_once() {
        let mut sequence = Sequence::default();
        for i in 0..10 {
            for stream in 0..STREAMS as u64 {
                let start = (stream << 30) + i * 64 * K;
                assert_eq!(sequence.note(&(start..start + 64 * K)), i > 0, "{i} {stream}");
            }
        }
    }

    #[test]
    fn the_same_place_again_is_none() {
        let mut sequence = Sequence::default();
        for _ in 0..10 {
            assert!(!sequence.note(&(4 * K..8 * K)));
        }
    }
}
