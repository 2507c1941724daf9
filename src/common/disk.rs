//! How the parsers read a disk: through a closure, never past its end, in pieces that are bounded whatever the disk says.

/// Fills a buffer from an offset in bytes.
pub(crate) type Read<'a, E> = dyn FnMut(&mut [u8], u64) -> Result<(), E> + 'a;

/// A disk, or a part of one.
pub(crate) struct Disk<'a, E> {
    /// In bytes.
    pub(crate) size: u64,
    pub(crate) read: &'a mut Read<'a, E>,
}

impl<E> Disk<'_, E> {
    /// Fills `buf` from `offset` on; false where that is not within the disk.
    pub(crate) fn fill(&mut self, buf: &mut [u8], offset: u64) -> Result<bool, E> {
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > self.size) {
            return Ok(false);
        }
        (self.read)(buf, offset).map(|()| true)
    }

    /// `N` bytes from `offset` on; None where they are not within the disk.
    pub(crate) fn array<const N: usize>(&mut self, offset: u64) -> Result<Option<[u8; N]>, E> {
        let mut buf = [0; N];
        Ok(self.fill(&mut buf, offset)?.then_some(buf))
    }

    /// `N` bytes from the start of a sector on; None where they are not within the disk.
    pub(crate) fn sector<const N: usize>(
        &mut self,
        lba: u64,
        sector_size: u64,
    ) -> Result<Option<[u8; N]>, E> {
        match lba.checked_mul(sector_size) {
            Some(offset) => self.array(offset),
            None => Ok(None),
        }
    }
}

/// Reads any range of a disk of `size` bytes that takes only whole blocks of `block` bytes, by reading the blocks that it
/// touches.
///
/// # Errors
/// Those of `read`.
pub fn read_aligned<E>(
    buf: &mut [u8],
    offset: u64,
    (size, block): (u64, u32),
    read: impl FnOnce(&mut [u8], u64) -> Result<(), E>,
) -> Result<(), E> {
    let (block, length) = (u64::from(block.max(1)), buf.len() as u64);
    if offset.is_multiple_of(block) && length.is_multiple_of(block) {
        return read(buf, offset);
    }
    let start = offset - offset % block;
    let end = offset.saturating_add(length).checked_next_multiple_of(block).unwrap_or(u64::MAX).min(size);
    let mut blocks = vec![0; (end - start) as usize];
    read(&mut blocks, start)?;
    let into = (offset - start) as usize;
    buf.copy_from_slice(&blocks[into..into + buf.len()]);
    Ok(())
}

/// The bytes at a fixed place that is within the buffer; zeroes where it is not.
pub(crate) fn bytes<const N: usize>(buf: &[u8], at: usize) -> [u8; N] {
    buf.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}

pub(crate) fn u16_at(buf: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes(buf, at))
}

pub(crate) fn u32_at(buf: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes(buf, at))
}

pub(crate) fn u64_at(buf: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes(buf, at))
}

pub(crate) fn be16_at(buf: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(bytes(buf, at))
}

pub(crate) fn be32_at(buf: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes(buf, at))
}

/// Text in a field of fixed size: up to the first NUL, without blanks at the end.
pub(crate) fn text_at(buf: &[u8], at: usize, length: usize) -> String {
    let field = buf.get(at..at + length).unwrap_or_default();
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    String::from_utf8_lossy(&field[..end]).trim_end().to_owned()
}
