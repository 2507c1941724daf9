//! The processes, loop devices and mounts that keep a mount busy.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::loopdev;

/// More are not named.
const MAX: usize = 8;

/// Those who use what is mounted at `place`, or `devices`, as words for a message: processes by /proc, loop devices,
/// and mounts beneath. Empty when nobody is found: other name spaces are out of sight.
pub(crate) fn list(place: &Path, devices: &[PathBuf]) -> Vec<String> {
    let mut users = processes(place, devices);
    for device in loopdev::showing(place).into_iter().filter(|device| !devices.contains(device)) {
        let mounts = nbdkit_fuse::mounts().unwrap_or_default();
        let mounted = mounts.into_iter().find(|mount| loopdev::is_on(&mount.source, &device));
        users.push(match mounted {
            Some(mount) => format!("{} (mounted at {})", device.display(), mount.target.display()),
            None => format!("{} (detach it with losetup -d)", device.display()),
        });
    }
    let beneath = nbdkit_fuse::mounts().unwrap_or_default();
    let beneath = beneath.iter().filter(|mount| mount.target != place && mount.target.starts_with(place));
    users.extend(beneath.map(|mount| format!("the mount {}", mount.target.display())));
    users.truncate(MAX);
    users
}

/// A process.
pub(crate) struct User {
    pub(crate) pid: u32,
    /// Its name and number, as words for a message.
    pub(crate) name: String,
}

/// One process of each other mount namespace that has the file system with this device number, as far as they can be
/// seen. The server's own does not count: it ends with the mount.
pub(crate) fn elsewhere(device: &str) -> Vec<User> {
    let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    let mut known = vec![namespace("self")];
    let Ok(all) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = all.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(|pid| {
        let own = Some(namespace(&pid.to_string())?);
        if known.contains(&own) {
            return None;
        }
        known.push(own);
        let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).ok()?;
        let has = mounts.lines().any(|line| line.split(' ').nth(2) == Some(device));
        has.then(|| User { pid, name: name(pid) })
    })
    .collect()
}

/// A process as words for a message.
fn name(pid: u32) -> String {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    format!("{} (process {pid})", name.trim())
}

fn processes(place: &Path, devices: &[PathBuf]) -> Vec<String> {
    let own = std::process::id();
    let Ok(all) = fs::read_dir("/proc") else { return Vec::new() };
    all.flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| *pid != own)
        .filter(|pid| uses(*pid, place, devices))
        .map(name)
        .collect()
}

/// Only links are read, nothing is followed: the mount may not answer.
fn uses(pid: u32, place: &Path, devices: &[PathBuf]) -> bool {
    let process = PathBuf::from(format!("/proc/{pid}"));
    let is_user = |link: &Path| {
        fs::read_link(link).is_ok_and(|target| target.starts_with(place) || devices.contains(&target))
    };
    let links = ["cwd", "root", "exe"].map(|name| process.join(name));
    let files = ["fd", "map_files"].into_iter().filter_map(|dir| fs::read_dir(process.join(dir)).ok());
    links.iter().any(|link| is_user(link)) || files.flatten().flatten().any(|entry| is_user(&entry.path()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_an_open_file_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().canonicalize().unwrap();
        assert!(processes(&place, &[]).is_empty());
        let file = fs::File::create(place.join("file")).unwrap();
        let mut child = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .stdout(file)
            .spawn()
            .unwrap();
        let found = processes(&place, &[]);
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(found.iter().any(|user| user.ends_with(&format!("(process {})", child.id()))), "{found:?}");
    }
}
