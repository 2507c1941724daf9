//! `nbdkit-mount -u`: takes a mount down with everything that was set up on it, in the right order.

use std::{
    os::fd::OwnedFd,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nbdkit_core::params;
use nbdkit_fuse::MountEntry;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::retry_on_intr,
    process::{Pid, PidfdFlags, pidfd_open},
};

use crate::{
    args::Args,
    loop_mount::{self, LoopMount},
    mount_users,
    state::{self, State, Stored},
};

/// How long a mount in use is tried.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a server that has been let go may take to end before it is asked what keeps it.
const GLANCE: Duration = Duration::from_millis(500);

/// What becomes of a mount that is in use.
#[derive(Clone, Copy, Debug)]
pub(crate) enum How {
    /// It is tried for this long.
    Within(Duration),
    /// It goes out of sight at once, and ends when nobody uses it any more.
    Lazily,
}

impl How {
    /// What the options say.
    ///
    /// # Errors
    /// Both, or a time that is none.
    pub(crate) fn new(args: &Args) -> Result<How> {
        Ok(match (args.lazy, &args.wait) {
            (true, Some(_)) => bail!("--lazy and --wait cannot be used together: leave one out"),
            (true, None) => How::Lazily,
            (false, Some(time)) => How::Within(params::delay(time).context("--wait")?),
            (false, None) => How::Within(PATIENCE),
        })
    }
}

/// Unmounts what is at `path`, which is the mountpoint, or where the file system inside is mounted. Returns when the
/// server has ended.
///
/// # Errors
/// Nothing of ours is mounted there; it is in use, here or in another mount namespace; the last flush failed.
pub(crate) fn unmount(path: &Path, how: How) -> Result<()> {
    let path = nbdkit_fuse::resolve(path)?;
    let (mount, stored) = find(&path)?;
    let patience = match how {
        How::Lazily => return unmount_lazily(&mount, stored.as_ref()),
        How::Within(patience) => patience,
    };
    // The disk must be found before the server is gone, and the server before it has ended.
    let server = stored.as_ref().and_then(|stored| server(&stored.state));
    let mut busy = |message: &str| log::warn!("{message}: waiting for up to {} s", patience.as_secs_f32());
    let devices = match &stored {
        Some(Stored { state, .. }) => {
            let loop_mount = LoopMount {
                // Meanwhile it may have been detached, and attached to something else.
                loop_device: state.loop_device.clone().filter(|d| crate::loopdev::shows(d, &mount.target)),
                mount: state.inside.clone(),
                place: mount.target.clone(),
            };
            loop_mount.take_down(patience, &mut busy)?;
            loop_mount.loop_device.into_iter().collect()
        }
        None => Vec::new(),
    };
    loop_mount::unmount(&mount.target, &devices, patience, &mut busy)?;
    let Some(stored) = stored else { return Ok(()) };
    match server {
        Some(server) => wait_for(&server, &stored.state, &mount)?,
        // It was killed, and nobody else takes the file away.
        None if stored.error().is_none() => stored.remove(),
        None => {}
    }
    match stored.error() {
        None => Ok(()),
        Some(error) => {
            stored.remove();
            bail!("{error}")
        }
    }
}

/// The server, unless it has ended and its number is another's.
fn server(state: &state::State) -> Option<OwnedFd> {
    let pidfd = pidfd_open(Pid::from_raw(i32::try_from(state.pid).ok()?)?, PidfdFlags::empty()).ok()?;
    // Afterwards: from here on the number stands for the one that the descriptor is for.
    let started = state::started(state.pid)?;
    (state.started == 0 || state.started == started).then_some(pidfd)
}

/// Waits until the server has ended: it writes what is left. That may take long, and then it is told; but it has no end
/// while the mount is in another mount namespace too.
fn wait_for(server: &OwnedFd, state: &state::State, mount: &MountEntry) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let ended = |timeout: Option<Duration>| -> Result<bool> {
        let timeout = timeout.map(Timespec::try_from).transpose()?;
        let mut fds = [PollFd::new(server, PollFlags::IN)];
        Ok(retry_on_intr(|| poll(&mut fds, timeout.as_ref())).context("waiting for the server")? > 0)
    };
    let mut told = false;
    while !ended(Some(GLANCE))? {
        let elsewhere = mount_users::elsewhere(&mount.device);
        match elsewhere.first() {
            Some(user) if Instant::now() > deadline => bail!(
                "{path} is unmounted here, but {} still has it in its mount namespace, so the server (process {}) goes \
                 on: unmount it there too (nsenter -t {} -m umount {path}), or end that process",
                user.name,
                state.pid,
                user.pid,
                path = mount.target.display(),
            ),
            Some(user) if !told => {
                log::warn!(
                    "{} still has {} in its mount namespace: waiting for up to {} s",
                    user.name,
                    mount.target.display(),
                    PATIENCE.as_secs()
                );
                told = true;
            }
            None if !told && Instant::now() > deadline => {
                log::warn!("waiting for the server (process {}), which writes what is left", state.pid);
                told = true;
            }
            _ => {}
        }
    }
    Ok(())
}

/// Takes it out of sight. What was written is written back first; the server ends by itself.
fn unmount_lazily(mount: &MountEntry, stored: Option<&Stored>) -> Result<()> {
    if let Some(Stored { state, .. }) = stored {
        let (loop_device, inside) = (state.loop_device.clone(), state.inside.clone());
        LoopMount { loop_device, mount: inside, place: mount.target.clone() }.abandon();
    }
    nbdkit_fuse::unmount(&mount.target, nbdkit_fuse::UnmountMode::Lazy)
        .with_context(|| format!("cannot unmount {}", mount.target.display()))
}

/// The mount at a path, or the one in which what is mounted there is.
pub(crate) fn find(path: &Path) -> Result<(MountEntry, Option<Stored>)> {
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
        let State { loop_device, inside, .. } = stored.state.clone();
        LoopMount { loop_device, mount: inside, place: path.clone() }.abandon();
        stored.remove();
    }
    nbdkit_fuse::unmount(&path, nbdkit_fuse::UnmountMode::Lazy)
        .with_context(|| format!("cannot clear the dead mount {}", path.display()))
}
