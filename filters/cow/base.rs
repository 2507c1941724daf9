//! The disk that a persistent overlay was made over, and whether another one is it.
//!
//! What an overlay holds makes sense over its own base alone; over another disk, or the same one after it was written to,
//! it mixes two disks, and a commit destroys one. So the overlay keeps samples of the base: blocks at its start and end,
//! where tables and superblocks with their unique numbers are, and some all over it, in data where it is sparse. They decide,
//! so a base that was copied or moved still counts. Path, inode and time of change only tell people more, and decide
//! where no sample can be read.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    os::{
        fd::{AsRawFd as _, BorrowedFd},
        unix::ffi::{OsStrExt as _, OsStringExt as _},
    },
};

use nbdkit_core::{Errno, Error, Extents, Flags, Next, Result, Session};

use super::format::{Header, SLOT, is_newer, number32, number64};
use crate::blocksize::{Limits, read_fitted, read_within_limits};

/// Bytes of a sample.
const SAMPLE: u64 = 4096;
/// The disk is divided in so many parts, with a sample at the start of each, and one in the first data of each.
const PARTS: u64 = 32;
/// Parts start at multiples of this, the largest block size there is.
const PART_ALIGNMENT: u64 = 64 << 10;
/// Where tables and superblocks are, besides the start of the disk: btrfs, and the first partition.
const LANDMARKS: [u64; 2] = [64 << 10, 1 << 20];

/// Where things lie in a slot.
const CHECKSUM: usize = 24;
const FIXED: usize = 80;
const SAMPLE_ENTRY: usize = 12;
/// A longer path is not kept, in bytes.
const LONGEST_PATH: usize = 2048;

/// A disk that an overlay lies over, or is to be committed to.
pub(super) trait Disk {
    fn size(&self) -> u64;

    /// Fills `buf`, whatever alignment the disk asks for.
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()>;

    /// Where the first data of a range are, as far as that is known for next to nothing.
    fn first_data(&self, offset: u64, length: u64) -> Option<u64>;

    /// The file that the disk is, if it is one.
    fn file(&self) -> Option<BorrowedFd<'_>>;
}

impl Disk for Next {
    fn size(&self) -> u64 {
        self.caps().size
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        read_within_limits(self, buf, offset)
    }

    fn first_data(&self, offset: u64, length: u64) -> Option<u64> {
        let mut extents = Extents::new(offset, offset + length);
        if !self.caps().skip_holes || self.extents(length, offset, Flags::empty(), &mut extents).is_err() {
            return None;
        }
        extents.as_slice().iter().find(|extent| !extent.zero).map(|extent| extent.offset)
    }

    fn file(&self) -> Option<BorrowedFd<'_>> {
        self.whole_file().map(|loan| loan.fd)
    }
}

impl Disk for Session {
    fn size(&self) -> u64 {
        self.caps().size
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let limits = Limits::of(self.caps().block_size);
        read_fitted(buf, offset, limits, |buf, at| self.pread(buf, at).map(|()| true)).map(drop)
    }

    fn first_data(&self, offset: u64, length: u64) -> Option<u64> {
        if !self.caps().skip_holes {
            return None;
        }
        self.holes(length, offset, true)?.iter().find(|extent| !extent.zero).map(|extent| extent.offset)
    }

    fn file(&self) -> Option<BorrowedFd<'_>> {
        self.whole_file().map(|(loan, _)| loan.fd)
    }
}

/// What an overlay keeps of its base.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Base {
    /// A commit has begun and has not ended: where the overlay has changes, the base may have them already.
    committing: bool,
    /// Offsets and checksums.
    samples: Vec<(u64, u32)>,
    file: Option<FileFacts>,
}

/// What the system says of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
struct FileFacts {
    path: Option<Vec<u8>>,
    device: u64,
    inode: u64,
    /// Seconds and nanoseconds.
    modified: (i64, u32),
}

impl FileFacts {
    /// None: the file has no name, so it says nothing about another time.
    fn of(fd: BorrowedFd<'_>) -> Option<Self> {
        let stat = rustix::fs::fstat(fd).ok().filter(|stat| stat.st_nlink > 0)?;
        let path = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok();
        Some(FileFacts {
            path: path.map(|path| path.into_os_string().into_vec()).filter(|path| path.len() <= LONGEST_PATH),
            device: stat.st_dev,
            inode: stat.st_ino,
            modified: (stat.st_mtime, stat.st_mtime_nsec as u32),
        })
    }

    fn is_same_file(&self, other: &FileFacts) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
    }

    fn describe(&self) -> String {
        let name =
            self.path.as_ref().map_or("a file".into(), |path| OsStr::from_bytes(path).display().to_string());
        format!("{name} (inode {})", self.inode)
    }
}

impl Base {
    /// Looks at a disk. What cannot be read is left out.
    pub(super) fn of(disk: &dyn Disk) -> Self {
        let samples = places(disk).into_iter().filter_map(|at| Some((at, sample(disk, at)?))).collect();
        Base { committing: false, samples, file: disk.file().and_then(FileFacts::of) }
    }

    /// The same with another mark.
    pub(super) fn committing(self, committing: bool) -> Self {
        Base { committing, ..self }
    }

    /// Whether a commit has begun and has not ended.
    pub(super) fn is_committing(&self) -> bool {
        self.committing
    }

    /// Checks that `disk` is this one and as it was. `is_changed` tells where the overlay has changes.
    ///
    /// # Errors
    /// `EINVAL`, with what differs; it completes the sentence "FILE …".
    pub(super) fn check(&self, disk: &dyn Disk, is_changed: impl Fn(u64) -> bool) -> Result<()> {
        let compared: Vec<_> = self
            .samples
            .iter()
            .filter(|(at, _)| !(self.committing && is_changed(*at)))
            .filter_map(|(at, sum)| Some((*at, sample(disk, *at)? == *sum)))
            .collect();
        let wrong: Vec<_> = compared.iter().filter(|(_, same)| !same).map(|(at, _)| *at).collect();
        let now = disk.file().and_then(FileFacts::of);
        if let Some(first) = wrong.first() {
            let count = format!(
                "{} of {} sampled blocks differ, the first at offset {first}",
                wrong.len(),
                compared.len()
            );
            return Err(Error::new(Errno::EINVAL, self.difference(now.as_ref(), &count)));
        }
        let (Some(then), Some(now)) = (&self.file, &now) else { return Ok(()) };
        if compared.is_empty()
            && disk.size() > 0
            && (!then.is_same_file(now) || then.modified != now.modified)
        {
            let why = "no sampled block can be read, and the file is another one or was modified";
            return Err(Error::new(Errno::EINVAL, self.difference(Some(now), why)));
        }
        if then.is_same_file(now) && then.modified != now.modified && !self.committing {
            log::warn!(
                "cow: {} was modified since the overlay was last made or committed, although its {} sampled blocks are as \
                 they were: if its content has changed elsewhere, what the overlay shows is wrong",
                now.describe(),
                compared.len()
            );
        }
        Ok(())
    }

    /// Completes the sentence "FILE …".
    fn difference(&self, now: Option<&FileFacts>, what: &str) -> String {
        let files = match (&self.file, now) {
            (Some(then), Some(now)) if then.is_same_file(now) => format!("{} has changed: ", now.describe()),
            (Some(then), Some(now)) => {
                format!("it was made over {} and this is {}: ", then.describe(), now.describe())
            }
            (Some(then), None) => format!("it was made over {}: ", then.describe()),
            (None, _) => String::new(),
        };
        format!("belongs to another disk, or to this one before it was changed: {files}{what}")
    }

    /// As a slot of the overlay's file.
    pub(super) fn encode(&self, header: &Header, sequence: u64) -> Vec<u8> {
        let mut bytes = vec![0; SLOT];
        let file = self.file.as_ref();
        let path = file.and_then(|file| file.path.as_deref()).unwrap_or_default();
        let (seconds, nanoseconds) = file.map_or((0, 0), |file| file.modified);
        let numbers = [
            (0, sequence),
            (8, u64::from(self.committing) | u64::from(file.is_some()) << 1),
            (16, header.id),
            (32, file.map_or(0, |file| file.device)),
            (40, file.map_or(0, |file| file.inode)),
            (48, seconds.cast_unsigned()),
            (56, nanoseconds.into()),
            (64, path.len() as u64),
            (72, self.samples.len() as u64),
        ];
        for (at, number) in numbers {
            bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
        }
        let mut at = FIXED;
        for (offset, sum) in &self.samples {
            bytes[at..at + 8].copy_from_slice(&offset.to_le_bytes());
            bytes[at + 8..at + SAMPLE_ENTRY].copy_from_slice(&sum.to_le_bytes());
            at += SAMPLE_ENTRY;
        }
        bytes[at..at + path.len()].copy_from_slice(path);
        let checksum = crc32fast::hash(&bytes);
        bytes[CHECKSUM..CHECKSUM + 4].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// The newer of two slots that lie one after the other, with its sequence number. None: there is none that is whole.
    pub(super) fn newest(bytes: &[u8], header: &Header) -> Option<(u64, Self)> {
        bytes
            .chunks_exact(SLOT)
            .filter_map(|slot| Self::decode(slot, header))
            .reduce(|a, b| if is_newer(a.0, b.0) { a } else { b })
    }

    fn decode(bytes: &[u8], header: &Header) -> Option<(u64, Self)> {
        let mut unsummed = bytes.to_vec();
        unsummed[CHECKSUM..CHECKSUM + 4].fill(0);
        if crc32fast::hash(&unsummed) != number32(bytes, CHECKSUM) || number64(bytes, 16) != header.id {
            return None;
        }
        let [flags, paths, samples] = [8, 64, 72].map(|at| number64(bytes, at));
        let path_at = FIXED.checked_add(usize::try_from(samples).ok()?.checked_mul(SAMPLE_ENTRY)?)?;
        let list = bytes.get(FIXED..path_at)?.chunks_exact(SAMPLE_ENTRY);
        let path = bytes.get(path_at..path_at.checked_add(usize::try_from(paths).ok()?)?)?;
        let file = (flags & 2 != 0).then(|| FileFacts {
            path: (!path.is_empty()).then(|| path.to_vec()),
            device: number64(bytes, 32),
            inode: number64(bytes, 40),
            modified: (number64(bytes, 48).cast_signed(), number64(bytes, 56) as u32),
        });
        let samples = list.map(|entry| (number64(entry, 0), number32(entry, 8))).collect();
        Some((number64(bytes, 0), Base { committing: flags & 1 != 0, samples, file }))
    }
}

/// Where samples of a disk are taken, in ascending order.
fn places(disk: &dyn Disk) -> BTreeSet<u64> {
    let size = disk.size();
    let part = (size / PARTS / PART_ALIGNMENT * PART_ALIGNMENT).max(PART_ALIGNMENT);
    let mut places: BTreeSet<u64> = LANDMARKS.into_iter().collect();
    places.insert(size.saturating_sub(1) / SAMPLE * SAMPLE);
    for number in 0..PARTS {
        let Some(start) = part.checked_mul(number).filter(|start| *start < size) else { break };
        places.insert(start);
        let data = disk.first_data(start, part.min(size - start));
        places.extend(data.map(|at| at / SAMPLE * SAMPLE));
    }
    places.retain(|at| *at < size);
    places
}

/// The checksum of a sample; None if it cannot be read.
fn sample(disk: &dyn Disk, at: u64) -> Option<u32> {
    let length = SAMPLE.min(disk.size().checked_sub(at)?);
    let mut buf = vec![0; length as usize];
    disk.read(&mut buf, at).ok()?;
    Some(crc32fast::hash(&buf))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back_and_damage_is_seen() {
        let header = Header::new(b"", 100 << 30, 65536, 7).unwrap();
        let file = FileFacts { path: Some(vec![b'x'; LONGEST_PATH]), device: 1, inode: 2, modified: (-3, 4) };
        let samples: Vec<_> = (0..PARTS * 2 + 3).map(|n| (n << 40, n as u32)).collect();
        let full = Base { committing: true, samples, file: Some(file) };
        for (number, base) in [full, Base::default()].into_iter().enumerate() {
            let bytes = base.encode(&header, number as u64);
            assert_eq!(Base::decode(&bytes, &header), Some((number as u64, base.clone())));
            for at in (0..FIXED).chain([SLOT - 1]) {
                let mut torn = bytes.clone();
                torn[at] ^= 1;
                assert_eq!(Base::decode(&torn, &header), None, "{at}");
            }
            let newer = Base { committing: !base.committing, ..base.clone() };
            let slots = [newer.encode(&header, 6), base.encode(&header, 5)].concat();
            assert_eq!(Base::newest(&slots, &header), Some((6, newer)));
        }
        let (old, new) = (Base::default(), Base { committing: true, ..Base::default() });
        let slots = [new.encode(&header, 0), old.encode(&header, u64::MAX)].concat();
        assert_eq!(Base::newest(&slots, &header), Some((0, new)), "the number wraps around");
        assert_eq!(Base::newest(&[0; 2 * SLOT], &header), None);
    }
}
