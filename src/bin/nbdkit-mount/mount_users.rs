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

fn processes(place: &Path, devices: &[PathBuf]) -> Vec<String> {
    let own = std::process::id();
    let Ok(all) = fs::read_dir("/proc") else { return Vec::new() };
    all.flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| *pid != own)
        .filter(|pid| uses(*pid, place, devices))
        .map(|pid| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            format!("{} (process {pid})", name.trim())
        })
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
