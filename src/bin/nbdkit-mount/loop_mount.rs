//! The loop device over the disk and the file system on it, set up after the mount and taken down before it.

use std::{
    io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nbdkit_common::Content;
use nbdkit_fuse::UnmountMode;

use crate::{loopdev, mount_users, selector::Selector, unprivileged};

/// What is wanted.
#[derive(Clone, Debug, Default)]
pub(crate) struct LoopMountOptions {
    /// A loop device.
    pub(crate) loop_device: bool,
    /// The file system mounted here.
    pub(crate) mount: Option<PathBuf>,
    /// Its type; None: as mount(8) finds out.
    pub(crate) fstype: Option<String>,
    /// Further options for that mount, each as after `-o`.
    pub(crate) options: Vec<String>,
    /// It must not be written to.
    pub(crate) readonly: bool,
    /// What has to be recovered may be, since there is an overlay over the disk.
    pub(crate) recovered: bool,
    /// Where it is; None: in the whole disk, or the only one there is.
    pub(crate) partition: Option<Selector>,
}

/// What all that stands on.
#[derive(Clone, Debug)]
pub(crate) struct Base {
    /// The file of the disk, or of a part of it.
    pub(crate) file: PathBuf,
    /// What is in it.
    pub(crate) content: Option<Content>,
}

/// What there is. Dropping it does nothing.
#[derive(Clone, Debug, Default)]
pub(crate) struct LoopMount {
    pub(crate) loop_device: Option<PathBuf>,
    pub(crate) mount: Option<PathBuf>,
    /// The mount of the disk, with links resolved.
    pub(crate) place: PathBuf,
}

/// Between two attempts: nothing tells when a mount gets idle.
const RETRY: Duration = Duration::from_millis(50);

impl LoopMount {
    /// Sets up what is wanted on the disk that is mounted at `place`. Only if that is anything, it asks what to do it on, and
    /// what the disk is like.
    ///
    /// # Errors
    /// One line that names the step; nothing is left behind.
    pub(crate) fn set_up(
        options: &LoopMountOptions,
        place: &Path,
        base: impl FnOnce() -> Result<Base>,
        shape: impl FnOnce() -> Result<loopdev::Shape>,
    ) -> Result<LoopMount> {
        if !options.loop_device && options.mount.is_none() {
            return Ok(LoopMount::default());
        }
        let mut loop_mount = LoopMount { place: nbdkit_fuse::resolve(place)?, ..LoopMount::default() };
        let (base, shape) = (base()?, shape()?);
        if let Some(target) = options.mount.as_deref().filter(|_| !rustix::process::geteuid().is_root())
            && unprivileged::mount(options, &base, target)?
        {
            loop_mount.mount = options.mount.clone();
            return Ok(loop_mount);
        }
        // One that has a file system mounted goes when that does, whoever unmounts it.
        let shape = loopdev::Shape { autoclear: options.mount.is_some(), ..shape };
        let (device, held) = loopdev::attach(&base.file, shape)?;
        loop_mount.loop_device = Some(device.clone());
        if let Some(target) = &options.mount
            && let Err(e) = mount(options, &base, &device, target)
        {
            drop(held);
            loop_mount.take_down(Duration::ZERO, |_| {})?;
            return Err(e);
        }
        loop_mount.mount = options.mount.clone();
        Ok(loop_mount)
    }

    /// The loop device, unless it shows something else meanwhile.
    fn own_device(&self) -> Option<&Path> {
        self.loop_device.as_deref().filter(|device| loopdev::shows(device, &self.place))
    }

    /// Takes everything down, the uppermost first, for at most `patience`. `busy` is told once who is in the way.
    ///
    /// # Errors
    /// If something stays.
    pub(crate) fn take_down(&self, patience: Duration, mut busy: impl FnMut(&str)) -> Result<()> {
        if let Some(target) = &self.mount
            && nbdkit_fuse::mounts()?.iter().any(|mount| mount.target == *target)
        {
            unmount(target, &[], patience, &mut busy)?;
        }
        match self.own_device() {
            Some(device) => {
                loopdev::detach(device).with_context(|| format!("cannot detach {}", device.display()))
            }
            None => Ok(()),
        }
    }

    /// Detaches everything lazily, even what is in use. What was written so far is written back first.
    pub(crate) fn abandon(&self) {
        let mounts = nbdkit_fuse::mounts().unwrap_or_default();
        if let Some(target) = self.mount.as_ref().filter(|target| mounts.iter().any(|m| m.target == **target))
        {
            let synced = std::fs::File::open(target).and_then(|dir| Ok(rustix::fs::syncfs(dir)?));
            for (what, result) in
                [("write back", synced), ("unmount", nbdkit_fuse::unmount(target, UnmountMode::Lazy))]
            {
                if let Err(e) = result {
                    log::warn!("cannot {what} {}: {e}", target.display());
                }
            }
        }
        if let Some(device) = self.own_device()
            && let Err(e) = loopdev::detach(device)
        {
            log::warn!("cannot detach {}: {e}", device.display());
        }
    }
}

/// Unmounts, again and again while somebody uses it.
///
/// # Errors
/// When it is still busy after `patience`; the message names who uses it. Others.
pub(crate) fn unmount(
    target: &Path,
    devices: &[PathBuf],
    patience: Duration,
    busy: &mut dyn FnMut(&str),
) -> Result<()> {
    let deadline = Instant::now() + patience;
    let mut told = false;
    loop {
        match nbdkit_fuse::unmount(target, UnmountMode::Idle) {
            Ok(()) => return Ok(()),
            Err(e) if e.raw_os_error() == Some(rustix::io::Errno::BUSY.raw_os_error()) => {
                let over = Instant::now() >= deadline;
                if told && !over {
                    std::thread::sleep(RETRY);
                    continue;
                }
                let who = mount_users::list(target, devices);
                let who = if who.is_empty() { "somebody that cannot be seen".into() } else { who.join(", ") };
                let message = format!("{} is in use by {who}", target.display());
                if over {
                    bail!("{message}");
                }
                busy(&message);
                told = true;
            }
            Err(e) => return Err(e).with_context(|| format!("cannot unmount {}", target.display())),
        }
    }
}

/// Mounts the file system by mount(8), which finds out its type. Devices and setuid programs in it do not count: it
/// comes from a disk image.
fn mount(options: &LoopMountOptions, base: &Base, device: &Path, target: &Path) -> Result<()> {
    let program = find("mount").context("--mount needs mount(8): install util-linux")?;
    let mut command = Command::new(program);
    command.arg("-o").arg(words(options, base).join(","));
    if let Some(fstype) = &options.fstype {
        command.arg("-t").arg(fstype);
    }
    let output = command.arg("--").arg(device).arg(target).stdin(Stdio::null()).output().context("mount")?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.lines().next().unwrap_or("mount failed").trim_start_matches("mount: ").to_owned();
    Err(io::Error::other(said)).with_context(|| format!("cannot mount {}", device.display()))
}

/// The options of that mount: nothing on a read-only disk may have to be written first.
fn words(options: &LoopMountOptions, base: &Base) -> Vec<String> {
    let mut words = vec!["nosuid".to_owned(), "nodev".to_owned()];
    let kind = options.fstype.as_deref().or(base.content.as_ref().map(|content| content.kind));
    let kind = kind.unwrap_or_default();
    if kind == "xfs" {
        // A copy of an image is no reason to refuse it.
        words.push("nouuid".into());
    }
    if options.readonly {
        words.push("ro".into());
    }
    if options.readonly && !options.recovered {
        let needs_recovery = base.content.as_ref().is_some_and(|content| content.needs_recovery);
        let without = match kind {
            "ext3" | "ext4" if needs_recovery => Some("noload"),
            "btrfs" if needs_recovery => Some("rescue=nologreplay"),
            "xfs" | "nilfs2" | "f2fs" => Some("norecovery"),
            _ => None,
        };
        words.extend(without.map(String::from));
        if needs_recovery {
            log::warn!(
                "the file system was not unmounted: its last changes are not seen, since they have to be recovered \
                 first (--recovered does that in a temporary overlay)"
            );
        }
    }
    words.extend(options.options.iter().cloned());
    words
}

/// Where a system program is, even with an empty PATH.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/bin".into(), "/bin".into(), "/usr/sbin".into(), "/sbin".into()])
        .map(|dir| dir.join(program))
        .find(|file| rustix::fs::access(file, rustix::fs::Access::EXEC_OK).is_ok())
}
