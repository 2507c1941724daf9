//! The partitions of an open export: where they lie, and when to look again.

use std::{ops::Range, sync::Arc};

use nbdkit_common::{Table as Labels, TableError, read_aligned, read_table};
use nbdkit_core::{Error, Session};

use crate::export_file::ExportFile;

/// More are not shown: every one costs an inode.
const MAX: usize = 4096;

/// A partition within the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Its number, from 1.
    pub(crate) number: u32,
    /// Its first byte.
    pub(crate) start: u64,
    /// Its length in bytes, not 0.
    pub(crate) length: u64,
}

/// What is known of a disk's table.
#[derive(Default)]
pub(crate) struct Table {
    /// The partitions as files, by ascending number.
    pub(crate) files: Vec<(Place, Arc<ExportFile>)>,
    /// The names that the table has for partitions, and their numbers.
    pub(crate) names: Vec<(String, u32)>,
    /// What the table was read from. A write to it makes the table stale.
    areas: Vec<Range<u64>>,
    fresh: bool,
    /// What was wrong with it the last time.
    warnings: Vec<String>,
}

/// What was read of a disk's table.
pub(crate) struct Reading {
    /// The partitions, cut off at the end of the disk.
    pub(crate) places: Vec<Place>,
    /// The names that the table has for them, and their numbers.
    names: Vec<(String, u32)>,
    /// The ranges that tell of them.
    areas: Vec<Range<u64>>,
    /// What is wrong with them.
    warnings: Vec<String>,
    /// Bytes in a sector of the table. None: there is no table.
    pub(crate) sector_size: Option<u64>,
}

impl Table {
    /// Whether it has to be read again.
    pub(crate) fn is_stale(&self) -> bool {
        !self.fresh
    }

    /// Notes that a range of the disk was written to.
    pub(crate) fn written(&mut self, range: &Range<u64>) {
        if self.areas.iter().any(|area| area.start < range.end && range.start < area.end) {
            self.fresh = false;
        }
    }

    /// Takes over what was read, with `open` making a file of a place that is new. Held locked from before the
    /// table is read, so that no write is missed.
    pub(crate) fn update(
        &mut self,
        name: &str,
        size: u64,
        reading: Reading,
        open: impl Fn(Place) -> Arc<ExportFile>,
    ) -> Vec<Arc<ExportFile>> {
        let Reading { places, names, areas, warnings, .. } = reading;
        self.names = names;
        if warnings != self.warnings {
            warnings.iter().for_each(|warning| log::warn!("{name}: {warning}"));
            self.warnings = warnings;
        }
        // The usual places, where a table may appear that is not there yet: the first 34 sectors and the last 33, of
        // 4096 bytes at most.
        self.areas = vec![0..34 * 4096, size.saturating_sub(33 * 4096)..size];
        self.areas.extend(areas);
        self.fresh = true;
        let old = std::mem::take(&mut self.files);
        let (kept, gone): (Vec<_>, Vec<_>) = old.into_iter().partition(|(place, _)| places.contains(place));
        self.files = places
            .into_iter()
            .map(|place| {
                let known = kept.iter().find(|(known, _)| *known == place);
                (place, known.map_or_else(|| open(place), |(_, file)| file.clone()))
            })
            .collect();
        gone.into_iter().map(|(_, file)| file).collect()
    }
}

/// Reads the table of a disk, in sectors of `sector_size` bytes or of what is found. A disk without a table has no
/// partitions; nor has one whose table is damaged.
pub(crate) fn read(session: &Session, sector_size: Option<u64>) -> Reading {
    let size = session.size();
    let block = session.caps().block_size.minimum;
    let mut areas: Vec<Range<u64>> = Vec::new();
    let mut pread = |buffer: &mut [u8], offset: u64| {
        let end = offset + buffer.len() as u64;
        match areas.last_mut() {
            Some(last) if last.end == offset => last.end = end,
            _ => areas.push(offset..end),
        }
        read_aligned(buffer, offset, (size, block), |buffer, offset| session.pread(buffer, offset))
    };
    let table = read_table(size, sector_size, &mut pread);
    let (found, mut warnings) = match table {
        Ok(Labels { partitions, warnings, sector_size, .. }) => (Some((partitions, sector_size)), warnings),
        Err(e) => {
            let warnings = match &e {
                TableError::Damaged(how) => vec![format!("no partitions are shown: {how}")],
                _ => Vec::new(),
            };
            log::debug!("no partitions: {}", describe(&e));
            (None, warnings)
        }
    };
    let sector_size = found.as_ref().map(|(_, size)| *size);
    let partitions = found.map(|(partitions, _)| partitions).unwrap_or_default();
    let mut places: Vec<_> = partitions
        .iter()
        .map(|p| Place { number: p.number, start: p.start, length: p.length_within(size) })
        .filter(|place| place.length > 0)
        .collect();
    if places.len() > MAX {
        warnings.push(format!("of {} partitions the first {MAX} are shown", places.len()));
        places.truncate(MAX);
    }
    let named = partitions.into_iter().filter(|p| !p.name.is_empty() && p.start < size);
    let names = named.map(|p| (p.name, p.number)).collect();
    Reading { places, names, areas, warnings, sector_size }
}

fn describe(e: &TableError<Error>) -> String {
    match e {
        TableError::Read(e) => format!("the disk cannot be read: {e}"),
        TableError::TooSmall => "the disk is smaller than a table".into(),
        TableError::NoTable => "there is no partition table".into(),
        TableError::Damaged(how) => format!("the table is damaged: {how}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_to_the_table_makes_it_stale() {
        let mut table = Table::default();
        assert!(table.is_stale());
        let size = 1 << 30;
        for (range, stale) in [
            (0..1, true),
            (1 << 20..1 << 21, false),
            (size - 512..size, true),
            (5 << 20..(5 << 20) + 1, true),
            ((5 << 20) + 512..6 << 20, false),
        ] {
            let areas = std::iter::once(5 << 20..(5 << 20) + 512).collect();
            let reading = Reading {
                places: Vec::new(),
                names: Vec::new(),
                areas,
                warnings: Vec::new(),
                sector_size: None,
            };
            table.update("nbd", size, reading, |_| unreachable!("no partitions"));
            table.written(&range);
            assert_eq!(table.is_stale(), stale, "{range:?}");
        }
    }
}
