//! What a running mount tells `nbdkit-mount -u`: a small file for each mount, which goes when the mount ended well.

use std::{
    ffi::OsStr,
    fs, io,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::DirBuilderExt,
    },
    path::{Path, PathBuf},
};

/// A mount as it stands in the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct State {
    /// The server.
    pub(crate) pid: u32,
    /// When it was started, in ticks since the boot: others get its number later. 0: not known.
    pub(crate) started: u64,
    /// Where the disk is mounted.
    pub(crate) mountpoint: PathBuf,
    /// The loop device that was attached.
    pub(crate) loop_device: Option<PathBuf>,
    /// Where the file system in the disk is mounted.
    pub(crate) inside: Option<PathBuf>,
    /// Why the mount ended badly.
    pub(crate) error: Option<String>,
}

/// Where the files are, if there is a place that only this user can write to.
fn directory() -> Option<PathBuf> {
    let uid = rustix::process::geteuid();
    let run = if uid.is_root() {
        PathBuf::from("/run")
    } else {
        std::env::var_os("XDG_RUNTIME_DIR")
            .map(PathBuf::from)
            .filter(|dir| dir.is_absolute())
            .unwrap_or_else(|| format!("/run/user/{}", uid.as_raw()).into())
    };
    run.is_dir().then(|| run.join("nbdkit-mount"))
}

/// When a process was started, in ticks since the boot; None: there is none.
pub(crate) fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold anything, blanks and parentheses too.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// A state that is in a file.
#[derive(Debug)]
pub(crate) struct Stored {
    path: PathBuf,
    pub(crate) state: State,
}

impl Stored {
    /// Stores the state of the mount with this device number. None when there is no place for it: the mount works
    /// without, and `-u` unmounts the disk alone.
    pub(crate) fn new(device: &str, state: State) -> Option<Stored> {
        let directory = directory()?;
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory);
        let stored = Stored { path: directory.join(device), state };
        match made.and_then(|()| stored.write()) {
            Ok(()) => Some(stored),
            Err(e) => {
                log::debug!("no state in {}: {e}", stored.path.display());
                None
            }
        }
    }

    /// The state of the mount with this device number.
    pub(crate) fn load(device: &str) -> Option<Stored> {
        let path = directory()?.join(device);
        let state = State::parse(&fs::read(&path).ok()?)?;
        Some(Stored { path, state })
    }

    /// The mount in which the file system at `inside` is.
    pub(crate) fn find_inside(inside: &Path) -> Option<Stored> {
        let files = fs::read_dir(directory()?).ok()?.flatten();
        files
            .filter_map(|file| Stored::load(file.file_name().to_str()?))
            .find(|stored| stored.state.inside.as_deref() == Some(inside))
    }

    /// Keeps the file true.
    pub(crate) fn write(&self) -> io::Result<()> {
        nbdkit_cli::replace::write(&self.path, &self.state.format(), 0o600)
    }

    /// What the server left behind, read anew: None when it ended well.
    pub(crate) fn error(&self) -> Option<String> {
        State::parse(&fs::read(&self.path).ok()?)?.error
    }

    /// Removes the file.
    pub(crate) fn remove(&self) {
        let _ = fs::remove_file(&self.path);
    }
}

impl State {
    /// `KEY=VALUE` and a NUL, which no path holds, for each field.
    fn format(&self) -> Vec<u8> {
        let mut text = Vec::new();
        let mut put = |key: &str, value: &OsStr| {
            text.extend([key.as_bytes(), b"=", value.as_bytes(), b"\0"].concat());
        };
        put("pid", OsStr::new(&self.pid.to_string()));
        put("started", OsStr::new(&self.started.to_string()));
        put("mountpoint", self.mountpoint.as_os_str());
        if let Some(device) = &self.loop_device {
            put("loop", device.as_os_str());
        }
        if let Some(inside) = &self.inside {
            put("inside", inside.as_os_str());
        }
        if let Some(error) = &self.error {
            put("error", OsStr::new(error));
        }
        text
    }

    fn parse(text: &[u8]) -> Option<State> {
        let mut state = State::default();
        for field in text.split(|b| *b == 0).filter(|field| !field.is_empty()) {
            let at = field.iter().position(|b| *b == b'=')?;
            let value = std::ffi::OsString::from_vec(field[at + 1..].to_vec());
            match &field[..at] {
                b"pid" => state.pid = value.to_str()?.parse().ok()?,
                b"started" => state.started = value.to_str()?.parse().ok()?,
                b"mountpoint" => state.mountpoint = value.into(),
                b"loop" => state.loop_device = Some(value.into()),
                b"inside" => state.inside = Some(value.into()),
                b"error" => state.error = Some(value.to_string_lossy().into_owned()),
                _ => {}
            }
        }
        (state.pid != 0).then_some(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_have_a_start() {
        let own = started(std::process::id()).unwrap();
        let mut child =
            std::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        assert!(started(child.id()).unwrap() >= own);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(started(child.id()), None);
    }

    #[test]
    fn what_is_written_is_read() {
        let full = State {
            pid: 7,
            started: 1 << 40,
            mountpoint: "/mnt/a=b\nc".into(),
            loop_device: Some("/dev/loop3".into()),
            inside: Some("/y".into()),
            error: Some("no".into()),
        };
        let small = State { pid: 1, mountpoint: "/m".into(), ..State::default() };
        for state in [full, small] {
            assert_eq!(State::parse(&state.format()), Some(state));
        }
        for odd in [&b""[..], b"pid", b"pid=x\0", b"mountpoint=/m\0"] {
            assert_eq!(State::parse(odd), None);
        }
    }
}
