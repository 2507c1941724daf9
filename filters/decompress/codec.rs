//! A decoder of one of the libraries, fed from a range of the source.

use std::ops::Range;

use nbdkit_core::Result;

use super::{Reader, Source, damaged, zeroed};

/// How far a decoder came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) consumed: usize,
    pub(crate) produced: usize,
    /// The data has ended, and its checksum was right.
    pub(crate) ended: bool,
}

/// A decoder of one of the libraries.
pub(crate) trait Codec: Send {
    /// Decodes from `input` to `output`, as far as it comes. No input: there is no more.
    ///
    /// # Errors
    /// What is wrong with the input.
    fn step(&mut self, input: &[u8], output: &mut [u8]) -> std::result::Result<Step, String>;
}

/// Decodes what is in a range of the source, between a head and a tail that are not there.
pub(crate) struct Stream<C> {
    codec: C,
    head: Vec<u8>,
    range: Reader,
    tail: Vec<u8>,
    ended: bool,
}

impl<C: Codec> Stream<C> {
    pub(crate) fn new(codec: C, head: Vec<u8>, range: Range<u64>, tail: Vec<u8>) -> Self {
        Stream { codec, head, range: Reader::new(range), tail, ended: false }
    }

    /// Fills `out`; less comes at the end of the data alone.
    ///
    /// # Errors
    /// `EIO` for damage; those of [`Source::read`].
    pub(crate) fn read(&mut self, source: &Source, out: &mut [u8]) -> Result<usize> {
        let mut filled = 0;
        while filled < out.len() && !self.ended {
            filled += self.step(source, &mut out[filled..])?;
        }
        Ok(filled)
    }

    fn step(&mut self, source: &Source, out: &mut [u8]) -> Result<usize> {
        let Stream { codec, head, range, tail, ended } = self;
        let (mut input, mut part) = (&head[..], 0);
        if input.is_empty() {
            (input, part) = (range.fill(source)?, 1);
        }
        if input.is_empty() {
            (input, part) = (&tail[..], 2);
        }
        let step = codec.step(input, out).map_err(damaged)?;
        *ended = step.ended;
        if step.consumed == 0 && step.produced == 0 && !step.ended {
            let what =
                if input.is_empty() { "the compressed data ends early" } else { "the data is damaged" };
            return Err(damaged(what));
        }
        match part {
            0 => drop(head.drain(..step.consumed)),
            1 => range.consume(step.consumed),
            _ => drop(tail.drain(..step.consumed)),
        }
        Ok(step.produced)
    }

    /// Verifies that the data ends here, and its checksum.
    ///
    /// # Errors
    /// `EIO` if not; those of [`Source::read`].
    pub(crate) fn finish(&mut self, source: &Source) -> Result<()> {
        if self.read(source, &mut [0])? > 0 {
            return Err(damaged("there is more data than the file says"));
        }
        Ok(())
    }

    /// All of the data, which has that length.
    ///
    /// # Errors
    /// `EIO` for damage and for another length; `ENOMEM`; those of [`Source::read`].
    pub(crate) fn whole(mut self, source: &Source, length: u64) -> Result<Vec<u8>> {
        let mut out = zeroed(length)?;
        if self.read(source, &mut out)? < out.len() {
            return Err(damaged("there is less data than the file says"));
        }
        self.finish(source)?;
        Ok(out)
    }
}
