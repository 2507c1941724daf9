//! The directory as it was when the server started: what is in it, how large the files are, and when they were changed.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Result, bail, ensure};
use nbdkit_core::Error;

use super::names::{Name, Names, Refused};

/// Most bytes of a file in a FAT file system.
const LARGEST: u64 = u32::MAX as u64;
/// How deep directories may be nested.
const MAX_DEPTH: usize = 250;

/// A directory, with what is in it.
#[derive(Debug, Default)]
pub(super) struct Directory {
    pub(super) entries: Vec<Entry>,
    /// None for the root.
    pub(super) parent: Option<usize>,
    /// When it was changed.
    pub(super) time: Stamp,
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: Name,
    pub(super) time: Stamp,
    pub(super) kind: Kind,
}

#[derive(Debug)]
pub(super) enum Kind {
    /// By index in the list of directories.
    Directory(usize),
    File {
        path: PathBuf,
        size: u64,
    },
}

/// A time as FAT has it: UTC, in steps of two seconds, from 1980 to 2107.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Stamp {
    pub(super) date: u16,
    pub(super) time: u16,
}

impl Stamp {
    /// From seconds since 1970.
    fn new(seconds: i64) -> Self {
        // 1980-01-01 and the last moment of 2107.
        let seconds = seconds.clamp(315_532_800, 4_354_819_199);
        let (days, second) = (seconds / 86_400, seconds % 86_400);
        // Years from March on, so that the leap day is the last; day 0 is 0000-03-01 of the Gregorian calendar.
        let day = days + 719_468;
        let (era, of_era) = (day / 146_097, day % 146_097);
        let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let from_march = (5 * of_year + 2) / 153;
        let day = of_year - (153 * from_march + 2) / 5 + 1;
        let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        let date = (year - 1980) << 9 | month << 5 | day;
        let time = (second / 3600) << 11 | (second / 60 % 60) << 5 | (second % 60 / 2);
        Stamp { date: date as u16, time: time as u16 }
    }
}

/// Reads a directory and those in it. The first one is the root; each comes after the one that it is in. What is neither a
/// regular file nor a directory is left out.
///
/// # Errors
/// What cannot be read; files that are too large for FAT, and names that it cannot hold. The message has the path.
pub(super) fn scan(root: &Path) -> Result<Vec<Directory>> {
    let mut all = vec![Directory::default()];
    let mut paths = vec![(root.to_owned(), 0)];
    let mut next = 0;
    while let Some((path, depth)) = paths.get(next).cloned() {
        ensure!(depth <= MAX_DEPTH, "{}: directories are nested more than {MAX_DEPTH} deep", path.display());
        scan_one(&path, next, &mut all, |inner| paths.push((inner, depth + 1)))?;
        next += 1;
    }
    Ok(all)
}

fn scan_one(
    path: &Path,
    index: usize,
    all: &mut Vec<Directory>,
    mut found: impl FnMut(PathBuf),
) -> Result<()> {
    let fail = |e: std::io::Error, path: &Path| Error::from(e).context(path.display());
    let mut names = Names::default();
    let mut inside: Vec<_> = fs::read_dir(path).and_then(Iterator::collect).map_err(|e| fail(e, path))?;
    // The same disk at each start.
    inside.sort_by_key(fs::DirEntry::file_name);
    all[index].time = Stamp::new(fs::metadata(path).map_err(|e| fail(e, path))?.mtime());
    for entry in inside {
        let (path, file_name) = (entry.path(), entry.file_name());
        let metadata = match entry.metadata() {
            // It has gone meanwhile.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            metadata => metadata.map_err(|e| fail(e, &path))?,
        };
        if !metadata.is_file() && !metadata.is_dir() {
            log::debug!("floppy: {} is neither a regular file nor a directory: left out", path.display());
            continue;
        }
        let name = names.add(&file_name.to_string_lossy()).map_err(|refused| match refused {
            Refused::TooLong => {
                anyhow::anyhow!("{}: the name is too long for FAT: shorten it", path.display())
            }
            Refused::Taken => anyhow::anyhow!(
                "{}: FAT cannot tell the name from another one in the directory: rename one of them",
                path.display()
            ),
        })?;
        let time = Stamp::new(metadata.mtime());
        let kind = if metadata.is_dir() {
            all.push(Directory { parent: Some(index), ..Directory::default() });
            found(path);
            Kind::Directory(all.len() - 1)
        } else {
            let size = metadata.len();
            if size > LARGEST {
                bail!(
                    "{}: a file of {size} bytes is too large for FAT, which has 4 GiB at most",
                    path.display()
                );
            }
            Kind::File { path, size }
        };
        all[index].entries.push(Entry { name, time, kind });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps() {
        let shown = |seconds| {
            let Stamp { date, time } = Stamp::new(seconds);
            (
                format!("{}-{:02}-{:02}", 1980 + (date >> 9), date >> 5 & 15, date & 31),
                format!("{:02}:{:02}:{:02}", time >> 11, time >> 5 & 63, (time & 31) * 2),
            )
        };
        for (seconds, date, time) in [
            (0, "1980-01-01", "00:00:00"),
            (i64::MIN, "1980-01-01", "00:00:00"),
            (315_532_800 + 59 * 86_400, "1980-02-29", "00:00:00"),
            (951_782_399, "2000-02-28", "23:59:58"),
            (951_782_400, "2000-02-29", "00:00:00"),
            (1_796_000_001, "2026-11-30", "00:53:20"),
            (4_107_542_399, "2100-02-28", "23:59:58"),
            (4_107_542_400, "2100-03-01", "00:00:00"),
            (i64::MAX, "2107-12-31", "23:59:58"),
        ] {
            assert_eq!(shown(seconds), (date.into(), time.into()), "{seconds}");
        }
    }
}
