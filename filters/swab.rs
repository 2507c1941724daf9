//! Swaps the order of bytes, for disks that were written the wrong way round.
//!
//! Requests must be aligned to the words that are swapped; the filter says so by its minimum block size. What is left
//! at the end of the disk after the last whole word is not there.

use std::ffi::OsStr;

use anyhow::bail;
use nbdkit_core::{
    Below, BlockSize, Call, Caps, Data, Errno, Error, Filter, Handle, Info, Next, NextConfig, Op, Open,
    Outcome, Request, Result, params,
};

use crate::passthrough::Passthrough;

const HELP: &str = "swab-bits=8|16|32|64   Size of the words whose bytes are swapped (default 16).";

pub(crate) fn new() -> Box<dyn Filter> {
    Box::new(Swab { word: 2 })
}

struct Swab {
    /// In bytes: 1, 2, 4 or 8.
    word: u32,
}

impl Filter for Swab {
    fn info(&self) -> Info {
        Info::bundled("swab", "nbdkit byte-swapping filter", HELP)
    }

    fn config(&mut self, key: &str, value: &OsStr, next: &mut NextConfig<'_>) -> anyhow::Result<()> {
        if key != "swab-bits" {
            return next(key, value);
        }
        self.word = match params::text(value)? {
            "8" => 1,
            "16" => 2,
            "32" => 4,
            "64" => 8,
            other => bail!("invalid swab-bits '{other}': use 8, 16, 32 or 64"),
        };
        Ok(())
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        let next = next.open(open)?;
        Ok(if self.word == 1 {
            Box::new(Passthrough(next))
        } else {
            Box::new(Swapped { word: self.word, next })
        })
    }
}

struct Swapped {
    word: u32,
    next: Next,
}

impl Swapped {
    fn check(&self, call: &Call) -> Result<()> {
        let (Call { offset, length, .. }, word) = (*call, u64::from(self.word));
        if length.is_multiple_of(word) && offset.is_multiple_of(word) {
            return Ok(());
        }
        Err(Error::new(
            Errno::EINVAL,
            format!(
                "the request of {length} bytes at {offset} is not aligned to swab-bits={}: put \
                 --filter=blocksize before --filter=swab",
                self.word * 8
            ),
        ))
    }

    fn swap(&self, bytes: &mut [u8]) {
        for word in bytes.chunks_exact_mut(self.word as usize) {
            word.reverse();
        }
    }
}

impl Handle for Swapped {
    fn next(&self) -> Option<&Next> {
        Some(&self.next)
    }

    fn capabilities(&self) -> Result<Caps> {
        let Caps { size, block_size: below, .. } = *self.next.caps();
        let block_size = if below.is_unset() {
            BlockSize { minimum: self.word, preferred: 512, maximum: u32::MAX }
        } else {
            // Both are powers of 2, so what is a multiple of the greater is one of both.
            let minimum = below.minimum.max(self.word);
            let maximum = match below.maximum {
                u32::MAX => u32::MAX,
                maximum => maximum - maximum % minimum,
            };
            BlockSize { minimum, preferred: below.preferred, maximum }
        };
        let caps = self.next.capabilities().with_size(size - size % u64::from(self.word));
        Ok(caps.with_block_size(block_size))
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        let call = *request.call();
        if let Err(e) = self.check(&call) {
            return Outcome::Done(Err(e));
        }
        match (call.op, request.data()) {
            (Op::Read, _) => self.next.transform(self, request, 0),
            (_, Data::Write(buf)) => {
                let mut swapped = buf.to_vec();
                self.swap(&mut swapped);
                self.next.replaced(request, call, Data::Write(&swapped))
            }
            // It asks for a loan.
            (Op::Write, _) => Outcome::NeedsThread,
            (Op::Extents, _) => self.next.whole_blocks(request, call.offset, call.length, self.word.into()),
            _ => self.next.submit(request),
        }
    }

    fn transform(&self, _: &Call, _: u64, data: &mut [u8]) -> Result<()> {
        self.swap(data);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use nbdkit_core::Flags;

    use super::*;
    use crate::testing::{
        Answer, Spec, View, check_model, config_error, lent, read_inline, session, started,
    };

    #[test]
    fn model() {
        // The blocksize filter makes whole words of the model's requests.
        let view = |map| View { map, ..View::same(20_000) };
        for (bits, view) in [
            ("8", view(|at, _| Some(at))),
            ("16", view(|at, _| Some(at ^ 1))),
            ("32", view(|at, _| Some(at ^ 3))),
            ("64", view(|at, _| Some(at ^ 7))),
        ] {
            check_model(&["blocksize", "swab"], &[("swab-bits", bits), ("minblock", "8")], 20_000, &view);
        }
    }

    #[test]
    fn the_default_is_16_bits() {
        let disk = Spec { data: b"badcfehg".to_vec(), ..Spec::default() }.disk();
        let session = session(&disk, "swab", &[]);
        let mut buf = [0; 8];
        session.pread(&mut buf, 0).unwrap();
        assert_eq!(&buf, b"abcdefgh");
        assert!(read_inline(&session, &mut buf[..4], 2).unwrap());
        assert_eq!(&buf[..4], b"cdef");
        session.pwrite(b"ABCD", 4, Flags::empty()).unwrap();
        assert_eq!(disk.contents(), b"badcBADC");
    }

    #[test]
    fn what_is_left_at_the_end_is_not_there() {
        for (bits, size) in [("8", 1023), ("16", 1022), ("32", 1020), ("64", 1016)] {
            assert_eq!(session(&Spec::sized(1023).disk(), "swab", &[("swab-bits", bits)]).size(), size);
        }
    }

    #[test]
    fn requests_must_be_aligned() {
        let disk = Spec::default().disk();
        let session = session(&disk, "swab", &[("swab-bits", "32")]);
        let mut buf = [0; 6];
        for error in [
            session.pread(&mut buf, 0).unwrap_err(),
            session.pread(&mut buf[..4], 2).unwrap_err(),
            read_inline(&session, &mut buf, 0).unwrap_err(),
            session.pwrite(&buf, 0, Flags::empty()).unwrap_err(),
            session.trim(4, 1, Flags::empty()).unwrap_err(),
            session.zero(3, 0, Flags::empty()).unwrap_err(),
            session.cache(2, 0).unwrap_err(),
            session.extents(2, 0, Flags::empty()).unwrap_err(),
        ] {
            assert_eq!(error.errno(), Errno::EINVAL);
            assert!(error.to_string().contains("put --filter=blocksize before"), "{error}");
        }
        assert!(disk.calls().is_empty());
    }

    #[test]
    fn block_sizes() {
        let block = |minimum, maximum| {
            let block_size = BlockSize { minimum, preferred: 4096, maximum };
            session(&Spec { block_size, ..Spec::default() }.disk(), "swab", &[("swab-bits", "64")])
                .caps()
                .block_size
        };
        let unset = session(&Spec::default().disk(), "swab", &[]).caps().block_size;
        assert_eq!((unset.minimum, unset.preferred, unset.maximum), (2, 512, u32::MAX));
        assert_eq!((block(1, u32::MAX).minimum, block(1, u32::MAX).maximum), (8, u32::MAX));
        assert_eq!(block(1, 10_001).maximum, 10_000);
        assert_eq!(block(512, 8192).minimum, 512);
    }

    #[test]
    fn only_a_filter_that_is_off_lends() {
        let disk = Spec::default().disk();
        for op in [Op::Read, Op::Write] {
            assert!(lent(&session(&disk, "swab", &[("swab-bits", "8")]), op, 0, 512).is_some());
            assert!(lent(&session(&disk, "swab", &[]), op, 0, 512).is_none());
        }
    }

    #[test]
    fn what_is_started_is_swapped() {
        let disk = Spec { data: b"badcfehg".to_vec(), later: true, ..Spec::default() }.disk();
        let session = session(&disk, "swab", &[]);
        let answer = started(&session, Call::new(Op::Read, 2, 4), &[]);
        assert!(matches!(&answer, Answer::Started(Ok(data)) if data == b"cdef"), "{answer:?}");
        let answer = started(&session, Call::new(Op::Write, 4, 4), b"ABCD");
        assert!(matches!(&answer, Answer::Started(Ok(_))), "{answer:?}");
        assert_eq!(disk.contents(), b"badcBADC");
        let answer = started(&session, Call::new(Op::Zero, 0, 4), b"");
        assert!(matches!(&answer, Answer::Started(Ok(_))), "{answer:?}");
    }

    #[test]
    fn other_numbers_of_bits_are_refused() {
        assert!(config_error("swab", &[("swab-bits", "7")]).contains("use 8, 16, 32 or 64"));
    }
}
