//! Holes in files: finding them with `lseek` and making them with `fallocate`, for the plugins whose disks are files.

use std::fs::File;

use nbdkit_core::{Extents, Flags, Result};
use rustix::{
    fs::{FallocateFlags, SeekFrom, fallocate, fstatfs, seek},
    io::Errno,
};

/// Most pairs of `lseek` calls for one answer: it may be shorter than the question, and a file with a hole in every
/// second block must not hold a client up for seconds.
const MAX_PAIRS: usize = 1 << 16;

/// Whether the file system knows where the holes of this file are.
pub(crate) fn are_known(file: &File) -> bool {
    // An empty file has nothing to look for.
    matches!(seek(file, SeekFrom::Hole(0)), Ok(_) | Err(Errno::NXIO))
}

/// File systems whose files are on another machine or behind another process: NFS, SMB, CIFS, Ceph, 9P, FUSE.
const FAR: [u64; 7] = [0x6969, 0x517b, 0xff53_4d42, 0xfe53_4d42, 0x00c3_6400, 0x0102_1997, 0x6573_5546];

/// Whether to look for holes is a matter of the kernel alone.
pub(crate) fn are_near(file: &File) -> bool {
    fstatfs(file).is_ok_and(|fs| !FAR.contains(&(fs.f_type as u64 & 0xffff_ffff)))
}

/// Adds the extents of `file`, from where the answer stands to the end of the range or of the disk of `size`
/// bytes, with at most one pair of calls for an extent. Flags: REQ_ONE.
///
/// # Errors
/// Those of `lseek`.
pub(crate) fn find(file: &File, size: u64, flags: Flags, extents: &mut Extents) -> Result<()> {
    let mut at = extents.covered_to();
    let done = |extents: &Extents| {
        extents.is_complete() || flags.contains(Flags::REQ_ONE) && !extents.as_slice().is_empty()
    };
    for _ in 0..MAX_PAIRS {
        if at >= size || done(extents) {
            break;
        }
        let Some(data) = look(file, SeekFrom::Data(at), at, size)? else {
            // The last hole ends where the file does. If it was made shorter while it was open, reading what is
            // missing fails: that is no hole.
            let end = seek(file, SeekFrom::End(0)).map_err(std::io::Error::from)?.clamp(at, size);
            extents.add(at, end - at, true, true)?;
            if !done(extents) {
                extents.add_data(end, size - end)?;
            }
            break;
        };
        extents.add(at, data - at, true, true)?;
        if data == size || done(extents) {
            break;
        }
        // One byte at least, so that a file which shrinks meanwhile cannot stop us from advancing.
        let hole = look(file, SeekFrom::Hole(data), data + 1, size)?.unwrap_or(size);
        extents.add(data, hole - data, false, false)?;
        at = hole;
    }
    Ok(())
}

/// The next boundary, within `from..=size`; None when there is none.
fn look(file: &File, to: SeekFrom, from: u64, size: u64) -> Result<Option<u64>> {
    match seek(file, to) {
        Ok(found) => Ok(Some(found.clamp(from, size))),
        Err(Errno::NXIO) => Ok(None),
        Err(e) => Err(std::io::Error::from(e).into()),
    }
}

/// Makes a range of `file` a hole, which reads as zeroes.
///
/// # Errors
/// Those of `fallocate`; see [`is_unsupported`].
pub(crate) fn punch(file: &File, offset: u64, length: u64) -> rustix::io::Result<()> {
    retry(|| fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, length))
}

/// Makes a range of `file` read as zeroes and keeps it allocated.
///
/// # Errors
/// Those of `fallocate`; see [`is_unsupported`].
pub(crate) fn zero_range(file: &File, offset: u64, length: u64) -> rustix::io::Result<()> {
    retry(|| fallocate(file, FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, offset, length))
}

fn retry(mut call: impl FnMut() -> rustix::io::Result<()>) -> rustix::io::Result<()> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

/// Whether `fallocate` said that this kind of file or file system cannot do it at all.
pub(crate) fn is_unsupported(e: Errno) -> bool {
    // ENOTSUP is the same number as EOPNOTSUPP on Linux.
    matches!(e, Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    const BLOCK: u64 = 64 << 10;

    fn file() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8 * BLOCK).unwrap();
        for block in [1, 2, 5] {
            file.write_all_at(&[1; BLOCK as usize], block * BLOCK).unwrap();
        }
        file
    }

    fn kinds(file: &File, range: std::ops::Range<u64>, flags: Flags) -> Vec<(u64, u64, u32)> {
        let mut extents = Extents::new(range.start, range.end);
        find(file, 8 * BLOCK, flags, &mut extents).unwrap();
        extents.as_slice().iter().map(|e| (e.offset, e.length, e.kind())).collect()
    }

    #[test]
    fn finds_data_and_holes() {
        let file = file();
        assert!(are_known(&file) && are_near(&file));
        let all = [
            (0, BLOCK, 3),
            (BLOCK, 2 * BLOCK, 0),
            (3 * BLOCK, 2 * BLOCK, 3),
            (5 * BLOCK, BLOCK, 0),
            (6 * BLOCK, 2 * BLOCK, 3),
        ];
        assert_eq!(kinds(&file, 0..8 * BLOCK, Flags::empty()), all);
        assert_eq!(kinds(&file, 7..BLOCK, Flags::REQ_ONE), [(7, BLOCK - 7, 3)]);
        assert_eq!(kinds(&file, BLOCK..8 * BLOCK, Flags::REQ_ONE), [all[1]]);
    }

    #[test]
    fn what_was_cut_off_is_no_hole() {
        let file = file();
        file.set_len(7 * BLOCK).unwrap();
        let rest = [(6 * BLOCK, BLOCK, 3), (7 * BLOCK, BLOCK, 0)];
        assert_eq!(kinds(&file, 6 * BLOCK..8 * BLOCK, Flags::empty()), rest);
        assert_eq!(kinds(&file, 7 * BLOCK..8 * BLOCK, Flags::empty()), rest[1..]);
        assert_eq!(kinds(&file, 6 * BLOCK..8 * BLOCK, Flags::REQ_ONE), rest[..1]);
    }

    #[test]
    fn a_punched_range_is_a_hole() {
        let file = file();
        match punch(&file, BLOCK, 2 * BLOCK) {
            Err(e) if is_unsupported(e) => return,
            other => other.unwrap(),
        }
        assert_eq!(kinds(&file, 0..BLOCK, Flags::REQ_ONE), [(0, 5 * BLOCK, 3)]);
    }
}
