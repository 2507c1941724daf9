//! Decompresses a .zst file: each of its frames by itself.
//!
//! Files of the seekable format have a table of their frames at the end. Of others the frames are found by their headers and
//! those of their blocks, which say how long they are in the file. How long the data of a frame is its header says, if the
//! program that made it knew; else the frame is decoded once when the file is first opened.

mod frames;

use std::{ffi::OsStr, ops::Range};

use nbdkit_core::{Filter, Info, Result};
use parking_lot::Mutex;
use zstd::{
    bulk::Decompressor,
    stream::raw::{DParameter, Decoder, InBuffer, Operation as _, OutBuffer},
};

use self::frames::Frame;
use crate::decompress::{
    Codec, Cursor as _, Cursors, Format, Kind, LARGEST_WHOLE, LEAST_CACHE, PART, Segments, Sink, Source,
    Step, Stream, StreamCursor, damaged, filter, zeroed,
};

/// Windows up to this power of two are accepted: the memory that a decoder may take. What zstd --long=27 makes.
const LARGEST_WINDOW: u32 = 27;

pub(crate) fn new() -> Box<dyn Filter> {
    filter(Zstd)
}

struct Zstd;

impl Kind for Zstd {
    fn info(&self) -> Info {
        Info::bundled("zstd", "nbdkit zstd filter", "")
    }

    fn open(&self, source: &Source, _: &OsStr) -> Result<Box<dyn Format>> {
        let frames = frames::read(source, |frame| length_of(source, frame))?;
        Ok(Box::new(ZstdFile { frames, cursors: Cursors::default(), decoders: Mutex::default() }))
    }
}

/// Decodes a frame whose header does not tell the length of its data.
fn length_of(source: &Source, frame: &Frame) -> Result<u64> {
    let mut cursor = StreamCursor::new(stream(frame)?, 0);
    let mut scratch = zeroed(PART)?;
    while cursor.read(source, &mut scratch)? == scratch.len() {}
    Ok(cursor.position())
}

fn stream(frame: &Frame) -> Result<Stream<Zst>> {
    Ok(Stream::new(Zst::new()?, Vec::new(), frame.clone(), Vec::new()))
}

struct ZstdFile {
    frames: Segments<Frame>,
    cursors: Cursors<StreamCursor<Zst>>,
    /// Contexts to be used again: making one costs as much as a small frame.
    decoders: Mutex<Vec<Decompressor<'static>>>,
}

impl ZstdFile {
    fn whole(&self, source: &Source, frame: &Frame, length: u64) -> Result<Vec<u8>> {
        // Hostile frames are long and empty.
        if frame.end - frame.start > length + length / 8 + PART {
            return stream(frame)?.whole(source, length);
        }
        let file = source.bytes(frame.clone())?;
        let spare = self.decoders.lock().pop();
        let mut decoder = match spare {
            Some(decoder) => decoder,
            None => Decompressor::new().map_err(damaged)?,
        };
        let mut data = zeroed(length)?;
        let count = decoder.decompress_to_buffer(&file, &mut data[..]).map_err(damaged)?;
        if count < data.len() {
            return Err(damaged("there is less data than the file says"));
        }
        self.decoders.lock().push(decoder);
        Ok(data)
    }
}

impl Format for ZstdFile {
    fn size(&self) -> u64 {
        self.frames.size()
    }

    fn piece(&self, offset: u64) -> Range<u64> {
        self.frames.piece(offset)
    }

    fn lane(&self, piece: &Range<u64>) -> Option<u64> {
        self.frames.lane(piece)
    }

    fn decode(&self, source: &Source, piece: Range<u64>, sink: &mut Sink<'_>) -> Result<()> {
        let (whole, frame) = self.frames.at(piece.start);
        if whole == piece {
            sink(piece.start, self.whole(source, &frame, piece.end - piece.start)?);
            return Ok(());
        }
        let make = || Ok(StreamCursor::new(stream(&frame)?, whole.start));
        self.cursors.decode(source, &whole, &piece, (whole.start, make), sink)
    }

    fn cache_size(&self) -> u64 {
        self.frames.largest().min(LARGEST_WHOLE).saturating_mul(4).max(2 * LEAST_CACHE)
    }
}

/// A decoder of libzstd's.
struct Zst(Decoder<'static>);

impl Zst {
    fn new() -> Result<Self> {
        let mut decoder = Decoder::new().map_err(damaged)?;
        decoder.set_parameter(DParameter::WindowLogMax(LARGEST_WINDOW)).map_err(damaged)?;
        Ok(Zst(decoder))
    }
}

impl Codec for Zst {
    fn step(&mut self, input: &[u8], output: &mut [u8]) -> std::result::Result<Step, String> {
        let (mut input, mut output) = (InBuffer::around(input), OutBuffer::around(output));
        let left = self.0.run(&mut input, &mut output).map_err(|e| format!("the data is damaged: {e}"))?;
        Ok(Step { consumed: input.pos(), produced: output.pos(), ended: left == 0 })
    }
}

#[cfg(test)]
mod tests;
