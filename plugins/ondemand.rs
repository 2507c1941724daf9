//! The ondemand plugin: a disk for each name that a client asks for, made when it is first asked for, and kept in a
//! directory.

use std::{
    collections::HashMap,
    ffi::{OsStr, OsString},
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use anyhow::{Context as _, ensure};
use nbdkit_core::{Client, Errno, Error, Exports, Handle, Info, Open, Plugin, Result, ShutdownFlag, params};
use parking_lot::{Condvar, Mutex};

use crate::{
    block_file::BlockFile,
    iso::check,
    lock::{self, Access, Mode},
    maker::{FileSystem, file_system_help},
    sh::{Alarm, Patience},
    tmpdisk::one_file,
};

const HELP: &str = concat!(
    "dir=DIRECTORY            (required) Where the disks are kept\n",
    file_system_help!(),
    "\nwait=BOOL                A second client of a disk waits for the first to leave (default false)\n\
     share=BOOL               Clients may use a disk at the same time (default false)"
);

/// What the empty name is called in the directory.
const DEFAULT: &str = "default";
/// The longest name of a file.
const NAME_MAX: usize = 255;

pub(crate) fn new() -> Box<dyn Plugin> {
    Box::new(OnDemand {
        directory: None,
        file_system: FileSystem::default(),
        wait: false,
        share: false,
        users: Arc::default(),
        stop: OnceLock::new(),
    })
}

struct OnDemand {
    directory: Option<PathBuf>,
    file_system: FileSystem,
    wait: bool,
    share: bool,
    users: Arc<Users>,
    /// Goes off when the server stops.
    stop: OnceLock<Arc<Alarm>>,
}

/// The disks that are in use.
#[derive(Default)]
struct Users {
    /// How many clients, by name.
    disks: Mutex<HashMap<OsString, usize>>,
    /// One was given back, or a client that waits may have gone.
    changed: Condvar,
}

/// A client's right to use a disk.
struct Use {
    users: Arc<Users>,
    name: OsString,
}

impl Drop for Use {
    fn drop(&mut self) {
        let mut disks = self.users.disks.lock();
        if let Some(count) = disks.get_mut(&self.name) {
            *count -= 1;
            if *count == 0 {
                disks.remove(&self.name);
            }
        }
        self.users.changed.notify_all();
    }
}

impl Users {
    /// Takes a disk for a client alone; `wait`: as soon as nobody has it.
    fn take(self: &Arc<Self>, name: &OsStr, wait: bool, client: &Client) -> Result<Use> {
        if wait {
            // Weakly, for the client may outlive the server's interest in it.
            let weak = Arc::downgrade(self);
            let wake = move || {
                if let Some(users) = weak.upgrade() {
                    let _disks = users.disks.lock();
                    users.changed.notify_all();
                }
            };
            client.gone.on_raise(wake.clone());
            client.server().on_raise(wake);
        }
        let mut disks = self.disks.lock();
        while disks.contains_key(name) {
            if !wait {
                return Err(locked(name));
            }
            if client.gone.is_raised() || client.server().is_raised() {
                return Err(Error::new(Errno::ESHUTDOWN, "the client or the server stops"));
            }
            self.changed.wait(&mut disks);
        }
        disks.insert(name.to_owned(), 1);
        Ok(Use { users: self.clone(), name: name.to_owned() })
    }

    /// Takes a disk beside others who may have it.
    fn share(self: &Arc<Self>, name: &OsStr) -> Use {
        *self.disks.lock().entry(name.to_owned()).or_insert(0) += 1;
        Use { users: self.clone(), name: name.to_owned() }
    }
}

fn locked(name: &OsStr) -> Error {
    Error::new(Errno::EBUSY, format!("{}: filesystem is locked by another client", name.display()))
}

/// What a disk is called while it is made, which no client's name can be.
fn new_name(name: &OsStr) -> OsString {
    let mut new = OsString::from("/");
    new.push(name);
    new
}

/// The file's name of an export. Nothing but a plain name in the directory itself.
fn file_name(export: &OsStr) -> Result<&OsStr> {
    let bytes = export.as_bytes();
    let wrong = |byte: &u8| matches!(byte, b'.' | b'/' | b':') || byte.is_ascii_control();
    if bytes.len() > NAME_MAX || bytes.iter().any(wrong) {
        let shown = &bytes[..bytes.len().min(NAME_MAX)];
        return Err(Error::new(
            Errno::ENOENT,
            format!("invalid exportname '{}' rejected", shown.escape_ascii()),
        ));
    }
    Ok(if export.is_empty() { OsStr::new(DEFAULT) } else { export })
}

impl OnDemand {
    /// Makes a disk that is not there. Until it is done it has another name, so that it is never half there.
    fn make(&self, directory: &Path, name: &OsStr, client: &Client) -> Result<()> {
        // Like the names of clients' disks it cannot be one of.
        let place = tempfile::Builder::new().prefix(".nbdkit-").tempdir_in(directory);
        let place = place.map_err(|e| Error::from(e).context(directory.display()))?;
        let made = place.path().join(name);
        let gone = Alarm::on(&client.gone)?;
        let patience = Patience::until_any(std::iter::once(&gone).chain(self.stop.get()));
        self.file_system.make(&made, patience)?;
        let disk = directory.join(name);
        // Another server may have been faster: its disk stays.
        match std::fs::hard_link(&made, &disk) {
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                Err(Error::new(Errno::EIO, "the command has made no disk at $disk"))
            }
            // A file system without links, or a device.
            Err(_) => std::fs::rename(&made, &disk).map_err(|e| Error::from(e).context(disk.display())),
            Ok(()) => Ok(()),
        }
    }
}

impl Plugin for OnDemand {
    fn info(&self) -> Info {
        Info::bundled("ondemand", "nbdkit ondemand plugin", HELP).magic("size")
    }

    fn callbacks(&self) -> Option<Vec<&'static str>> {
        let more = ["config_complete", "after_fork", "list_exports", "default_export"];
        Some([crate::EVERYTHING, &more].concat())
    }

    fn config(&mut self, key: &str, value: &OsStr) -> anyhow::Result<bool> {
        match key {
            "dir" => {
                ensure!(!value.is_empty(), "dir= needs the name of a directory");
                self.directory = Some(std::path::absolute(value).context("dir=")?);
            }
            "wait" => self.wait = params::boolean(value)?,
            "share" => self.share = params::boolean(value)?,
            _ => return self.file_system.config(key, value),
        }
        Ok(true)
    }

    fn config_complete(&mut self) -> anyhow::Result<()> {
        check(self.directory.as_deref().context("dir parameter is required: where the disks are kept")?)?;
        self.file_system.check()
    }

    fn after_fork(&self, server: &Arc<ShutdownFlag>) -> anyhow::Result<()> {
        let _ = self.stop.set(Alarm::on(server)?);
        Ok(())
    }

    fn list_exports(&self, _: bool, _: bool) -> Result<Exports> {
        let directory = self.directory.as_deref().ok_or(Errno::EINVAL)?;
        let entries =
            std::fs::read_dir(directory).map_err(|e| Error::from(e).context(directory.display()))?;
        let mut names: Vec<OsString> = entries
            .filter_map(|entry| Some(entry.ok()?.file_name()))
            .filter(|name| name.as_bytes() != DEFAULT.as_bytes() && file_name(name).is_ok())
            .collect();
        names.sort();
        let mut exports = Exports::new();
        for name in std::iter::once(DEFAULT.into()).chain(names) {
            exports.add(name, None)?;
        }
        Ok(exports)
    }

    fn default_export(&self, _: bool, _: bool) -> Result<Option<OsString>> {
        Ok(Some(DEFAULT.into()))
    }

    fn open(&self, open: &Open) -> Result<Box<dyn Handle>> {
        let directory = self.directory.as_deref().ok_or(Errno::EINVAL)?;
        let name = file_name(&open.export_name)?;
        let disk = directory.join(name);
        if !disk.exists() {
            // Those who want to share it do not make it twice: the others wait.
            let making = self.users.take(&new_name(name), true, &open.client)?;
            if !disk.exists() {
                self.make(directory, name, &open.client)?;
            }
            drop(making);
        }
        let used = if self.share {
            self.users.share(name)
        } else {
            self.users.take(name, self.wait, &open.client)?
        };
        let file = BlockFile::open(&disk, open.readonly)?;
        // Other servers may have the same directory.
        let lock = lock::lock(file.file(), &disk, Access::new(!open.readonly), Mode::default());
        let lock = lock.map_err(|e| if e.errno() == Errno::EBUSY { locked(name) } else { e })?;
        let concat = one_file(file)?.keeping(lock.into_iter().collect()).holding(Box::new(used));
        // One who may not connect twice must not be told to.
        Ok(Box::new(if self.share { concat } else { concat.for_one_connection() }))
    }
}
