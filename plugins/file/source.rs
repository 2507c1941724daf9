//! Where the files come from: a path, a directory, or descriptors that we were given.

use std::{
    ffi::OsStr,
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use nbdkit_core::{Errno, Error, Exports, Result};
use rustix::{
    fs::{CWD, Dir, FileType, Mode, OFlags, fcntl_getfl, fstat, openat},
    io::Errno as Sys,
};

use crate::open_disk::{self, NoDisk, Reach};

/// See the module. Paths are absolute.
pub(super) enum Source {
    File(PathBuf),
    /// A directory, the parameter that names it, and where links in it may lead. It stays open, for a mount may cover its
    /// path.
    Dir(&'static str, OwnedFd, Reach),
    Fd(OwnedFd),
}

/// The file type of `st_mode`.
fn file_type(stat: &rustix::fs::Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

fn is_servable(file_type: FileType) -> bool {
    matches!(file_type, FileType::RegularFile | FileType::BlockDevice)
}

impl Source {
    /// The files of a directory.
    pub(super) fn dir(path: &Path) -> anyhow::Result<Source> {
        let dir = open_dir(CWD, path).map_err(io::Error::from);
        let dir =
            dir.with_context(|| format!("dir={}: name a directory that can be read", path.display()))?;
        Ok(Source::Dir("dir", dir, Reach::Beneath))
    }

    /// Says where the links in a directory may lead. False: it is no directory.
    pub(super) fn set_reach(&mut self, reach: Reach) -> bool {
        match self {
            Source::Dir(.., own) => {
                *own = reach;
                true
            }
            _ => false,
        }
    }

    /// The parameter that names it.
    pub(super) fn key(&self) -> &'static str {
        match self {
            Source::File(_) => "file",
            Source::Dir(key, ..) => key,
            Source::Fd(_) => "fd",
        }
    }

    /// The file of an export, for messages.
    pub(super) fn name(&self, export: &OsStr) -> PathBuf {
        match self {
            Source::File(path) => path.clone(),
            Source::Dir(..) => export.into(),
            Source::Fd(fd) => {
                let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(fd));
                std::fs::read_link(&link).unwrap_or(link.into())
            }
        }
    }

    /// Each file is an export.
    pub(super) fn has_many(&self) -> bool {
        matches!(self, Source::Dir(..))
    }

    /// Looks at start-up whether it can be served at all, while the user is still there to hear of it.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        match self {
            Source::File(path) => check_file(path),
            Source::Fd(fd) => {
                if !is_servable(file_type(&fstat(fd).context("fd=")?)) {
                    bail!("fd= is neither a regular file nor a block device");
                }
                if fcntl_getfl(fd).context("fd=")? & OFlags::ACCMODE == OFlags::WRONLY {
                    bail!("fd= cannot be read: open it for reading too");
                }
                Ok(())
            }
            Source::Dir(key, fd, _) => {
                open_dir(fd.as_fd(), Path::new("."))
                    .with_context(|| format!("{key}= is not a directory that can be read"))?;
                Ok(())
            }
        }
    }

    /// The exports: the default one, or the name of each file, in directory order.
    pub(super) fn list(&self) -> Result<Exports> {
        let mut exports = Exports::new();
        let (dir, reach) = match self {
            Source::File(_) | Source::Fd(_) => {
                exports.add("", None)?;
                return Ok(exports);
            }
            // A new description, for the position in a directory is shared by all copies of a descriptor.
            Source::Dir(_, fd, reach) => (open_dir(fd.as_fd(), Path::new(".")), *reach),
        };
        let dir = dir.map_err(io::Error::from)?;
        for entry in Dir::read_from(&dir).map_err(io::Error::from)? {
            let entry = entry.map_err(io::Error::from)?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            // The type in the entry is that of a symbolic link, not of the file it leads to.
            if open_disk::look(dir.as_fd(), Path::new(name), reach).is_err() {
                continue;
            }
            if exports.as_slice().len() == Exports::MAX {
                log::error!("file: only the first {} files of the directory are listed", Exports::MAX);
                break;
            }
            exports.add(name, None)?;
        }
        Ok(exports)
    }

    /// Opens the export's file anew, so that a client gets the file that has the name now. The boolean says
    /// whether it can be written to.
    pub(super) fn open(&self, export: &OsStr, readonly: bool) -> Result<(File, bool)> {
        match self {
            Source::File(path) => open_file(CWD, path, readonly, Reach::Anywhere),
            Source::Dir(_, fd, reach) => open_file(fd.as_fd(), entry_name(export)?, readonly, *reach),
            Source::Fd(fd) => {
                let flags = fcntl_getfl(fd).map_err(io::Error::from)?;
                let writable = flags & OFlags::ACCMODE == OFlags::RDWR;
                Ok((File::from(fd.try_clone()?), writable && !readonly))
            }
        }
    }
}

/// An export name as the name of a directory entry: nothing that leads elsewhere.
fn entry_name(export: &OsStr) -> Result<&Path> {
    let why = match export.as_bytes() {
        b"" => "name an export: there is one for each file of the directory",
        b"." | b".." => "not the name of a file",
        bytes if bytes.contains(&b'/') => "an export name cannot hold '/': it is the name of a file",
        _ => return Ok(Path::new(export)),
    };
    Err(Error::new(Errno::ENOENT, format!("export '{}': {why}", export.display())))
}

fn open_dir(at: BorrowedFd<'_>, path: &Path) -> rustix::io::Result<OwnedFd> {
    openat(at, path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// Opens for reading and writing, or for reading alone where the file cannot be written to.
fn open_file(at: BorrowedFd<'_>, path: &Path, readonly: bool, reach: Reach) -> Result<(File, bool)> {
    let open = |write| open_disk::open(at, path, write, reach).map(|(file, _)| file);
    let opened = match if readonly { Err(Sys::ROFS.into()) } else { open(true) } {
        Ok(file) => Ok((file, true)),
        Err(NoDisk::System(Sys::ACCESS | Sys::PERM | Sys::ROFS | Sys::TXTBSY)) => {
            open(false).map(|file| (file, false))
        }
        Err(e) => Err(e),
    };
    opened.map_err(|e| match e {
        NoDisk::System(Sys::XDEV) if reach == Reach::Beneath => Error::new(
            Errno::EACCES,
            format!(
                "{}: the link leads out of the directory: allow that with follow-links=true",
                path.display()
            ),
        ),
        NoDisk::System(e) => Error::from(io::Error::from(e)).context(path.display()),
        NoDisk::Type(_) => {
            Error::new(Errno::EINVAL, format!("{}: not a file or block device", path.display()))
        }
    })
}

fn check_file(path: &Path) -> anyhow::Result<()> {
    let name = path.display();
    match open_disk::look(CWD, path, Reach::Anywhere) {
        Ok(_) => {}
        Err(NoDisk::System(Sys::NOENT)) => {
            bail!("file={name} does not exist: create it first, for example with truncate -s 1G {name}")
        }
        Err(NoDisk::System(e)) => return Err(io::Error::from(e)).with_context(|| format!("file={name}")),
        Err(NoDisk::Type(FileType::Directory)) => {
            bail!("file={name} is a directory: use dir={name} to serve the files in it")
        }
        Err(NoDisk::Type(_)) => bail!("file={name} is neither a regular file nor a block device"),
    }
    open_disk::open(CWD, path, false, Reach::Anywhere)
        .map_err(NoDisk::into_io)
        .with_context(|| format!("file={name} cannot be read: check its mode and that of its directories"))?;
    Ok(())
}
