//! Opening what is to be a disk. Its type is looked at before and after the open, since a name may come to stand for
//! something else in between: to open a pipe waits for somebody, and to open a device can have effects.

use std::{fs::File, io, os::fd::BorrowedFd, path::Path};

use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, fcntl_setfl, fstat, openat, openat2, statat},
    io::Errno,
};

/// Where the names in a directory may lead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// Anywhere, by symbolic links.
    Anywhere,
    /// Not out of the directory.
    Beneath,
}

/// Why something is no disk.
#[derive(Debug)]
pub(crate) enum NoDisk {
    /// It is neither a regular file nor a block device, but this.
    Type(FileType),
    /// The system says so.
    System(Errno),
}

impl From<Errno> for NoDisk {
    fn from(e: Errno) -> Self {
        NoDisk::System(e)
    }
}

impl NoDisk {
    /// As an error of the system's.
    pub(crate) fn into_io(self) -> io::Error {
        match self {
            NoDisk::Type(FileType::Directory) => io::Error::from(Errno::ISDIR),
            NoDisk::Type(_) => io::Error::from(Errno::INVAL),
            NoDisk::System(e) => e.into(),
        }
    }
}

/// The type of what can be served.
fn servable(mode: u32) -> Result<FileType, NoDisk> {
    match FileType::from_raw_mode(mode) {
        found @ (FileType::RegularFile | FileType::BlockDevice) => Ok(found),
        other => Err(NoDisk::Type(other)),
    }
}

/// The type of what a name stands for, which is not opened.
///
/// # Errors
/// What is no disk; those of the system.
pub(crate) fn look(at: BorrowedFd<'_>, path: &Path, reach: Reach) -> Result<FileType, NoDisk> {
    let stat = match reach {
        Reach::Anywhere => statat(at, path, AtFlags::empty())?,
        Reach::Beneath => fstat(beneath(at, path, OFlags::PATH)?)?,
    };
    servable(stat.st_mode)
}

/// Opens a regular file or a block device for reading and, with `write`, for writing.
///
/// # Errors
/// As [`look`].
pub(crate) fn open(
    at: BorrowedFd<'_>,
    path: &Path,
    write: bool,
    reach: Reach,
) -> Result<(File, FileType), NoDisk> {
    look(at, path, reach)?;
    let access = if write { OFlags::RDWR } else { OFlags::RDONLY };
    let flags = access | OFlags::NONBLOCK | OFlags::NOCTTY;
    let fd = match reach {
        Reach::Anywhere => openat(at, path, flags | OFlags::CLOEXEC, Mode::empty())?,
        Reach::Beneath => beneath(at, path, flags)?,
    };
    let found = servable(fstat(&fd)?.st_mode)?;
    // io_uring would take it for "fail rather than wait".
    fcntl_setfl(&fd, OFlags::empty())?;
    Ok((File::from(fd), found))
}

/// Opens a name that does not lead out of its directory.
fn beneath(at: BorrowedFd<'_>, path: &Path, flags: OFlags) -> Result<std::os::fd::OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    match openat2(at, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
        // A kernel or a container that does not know it: then no links at all.
        Err(Errno::NOSYS | Errno::PERM) => {
            openat(at, path, flags | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
        }
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::fs::{CWD, fcntl_getfl, mknodat, symlinkat};

    use super::*;

    #[test]
    fn a_pipe_is_no_disk_and_nothing_waits_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        mknodat(CWD, &pipe, FileType::Fifo, Mode::RWXU, 0).unwrap();
        for write in [false, true] {
            let refused = open(CWD, &pipe, write, Reach::Anywhere).unwrap_err();
            assert!(matches!(refused, NoDisk::Type(FileType::Fifo)), "{refused:?}");
        }
    }

    /// The name changes between a look at it and its open, as often as it can.
    #[test]
    fn a_file_that_becomes_a_pipe_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let [name, other] = ["name", "other"].map(|name| dir.path().join(name));
        File::create(&name).unwrap();
        mknodat(CWD, &other, FileType::Fifo, Mode::RWXU, 0).unwrap();
        let over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    let exchange = rustix::fs::RenameFlags::EXCHANGE;
                    rustix::fs::renameat_with(CWD, &name, CWD, &other, exchange).unwrap();
                }
            });
            for _ in 0..20_000 {
                if let Ok((file, found)) = open(CWD, &name, false, Reach::Anywhere) {
                    assert!(found == FileType::RegularFile && file.metadata().unwrap().is_file());
                    assert!(!fcntl_getfl(&file).unwrap().contains(OFlags::NONBLOCK));
                }
            }
            over.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }

    #[test]
    fn links_that_lead_out_of_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let exports = dir.path().join("exports");
        std::fs::create_dir(&exports).unwrap();
        for file in ["secret", "exports/file"] {
            File::create(dir.path().join(file)).unwrap();
        }
        let at = File::open(&exports).unwrap();
        let secret = dir.path().join("secret");
        for (name, target, inside) in [
            ("up", Path::new("../secret"), false),
            ("absolute", &secret, false),
            ("around", Path::new("../exports/file"), false),
            ("proc", Path::new("/proc/self/exe"), false),
            ("inside", Path::new("file"), true),
        ] {
            symlinkat(target, &at, name).unwrap();
            let found = open(at.as_fd(), Path::new(name), false, Reach::Beneath);
            assert_eq!(found.is_ok(), inside, "{name}: {found:?}");
            assert_eq!(look(at.as_fd(), Path::new(name), Reach::Beneath).is_ok(), inside, "{name}");
            open(at.as_fd(), Path::new(name), false, Reach::Anywhere).unwrap();
        }
    }
}
