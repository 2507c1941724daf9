//! Decompresses a .gz file by an index that is kept in a file: gzip, with the parameters of this filter.

use std::ffi::OsStr;

use nbdkit_core::{Filter, Info, Result};

use crate::{
    decompress::{Format, Kind, Source, filter},
    gzip::Settings,
};

pub(crate) fn new() -> Box<dyn Filter> {
    filter(IndexedGzip::default())
}

#[derive(Default)]
struct IndexedGzip(Settings);

impl Kind for IndexedGzip {
    fn info(&self) -> Info {
        const HELP: &str = "gzip-index-path=<PATH> (required) The index; it is made if it is not there.
span=<SIZE>            Distance of the places where decoding can begin (default: 1M).";
        Info::bundled("indexed-gzip", "nbdkit indexed-gzip filter", HELP)
    }

    fn config(&mut self, key: &str, value: &OsStr) -> anyhow::Result<bool> {
        match key {
            "gzip-index-path" => self.0.set_index(key, value)?,
            "span" => self.0.set_span(key, value)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn config_complete(&mut self) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.0.index.is_some(),
            "indexed-gzip needs gzip-index-path=PATH, a file that it may write (or use the filter gzip)"
        );
        Ok(())
    }

    fn open(&self, source: &Source, _: &OsStr) -> Result<Box<dyn Format>> {
        self.0.open(source)
    }
}
