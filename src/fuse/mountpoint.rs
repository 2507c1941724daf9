//! What can be mounted on, and clear words for what cannot.

use std::{
    fs,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use nbdkit_core::Session;
use rustix::{fs::Access, io::Errno};

use crate::{kernel_mount, mountinfo};

/// A mountpoint that passed the checks.
#[derive(Clone, Debug)]
pub(crate) struct Mountpoint {
    /// Absolute, without symbolic links.
    pub(crate) path: PathBuf,
    /// What it was before the mount.
    pub(crate) metadata: fs::Metadata,
}

/// Checks that an export can be mounted at `path`: a directory or a regular file, not in use, and FUSE is there.
///
/// # Errors
/// One line that says what to do.
pub fn check_mountpoint(path: &Path) -> anyhow::Result<()> {
    check(path).map(drop)
}

pub(crate) fn check(path: &Path) -> anyhow::Result<Mountpoint> {
    let shown = path.display();
    let full = resolve(path)?;
    let mounted = mountinfo::at(&full).unwrap_or_default();
    let top = mounted.last();
    // The kernel may know the attributes of a dead mount by heart; the free space it has to ask for.
    let alive = rustix::fs::statfs(&full).map_err(std::io::Error::from);
    let metadata = match alive.and_then(|_| fs::metadata(&full)) {
        Ok(metadata) => metadata,
        Err(e) if e.raw_os_error() == Some(Errno::NOTCONN.raw_os_error()) => bail!(
            "{shown} is left over from a mount whose server is gone (Transport endpoint is not connected): run \
             fusermount3 -u {}, or add --force",
            quote(path)
        ),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            bail!("the mountpoint {shown} does not exist: create it with mkdir {}", quote(path))
        }
        Err(e) => return Err(e).with_context(|| format!("cannot use {shown} as the mountpoint")),
    };
    if let Some(entry) = top
        && entry.is_ours()
    {
        bail!(
            "{shown} is in use, {} is mounted there: choose another mountpoint or run nbdkit-mount -u {}",
            entry.source,
            quote(path)
        );
    }
    if !metadata.is_dir() && !metadata.is_file() {
        bail!("the mountpoint {shown} is neither a directory nor a regular file: give one of these");
    }
    check_fuse()?;
    Ok(Mountpoint { path: full, metadata })
}

/// Whether a mount whose server is gone is at `path`.
pub fn is_stale(path: &Path) -> bool {
    resolve(path).is_ok_and(|full| rustix::fs::statfs(&full).err() == Some(Errno::NOTCONN))
}

/// The path without symbolic links, found without a look at the mountpoint itself unless it is one.
///
/// # Errors
/// An empty path, or one that is relative to a directory that is gone.
pub fn resolve(path: &Path) -> anyhow::Result<PathBuf> {
    if path.as_os_str().is_empty() {
        bail!("the mountpoint's name is empty: give a directory or a file");
    }
    match fs::canonicalize(path) {
        Ok(full) => Ok(full),
        // A dead mount, or nothing: say so with the name that was given.
        Err(_) => std::path::absolute(path).context("cannot tell the current directory"),
    }
}

fn check_fuse() -> anyhow::Result<()> {
    let device = Path::new(kernel_mount::PATH);
    match rustix::fs::access(device, Access::READ_OK | Access::WRITE_OK) {
        Ok(()) => {}
        Err(Errno::NOENT) => bail!("{} is missing: run modprobe fuse as root", kernel_mount::PATH),
        Err(e) => {
            return Err(std::io::Error::from(e)).with_context(|| {
                format!("cannot open {}: ask for access to it, or run as root", kernel_mount::PATH)
            });
        }
    }
    if !rustix::process::geteuid().is_root() && kernel_mount::find_helper().is_none() {
        bail!("only root can mount without fusermount3: install the package fuse3, or run as root");
    }
    Ok(())
}

/// A mount must not cover the disk image that is served: the server would find the mount in its place.
pub(crate) fn refuse_own_image(session: &Session, mountpoint: &Mountpoint) -> anyhow::Result<()> {
    let Some((loan, _)) = session.whole_file() else { return Ok(()) };
    let shown = mountpoint.path.display();
    let Ok(stat) = rustix::fs::fstat(loan.fd) else { return Ok(()) };
    if (stat.st_dev, stat.st_ino) == (mountpoint.metadata.dev(), mountpoint.metadata.ino()) {
        bail!("{shown} is the disk image itself: mount it on another file or directory");
    }
    let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&loan.fd));
    // One without a name, such as memory, lies nowhere.
    if mountpoint.metadata.is_dir()
        && stat.st_nlink > 0
        && let Ok(image) = fs::read_link(link)
        && image.starts_with(&mountpoint.path)
    {
        bail!(
            "the disk image {} lies in {shown}, which the mount would cover: choose another mountpoint",
            image.display()
        );
    }
    Ok(())
}

/// The path as one word for a shell.
fn quote(path: &Path) -> String {
    let plain = |b: &u8| b.is_ascii_alphanumeric() || b"/._-+,:@%".contains(b);
    let bytes = path.as_os_str().as_bytes();
    if bytes.iter().all(plain) {
        path.display().to_string()
    } else {
        format!("'{}'", path.display().to_string().replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complaint(path: &Path) -> String {
        format!("{:#}", check_mountpoint(path).unwrap_err())
    }

    #[test]
    fn a_missing_mountpoint_names_mkdir() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("no such");
        assert!(complaint(&path).contains(&format!("mkdir '{}'", path.display())));
    }

    #[test]
    fn other_kinds_of_files_are_refused() {
        assert!(complaint(Path::new("/dev/null")).contains("neither a directory nor a regular file"));
        assert!(complaint(Path::new("")).contains("empty"));
    }

    #[test]
    fn words_for_a_shell() {
        assert_eq!(quote(Path::new("/mnt/x-1")), "/mnt/x-1");
        assert_eq!(quote(Path::new("/a b/it's")), r"'/a b/it'\''s'");
    }
}
