//! The tmpdisk plugin: a fresh disk for each client, which goes when the client does.

use std::{
    ffi::OsStr,
    sync::{Arc, OnceLock},
};

use nbdkit_common::Regions;
use nbdkit_core::{Error, Handle, Info, Open, Plugin, Result, ShutdownFlag};

use crate::{
    block_file::BlockFile,
    concat::{Concat, Segment},
    maker::{self, FileSystem, file_system_help},
    sh::{Alarm, Patience},
};

pub(crate) fn new() -> Box<dyn Plugin> {
    Box::<TmpDisk>::default()
}

#[derive(Default)]
struct TmpDisk {
    file_system: FileSystem,
    /// Goes off when the server stops.
    stop: OnceLock<Arc<Alarm>>,
}

impl Plugin for TmpDisk {
    fn info(&self) -> Info {
        Info::bundled("tmpdisk", "nbdkit tmpdisk plugin", file_system_help!()).magic("size")
    }

    fn callbacks(&self) -> Option<Vec<&'static str>> {
        Some([crate::EVERYTHING, &["config_complete", "after_fork"]].concat())
    }

    fn config(&mut self, key: &str, value: &OsStr) -> anyhow::Result<bool> {
        self.file_system.config(key, value)
    }

    fn config_complete(&mut self) -> anyhow::Result<()> {
        self.file_system.check()
    }

    fn after_fork(&self, server: &Arc<ShutdownFlag>) -> anyhow::Result<()> {
        let _ = self.stop.set(Alarm::on(server)?);
        Ok(())
    }

    fn open(&self, open: &Open) -> Result<Box<dyn Handle>> {
        let place = maker::directory();
        let directory = tempfile::Builder::new().prefix("nbdkit").tempdir_in(&place);
        let directory = directory.map_err(|e| Error::from(e).context(place.display()))?;
        let disk = directory.path().join("disk");
        // Wanted as long as there are the client and the server.
        let gone = Alarm::on(&open.client.gone)?;
        let patience = Patience::until_any(std::iter::once(&gone).chain(self.stop.get()));
        self.file_system.make(&disk, patience)?;
        let file = BlockFile::open(&disk, open.readonly)
            .map_err(|e| e.context("the command has made no disk at $disk"))?;
        // The file has no name from here on, so it goes with the connection, however that ends.
        drop(directory);
        Ok(Box::new(one_file(file)?.for_one_connection()))
    }
}

/// A disk that is one file.
///
/// # Errors
/// It passes 2^63-1 bytes.
pub(crate) fn one_file(file: BlockFile) -> Result<Concat> {
    let mut disk = Regions::new();
    let pushed = disk.push(file.length(), Segment::File(file));
    pushed.ok_or_else(|| Error::new(nbdkit_core::Errno::EINVAL, "the disk would pass 2^63-1 bytes"))?;
    Ok(Concat::new(Arc::new(disk)))
}
