//! Mounting and unmounting: by mount(2) where that is allowed, else by the setuid helper fusermount3.
//!
//! fuser has its own code for this. Ours knows whether the mount at a path is still the one it made before it unmounts
//! anything, detaches and aborts a mount that is in use, and passes on what the helper says.

use std::{
    env,
    ffi::CString,
    fs, io,
    mem::MaybeUninit,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, bail};
use log::debug;
use rustix::{
    fs::{FileType, Mode},
    io::{Errno, FdFlags},
    mount::UnmountFlags,
    net::{AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType},
};

use crate::{mountinfo, mountpoint::Mountpoint, options::Options};

/// The device by which the kernel talks to FUSE servers.
pub(crate) const PATH: &str = "/dev/fuse";
const HELPER: &str = "fusermount3";
/// Where the kernel lists the connections, when that is mounted.
const CONNECTIONS: &str = "/sys/fs/fuse/connections";

/// A mount that was made.
#[derive(Debug)]
pub(crate) struct KernelMount {
    target: PathBuf,
    /// Number of the file system; None when the mount table does not tell.
    device: Option<String>,
}

/// How to unmount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnmountMode {
    /// Only if nobody uses it; what was written to it goes to the server first.
    Idle,
    /// Out of sight at once, ended once nobody uses it any more.
    Lazy,
    /// At once; processes that use it get errors.
    Force,
}

/// Mounts at `mountpoint`. The kernel's first request waits in the file that is returned.
pub(crate) fn attach(
    mountpoint: &Mountpoint,
    options: &Options,
    source: &str,
) -> anyhow::Result<(OwnedFd, KernelMount)> {
    let fd = match mount(mountpoint, options, source)? {
        Some(fd) => fd,
        None => ask_helper(&mountpoint.path, options, source)?,
    };
    let device =
        mountinfo::at(&mountpoint.path).ok().and_then(|mut mounts| mounts.pop()).map(|entry| entry.device);
    Ok((fd, KernelMount { target: mountpoint.path.clone(), device }))
}

/// Mounts by the system call; None: that is not allowed.
fn mount(mountpoint: &Mountpoint, options: &Options, source: &str) -> anyhow::Result<Option<OwnedFd>> {
    let device = fs::OpenOptions::new().read(true).write(true).open(PATH).with_context(|| PATH)?;
    let kind = if mountpoint.metadata.is_dir() { FileType::Directory } else { FileType::RegularFile };
    let data = format!(
        "fd={},rootmode={:o},user_id={},group_id={},{}",
        device.as_raw_fd(),
        kind.as_raw_mode() | Mode::RUSR.as_raw_mode(),
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
        options.kernel_words().join(",")
    );
    let mut flags = options.flags;
    flags.set(rustix::mount::MountFlags::RDONLY, options.readonly);
    let data = CString::new(data)?;
    let fstype = format!("fuse.{}", options.subtype);
    debug!("mount {} at {}: {data:?}", fstype, mountpoint.path.display());
    match rustix::mount::mount(source, &mountpoint.path, fstype.as_str(), flags, data.as_c_str()) {
        Ok(()) => Ok(Some(device.into())),
        Err(Errno::PERM) => Ok(None),
        Err(e) => {
            Err(io::Error::from(e)).with_context(|| format!("cannot mount at {}", mountpoint.path.display()))
        }
    }
}

/// Where fusermount3 is.
pub(crate) fn find_helper() -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/bin".into(), "/bin".into()])
        .map(|dir| dir.join(HELPER))
        .find(|file| rustix::fs::access(file, rustix::fs::Access::EXEC_OK).is_ok())
}

/// Lets fusermount3 mount; it sends the opened device over a socket, the number of which it finds in its environment.
fn ask_helper(target: &Path, options: &Options, source: &str) -> anyhow::Result<OwnedFd> {
    let helper = find_helper()
        .with_context(|| format!("not allowed to mount without {HELPER}: install the package fuse3"))?;
    let mut words: Vec<String> = options.flag_words().into_iter().map(String::from).collect();
    words.extend(options.kernel_words());
    words.push(format!("fsname={}", source.replace('\\', "\\\\").replace(',', "\\,")));
    words.push(format!("subtype={}", options.subtype));
    // The helper's end must live through exec, ours must not.
    let (ours, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::empty(), None)
            .map_err(io::Error::from)?;
    rustix::io::fcntl_setfd(&ours, FdFlags::CLOEXEC).map_err(io::Error::from)?;
    debug!("{HELPER} -o {} -- {}", words.join(","), target.display());
    let mut child = Command::new(helper)
        .arg("-o")
        .arg(words.join(","))
        .arg("--")
        .arg(target)
        .env("_FUSE_COMMFD", theirs.as_raw_fd().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {HELPER}"))?;
    drop(theirs);
    match receive(&ours) {
        Ok(Some(fd)) => {
            child.wait().with_context(|| HELPER)?;
            Ok(fd)
        }
        received => {
            drop(ours);
            let output = child.wait_with_output().with_context(|| HELPER)?;
            let said = String::from_utf8_lossy(&output.stderr);
            // It puts its own path before the message.
            let said = said.trim();
            let said = said.split_once("fusermount3: ").map_or(said, |(_, message)| message);
            match received {
                _ if said.contains("user_allow_other") => bail!(
                    "allow_other and allow_root are for root only unless user_allow_other stands in /etc/fuse.conf: \
                     add it there, or leave the option out"
                ),
                Err(e) if said.is_empty() => Err(e).with_context(|| format!("{HELPER} did not answer")),
                _ if said.is_empty() => bail!("{HELPER} could not mount at {}", target.display()),
                _ => bail!("cannot mount at {}: {}", target.display(), said.replace('\n', "; ")),
            }
        }
    }
}

/// Waits for a file descriptor; None: the other end was closed.
fn receive(socket: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(
            socket,
            &mut [io::IoSliceMut::new(&mut byte)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )
    })?;
    let fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    Ok(fds.flatten().next())
}

/// Unmounts what is uppermost at `target`, by the system call or by fusermount3.
///
/// # Errors
/// `EBUSY` with [`UnmountMode::Idle`] when somebody uses the mount, and others.
pub fn unmount(target: &Path, how: UnmountMode) -> io::Result<()> {
    let flags = match how {
        UnmountMode::Idle => UnmountFlags::empty(),
        UnmountMode::Lazy => UnmountFlags::DETACH,
        UnmountMode::Force => UnmountFlags::DETACH | UnmountFlags::FORCE,
    };
    match rustix::mount::unmount(target, flags | UnmountFlags::NOFOLLOW) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(Errno::PERM) => unmount_by_helper(target, how),
        Err(e) => Err(e.into()),
    }
}

/// Changes the flags of a mount to what mount options say (`ro`, `rw`, `noexec` …).
///
/// # Errors
/// An option that is not known; not allowed; others.
pub fn remount(target: &Path, words: &[String]) -> anyhow::Result<()> {
    let options = Options::parse(words.iter().map(String::as_str))?;
    let mut flags = options.flags;
    flags.set(rustix::mount::MountFlags::RDONLY, options.readonly);
    rustix::mount::mount_remount(target, flags, c"").map_err(|e| {
        let hint = match e {
            Errno::BUSY => "something on it is open for writing: close that first",
            _ => "run as root, or unmount it and mount it again with the options",
        };
        anyhow::Error::from(io::Error::from(e))
            .context(format!("cannot remount {}: {hint}", target.display()))
    })
}

fn unmount_by_helper(target: &Path, how: UnmountMode) -> io::Result<()> {
    let helper = find_helper().ok_or_else(|| io::Error::other(format!("{HELPER} is missing")))?;
    let mut command = Command::new(helper);
    command.arg("-u");
    if how != UnmountMode::Idle {
        command.arg("-z");
    }
    let output = command.arg("--").arg(target).stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("busy") {
        return Err(Errno::BUSY.into());
    }
    Err(io::Error::other(said.trim().to_owned()))
}

impl KernelMount {
    /// The mountpoint, absolute.
    pub(crate) fn target(&self) -> &Path {
        &self.target
    }

    /// Number of the file system, when the mount table tells.
    pub(crate) fn device(&self) -> Option<&str> {
        self.device.as_deref()
    }

    /// Whether our mount is still there, and the uppermost at its place: only then may it be unmounted by path.
    fn is_mounted(&self) -> bool {
        match (&self.device, mountinfo::at(&self.target)) {
            (Some(device), Ok(mounts)) => mounts.last().is_some_and(|entry| entry.device == *device),
            _ => true,
        }
    }

    /// Unmounts. Doing it again does nothing.
    ///
    /// # Errors
    /// `EBUSY` with [`UnmountMode::Idle`] when somebody uses the mount, and others.
    pub(crate) fn unmount(&self, how: UnmountMode) -> io::Result<()> {
        if !self.is_mounted() {
            return Ok(());
        }
        unmount(&self.target, how)
    }

    /// The file that ends the connection when written to, where there is one.
    fn abort_file(&self) -> Option<PathBuf> {
        let minor = self.device.as_deref()?.split_once(':')?.1;
        let file = Path::new(CONNECTIONS).join(minor).join("abort");
        file.exists().then_some(file)
    }

    /// Whether [`abort`](Self::abort) would work.
    pub(crate) fn can_abort(&self) -> bool {
        self.abort_file().is_some()
    }

    /// Ends the connection to the kernel, even of a mount that is out of sight.
    pub(crate) fn abort(&self) -> io::Result<()> {
        match self.abort_file() {
            Some(file) => fs::write(file, "1"),
            None => Err(Errno::NOENT.into()),
        }
    }

    /// Raises the kernel's read-ahead to at least `kib`, if we may.
    pub(crate) fn raise_read_ahead(&self, kib: u32) {
        let Some(device) = &self.device else { return };
        let file = format!("/sys/class/bdi/{device}/read_ahead_kb");
        let now = fs::read_to_string(&file).ok().and_then(|text| text.trim().parse::<u32>().ok());
        if now.is_some_and(|now| now < kib)
            && let Err(e) = fs::write(&file, kib.to_string())
        {
            debug!("read-ahead stays at {} KiB: {file}: {e}", now.unwrap_or_default());
        }
    }
}
