//! Locks on the files of a disk, as qemu takes them, so that two programs do not write to one image, and none writes while
//! another reads.
//!
//! They are locks of an open file description on single bytes of the file, all of them shared. Byte 100+N says that the holder
//! uses permission N, byte 200+N that it does not let others use it. A holder that takes permission N then checks that
//! no other has byte 200+N, and one that does not share N checks that no other has 100+N. The locks are advisory: cp
//! and dd ignore them.
//!
//! All connections of this process are one holder for each file: they see each other's changes.

use std::{
    ffi::OsStr,
    fs::{self, File},
    os::{
        fd::{AsFd, AsRawFd as _},
        unix::fs::MetadataExt as _,
    },
    path::Path,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::bail;
use nbdkit_core::{Errno, Error, Result, params};
use nix::{
    fcntl::{FcntlArg, fcntl},
    libc,
};
use parking_lot::Mutex;

/// Byte of the first permission, and that of the first one that is not shared.
const USED: i64 = 100;
const UNSHARED: i64 = 200;

/// The permissions, as distances from those.
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// What is locked in any case: reads make sense only while nobody else writes.
const OF_READERS: [i64; 3] = [USED + CONSISTENT_READ, UNSHARED + WRITE, UNSHARED + RESIZE];
/// What readers must not find.
const AGAINST_READERS: [i64; 3] = [UNSHARED + CONSISTENT_READ, USED + WRITE, USED + RESIZE];
/// What writers lock besides, and must not find.
const OF_WRITERS: i64 = USED + WRITE;
const AGAINST_WRITERS: i64 = UNSHARED + WRITE;

/// Whether files are locked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Mode {
    Off,
    /// Where the file system has locks.
    #[default]
    Auto,
    On,
}

impl Mode {
    /// The value of `lock=`.
    ///
    /// # Errors
    /// An unknown word.
    pub(crate) fn parse(value: &OsStr) -> anyhow::Result<Self> {
        Ok(match params::text(value)? {
            "off" => Mode::Off,
            "auto" => Mode::Auto,
            "on" => Mode::On,
            other => bail!("unknown lock mode '{other}': use off, auto or on"),
        })
    }
}

/// What a file is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
}

impl Access {
    pub(crate) fn new(writes: bool) -> Self {
        if writes { Access::Write } else { Access::Read }
    }
}

/// The files that this process has locked.
static HELD: Mutex<Vec<(FileId, Weak<Held>)>> = Mutex::new(Vec::new());

/// Device and inode.
type FileId = (u64, u64);

/// A file that is locked; closing it unlocks it.
#[derive(Debug)]
struct Held {
    file: File,
    /// How many leases are for writing.
    writers: Mutex<usize>,
}

/// A lock on a file, for one of its uses. Dropping the last one unlocks it.
#[derive(Debug)]
pub(crate) struct Lock {
    held: Arc<Held>,
    access: Access,
}

impl Drop for Lock {
    fn drop(&mut self) {
        if self.access == Access::Read {
            return;
        }
        let mut writers = self.held.writers.lock();
        *writers -= 1;
        if *writers == 0 {
            let _ = set(&self.held.file, OF_WRITERS, libc::F_UNLCK);
        }
    }
}

/// Locks a file that is open, which messages call `name`. None: it is not locked, as `mode` allows.
///
/// # Errors
/// `EBUSY`: another program uses the file; with [`Mode::On`], those of the system.
pub(crate) fn lock(file: impl AsFd, name: &Path, access: Access, mode: Mode) -> Result<Option<Lock>> {
    if mode == Mode::Off {
        return Ok(None);
    }
    match try_lock(file.as_fd(), access) {
        Ok(lock) => Ok(Some(lock)),
        Err(Failure::Conflict(by)) => {
            let shown = name.display();
            let error = format!("{shown} is in use by {by}: end that first, or share the file with lock=off");
            Err(Error::new(Errno::EBUSY, error))
        }
        Err(Failure::System(e)) if mode == Mode::On => Err(Error::from(e)
            .context(format!("cannot lock {}: leave out lock=on to do without", name.display()))),
        Err(Failure::System(e)) => {
            static TOLD: AtomicBool = AtomicBool::new(false);
            if !TOLD.swap(true, Ordering::Relaxed) {
                log::warn!(
                    "{} cannot be locked ({}), so that other programs may write to it meanwhile",
                    name.display(),
                    Error::from(e)
                );
            }
            Ok(None)
        }
    }
}

/// Why a file is not locked.
enum Failure {
    /// By whom it is used.
    Conflict(String),
    System(std::io::Error),
}

impl From<nix::Error> for Failure {
    fn from(e: nix::Error) -> Self {
        Failure::System(e.into())
    }
}

fn try_lock(file: std::os::fd::BorrowedFd<'_>, access: Access) -> std::result::Result<Lock, Failure> {
    // A description of its own: that of a descriptor which was passed to us is somebody else's, too.
    let own = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).map_err(Failure::System)?;
    let metadata = own.metadata().map_err(Failure::System)?;
    let id = (metadata.dev(), metadata.ino());
    let mut files = HELD.lock();
    files.retain(|(_, held)| held.strong_count() > 0);
    let known = files.iter().find(|(other, _)| *other == id).and_then(|(_, held)| held.upgrade());
    let held = match known {
        Some(held) => held,
        None => {
            for byte in OF_READERS {
                take(&own, id, byte)?;
            }
            AGAINST_READERS.iter().try_for_each(|byte| check(&own, id, *byte))?;
            let held = Arc::new(Held { file: own, writers: Mutex::new(0) });
            files.push((id, Arc::downgrade(&held)));
            held
        }
    };
    if access == Access::Write {
        let mut writers = held.writers.lock();
        if *writers == 0 {
            take(&held.file, id, OF_WRITERS)?;
            check(&held.file, id, AGAINST_WRITERS).inspect_err(|_| {
                let _ = set(&held.file, OF_WRITERS, libc::F_UNLCK);
            })?;
        }
        *writers += 1;
    }
    Ok(Lock { held, access })
}

fn description(byte: i64, kind: i32) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

/// Sets or removes a lock on a byte.
fn set(file: &File, byte: i64, kind: i32) -> nix::Result<()> {
    fcntl(file, FcntlArg::F_OFD_SETLK(&description(byte, kind))).map(drop)
}

fn take(file: &File, id: FileId, byte: i64) -> std::result::Result<(), Failure> {
    match set(file, byte, libc::F_RDLCK) {
        // Somebody has it for himself, as no program that knows these locks does.
        Err(nix::Error::EAGAIN | nix::Error::EACCES) => Err(conflict(id, byte, 0)),
        result => Ok(result?),
    }
}

/// Fails if another program has a lock on a byte.
fn check(file: &File, id: FileId, byte: i64) -> std::result::Result<(), Failure> {
    let mut found = description(byte, libc::F_WRLCK);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut found))?;
    if i32::from(found.l_type) == libc::F_UNLCK { Ok(()) } else { Err(conflict(id, byte, found.l_pid)) }
}

/// Names the program that has a lock on a byte. The kernel tells the process only of locks that are not of a description.
fn conflict(id: FileId, byte: i64, process: i32) -> Failure {
    let process = if process > 0 { Some(process as u32) } else { find_holder(id.1, byte) };
    let how = match byte {
        b if b == OF_WRITERS => ", which writes to it",
        b if b == USED + RESIZE => ", which may change its size",
        b if b == AGAINST_WRITERS => ", which lets nobody else write to it",
        _ => "",
    };
    Failure::Conflict(match process {
        Some(process) => {
            let name = fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
            format!("{} (process {process}){how}", name.trim())
        }
        None => format!("another program{how}"),
    })
}

/// Looks through the descriptors of all processes that we may look at, but for our own. Never at the files themselves: one
/// on a file system whose server hangs would hang us.
fn find_holder(inode: u64, byte: i64) -> Option<u32> {
    let own = std::process::id();
    let processes =
        fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    processes.filter(|process| *process != own).find(|process: &u32| {
        let Ok(descriptors) = fs::read_dir(format!("/proc/{process}/fdinfo")) else { return false };
        descriptors.flatten().any(|entry| {
            fs::read_to_string(entry.path())
                .is_ok_and(|text| text.lines().any(|line| covers(line, inode, byte)))
        })
    })
}

/// Whether a line of fdinfo tells of a lock on a byte of a file: `lock:\t1: OFDLCK  ADVISORY  READ -1 fe:01:1234 100 103`.
/// The device is left out, since some file systems show another one there than stat(2) does.
fn covers(line: &str, inode: u64, byte: i64) -> bool {
    let range = || {
        let words: Vec<_> = line.strip_prefix("lock:")?.split_whitespace().collect();
        let [.., file, start, end] = words[..] else { return None };
        let end = if end == "EOF" { i64::MAX } else { end.parse().ok()? };
        let same = file.rsplit(':').next()?.parse() == Ok(inode);
        Some(same && start.parse::<i64>().ok()? <= byte && byte <= end)
    };
    range().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open_with(bytes: &[i64]) -> (tempfile::NamedTempFile, File) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let other = File::open(file.path()).unwrap();
        bytes.iter().for_each(|byte| set(&other, *byte, libc::F_RDLCK).unwrap());
        (file, other)
    }

    fn try_both(bytes: &[i64]) -> [bool; 2] {
        [Access::Read, Access::Write].map(|access| {
            let (file, _other) = open_with(bytes);
            match lock(&file, file.path(), access, Mode::On) {
                Ok(lock) => lock.is_some(),
                Err(e) => {
                    assert_eq!(e.errno(), Errno::EBUSY);
                    assert!(e.to_string().contains("is in use by"), "{e}");
                    false
                }
            }
        })
    }

    #[test]
    fn readers_share_and_writers_do_not() {
        assert_eq!(try_both(&[]), [true, true]);
        assert_eq!(try_both(&[100, 201, 203]), [true, false], "a reader");
        assert_eq!(try_both(&[100, 101, 201, 203]), [false, false], "a writer");
        assert_eq!(try_both(&[100, 101]), [false, false], "a writer that lets others write");
        assert_eq!(try_both(&[103]), [false, false], "one that changes the size");
        assert_eq!(try_both(&[100]), [true, true], "a reader that lets others write");
        assert_eq!(try_both(&[200]), [false, false], "one that wants it for itself");
    }

    #[test]
    fn a_process_holds_a_file_once() {
        let (file, other) = open_with(&[]);
        let take = |access| lock(&file, file.path(), access, Mode::Auto).unwrap().unwrap();
        let has = |byte| {
            let mut found = description(byte, libc::F_WRLCK);
            fcntl(&other, FcntlArg::F_OFD_GETLK(&mut found)).unwrap();
            i32::from(found.l_type) != libc::F_UNLCK
        };
        let reader = take(Access::Read);
        assert_eq!([100, 101, 201, 203].map(has), [true, false, true, true]);
        let writers = [take(Access::Write), take(Access::Write)];
        assert!(has(101));
        let [first, second] = writers;
        drop(first);
        assert!(has(101));
        drop(second);
        assert_eq!([100, 101, 201, 203].map(has), [true, false, true, true]);
        drop(reader);
        assert_eq!([100, 101, 201, 203].map(has), [false; 4]);
        assert!(lock(&file, file.path(), Access::Write, Mode::Off).unwrap().is_none());
    }

    #[test]
    fn lines_of_fdinfo() {
        let line = "lock:\t1: OFDLCK  ADVISORY  READ -1 fe:01:1234 100 101";
        assert_eq!([99, 100, 101, 102].map(|byte| covers(line, 1234, byte)), [false, true, true, false]);
        assert!(covers("lock:\t1: POSIX  ADVISORY  WRITE 7 fe:01:1234 0 EOF", 1234, 203));
        assert!(!covers("pos:\t100 300", 300, 200) && !covers("lock:", 1234, 1) && !covers(line, 1235, 100));
    }
}
