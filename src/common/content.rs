//! What is on a disk or in a partition: file systems, swap space, encrypted volumes and members of arrays, with their
//! labels and UUIDs, told by their superblocks.
//!
//! Names are those of blkid(8), for they are what mount(8), fstab(5) and scripts know. What is read may be hostile: nothing
//! is followed further than a step or two, and nothing that is read decides how much memory is used.

use crate::disk::{Disk, Read};

mod dos;
mod members;
mod native;
mod optical;
mod other;

/// What something is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    /// It can be mounted.
    FileSystem,
    /// It is part of something else: an array, a volume group.
    Member,
    /// It is encrypted.
    Crypto,
    /// Swap space and what else cannot be mounted.
    Other,
}

/// A superblock that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Content {
    /// Its type, as blkid(8) has it: `ext4`, `vfat`, `LVM2_member`.
    pub kind: &'static str,
    /// What it is for.
    pub usage: Usage,
    /// Its label, if it has one.
    pub label: Option<String>,
    /// Its UUID or serial number, as blkid(8) writes it.
    pub uuid: Option<String>,
    /// It was not unmounted, and mounting it would write to it even if it were read-only.
    pub needs_recovery: bool,
}

impl Content {
    fn new(kind: &'static str, usage: Usage) -> Self {
        Content { kind, usage, label: None, uuid: None, needs_recovery: false }
    }

    fn file_system(kind: &'static str) -> Self {
        Content::new(kind, Usage::FileSystem)
    }

    fn member(kind: &'static str) -> Self {
        Content::new(kind, Usage::Member)
    }

    fn label(mut self, label: impl Into<String>) -> Self {
        self.label = Some(label.into()).filter(|label| !label.trim().is_empty());
        self
    }

    fn uuid(mut self, uuid: Option<String>) -> Self {
        self.uuid = uuid;
        self
    }
}

/// Finds out what a disk of `size` bytes holds as a whole. `read` fills a buffer from an offset in bytes that is within it.
///
/// # Errors
/// Those of `read`.
pub fn detect_content<E>(
    size: u64,
    mut read: impl FnMut(&mut [u8], u64) -> Result<(), E>,
) -> Result<Option<Content>, E> {
    let read: &mut Read<'_, E> = &mut read;
    probe(&mut Disk { size, read })
}

/// How much of the start is read at once: most superblocks are within.
const HEAD: u64 = 72 << 10;

/// A disk, the start of which is in memory.
struct Probe<'a, 'd, E> {
    disk: &'a mut Disk<'d, E>,
    head: Vec<u8>,
}

impl<E> Probe<'_, '_, E> {
    /// `N` bytes from `offset` on; None where they are not within the disk.
    fn array<const N: usize>(&mut self, offset: u64) -> Result<Option<[u8; N]>, E> {
        let kept = usize::try_from(offset).ok().and_then(|at| self.head.get(at..)?.first_chunk());
        match kept {
            Some(bytes) => Ok(Some(*bytes)),
            None => self.disk.array(offset),
        }
    }

    /// At most `length` bytes from `offset` on, as far as they are within the disk.
    fn some(&mut self, offset: u64, length: u64) -> Result<Vec<u8>, E> {
        let length = length.min(self.disk.size.saturating_sub(offset));
        let mut buf = vec![0; length as usize];
        self.disk.fill(&mut buf, offset)?;
        Ok(buf)
    }
}

type Found<E> = Result<Option<Content>, E>;
type Prober<E> = fn(&mut Probe<'_, '_, E>) -> Found<E>;

/// Looks for all that is known. Members of arrays come first: a mirror looks like the file system in it.
pub(crate) fn probe<E>(disk: &mut Disk<'_, E>) -> Found<E> {
    let mut head = vec![0; HEAD.min(disk.size) as usize];
    disk.fill(&mut head, 0)?;
    let mut probe = Probe { disk, head };
    let probers: [Prober<E>; 5] = [members::probe, dos::probe, native::probe, optical::probe, other::probe];
    for prober in probers {
        if let Some(content) = prober(&mut probe)? {
            return Ok(Some(content));
        }
    }
    Ok(None)
}

/// A UUID in the usual form. None: it is all zeroes, and so not set.
fn uuid(bytes: [u8; 16]) -> Option<String> {
    if bytes == [0; 16] {
        return None;
    }
    let mut text = String::with_capacity(36);
    for (i, byte) in bytes.iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text += &format!("{byte:02x}");
    }
    Some(text)
}

/// Text of UTF-16 units in little-endian order, up to the first zero.
fn utf16(bytes: &[u8]) -> String {
    let units = bytes.chunks_exact(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]]));
    let chars = char::decode_utf16(units.take_while(|unit| *unit != 0));
    chars.map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER)).collect()
}

#[cfg(test)]
mod tests;
