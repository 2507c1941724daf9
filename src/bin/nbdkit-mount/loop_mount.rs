//! The loop device over the disk and the file system on it, set up after the mount and taken down before it.

use std::{
    io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nbdkit_fuse::UnmountMode;

use crate::{loopdev, mount_users};

/// What is wanted.
#[derive(Clone, Debug, Default)]
pub(crate) struct LoopMountOptions {
    /// A loop device.
    pub(crate) loop_device: bool,
    /// The file system mounted here.
    pub(crate) mount: Option<PathBuf>,
    /// Its type; None: as mount(8) finds out.
    pub(crate) fstype: Option<String>,
    /// The partition it is in; None: the whole disk.
    pub(crate) partition: Option<u32>,
}

/// What there is. Dropping it does nothing.
#[derive(Clone, Debug, Default)]
pub(crate) struct LoopMount {
    pub(crate) loop_device: Option<PathBuf>,
    pub(crate) mount: Option<PathBuf>,
}

/// Between two attempts: nothing tells when a mount gets idle.
const RETRY: Duration = Duration::from_millis(50);

impl LoopMount {
    /// Sets up what is wanted on `file`. Only if that is anything, it asks what the disk is like.
    ///
    /// # Errors
    /// One line that names the step; nothing is left behind.
    pub(crate) fn set_up(
        options: &LoopMountOptions,
        file: &Path,
        shape: impl FnOnce() -> Result<loopdev::Shape>,
    ) -> Result<LoopMount> {
        let mut loop_mount = LoopMount::default();
        if !options.loop_device && options.mount.is_none() {
            return Ok(loop_mount);
        }
        let shape = shape()?;
        let device = match options.partition {
            None => loopdev::attach(file, shape)?,
            // Not left to the kernel, which may know fewer tables.
            Some(number) => loopdev::attach(&partition(file, number)?, shape)?,
        };
        loop_mount.loop_device = Some(device.clone());
        if let Some(target) = &options.mount
            && let Err(e) = mount(options, &device, target, shape.readonly)
        {
            loop_mount.take_down(Duration::ZERO, |_| {})?;
            return Err(e);
        }
        loop_mount.mount = options.mount.clone();
        Ok(loop_mount)
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
        match &self.loop_device {
            Some(device) if loopdev::backing_file(device).is_some() => {
                loopdev::detach(device).with_context(|| format!("cannot detach {}", device.display()))
            }
            _ => Ok(()),
        }
    }

    /// Detaches everything lazily, even what is in use. What was written so far is written back first.
    pub(crate) fn abandon(&self) {
        if let Some(target) = &self.mount {
            let synced = std::fs::File::open(target).and_then(|dir| Ok(rustix::fs::syncfs(dir)?));
            for (what, result) in
                [("write back", synced), ("unmount", nbdkit_fuse::unmount(target, UnmountMode::Lazy))]
            {
                if let Err(e) = result {
                    log::warn!("cannot {what} {}: {e}", target.display());
                }
            }
        }
        if let Some(device) = &self.loop_device
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

/// The file of a partition of the disk that is `file`.
fn partition(file: &Path, number: u32) -> Result<PathBuf> {
    let directory = file.parent().context("no directory")?;
    let disk = file.file_name().context("no name")?;
    let path = directory.join(nbdkit_fuse::partition_name(disk, number));
    if !path.exists() {
        let found: Vec<_> = std::fs::read_dir(directory)?
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name();
                nbdkit_fuse::split_partition_name(&name)
                    .filter(|(of, _)| *of == disk)
                    .map(|(_, n)| n.to_string())
            })
            .collect();
        if found.is_empty() {
            bail!("partition {number} not found: the disk has no partition table: leave --partition out");
        }
        bail!("partition {number} not found: the disk has {}", found.join(" "));
    }
    Ok(path)
}

/// Mounts the file system by mount(8), which finds out its type. Devices and setuid programs in it do not count: it
/// comes from a disk image.
fn mount(options: &LoopMountOptions, device: &Path, target: &Path, readonly: bool) -> Result<()> {
    let program = find("mount").context("--mount needs mount(8): install util-linux")?;
    let mut command = Command::new(program);
    command.arg("-o").arg(if readonly { "nosuid,nodev,ro" } else { "nosuid,nodev" });
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

/// Where a system program is, even with an empty PATH.
fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/bin".into(), "/bin".into(), "/usr/sbin".into(), "/sbin".into()])
        .map(|dir| dir.join(program))
        .find(|file| rustix::fs::access(file, rustix::fs::Access::EXEC_OK).is_ok())
}
