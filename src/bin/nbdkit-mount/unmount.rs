//! `nbdkit-mount -u`: takes a mount down with everything that was set up on it, in the right order.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result, bail};
use nbdkit_fuse::MountEntry;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::{
    loop_mount::{self, LoopMount},
    state::Stored,
};

/// How long a mount in use is tried.
const PATIENCE: Duration = Duration::from_secs(10);

/// Unmounts what is at `path`, which is the mountpoint, or where the file system inside is mounted. Returns when the
/// server has ended.
///
/// # Errors
/// Nothing of ours is mounted there; it is in use; the last flush failed.
pub(crate) fn unmount(path: &Path) -> Result<()> {
    let path = nbdkit_fuse::resolve(path)?;
    let (mount, stored) = find(&path)?;
    // The disk must be found before the server is gone, and the server before it has ended.
    let server = stored
        .as_ref()
        .and_then(|stored| Pid::from_raw(i32::try_from(stored.state.pid).ok()?))
        .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    let mut busy = |message: &str| log::warn!("{message}: waiting for up to {} s", PATIENCE.as_secs());
    let devices = match &stored {
        Some(Stored { state, .. }) => {
            let loop_mount = LoopMount {
                // Meanwhile it may have been detached, and attached to something else.
                loop_device: state.loop_device.clone().filter(|d| crate::loopdev::shows(d, &mount.target)),
                mount: state.inside.clone(),
            };
            loop_mount.take_down(PATIENCE, &mut busy)?;
            loop_mount.loop_device.into_iter().collect()
        }
        None => Vec::new(),
    };
    loop_mount::unmount(&mount.target, &devices, PATIENCE, &mut busy)?;
    let Some(stored) = stored else { return Ok(()) };
    if let Some(server) = server {
        let mut fds = [rustix::event::PollFd::new(&server, rustix::event::PollFlags::IN)];
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut fds, None))
            .context("waiting for the server")?;
    }
    match stored.error() {
        None => Ok(()),
        Some(error) => {
            stored.remove();
            bail!("{error}")
        }
    }
}

/// The mount at a path, or the one in which what is mounted there is.
fn find(path: &Path) -> Result<(MountEntry, Option<Stored>)> {
    let mounts = nbdkit_fuse::mounts().context("cannot read the mount table")?;
    let top = mounts.iter().rev().find(|mount| mount.target == path);
    if let Some(mount) = top.filter(|mount| mount.is_ours()) {
        let stored = Stored::load(&mount.device).filter(|stored| stored.state.mountpoint == mount.target);
        return Ok((mount.clone(), stored));
    }
    if let Some(stored) = Stored::find_inside(path)
        && let Some(mount) =
            mounts.iter().rev().find(|mount| mount.target == stored.state.mountpoint && mount.is_ours())
    {
        return Ok((mount.clone(), Some(stored)));
    }
    match top {
        Some(mount) => bail!("{} is a mount of {}, not of nbdkit-mount", path.display(), mount.source),
        None => bail!("nothing is mounted at {}", path.display()),
    }
}

/// Clears a mount whose server was killed, with what was set up on it.
///
/// # Errors
/// If it stays.
pub(crate) fn clear_stale(path: &Path) -> Result<()> {
    if !nbdkit_fuse::is_stale(path) {
        return Ok(());
    }
    let path = nbdkit_fuse::resolve(path)?;
    if let Ok((_, Some(stored))) = find(&path) {
        let shown = |device: &std::path::PathBuf| crate::loopdev::shows(device, &path);
        let loop_device = stored.state.loop_device.clone().filter(shown);
        LoopMount { loop_device, mount: stored.state.inside.clone() }.abandon();
        stored.remove();
    }
    nbdkit_fuse::unmount(&path, nbdkit_fuse::UnmountMode::Lazy)
        .with_context(|| format!("cannot clear the dead mount {}", path.display()))
}
