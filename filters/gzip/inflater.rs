//! A decoder of .gz files that can begin at a checkpoint, and notes checkpoints where it comes by.

use std::sync::Arc;

use crc32fast::Hasher;
use miniz_oxide::inflate::{
    TINFLStatus,
    core::{
        BlockBoundaryState, DecompressorOxide, decompress_with_limit,
        inflate_flags::{
            TINFL_FLAG_HAS_MORE_INPUT, TINFL_FLAG_STOP_ON_BLOCK_BOUNDARY,
            TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF,
        },
    },
};
use nbdkit_core::{Error, Result};

use super::checkpoints::{Checkpoint, Checkpoints, WINDOW};
use crate::decompress::{Cursor, Reader, Source, damaged};

/// How a member begins.
pub(super) const MAGIC: [u8; 2] = [0x1f, 0x8b];
/// Decoded data that is kept to decode more, in bytes.
const BUFFER: usize = WINDOW + (256 << 10);
/// Candidates for a checkpoint are this part of a span apart.
const CANDIDATES: u64 = 16;
/// Name, comment and so on of a member may have this length, in bytes.
const MOST_HEADER: usize = 1 << 20;

/// See the module.
pub(super) struct Inflater {
    checkpoints: Arc<Checkpoints>,
    input: Reader,
    state: State,
    decoder: Box<DecompressorOxide>,
    /// The last data, and the place for more from `filled` on.
    buffer: Vec<u8>,
    filled: usize,
    /// The offset in the disk of what comes next.
    position: u64,
    /// Where the member begins in the disk, and the checksum of what it had so far.
    member: u64,
    checksum: Hasher,
    /// The last place that could be a checkpoint.
    candidate: Option<Checkpoint>,
    verify_end: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Between,
    Within,
    Ended,
}

impl Inflater {
    /// One that begins at a checkpoint, or at the start of the file. Whether the data ends where the disk does is verified,
    /// or does not matter.
    pub(super) fn new(
        source: &Source,
        checkpoints: Arc<Checkpoints>,
        from: Option<Checkpoint>,
        verify_end: bool,
    ) -> Self {
        let state = if from.is_some() { State::Within } else { State::Between };
        let from = from.unwrap_or_default();
        let boundary =
            BlockBoundaryState { num_bits: from.bits, bit_buf: from.bit_buffer, ..Default::default() };
        let mut buffer = vec![0; BUFFER];
        let window = from.window.len().min(WINDOW);
        buffer[WINDOW - window..WINDOW].copy_from_slice(&from.window[..window]);
        Inflater {
            checkpoints,
            input: Reader::new(from.file..source.size()),
            state,
            decoder: Box::new(DecompressorOxide::from_block_boundary_state(&boundary)),
            buffer,
            filled: WINDOW,
            position: from.disk,
            member: from.member,
            checksum: Hasher::new_with_initial_len(from.checksum, from.disk - from.member),
            candidate: None,
            verify_end,
        }
    }

    /// The next byte.
    fn byte(&mut self, source: &Source) -> Result<Option<u8>> {
        let byte = self.input.fill(source)?.first().copied();
        self.input.consume(usize::from(byte.is_some()));
        Ok(byte)
    }

    fn bytes<const N: usize>(&mut self, source: &Source) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        for byte in &mut bytes {
            *byte = self.byte(source)?.ok_or_else(ends_early)?;
        }
        Ok(bytes)
    }

    /// Begins the next member, if there is one: gzip ignores what else follows a member, and so do we.
    fn begin(&mut self, source: &Source) -> Result<()> {
        self.state = State::Ended;
        for expected in MAGIC {
            if self.byte(source)? != Some(expected) {
                return Ok(());
            }
        }
        let [method, flags, ..] = self.bytes::<8>(source)?;
        if method != 8 || flags & 0xe0 != 0 {
            return Err(damaged("a member is compressed in an unknown way"));
        }
        if flags & 4 != 0 {
            let length = u16::from_le_bytes(self.bytes(source)?);
            for _ in 0..length {
                self.bytes::<1>(source)?;
            }
        }
        for _ in 0..(flags >> 3 & 1) + (flags >> 4 & 1) {
            let mut length = 0;
            while self.bytes::<1>(source)? != [0] {
                length += 1;
                if length > MOST_HEADER {
                    return Err(damaged("the name in the file is too long"));
                }
            }
        }
        if flags & 2 != 0 {
            self.bytes::<2>(source)?;
        }
        self.state = State::Within;
        self.decoder.init();
        self.member = self.position;
        self.checksum = Hasher::new();
        self.boundary(0, 0)
    }

    /// A member's data has ended: its checksum and length follow.
    fn end(&mut self, source: &Source) -> Result<()> {
        let checksum = u32::from_le_bytes(self.bytes(source)?);
        let length = u32::from_le_bytes(self.bytes(source)?);
        if checksum != self.checksum.clone().finalize() || length != (self.position - self.member) as u32 {
            return Err(damaged("the checksum of the data is wrong"));
        }
        self.state = State::Between;
        Ok(())
    }

    /// Decoding could begin here.
    fn boundary(&mut self, bits: u8, bit_buffer: u8) -> Result<()> {
        let checksum = self.checksum.clone().finalize();
        if self.checkpoints.checksum(self.position).is_some_and(|known| known != checksum)
            && self.position > self.member
        {
            return Err(damaged("the data is not what it was when it was first read"));
        }
        let span = self.checkpoints.span();
        let near = |c: &Checkpoint| {
            self.position - c.disk < span / CANDIDATES && c.disk / span == self.position / span
        };
        if self.candidate.as_ref().is_some_and(near) {
            return Ok(());
        }
        let window = if self.position == self.member {
            Vec::new()
        } else {
            self.buffer[self.filled - WINDOW..self.filled].to_vec()
        };
        self.pass();
        self.candidate = Some(Checkpoint {
            disk: self.position,
            file: self.input.position(),
            member: self.member,
            checksum,
            bits,
            bit_buffer,
            window,
        });
        Ok(())
    }

    /// The candidate becomes a checkpoint if the next span has begun since: then it is the last one before it.
    fn pass(&mut self) {
        let span = self.checkpoints.span();
        let passed = |c: &mut Checkpoint| c.disk / span != self.position / span;
        if let Some(checkpoint) = self.candidate.take_if(passed) {
            self.checkpoints.add(checkpoint);
        }
    }

    /// Decodes on, into the buffer.
    fn inflate(&mut self, source: &Source, most: usize) -> Result<Range> {
        if self.filled == self.buffer.len() {
            self.buffer.copy_within(self.filled - WINDOW.., 0);
            self.filled = WINDOW;
        }
        let input = self.input.fill(source)?;
        let flags = TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF | TINFL_FLAG_STOP_ON_BLOCK_BOUNDARY;
        let more = if input.is_empty() { 0 } else { TINFL_FLAG_HAS_MORE_INPUT };
        let (decoder, buffer) = (&mut self.decoder, &mut self.buffer);
        let (status, consumed, produced) =
            decompress_with_limit(decoder, input, buffer, self.filled, most, flags | more);
        let nothing = consumed == 0 && produced == 0;
        self.input.consume(consumed);
        let range = self.filled..self.filled + produced;
        self.checksum.update(&self.buffer[range.clone()]);
        self.filled = range.end;
        self.position += produced as u64;
        match status {
            TINFLStatus::Done => self.end(source)?,
            TINFLStatus::BlockBoundary => {
                let state = self.decoder.block_boundary_state().unwrap_or_default();
                self.boundary(state.num_bits, state.bit_buf)?;
            }
            TINFLStatus::FailedCannotMakeProgress => return Err(ends_early()),
            TINFLStatus::NeedsMoreInput | TINFLStatus::HasMoreOutput if !nothing || more != 0 => {}
            _ => return Err(damaged("the data is damaged")),
        }
        Ok(range)
    }
}

type Range = std::ops::Range<usize>;

fn ends_early() -> Error {
    damaged("the compressed data ends early")
}

impl Cursor for Inflater {
    fn position(&self) -> u64 {
        self.position
    }

    fn read(&mut self, source: &Source, out: &mut [u8]) -> Result<usize> {
        let mut count = 0;
        while count < out.len() {
            match self.state {
                State::Ended => break,
                State::Between => self.begin(source)?,
                State::Within => {
                    let range = self.inflate(source, out.len() - count)?;
                    let length = range.len();
                    out[count..count + length].copy_from_slice(&self.buffer[range]);
                    count += length;
                    self.pass();
                }
            }
        }
        if self.checkpoints.reach(self.position - count as u64) {
            self.checkpoints.reached(self.position);
        }
        Ok(count)
    }

    fn finish(&mut self, source: &Source) -> Result<()> {
        if !self.verify_end {
            return Ok(());
        }
        if self.read(source, &mut [0])? > 0 {
            return Err(damaged(
                "there is more data than the end of the file says: give gzip-size=SIZE, or leave it out",
            ));
        }
        self.checkpoints.completed();
        Ok(())
    }
}
