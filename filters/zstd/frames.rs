//! Where the frames of a .zst file are.

use std::ops::Range;

use nbdkit_core::{Errno, Error, Result};

use crate::decompress::{Segments, Source, damaged};

/// A frame's place in the file.
pub(super) type Frame = Range<u64>;

const MAGIC: u32 = 0xfd2f_b528;
/// The first of sixteen that begin frames to be skipped.
const SKIPPABLE: u32 = 0x184d_2a50;
/// The one that has the table of the seekable format, and what that ends with.
const TABLE: u32 = 0x184d_2a5e;
const TABLE_END: u32 = 0x8f92_eab1;
/// Length of the table's end in bytes, and of the header of a frame to be skipped.
const FOOTER: u64 = 9;
const SKIP_HEADER: u64 = 8;
/// Frames that are remembered, at most.
const MOST_FRAMES: usize = 8 << 20;

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// The frames of a file; `decode` finds the length of the data of one that does not tell.
///
/// # Errors
/// `EINVAL`: not a .zst file; `EIO`: cut off or damaged; `E2BIG`: too many frames; those of `decode`.
pub(super) fn read(source: &Source, decode: impl Fn(&Frame) -> Result<u64>) -> Result<Segments<Frame>> {
    let magic = if source.size() < 4 { 0 } else { u32::from_le_bytes(source.array(0)?) };
    if magic != MAGIC && magic & !15 != SKIPPABLE {
        return Err(Error::new(Errno::EINVAL, "this is not a .zst file"));
    }
    match from_table(source)? {
        Some(frames) => Segments::new(frames.into_iter()),
        None => Segments::new(walk(source, decode)?.into_iter()),
    }
}

/// By the table of the seekable format, if there is one that describes all of the file.
fn from_table(source: &Source) -> Result<Option<Vec<(u64, Frame)>>> {
    let size = source.size();
    if size < SKIP_HEADER + FOOTER {
        return Ok(None);
    }
    let [c0, c1, c2, c3, descriptor, end @ ..] = source.array::<{ FOOTER as usize }>(size - FOOTER)?;
    if u32::from_le_bytes(end) != TABLE_END || descriptor & 0x7c != 0 {
        return Ok(None);
    }
    let count = u64::from(u32::from_le_bytes([c0, c1, c2, c3]));
    let entry = if descriptor & 0x80 != 0 { 12 } else { 8 };
    let content = count * entry + FOOTER;
    let Some(start) = size.checked_sub(content + SKIP_HEADER) else { return Ok(None) };
    if count > MOST_FRAMES as u64 {
        return Err(too_many());
    }
    let header = source.array::<{ SKIP_HEADER as usize }>(start)?;
    if (u32_at(&header, 0), u32_at(&header, 4).map(u64::from)) != (Some(TABLE), Some(content)) {
        return Ok(None);
    }
    let table = source.bytes(start + SKIP_HEADER..size - FOOTER)?;
    let mut at = 0_u64;
    let mut frames = Vec::with_capacity(count as usize);
    for entry in table.chunks_exact(entry as usize) {
        let lengths = u32_at(entry, 0).zip(u32_at(entry, 4));
        let (compressed, length) = lengths.ok_or_else(|| damaged("the table of frames is damaged"))?;
        let frame = at..at + u64::from(compressed);
        at = frame.end;
        frames.push((u64::from(length), frame));
    }
    // Else something else is before it, or the table is wrong.
    Ok((at == start).then_some(frames))
}

/// By the headers of all frames and blocks.
fn walk(source: &Source, decode: impl Fn(&Frame) -> Result<u64>) -> Result<Vec<(u64, Frame)>> {
    let (mut at, mut frames) = (0, Vec::new());
    while at < source.size() {
        let cut = |_| damaged(format_args!("the compressed data ends early, in the frame at {at}"));
        let magic = source.array(at).map_err(|e| if source.size() - at < 4 { cut(e) } else { e })?;
        let magic = u32::from_le_bytes(magic);
        if magic & !15 == SKIPPABLE {
            let length = u32::from_le_bytes(source.array(at + 4)?);
            at += SKIP_HEADER + u64::from(length);
            if at > source.size() {
                return Err(damaged("the compressed data ends early"));
            }
            continue;
        }
        if magic != MAGIC {
            return Err(damaged(format_args!("what follows at {at} of the file is no frame")));
        }
        let (end, length) = frame_at(source, at)?;
        if frames.len() == MOST_FRAMES {
            return Err(too_many());
        }
        let frame = at..end;
        let length = match length {
            Some(length) => length,
            None => decode(&frame)?,
        };
        frames.push((length, frame));
        at = end;
    }
    Ok(frames)
}

fn too_many() -> Error {
    Error::new(Errno::E2BIG, format!("the file has over {MOST_FRAMES} frames: compress it in larger ones"))
}

/// Where the frame at `start` ends, and the length of its data if it tells.
fn frame_at(source: &Source, start: u64) -> Result<(u64, Option<u64>)> {
    let [descriptor] = source.array(start + 4)?;
    let single = descriptor & 0x20 != 0;
    let checksum = descriptor & 4 != 0;
    let dictionary = [0, 1, 2, 4][usize::from(descriptor & 3)];
    let length_of_length: u64 = match descriptor >> 6 {
        0 => u64::from(single),
        1 => 2,
        2 => 4,
        _ => 8,
    };
    let at = start + 5 + u64::from(!single) + dictionary;
    let mut bytes = [0; 8];
    source.read(&mut bytes[..length_of_length as usize], at)?;
    let length = u64::from_le_bytes(bytes);
    let length = match length_of_length {
        0 => None,
        2 => Some(length + 256),
        _ => Some(length),
    };
    let mut at = at + length_of_length;
    loop {
        let [b0, b1, b2] = source.array(at)?;
        let header = u32::from_le_bytes([b0, b1, b2, 0]);
        let (last, kind, size) = (header & 1 == 1, header >> 1 & 3, u64::from(header >> 3));
        at += 3 + match kind {
            // One byte that is repeated.
            1 => 1,
            0 | 2 => size,
            _ => return Err(damaged(format_args!("the block at {at} of the file is damaged"))),
        };
        if last {
            let end = at + if checksum { 4 } else { 0 };
            return match end <= source.size() {
                true => Ok((end, length)),
                false => Err(damaged("the compressed data ends early")),
            };
        }
    }
}
