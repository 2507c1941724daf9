//! The disks that are served, made when they are first needed and gone with the bench.

use std::{
    cell::OnceCell,
    fs::{self, File},
    io::Write,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use rustix::fs::{Advice, fadvise};
use tempfile::NamedTempFile;

use crate::{
    contestants::{Disk, Variant},
    interrupt,
    load::{Content, stamp_blocks},
};

const MIB: u64 = 1 << 20;
/// The part of the stamped image that has a partition table, for the offset filter to cut out, starts here.
pub(crate) const TABLE: u64 = MIB;
/// The partition starts here, counted from the table.
const PARTITION: u64 = MIB;
/// The sparse file.
const SPARSE_SIZE: u64 = 1 << 40;
const SPARSE_EXTENTS: u64 = 10_000;
const SPARSE_DATA: usize = 4096;

/// See the module.
#[derive(Debug)]
pub(crate) struct Images {
    dir: PathBuf,
    /// Of the stamped images, in MiB.
    size: u64,
    cached: OnceCell<NamedTempFile>,
    cold: OnceCell<NamedTempFile>,
    sparse: OnceCell<NamedTempFile>,
}

impl Images {
    /// Images in `dir`, stamped ones of `size` MiB.
    pub(crate) fn new(dir: PathBuf, size: u64) -> Result<Self> {
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let (cached, cold, sparse) = Default::default();
        Ok(Images { dir, size, cached, cold, sparse })
    }

    /// The file behind a disk; None: it is in memory.
    pub(crate) fn file(&self, disk: Disk) -> Result<Option<&Path>> {
        let image = match disk {
            Disk::Cached => self.image(&self.cached, |file| {
                fill(file, self.size)?;
                partition(file, self.size)
            })?,
            Disk::Cold => self.image(&self.cold, |file| {
                fill(file, self.size)?;
                partition(file, self.size)?;
                evict(file)
            })?,
            Disk::Sparse => self.image(&self.sparse, |file| punctuate(file, SPARSE_EXTENTS))?,
            Disk::Memory(_) | Disk::Empty(_) => return Ok(None),
        };
        Ok(Some(image))
    }

    /// Writes the partition table of the stamped image again, which jobs write over.
    pub(crate) fn repair(&self) -> Result<()> {
        self.cached.get().map_or(Ok(()), |image| partition(image.as_file(), self.size))
    }

    fn image<'a>(
        &self,
        cell: &'a OnceCell<NamedTempFile>,
        make: impl FnOnce(&File) -> Result<()>,
    ) -> Result<&'a Path> {
        if let Some(image) = cell.get() {
            return Ok(image.path());
        }
        let image = tempfile::Builder::new().prefix("disk-").suffix(".img").tempfile_in(&self.dir)?;
        make(image.as_file()).context("cannot make the disk")?;
        Ok(cell.get_or_init(|| image).path())
    }
}

/// A file in memory, for a server without a memory plugin: the same storage that ours has.
pub(crate) fn memory(size: u64) -> Result<NamedTempFile> {
    let file = tempfile::Builder::new().prefix("nbdkit-bench-").tempfile_in("/dev/shm")?;
    file.as_file().set_len(size)?;
    Ok(file)
}

/// What reads of a disk find, when it is served like that.
pub(crate) fn content(disk: Disk, variant: Variant) -> Content {
    match (disk, variant) {
        (Disk::Cached | Disk::Cold, Variant::Filters(filters, _)) if filters.contains(&"partition") => {
            Content::Stamped(TABLE + PARTITION)
        }
        (Disk::Cached | Disk::Cold | Disk::Memory(_), _) => Content::Stamped(0),
        (Disk::Empty(_), _) => Content::Zeroes,
        (Disk::Sparse, _) => Content::Unknown,
    }
}

/// Fills the disk with stamped blocks, which leaves it in the page cache.
fn fill(mut file: &File, mib: u64) -> Result<()> {
    let mut data = vec![0x5a; MIB as usize];
    for index in 0..mib {
        interrupt::check()?;
        stamp_blocks(&mut data, index * MIB);
        file.write_all(&data)?;
    }
    // Otherwise the kernel would write the pages back during the first jobs.
    Ok(file.sync_all()?)
}

/// Puts an MBR at [`TABLE`], with one partition. The stamp of that block stays.
fn partition(file: &File, mib: u64) -> Result<()> {
    const SECTOR: u64 = 512;
    let start = (PARTITION / SECTOR) as u32;
    let sectors = (mib * MIB).saturating_sub(TABLE + PARTITION) / SECTOR;
    let mut table = [0; 66];
    // The type: Linux.
    table[4] = 0x83;
    table[8..12].copy_from_slice(&start.to_le_bytes());
    table[12..16].copy_from_slice(&u32::try_from(sectors).unwrap_or(u32::MAX).to_le_bytes());
    table[64..].copy_from_slice(&[0x55, 0xaa]);
    file.write_all_at(&table, TABLE + 446)?;
    Ok(file.sync_all()?)
}

/// Makes it 1 TiB with so many pieces of data between holes.
fn punctuate(file: &File, extents: u64) -> Result<()> {
    file.set_len(SPARSE_SIZE)?;
    let distance = (SPARSE_SIZE / extents) & !(SPARSE_DATA as u64 - 1);
    for index in 0..extents {
        file.write_all_at(&[0x5a; SPARSE_DATA], index * distance)?;
    }
    Ok(file.sync_all()?)
}

/// Drops a file from the page cache.
pub(crate) fn evict(file: &File) -> Result<()> {
    Ok(fadvise(file, 0, None, Advice::DontNeed)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{SeekFrom, seek};

    #[test]
    fn the_partition_ends_with_the_disk() {
        let file = tempfile::tempfile().unwrap();
        partition(&file, 16).unwrap();
        let mut table = [0; 66];
        file.read_exact_at(&mut table, TABLE + 446).unwrap();
        let field = |at: usize| u32::from_le_bytes(table[at..at + 4].try_into().unwrap());
        assert_eq!(u64::from(field(8)) * 512, PARTITION);
        assert_eq!(TABLE + u64::from(field(8) + field(12)) * 512, 16 * MIB);
    }

    #[test]
    fn the_sparse_file_has_its_extents() {
        let file = tempfile::tempfile().unwrap();
        punctuate(&file, 7).unwrap();
        let (mut at, mut extents) = (0, 0);
        while let Ok(data) = seek(&file, SeekFrom::Data(at)) {
            extents += 1;
            at = seek(&file, SeekFrom::Hole(data)).unwrap();
        }
        assert_eq!(extents, 7);
        assert_eq!(file.metadata().unwrap().len(), SPARSE_SIZE);
    }
}
