//! Writes back file systems that others have on loop devices over the disk, which would lose unwritten data with the mount.

use std::{fs::File, path::Path, sync::Arc, time::Duration};

use nbdkit_core::ShutdownFlag;

use crate::loopdev;

/// Writes back what the kernel keeps for loop devices that show files at or under `place`, and for the file systems on
/// them. It may not get done: after `patience` it goes on by itself.
pub(crate) fn write_back(place: &Path, patience: Duration) {
    let devices = loopdev::showing(place);
    if devices.is_empty() {
        return;
    }
    let done = Arc::new(ShutdownFlag::new());
    let tell = done.clone();
    // A thread of its own: the disk may be what hangs.
    let started = std::thread::Builder::new().name("write-back".into()).spawn(move || {
        devices.iter().for_each(|device| write_back_device(device));
        tell.raise();
    });
    if started.is_err() || !done.wait_for(patience) {
        log::warn!("not everything is written to {}: what is not is lost", place.display());
    }
}

fn write_back_device(device: &Path) {
    let report = |path: &Path, e: std::io::Error| log::warn!("cannot write back {}: {e}", path.display());
    let mounts = nbdkit_fuse::mounts().unwrap_or_default();
    for mount in mounts.iter().filter(|mount| loopdev::is_on(&mount.source, device)) {
        let synced = File::open(&mount.target).and_then(|file| Ok(rustix::fs::syncfs(file)?));
        synced.unwrap_or_else(|e| report(&mount.target, e));
    }
    File::open(device).and_then(|file| file.sync_all()).unwrap_or_else(|e| report(device, e));
}
