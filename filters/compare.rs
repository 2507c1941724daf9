//! Compares what a request would write with what is there: for the filters that let only the same pass.

use nbdkit_core::{Next, Result, emulate};

/// Reads a range in pieces and asks `same` about each, with its place, until one is refused. The pieces are those of
/// the range alone, though whole blocks of the layer below are read.
pub(crate) fn holds(
    next: &Next,
    length: u64,
    offset: u64,
    mut same: impl FnMut(u64, &[u8]) -> bool,
) -> Result<bool> {
    let block = next.caps().block_size;
    let minimum = u64::from(block.minimum).max(1);
    let end = offset + length;
    let first = offset - offset % minimum;
    let last = end.checked_next_multiple_of(minimum).map_or(end, |end| end.min(next.caps().size));
    let mut holds = true;
    emulate::cache(last - first, first, block, |buf, at| {
        if holds {
            next.pread(buf, at)?;
            let from = offset.max(at);
            let to = end.min(at + buf.len() as u64);
            holds = from >= to || same(from, &buf[(from - at) as usize..(to - at) as usize]);
        }
        Ok(())
    })?;
    Ok(holds)
}

/// For [`holds`]: the piece is that of a buffer that would be written at `offset`.
pub(crate) fn equals(buf: &[u8], offset: u64) -> impl Fn(u64, &[u8]) -> bool {
    move |at, there| {
        let from = (at - offset) as usize;
        buf[from..from + there.len()] == *there
    }
}

/// For [`holds`]: the piece is zero.
pub(crate) fn is_zero(_: u64, there: &[u8]) -> bool {
    there.iter().all(|byte| *byte == 0)
}
