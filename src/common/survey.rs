//! All there is to see on a disk: its table, what is in its partitions, and what it is as a whole.
//!
//! What cannot be read or makes no sense becomes a warning; the rest is still there.

use std::fmt::Display;

use crate::{Content, Partition, Table, TableError, Usage, detect_content, read_table, table::SECTOR};

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// The disk's partition table, if it has one with partitions, or nothing else.
    pub table: Option<Table>,
    /// What each of its partitions holds, in the same order.
    pub contents: Vec<Option<Content>>,
    /// What the disk holds as a whole, beside a table perhaps, as hybrid images of optical discs do.
    pub whole: Option<Content>,
    /// What is wrong, one line for each.
    pub warnings: Vec<String>,
}

impl Survey {
    /// Looks at a disk of `size` bytes, which `read` fills a buffer of from an offset in bytes that is within it. The table is
    /// in sectors of `sector_size` bytes, see [`read_table`].
    pub fn new<E: Display>(
        size: u64,
        sector_size: Option<u64>,
        mut read: impl FnMut(&mut [u8], u64) -> Result<(), E>,
    ) -> Survey {
        let mut survey = Survey::default();
        match read_table(size, sector_size, &mut read) {
            Ok(table) => {
                survey.warnings.clone_from(&table.warnings);
                survey.table = Some(table);
            }
            Err(TableError::Damaged(how)) => survey.warnings.push(how),
            Err(TableError::Read(e)) => survey.warnings.push(format!("the disk cannot be read: {e}")),
            Err(TableError::TooSmall | TableError::NoTable) => {}
        }
        survey.whole = survey.look("the disk", size, 0, &mut read);
        // The boot sector of a file system looks like a table without partitions.
        let is_empty = survey.table.as_ref().is_some_and(|table| table.partitions.is_empty());
        if is_empty && survey.whole.is_some() {
            survey.table = None;
        }
        let partitions = survey.table.as_ref().map(|table| table.partitions.clone()).unwrap_or_default();
        for partition in &partitions {
            let name = format!("partition {}", partition.number);
            let content = survey.look(&name, partition.length_within(size), partition.start, &mut read);
            survey.contents.push(content);
        }
        // What is at the end of the last partition is at the end of the disk too.
        if survey.whole.as_ref().is_some_and(|whole| survey.is_of_last_partition(whole)) {
            survey.whole = None;
        }
        survey
    }

    /// What a part of the disk holds.
    fn look<E: Display>(
        &mut self,
        name: &str,
        length: u64,
        start: u64,
        read: &mut impl FnMut(&mut [u8], u64) -> Result<(), E>,
    ) -> Option<Content> {
        if length < SECTOR {
            return None;
        }
        // The sum does not overflow: both are within the disk.
        match detect_content(length, |buf, offset| read(buf, start + offset)) {
            Ok(content) => content,
            Err(e) => {
                self.warnings.push(format!("{name} cannot be read: {e}"));
                None
            }
        }
    }

    fn is_of_last_partition(&self, whole: &Content) -> bool {
        let members = self.contents.iter().flatten().filter(|content| content.usage == Usage::Member);
        members.into_iter().any(|content| content.kind == whole.kind && content.uuid == whole.uuid)
    }

    /// The partitions with what they hold.
    pub fn partitions(&self) -> impl Iterator<Item = (&Partition, Option<&Content>)> {
        let partitions = self.table.iter().flat_map(|table| &table.partitions);
        partitions.zip(self.contents.iter().map(Option::as_ref))
    }
}
