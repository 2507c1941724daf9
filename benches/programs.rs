//! Which programs are on this machine, and how large they are.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Result, ensure};
use tempfile::NamedTempFile;

/// The first program of that name in `$PATH` or a system directory.
pub(crate) fn in_path(name: &str) -> Option<PathBuf> {
    all_in_path(name).next()
}

fn all_in_path(name: &str) -> impl Iterator<Item = PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let directories: Vec<_> =
        env::split_paths(&path).chain(["/usr/bin".into(), "/usr/sbin".into()]).collect();
    directories.into_iter().map(move |dir| dir.join(name)).filter(|file| is_program(file))
}

fn is_program(file: &Path) -> bool {
    fs::metadata(file).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// The programs of one release of this project; None: not there.
#[derive(Clone, Debug)]
pub(crate) struct Release {
    pub(crate) server: Option<PathBuf>,
    pub(crate) mount: Option<PathBuf>,
    /// Its file plugin locks what it serves, unless it is told otherwise.
    pub(crate) locks: bool,
}

impl Release {
    fn new(server: &Path, mount: &Path) -> Self {
        let program = |file: &Path| is_program(file).then(|| file.to_owned());
        let help = Command::new(server).args(["file", "--help"]).stdin(Stdio::null()).output();
        let locks = help.is_ok_and(|help| String::from_utf8_lossy(&help.stdout).contains("\nlock="));
        Release { server: program(server), mount: program(mount), locks }
    }

    /// An earlier release, in the directory that `--baseline` names.
    ///
    /// # Errors
    /// There is no server.
    pub(crate) fn earlier(dir: &Path) -> Result<Self> {
        let server = dir.join("nbdkit");
        ensure!(
            is_program(&server),
            "no program {}: --baseline takes a directory with the nbdkit and nbdkit-mount of an earlier release",
            server.display()
        );
        Ok(Release::new(&server, &dir.join("nbdkit-mount")))
    }
}

/// Programs on this machine; None: not installed.
#[derive(Clone, Debug)]
pub(crate) struct Programs {
    pub(crate) ours: Release,
    /// The release to compare ours with.
    pub(crate) earlier: Option<Release>,
    pub(crate) nbdkit: Option<PathBuf>,
    /// The C file plugin that belongs to `nbdkit`.
    pub(crate) file_plugin: Option<PathBuf>,
    pub(crate) qemu_nbd: Option<PathBuf>,
    pub(crate) nbdfuse: Option<PathBuf>,
    pub(crate) qsd: Option<PathBuf>,
    pub(crate) fio: Option<PathBuf>,
    pub(crate) nbdcopy: Option<PathBuf>,
    pub(crate) nbdinfo: Option<PathBuf>,
}

impl Programs {
    /// Looks for everything. The peer is the first nbdkit that is not our own.
    pub(crate) fn find(ours: &Path, ours_mount: &Path, peer: Option<PathBuf>) -> Self {
        let is_ours = |file: &PathBuf| match (fs::read(file), fs::read(ours)) {
            (Ok(a), Ok(b)) => a == b,
            _ => false,
        };
        let nbdkit = peer.or_else(|| all_in_path("nbdkit").find(|file| !is_ours(file)));
        Programs {
            ours: Release::new(ours, ours_mount),
            earlier: None,
            file_plugin: nbdkit.as_deref().and_then(file_plugin),
            nbdkit,
            qemu_nbd: in_path("qemu-nbd"),
            nbdfuse: in_path("nbdfuse"),
            qsd: in_path("qemu-storage-daemon"),
            fio: in_path("fio"),
            nbdcopy: in_path("nbdcopy"),
            nbdinfo: in_path("nbdinfo"),
        }
    }
}

fn file_plugin(nbdkit: &Path) -> Option<PathBuf> {
    let output = Command::new(nbdkit).arg("--dump-config").stdin(Stdio::null()).output().ok()?;
    let config = String::from_utf8(output.stdout).ok()?;
    let plugins = config.lines().find_map(|line| line.strip_prefix("plugindir="))?;
    let plugin = Path::new(plugins).join("nbdkit-file-plugin.so");
    plugin.exists().then_some(plugin)
}

/// What the first line of `PROGRAM --version` says.
pub(crate) fn version(program: &Path) -> Option<String> {
    let output = Command::new(program).arg("--version").stdin(Stdio::null()).output().ok()?;
    String::from_utf8_lossy(&output.stdout).lines().next().map(str::to_owned)
}

/// The size in bytes of a program without its debug information, as distributions ship it.
pub(crate) fn stripped_size(program: &Path) -> Option<u64> {
    let copy = NamedTempFile::new().ok()?;
    let mut strip = Command::new(in_path("strip")?);
    strip.arg("-o").arg(copy.path()).arg(program).stdin(Stdio::null()).stderr(Stdio::null());
    // strip replaces the file.
    strip.status().ok()?.success().then(|| fs::metadata(copy.path()).map(|meta| meta.len()).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_earlier_release_has_a_server() {
        let dir = tempfile::tempdir().unwrap();
        let message = Release::earlier(dir.path()).unwrap_err().to_string();
        assert!(message.contains("--baseline"), "{message}");

        let server = dir.path().join("nbdkit");
        fs::write(&server, "#!/bin/sh\necho; echo lock=off").unwrap();
        fs::set_permissions(&server, fs::Permissions::from_mode(0o755)).unwrap();
        let release = Release::earlier(dir.path()).unwrap();
        assert_eq!((release.server, release.mount, release.locks), (Some(server), None, true));
    }
}
