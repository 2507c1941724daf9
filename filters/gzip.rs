//! Decompresses a .gz file: from the places in it where decoding can begin.
//!
//! The format has no index, and its data says nothing about the size of the disk: its last field counts 32 bits, of the last
//! member. So the file is decoded once when it is first opened, as fast as that goes and without keeping the data, to learn
//! the size and to note `checkpoints`. An index file keeps both for the next time. Who knows the size can give it: then the
//! checkpoints are noted as reading goes on.

mod checkpoints;
mod index_file;
mod inflater;

use std::{
    ffi::OsStr,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context as _;
use nbdkit_core::{Errno, Error, Filter, Info, Result, params};

use self::{checkpoints::Checkpoints, index_file::IndexFile, inflater::Inflater};
use crate::decompress::{
    Cursor as _, Cursors, Format, Kind, LEAST_CACHE, PART, Sink, Source, filter, part_of, zeroed,
};

/// How far apart checkpoints are, unless told otherwise, in bytes of the disk.
pub(crate) const DEFAULT_SPAN: u64 = 1 << 20;
/// The least that they may be apart.
const LEAST_SPAN: u64 = 64 << 10;

pub(crate) fn new() -> Box<dyn Filter> {
    filter(Gzip::default())
}

/// How to find the size of the disk.
#[derive(Clone, Copy, Debug, Default)]
enum Size {
    /// By decoding all of it.
    #[default]
    Scan,
    /// From the end of the file, which is right for one member of less than 4 GiB.
    Trailer,
    Given(u64),
}

/// What gzip and indexed-gzip have in common.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) index: Option<PathBuf>,
    pub(crate) span: u64,
    size: Size,
}

impl Default for Settings {
    fn default() -> Self {
        Settings { index: None, span: DEFAULT_SPAN, size: Size::Scan }
    }
}

impl Settings {
    pub(crate) fn set_index(&mut self, key: &str, value: &OsStr) -> anyhow::Result<()> {
        // The server may leave its directory.
        let path = std::path::absolute(Path::new(value))
            .with_context(|| format!("{key}='{}' is not a path", value.display()))?;
        self.index = Some(path);
        Ok(())
    }

    pub(crate) fn set_span(&mut self, key: &str, value: &OsStr) -> anyhow::Result<()> {
        self.span = params::size(value)?;
        anyhow::ensure!(self.span >= LEAST_SPAN, "{key} must be 64K or more");
        Ok(())
    }

    pub(crate) fn open(&self, source: &Source) -> Result<Box<dyn Format>> {
        if source.size() < 2 || source.array::<2>(0)? != inflater::MAGIC {
            return Err(Error::new(Errno::EINVAL, "this is not a .gz file"));
        }
        let file = match &self.index {
            Some(path) => Some(IndexFile::new(path, source)?),
            None => None,
        };
        if let Some((size, checkpoints)) = file.as_ref().map(IndexFile::load).transpose()?.flatten() {
            let verify_end = checkpoints.is_complete();
            return Ok(Box::new(GzipFile {
                size,
                checkpoints,
                verify_end,
                cursors: Cursors::default(),
                file,
            }));
        }
        let checkpoints = Arc::new(Checkpoints::new(self.span));
        let size = match self.size {
            Size::Scan => scan(source, &checkpoints)?,
            Size::Trailer => u32::from_le_bytes(source.array(source.size().saturating_sub(4))?).into(),
            Size::Given(size) => size,
        };
        let verify_end = !matches!(self.size, Size::Given(_));
        let format = GzipFile { size, checkpoints, verify_end, cursors: Cursors::default(), file };
        if format.checkpoints.is_complete() {
            format.save();
        }
        Ok(Box::new(format))
    }
}

/// Decodes all of a file.
///
/// # Errors
/// Those of [`Inflater::read`].
fn scan(source: &Source, checkpoints: &Arc<Checkpoints>) -> Result<u64> {
    let mut inflater = Inflater::new(source, checkpoints.clone(), None, true);
    let mut scratch = zeroed(PART)?;
    loop {
        let count = inflater.read(source, &mut scratch).map_err(|e| {
            let at = inflater.position();
            e.context(format_args!(
                "after {at} bytes of the disk (gzip-size={at} would serve what is before)"
            ))
        })?;
        if count < scratch.len() {
            checkpoints.completed();
            return Ok(inflater.position());
        }
    }
}

#[derive(Default)]
struct Gzip(Settings);

impl Kind for Gzip {
    fn info(&self) -> Info {
        const HELP: &str =
            "index-path=<PATH>      Keep what was learnt about the file there, for the next start.
span=<SIZE>            Distance of the places where decoding can begin (default: 1M).
gzip-size=<SIZE>|trailer  Size of the disk; trailer: as the file's end says (default: decode the file).";
        Info::bundled("gzip", "nbdkit gzip filter", HELP)
    }

    fn config(&mut self, key: &str, value: &OsStr) -> anyhow::Result<bool> {
        match key {
            "index-path" => self.0.set_index(key, value)?,
            "span" => self.0.set_span(key, value)?,
            "gzip-size" if value == "trailer" => self.0.size = Size::Trailer,
            "gzip-size" => self.0.size = Size::Given(params::size(value)?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn open(&self, source: &Source, _: &OsStr) -> Result<Box<dyn Format>> {
        self.0.open(source)
    }
}

struct GzipFile {
    size: u64,
    checkpoints: Arc<Checkpoints>,
    /// The data has to end where the disk does: nobody has said how much of it is wanted.
    verify_end: bool,
    cursors: Cursors<Inflater>,
    file: Option<IndexFile>,
}

impl Format for GzipFile {
    fn size(&self) -> u64 {
        self.size
    }

    fn piece(&self, offset: u64) -> Range<u64> {
        part_of(&(0..self.size), PART, offset)
    }

    fn lane(&self, piece: &Range<u64>) -> Option<u64> {
        // Where there are no checkpoints yet, one decoder goes before all others.
        (!self.checkpoints.reach(piece.start)).then_some(0)
    }

    fn decode(&self, source: &Source, piece: Range<u64>, sink: &mut Sink<'_>) -> Result<()> {
        let nearest = self.checkpoints.before(piece.start)?;
        let start = nearest.as_ref().map_or(0, |checkpoint| checkpoint.disk);
        let make = || Ok(Inflater::new(source, self.checkpoints.clone(), nearest, self.verify_end));
        self.cursors.decode(source, &(0..self.size), &piece, (start, make), sink)
    }

    fn cache_size(&self) -> u64 {
        2 * LEAST_CACHE
    }

    fn save(&self) {
        if let Some(file) = &self.file {
            file.save(self.size, &self.checkpoints);
        }
    }
}

#[cfg(test)]
mod tests;
