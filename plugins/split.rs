//! Several files, one after the other, as one disk.

use std::{ffi::OsStr, path::PathBuf, sync::Arc};

use anyhow::{Context as _, bail};
use nbdkit_common::Regions;
use nbdkit_core::{Above, Errno, Error, Handle, Info, Open, Plugin, Result};

use crate::{
    block_file::BlockFile,
    concat::{Concat, Segment},
    image::ImageGuard,
    lock::{Access, Lock},
};

const HELP: &str = "\
file=<FILENAME>         (required, may be repeated) The files, in order.
lock=off|auto|on        Lock the files against other programs (default auto).
format=raw              Serve an image of another format as it is, for writing too.";

pub(crate) fn new() -> Box<dyn Plugin> {
    Box::new(Split { files: Vec::new(), guard: ImageGuard::default(), locks: Vec::new() })
}

struct Split {
    /// Absolute, for the server may leave its directory.
    files: Vec<PathBuf>,
    guard: ImageGuard,
    /// Of all files, from the start on.
    locks: Vec<Lock>,
}

impl Split {
    /// Opens the files, and tells whether all of them can be written to; with their locks.
    fn open_files(&self, readonly: bool) -> Result<(Vec<BlockFile>, bool, Vec<Lock>)> {
        let files: Vec<_> =
            self.files.iter().map(|path| BlockFile::open(path, readonly)).collect::<Result<_>>()?;
        let mut writable = !readonly;
        if let (Some(first), Some(last), Some(name)) = (files.first(), files.last(), self.files.first()) {
            writable = self.guard.may_write((first.file(), name), last.file(), writable) && writable;
        }
        for (file, name) in files.iter().zip(&self.files) {
            if writable && !file.is_writable() {
                self.guard.tell_fallback(file.file(), name);
            }
        }
        writable = writable && files.iter().all(BlockFile::is_writable);
        let lock =
            |(file, name): (&BlockFile, &PathBuf)| self.guard.lock(file.file(), name, Access::new(writable));
        let locks: Vec<_> = files.iter().zip(&self.files).map(lock).collect::<Result<_>>()?;
        Ok((files, writable, locks.into_iter().flatten().collect()))
    }
}

impl Plugin for Split {
    fn info(&self) -> Info {
        Info::bundled("split", "nbdkit split plugin", HELP).magic("file")
    }

    fn callbacks(&self) -> Option<Vec<&'static str>> {
        Some([crate::EVERYTHING, &["config_complete"]].concat())
    }

    fn config(&mut self, key: &str, value: &OsStr) -> anyhow::Result<bool> {
        if key != "file" {
            return self.guard.config(key, value);
        }
        let path = std::path::absolute(value).with_context(|| format!("file={}", value.display()))?;
        BlockFile::check(&path)?;
        self.files.push(path);
        Ok(true)
    }

    fn config_complete(&mut self) -> anyhow::Result<()> {
        if self.files.is_empty() {
            bail!("you must supply at least one file=FILENAME parameter");
        }
        Ok(())
    }

    fn set_above(&mut self, above: Above) {
        self.guard.set_above(above);
    }

    fn get_ready(&mut self) -> anyhow::Result<()> {
        let (_, _, locks) = self.open_files(self.guard.starts_readonly())?;
        self.locks = locks;
        Ok(())
    }

    fn open(&self, open: &Open) -> Result<Box<dyn Handle>> {
        let (mut files, writable, locks) = self.open_files(open.readonly)?;
        if !writable && !open.readonly {
            // None of them is written to.
            (files, ..) = self.open_files(true)?;
        }
        let mut disk = Regions::new();
        for (file, path) in files.into_iter().zip(&self.files) {
            disk.push(file.length(), Segment::File(file)).ok_or_else(|| {
                Error::new(Errno::EFBIG, format!("{}: the disk would pass 2^63-1 bytes", path.display()))
            })?;
        }
        Ok(Box::new(Concat::new(Arc::new(disk)).keeping(locks)))
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::MetadataExt};

    use super::*;
    use crate::testkit::{check_model, config_error, disk, extents, file, lend, read_all, start};
    use nbdkit_core::{Flags, Op};

    fn params(paths: &[PathBuf]) -> Vec<(&str, &str)> {
        paths.iter().map(|path| ("file", path.to_str().unwrap())).collect()
    }

    #[test]
    fn files_follow_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let paths = [file(&dir, "a", b"abc"), file(&dir, "b", b""), file(&dir, "c", b"defgh")];
        let disk = disk("split", &params(&paths));
        assert_eq!(read_all(&disk), b"abcdefgh");
        disk.pwrite(b"XYZ", 2, Flags::FUA).unwrap();
        disk.flush().unwrap();
        assert_eq!(fs::read(&paths[0]).unwrap(), b"abX");
        assert_eq!(fs::read(&paths[2]).unwrap(), b"YZfgh");
        for op in [Op::Read, Op::Write] {
            assert!(lend(&disk, op, 3, 5).is_some_and(|(_, offset)| offset == 0));
            assert!(lend(&disk, op, 2, 2).is_none());
        }
    }

    #[test]
    fn model() {
        let dir = tempfile::tempdir().unwrap();
        let data: Vec<u8> = (0..=255).cycle().take(5000).collect();
        let parts = [&data[..1], &data[..5000], &data[..], &data[..4096]];
        let paths: Vec<_> =
            parts.iter().enumerate().map(|(i, part)| file(&dir, &i.to_string(), part)).collect();
        check_model(&disk("split", &params(&paths)), |_| true);
        let total: usize = parts.iter().map(|part| part.len()).sum();
        assert_eq!(paths.iter().map(|path| fs::read(path).unwrap().len()).sum::<usize>(), total);
    }

    #[test]
    fn holes_are_seen_and_made() {
        let dir = tempfile::tempdir().unwrap();
        let paths = [file(&dir, "a", &[1; 65536]), file(&dir, "b", b"")];
        fs::File::options().write(true).open(&paths[1]).unwrap().set_len(1 << 20).unwrap();
        let disk = disk("split", &params(&paths));
        assert_eq!(extents(&disk, 0, disk.size()), [(0, 65536, 0), (65536, 1 << 20, 3)]);
        let one = disk.extents(disk.size(), 100, Flags::REQ_ONE);
        assert!(one.is_err(), "past the end");
        let one = disk.extents(disk.size() - 100, 100, Flags::REQ_ONE).unwrap();
        assert_eq!((one.len(), one[0].length), (1, 65436));
        disk.trim(65536, 0, Flags::empty()).unwrap();
        assert_eq!(fs::metadata(&paths[0]).unwrap().blocks(), 0);
        assert_eq!(extents(&disk, 0, disk.size()), [(0, 65536 + (1 << 20), 3)]);
    }

    #[test]
    fn one_file_that_cannot_be_written_makes_the_disk_read_only() {
        let dir = tempfile::tempdir().unwrap();
        // A running program cannot be written to, not even by root.
        let paths = [file(&dir, "a", b"abc"), std::env::current_exe().unwrap()];
        assert!(!disk("split", &params(&paths)).caps().write);
        assert!(disk("split", &params(&paths[..1])).caps().write);
    }

    #[test]
    fn a_file_that_became_shorter_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let paths = [file(&dir, "a", b"abc")];
        let disk = disk("split", &params(&paths));
        fs::write(&paths[0], b"a").unwrap();
        let error = disk.pread(&mut [0; 3], 0).unwrap_err();
        assert_eq!(error.errno(), Errno::EIO);
        assert!(error.to_string().contains("shorter"), "{error}");
    }

    #[test]
    fn bad_parameters_name_the_fix() {
        assert!(config_error("split", &[]).contains("file=FILENAME"));
        assert!(config_error("split", &[("file", "/")]).contains("/: is a directory"));
        assert!(config_error("split", &[("file", "/nonexistent")]).contains("/nonexistent: No such file"));
        assert!(config_error("split", &[("file", "/dev/null")]).contains("neither a regular file"));
        assert!(start("split", &[("files", "x")]).is_err());
    }
}
