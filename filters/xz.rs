//! Decompresses an .xz file: random access by the index at the end of each of its streams.
//!
//! liblzma decodes whole streams, and knows how to verify each kind of checksum. So a block is decoded as the only one of a
//! stream that is made up around it: a header, the block as it is in the file, and an index of one record.

mod index;

use std::{ffi::OsStr, ops::Range};

use liblzma::stream::{self as lzma, Action, Status};
use nbdkit_core::{Errno, Error, Filter, Info, Result, params};

use self::index::Block;
use crate::decompress::{
    Codec, Cursors, Format, Kind, LEAST_CACHE, PART, Segments, Sink, Source, Step, Stream, StreamCursor,
    filter,
};

/// Largest block unless told otherwise, in bytes.
const DEFAULT_MAX_BLOCK: u64 = 512 << 20;
/// Blocks that are kept unless told otherwise.
const DEFAULT_MAX_DEPTH: u64 = 8;
/// The cache unless told otherwise, in bytes: at most.
const DEFAULT_CACHE: u64 = 256 << 20;
/// What a decoder may take for its dictionary, in bytes. It is touched as far as the block is long.
const MEMORY_LIMIT: u64 = 1 << 30;

pub(crate) fn new() -> Box<dyn Filter> {
    filter(Xz(Limits::default()))
}

/// How large blocks may be, and how many are kept.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    max_block: u64,
    /// None: as many as there is memory for, by default.
    max_depth: Option<u64>,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { max_block: DEFAULT_MAX_BLOCK, max_depth: None }
    }
}

impl Limits {
    /// Takes `PREFIX-max-block` and `PREFIX-max-depth`.
    pub(crate) fn config(&mut self, prefix: &str, key: &str, value: &OsStr) -> anyhow::Result<bool> {
        match key.strip_prefix(prefix) {
            Some("-max-block") => self.max_block = params::size(value)?,
            Some("-max-depth") => {
                let depth: u32 = params::integer(key, value)?;
                anyhow::ensure!(depth > 0, "{key} must be 1 or more");
                self.max_depth = Some(depth.into());
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// A file whose largest block has that length, in bytes.
    pub(crate) fn check(&self, prefix: &str, largest: u64) -> Result<()> {
        if largest > self.max_block {
            let max = self.max_block;
            return Err(Error::new(
                Errno::E2BIG,
                format!(
                    "the file's largest block has {largest} bytes, more than {prefix}-max-block={max}: \
                     compress it in smaller blocks, or raise {prefix}-max-block"
                ),
            ));
        }
        Ok(())
    }

    /// The cache for such a file, in bytes.
    pub(crate) fn cache_size(&self, largest: u64) -> u64 {
        match self.max_depth {
            Some(depth) => largest.saturating_mul(depth).max(PART),
            None => largest.saturating_mul(DEFAULT_MAX_DEPTH).clamp(LEAST_CACHE, DEFAULT_CACHE),
        }
    }
}

struct Xz(Limits);

impl Kind for Xz {
    fn info(&self) -> Info {
        const HELP: &str = "xz-max-block=<SIZE>    Largest block that is accepted (default: 512M).
xz-max-depth=<N>       Blocks that are kept in memory (default: 8 and more).";
        Info::bundled("xz", "nbdkit XZ filter", HELP)
    }

    fn config(&mut self, key: &str, value: &OsStr) -> anyhow::Result<bool> {
        self.0.config("xz", key, value)
    }

    fn open(&self, source: &Source, _: &OsStr) -> Result<Box<dyn Format>> {
        let blocks = index::read(source)?;
        self.0.check("xz", blocks.largest())?;
        let cache_size = self.0.cache_size(blocks.largest());
        Ok(Box::new(XzFile { blocks, cache_size, cursors: Cursors::default() }))
    }
}

struct XzFile {
    blocks: Segments<Block>,
    cache_size: u64,
    /// Within blocks that are too large to be decoded as a whole.
    cursors: Cursors<StreamCursor<Lzma>>,
}

impl XzFile {
    fn stream(block: &Block) -> Result<Stream<Lzma>> {
        let (head, tail) = block.surroundings();
        Ok(Stream::new(Lzma::xz()?, head, block.compressed(), tail))
    }
}

impl Format for XzFile {
    fn size(&self) -> u64 {
        self.blocks.size()
    }

    fn piece(&self, offset: u64) -> Range<u64> {
        self.blocks.piece(offset)
    }

    fn lane(&self, piece: &Range<u64>) -> Option<u64> {
        self.blocks.lane(piece)
    }

    fn decode(&self, source: &Source, piece: Range<u64>, sink: &mut Sink<'_>) -> Result<()> {
        let (whole, block) = self.blocks.at(piece.start);
        if whole == piece {
            sink(piece.start, Self::stream(&block)?.whole(source, piece.end - piece.start)?);
            return Ok(());
        }
        let make = || Ok(StreamCursor::new(Self::stream(&block)?, whole.start));
        self.cursors.decode(source, &whole, &piece, (whole.start, make), sink)
    }

    fn cache_size(&self) -> u64 {
        self.cache_size
    }
}

/// A decoder of liblzma's.
pub(crate) struct Lzma(lzma::Stream);

impl Lzma {
    fn xz() -> Result<Self> {
        lzma::Stream::new_stream_decoder(MEMORY_LIMIT, 0).map(Lzma).map_err(|e| no_decoder(&e))
    }

    /// For one member of an .lz file.
    pub(crate) fn lzip() -> Result<Self> {
        lzma::Stream::new_lzip_decoder(MEMORY_LIMIT, 0).map(Lzma).map_err(|e| no_decoder(&e))
    }
}

fn no_decoder(error: &lzma::Error) -> Error {
    Error::new(Errno::ENOMEM, format!("cannot make a decoder: {error}"))
}

impl Codec for Lzma {
    fn step(&mut self, input: &[u8], output: &mut [u8]) -> std::result::Result<Step, String> {
        let (consumed, produced) = (self.0.total_in(), self.0.total_out());
        let status = self.0.process(input, output, Action::Run).map_err(|e| match e {
            lzma::Error::MemLimit => format!("its dictionary is larger than {MEMORY_LIMIT} bytes"),
            lzma::Error::Data | lzma::Error::Format => "the data is damaged".to_owned(),
            e => e.to_string(),
        })?;
        Ok(Step {
            consumed: (self.0.total_in() - consumed) as usize,
            produced: (self.0.total_out() - produced) as usize,
            ended: status == Status::StreamEnd,
        })
    }
}

#[cfg(test)]
mod tests;
