//! What the file plugin adds to the conformance suite: parameters, directories, descriptors, and files that change.

use std::{
    fs::{self, File},
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, MetadataExt, symlink},
    },
    path::Path,
    sync::Arc,
};

use nbdkit_core::{Chain, Client, Errno, Flags, Peer, Session, ShutdownFlag};
use tempfile::TempDir;

use super::*;

fn start<V: AsRef<OsStr>>(params: &[(&str, V)]) -> anyhow::Result<Arc<Chain>> {
    let mut chain = Chain::new(new(), vec![]);
    for (key, value) in params {
        chain.config(key, value.as_ref())?;
    }
    chain.config_complete()?;
    chain.get_ready()?;
    Ok(Arc::new(chain))
}

fn open(chain: &Arc<Chain>, export: &str) -> Result<Session> {
    let client = Client::new(1, Peer::Local, Arc::new(ShutdownFlag::new()));
    Arc::new(chain.connect(Arc::new(client), false)?).open(OsStr::new(export), false)
}

fn open_errno(chain: &Arc<Chain>, export: &str) -> Errno {
    open(chain, export).unwrap_err().errno()
}

fn make(path: &Path, size: u64) -> File {
    let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
    file.set_len(size).unwrap();
    file
}

#[test]
fn bad_parameters_are_named_with_the_fix() {
    let dir = TempDir::new().unwrap();
    let path = |name: &str| dir.path().join(name).into_os_string();
    make(Path::new(&path("disk")), 512);
    rustix::fs::mkfifoat(rustix::fs::CWD, path("pipe"), rustix::fs::Mode::RUSR).unwrap();
    let (disk, here) = (path("disk"), dir.path().as_os_str().to_owned());
    for (params, message) in [
        (vec![], "file="),
        (vec![("file", here.clone())], "use dir="),
        (vec![("file", path("missing"))], "does not exist"),
        (vec![("file", path("pipe"))], "neither"),
        (vec![("file", "".into())], "needs a name"),
        (vec![("file", disk.clone()), ("file", disk.clone())], "cannot be used together"),
        (vec![("file", disk.clone()), ("dir", here)], "cannot be used together"),
        (vec![("dir", disk.clone())], "directory"),
        (vec![("dir", path("missing"))], "directory"),
        (vec![("fd", "0".into())], "from 3 up"),
        (vec![("fd", "-5".into())], "from 3 up"),
        (vec![("fd", "1000000".into())], "not open"),
        (vec![("fd", "three".into())], "three"),
        (vec![("file", disk.clone()), ("fadvise", "fast".into())], "sequential"),
        (vec![("file", disk.clone()), ("cache", "all".into())], "none"),
        (vec![("file", disk.clone()), ("lock", "maybe".into())], "off, auto or on"),
        (vec![("file", disk.clone()), ("format", "qcow2".into())], "served raw"),
        (vec![("file", disk), ("nonsense", "1".into())], "nonsense"),
    ] {
        let error = format!("{:#}", start(&params).unwrap_err());
        assert!(error.contains(message) && !error.contains('\n'), "{params:?}: {error}");
    }
}

#[test]
fn a_directory_has_an_export_for_each_file() {
    let outer = TempDir::new().unwrap();
    let dir = outer.path().join("dir");
    fs::create_dir_all(dir.join("sub")).unwrap();
    make(&outer.path().join("outside"), 512);
    for (name, size) in [("b", 1024), ("a", 512), ("c d", 0)] {
        make(&dir.join(name), size);
    }
    symlink("b", dir.join("link")).unwrap();
    symlink("nowhere", dir.join("dangling")).unwrap();
    let handle = File::open(&dir).unwrap();
    let number = handle.as_raw_fd().to_string();
    for params in [[("dir", dir.as_os_str())], [("dirfd", OsStr::new(&number))]] {
        let chain = start(&params).unwrap();
        let exports = chain.list_exports(false, false).unwrap();
        let names: Vec<_> = exports.as_slice().iter().map(|e| e.name.clone()).collect();
        let in_directory_order: Vec<_> = fs::read_dir(&dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .filter(|name| name != "sub" && name != "dangling")
            .collect();
        assert_eq!(names, in_directory_order);
        assert_eq!(chain.default_export(false, false).unwrap(), None);
        for (name, size) in [("a", 512), ("b", 1024), ("c d", 0), ("link", 1024)] {
            assert_eq!(open(&chain, name).unwrap().size(), size);
        }
        for name in ["", ".", "..", "../outside", "/etc/passwd", "sub/x", "missing", "dangling"] {
            assert_eq!(open_errno(&chain, name), Errno::ENOENT, "{name}");
        }
        assert_eq!(open_errno(&chain, "sub"), Errno::EINVAL);
    }
}

#[test]
fn each_connection_opens_the_file_that_has_the_name_now() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("disk");
    make(&path, 512);
    let chain = start(&[("file", &path)]).unwrap();
    let old = open(&chain, "").unwrap();
    fs::remove_file(&path).unwrap();
    assert_eq!(open_errno(&chain, ""), Errno::ENOENT);
    assert!(!path.exists(), "a file was created");
    make(&path, 1024);
    assert_eq!(open(&chain, "").unwrap().size(), 1024);
    assert_eq!(old.size(), 512);
    old.pread(&mut [0; 512], 0).unwrap();
}

#[test]
fn a_file_that_becomes_shorter_gives_an_error() {
    let dir = TempDir::new().unwrap();
    let file = make(&dir.path().join("disk"), 8192);
    let session = open(&start(&[("file", dir.path().join("disk"))]).unwrap(), "").unwrap();
    file.set_len(4096).unwrap();
    session.pread(&mut [0; 4096], 0).unwrap();
    assert!(!session.pread_nowait(&mut [0; 4096], 2048).unwrap());
    assert_eq!(session.pread(&mut [0; 4096], 2048).unwrap_err().errno(), Errno::EIO);
    assert!(!session.extents(8192, 0, Flags::empty()).unwrap().is_empty());
}

#[test]
fn a_file_that_cannot_be_written_to_is_read_only() {
    // Nobody, not even root, may write to a program while it runs.
    let chain = start(&[("file", std::env::current_exe().unwrap())]).unwrap();
    let session = open(&chain, "").unwrap();
    assert!(!session.caps().write);
    session.pread(&mut [0; 16], 0).unwrap();
}

#[test]
fn a_descriptor_keeps_its_access_mode() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("disk");
    let file = make(&path, 4096);
    let session = open(&start(&[("fd", file.as_raw_fd().to_string())]).unwrap(), "").unwrap();
    session.pwrite(b"hello", 100, Flags::FUA).unwrap();
    let read_only = File::open(&path).unwrap();
    let session = open(&start(&[("fd", read_only.as_raw_fd().to_string())]).unwrap(), "").unwrap();
    assert!(!session.caps().write);
    let mut buf = [0; 5];
    session.pread(&mut buf, 100).unwrap();
    assert_eq!(&buf, b"hello");
    let write_only = File::options().write(true).open(&path).unwrap();
    assert!(start(&[("fd", write_only.as_raw_fd().to_string())]).is_err());
}

#[test]
fn only_may_trim_makes_holes() {
    const SIZE: u64 = 1 << 20;
    let dir = TempDir::new().unwrap();
    let file = make(&dir.path().join("disk"), SIZE);
    file.write_all_at(&vec![1; SIZE as usize], 0).unwrap();
    let session = open(&start(&[("file", dir.path().join("disk"))]).unwrap(), "").unwrap();
    let blocks = || {
        file.sync_all().unwrap();
        file.metadata().unwrap().blocks()
    };
    let full = blocks();
    session.zero(SIZE, 0, Flags::FUA).unwrap();
    assert!(blocks() >= full, "the space was given up");
    if crate::holes::punch(&file, 0, 4096).is_ok() {
        session.zero(SIZE, 0, Flags::MAY_TRIM | Flags::FUA).unwrap();
        assert_eq!(blocks(), 0);
    }
}
