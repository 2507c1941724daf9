//! What is in the first disk of a mount and in its partitions: for those who choose one.

use std::ffi::{OsStr, OsString};

use anyhow::Context as _;
use nbdkit_common::{Content, Kind, Survey, read_aligned};
use nbdkit_core::Session;

use crate::{mount::Mount, tree, volume::Volume};

/// What the first disk holds.
#[derive(Clone, Debug, Default)]
pub struct Contents {
    /// The disk as a whole.
    pub whole: Option<Content>,
    /// Its partitions that are there as files.
    pub parts: Vec<PartContent>,
}

/// What a partition holds.
#[derive(Clone, Debug)]
pub struct PartContent {
    /// The name of its file.
    pub file: OsString,
    /// The partition's number.
    pub number: u32,
    /// The name that the table has for it. Empty: none.
    pub name: String,
    /// The partition's own identifier.
    pub uuid: Option<String>,
    /// The partition's type.
    pub kind: Kind,
    /// What is in it.
    pub content: Option<Content>,
}

impl Mount {
    /// Looks at what there is.
    ///
    /// # Errors
    /// Those of the chain: the export is opened if it is not.
    pub fn contents(&self) -> anyhow::Result<Contents> {
        self.volume().context("the mount has ended")?.contents()
    }
}

impl Volume {
    fn contents(&self) -> anyhow::Result<Contents> {
        let whole = self.open(0)?;
        let (size, session) = (whole.size(), &whole.session);
        let survey = Survey::new(size, self.style.sector_size, |buf: &mut [u8], at| read(session, buf, at));
        let mut contents = Contents { whole: survey.whole.clone(), parts: Vec::new() };
        if !self.style.partitions {
            return Ok(contents);
        }
        let disk = self.tree.names().first().map(OsString::as_os_str).unwrap_or(OsStr::new(""));
        let partitions = survey.partitions().filter(|(partition, _)| partition.length_within(size) > 0);
        contents.parts.extend(partitions.map(|(partition, content)| PartContent {
            file: tree::partition_name(disk, partition.number),
            number: partition.number,
            name: partition.name.clone(),
            uuid: partition.uuid.clone(),
            kind: partition.kind.clone(),
            content: content.cloned(),
        }));
        Ok(contents)
    }
}

/// Reads in the blocks that the disk takes.
fn read(session: &Session, buf: &mut [u8], offset: u64) -> nbdkit_core::Result<()> {
    let shape = (session.size(), session.caps().block_size.minimum);
    read_aligned(buf, offset, shape, |buf, offset| session.pread(buf, offset))
}
