//! Data that can be decoded from few places, or from its start alone: it is given out in parts, and decoders are kept where
//! they have stopped, for whoever reads on.

use std::ops::Range;

use nbdkit_core::Result;
use parking_lot::Mutex;

use super::{Codec, PART, Sink, Source, Stream, damaged, part_of, zeroed};

/// Decoders that are kept. Each may have a window of many megabytes.
const MOST_PARKED: usize = 4;
/// Parts before the one that was asked for that are given out too, if they were decoded on the way.
const BEFORE: u64 = 8 * PART;

/// A decoder at some place of the disk.
pub(crate) trait Cursor: Send {
    /// The offset in the disk of what comes next.
    fn position(&self) -> u64;

    /// Fills `out`; less comes at the end of the data alone.
    ///
    /// # Errors
    /// `EIO` for damage; those of [`Source::read`].
    fn read(&mut self, source: &Source, out: &mut [u8]) -> Result<usize>;

    /// Verifies that the data ends here, and its checksum.
    ///
    /// # Errors
    /// `EIO` if not; those of [`Source::read`].
    fn finish(&mut self, source: &Source) -> Result<()>;
}

/// The decoders that have stopped somewhere.
pub(crate) struct Cursors<C> {
    parked: Mutex<Vec<C>>,
}

impl<C> Default for Cursors<C> {
    fn default() -> Self {
        Cursors { parked: Mutex::default() }
    }
}

impl<C: Cursor> Cursors<C> {
    /// Decodes the part `piece` of `whole`. A new decoder can begin at `start`.
    ///
    /// # Errors
    /// `EIO` for damage; those of [`Source::read`] and of `make`.
    pub(crate) fn decode(
        &self,
        source: &Source,
        whole: &Range<u64>,
        piece: &Range<u64>,
        (start, make): (u64, impl FnOnce() -> Result<C>),
        sink: &mut Sink<'_>,
    ) -> Result<()> {
        let mut cursor = match self.take(start.max(whole.start), piece.start) {
            Some(cursor) => cursor,
            None => make()?,
        };
        let mut scratch = Vec::new();
        while cursor.position() < piece.end {
            let here = cursor.position();
            let part = part_of(whole, PART, here);
            let given = here == part.start && piece.start - part.start <= BEFORE;
            let mut out = if given { zeroed(part.end - here)? } else { std::mem::take(&mut scratch) };
            out.resize((part.end - here) as usize, 0);
            if cursor.read(source, &mut out)? < out.len() {
                return Err(damaged("there is less data than the file says"));
            }
            if part.end == whole.end {
                cursor.finish(source)?;
            }
            if given { sink(part.start, out) } else { scratch = out }
        }
        if cursor.position() < whole.end {
            let mut parked = self.parked.lock();
            if parked.len() >= MOST_PARKED {
                parked.remove(0);
            }
            parked.push(cursor);
        }
        Ok(())
    }

    /// The decoder that has the shortest way to `until`, of those past `from`.
    fn take(&self, from: u64, until: u64) -> Option<C> {
        let mut parked = self.parked.lock();
        let fits = |cursor: &C| (from..=until).contains(&cursor.position());
        let best = (0..parked.len()).filter(|i| fits(&parked[*i])).max_by_key(|i| parked[*i].position())?;
        Some(parked.remove(best))
    }
}

/// A [`Stream`] whose first byte is at `start` of the disk.
pub(crate) struct StreamCursor<C> {
    stream: Stream<C>,
    position: u64,
}

impl<C> StreamCursor<C> {
    pub(crate) fn new(stream: Stream<C>, start: u64) -> Self {
        StreamCursor { stream, position: start }
    }
}

impl<C: Codec> Cursor for StreamCursor<C> {
    fn position(&self) -> u64 {
        self.position
    }

    fn read(&mut self, source: &Source, out: &mut [u8]) -> Result<usize> {
        let count = self.stream.read(source, out)?;
        self.position += count as u64;
        Ok(count)
    }

    fn finish(&mut self, source: &Source) -> Result<()> {
        self.stream.finish(source)
    }
}
