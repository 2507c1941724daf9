//! Decrypts a LUKS volume, version 1 and 2, and encrypts what is written to it.
//!
//! A header (`header1`, `header2`) has key slots; the passphrase opens one of them (`keyslot`), which gives the volume's key.
//! With that each sector is decrypted by itself (`cipher`). Opening a slot is slow by design, and may take a gigabyte, so it is
//! done once for each volume and all connections share the key; slots are opened one after the other.

mod cipher;
mod header1;
mod header2;
mod kdf;
mod keyslot;
mod passphrase;
mod volume;

use std::{
    collections::HashMap,
    ffi::{OsStr, OsString},
    fs::File,
    os::unix::fs::FileExt as _,
    path::PathBuf,
    sync::Arc,
};

use anyhow::{Context as _, ensure};
use nbdkit_core::{
    Below, Errno, Error, Filter, Handle, Info, Next, NextConfig, NextConfigComplete, Open, Result,
};
use parking_lot::Mutex;
use zeroize::Zeroizing;

use self::{
    keyslot::Header,
    volume::{Opened, Volume},
};

const HELP: &str = "passphrase=<SECRET>    (required) The passphrase; - asks, +FILE and -FD read it.
luks-header=<PATH>     A header that is kept apart from the data.";
/// Volumes whose key is kept when nobody has them open. Clients choose the names of exports.
const MOST_VOLUMES: usize = 16;

pub(crate) fn new() -> Box<dyn Filter> {
    Box::new(Luks { passphrase: None, header: None, volumes: Mutex::default() })
}

struct Luks {
    passphrase: Option<Zeroizing<Vec<u8>>>,
    /// Detached.
    header: Option<PathBuf>,
    volumes: Mutex<HashMap<OsString, Arc<Slot>>>,
}

/// The volume of an export. It is locked while it is opened.
type Slot = Mutex<Option<(Header, Arc<Volume>)>>;

impl Luks {
    fn volume(&self, next: &Next, export: &OsStr) -> Result<Arc<Volume>> {
        let header = match &self.header {
            None => Header::read(&mut |buf, offset| next_read(next, buf, offset))?,
            Some(path) => {
                let file = File::open(path).map_err(|e| unreadable(path, &e))?;
                Header::read(&mut |buf, offset| {
                    file.read_exact_at(buf, offset).map_err(|e| unreadable(path, &e))
                })?
            }
        };
        let slot = {
            let mut volumes = self.volumes.lock();
            if volumes.len() >= MOST_VOLUMES && !volumes.contains_key(export) {
                volumes.retain(|_, slot| {
                    slot.try_lock().is_none_or(|v| v.as_ref().is_some_and(|(_, v)| Arc::strong_count(v) > 1))
                });
            }
            volumes.entry(export.to_owned()).or_default().clone()
        };
        // One at a time: each may take a gigabyte.
        let mut known = slot.lock();
        if let Some((_, volume)) = known.as_ref().filter(|(known, _)| *known == header) {
            return Ok(volume.clone());
        }
        *known = None;
        let passphrase = self.passphrase.as_ref().ok_or(Errno::EINVAL)?;
        let volume = match &self.header {
            None => header.unlock(passphrase, &mut |buf, offset| next_read(next, buf, offset))?,
            Some(path) => {
                let file = File::open(path).map_err(|e| unreadable(path, &e))?;
                header.unlock(passphrase, &mut |buf, offset| {
                    file.read_exact_at(buf, offset).map_err(|e| unreadable(path, &e))
                })?
            }
        };
        let volume = Arc::new(volume);
        *known = Some((header, volume.clone()));
        Ok(volume)
    }
}

fn next_read(next: &Next, buf: &mut [u8], offset: u64) -> Result<()> {
    if offset.checked_add(buf.len() as u64).is_none_or(|end| end > next.caps().size) {
        return Err(Error::new(Errno::EINVAL, "the disk is too short for a LUKS header"));
    }
    next.pread(buf, offset)
}

fn unreadable(path: &std::path::Path, error: &std::io::Error) -> Error {
    let errno = error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
    Error::new(errno, format!("cannot read the header {}: {error}", path.display()))
}

impl Filter for Luks {
    fn info(&self) -> Info {
        Info::bundled("luks", "nbdkit luks filter", HELP)
    }

    fn config(&mut self, key: &str, value: &OsStr, next: &mut NextConfig<'_>) -> anyhow::Result<()> {
        match key {
            "passphrase" => self.passphrase = Some(passphrase::read(value)?),
            "luks-header" => {
                let path = std::path::absolute(value);
                self.header = Some(path.with_context(|| format!("luks-header='{}'", value.display()))?);
            }
            _ => return next(key, value),
        }
        Ok(())
    }

    fn config_complete(&mut self, next: &mut NextConfigComplete<'_>) -> anyhow::Result<()> {
        ensure!(
            self.passphrase.is_some(),
            "LUKS \"passphrase\" parameter is missing: give passphrase=+FILE, or passphrase=- to be asked"
        );
        next()
    }

    fn cleanup(&self, _: &Below) {
        self.volumes.lock().clear();
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        let next = next.open(open)?;
        let volume = self.volume(&next, &open.export_name).map_err(|e| e.context("luks"))?;
        Ok(Box::new(Opened::new(next, volume)?))
    }
}

#[cfg(test)]
mod tests;
