//! Files as the partitions of one disk, with a table made around them.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt, path::PathBuf, sync::Arc};

use anyhow::{Context as _, bail};
use nbdkit_common::{Guid, LINUX, Layout, LayoutError, NewPartition, Regions, SECTOR};
use nbdkit_core::{Above, Errno, Handle, Info, Open, Plugin, Result, params};

use crate::{
    block_file::BlockFile,
    concat::{Concat, Segment},
    image::ImageGuard,
    lock::{Access, Lock},
};

const HELP: &str = "\
file=<FILENAME>            (required, may be repeated) The partitions, in order.
partition-type=mbr|gpt     The table (default: MBR for up to 4 partitions and 2 TB).
alignment=<SIZE>           Alignment of the files that follow (default 1M).
mbr-id=<BYTE>|default      Type in an MBR of the files that follow (default 0x83).
type-guid=<GUID>|default   Type in a GPT of the files that follow (default Linux).
lock=off|auto|on           Lock the files against other programs (default auto).";

pub(crate) fn new() -> Box<dyn Plugin> {
    Box::new(Partitioning {
        files: Vec::new(),
        scheme: None,
        template: NewPartition::new(0),
        disk: None,
        guard: ImageGuard::default(),
        locks: Vec::new(),
    })
}

#[derive(Clone, Copy)]
enum Scheme {
    Mbr,
    Gpt,
}

struct Partitioning {
    files: Vec<(PathBuf, NewPartition)>,
    scheme: Option<Scheme>,
    /// What the next file will be.
    template: NewPartition,
    disk: Option<Arc<Regions<Segment>>>,
    guard: ImageGuard,
    /// Of all files, from the start on.
    locks: Vec<Lock>,
}

impl Partitioning {
    /// Takes a file with what holds for it at this place of the command line.
    fn add(&mut self, value: &OsStr) -> anyhow::Result<()> {
        let path = std::path::absolute(value).with_context(|| format!("file={}", value.display()))?;
        BlockFile::check(&path)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // The same at each start, so that what refers to a partition by its GUID goes on to find it.
        let number = format!("partition {} of ", self.files.len() + 1);
        let guid = Guid::from_seed(&[number.as_bytes(), path.as_os_str().as_bytes()].concat());
        self.files.push((path, NewPartition { name, guid, ..self.template.clone() }));
        Ok(())
    }

    fn layout(&self, partitions: &[NewPartition]) -> anyhow::Result<Layout> {
        let paths: Vec<&[u8]> = self.files.iter().map(|(path, _)| path.as_os_str().as_bytes()).collect();
        let gpt = || Layout::gpt(partitions, Guid::from_seed(&paths.join(&0)));
        let layout = match self.scheme {
            Some(Scheme::Mbr) => Layout::mbr(partitions),
            Some(Scheme::Gpt) => gpt(),
            None if partitions.len() > 4 => gpt(),
            None => Layout::mbr(partitions).or_else(|_| gpt()),
        };
        layout.map_err(|e| match e {
            LayoutError::TooLargeForMbr => anyhow::anyhow!(
                "the disk is larger than the 2 TB that an MBR partition table supports: use partition-type=gpt"
            ),
            LayoutError::TooLarge => anyhow::anyhow!("the disk would pass 2^63-1 bytes"),
        })
    }
}

impl Plugin for Partitioning {
    fn info(&self) -> Info {
        Info::bundled("partitioning", "nbdkit partitioning plugin", HELP).magic("file")
    }

    fn callbacks(&self) -> Option<Vec<&'static str>> {
        Some([crate::EVERYTHING, &["config_complete"]].concat())
    }

    fn config(&mut self, key: &str, value: &OsStr) -> anyhow::Result<bool> {
        let default = value.eq_ignore_ascii_case("default");
        match key {
            "file" => self.add(value)?,
            "partition-type" => {
                self.scheme = Some(match params::text(value)?.to_ascii_lowercase().as_str() {
                    "mbr" | "dos" => Scheme::Mbr,
                    "gpt" => Scheme::Gpt,
                    other => bail!("unknown partition-type '{other}': use mbr or gpt"),
                });
            }
            "alignment" => {
                let alignment = params::size(value)?;
                if alignment < SECTOR || !alignment.is_multiple_of(SECTOR) {
                    bail!("partition alignment {alignment} is not a multiple of the sector size {SECTOR}");
                }
                self.template.alignment = alignment;
            }
            "mbr-id" => self.template.mbr_type = if default { 0x83 } else { mbr_type(value)? },
            "type-guid" if default => self.template.gpt_type = LINUX,
            "type-guid" => {
                let guid = params::text(value)?.parse().map_err(|e| anyhow::anyhow!("type-guid: {e}"))?;
                if guid == Guid::NIL {
                    bail!("type-guid: a GUID of zeroes marks an entry that is not used");
                }
                self.template.gpt_type = guid;
            }
            "lock" => return self.guard.config(key, value),
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn set_above(&mut self, above: Above) {
        self.guard.set_above(above);
    }

    fn get_ready(&mut self) -> anyhow::Result<()> {
        for (path, _) in &self.files {
            // The files were opened for writing, for all clients, before it was known whether anybody does.
            let file = BlockFile::open(path, true)?;
            self.locks.extend(self.guard.lock(
                file.file(),
                path,
                Access::new(self.guard.may_be_written()),
            )?);
        }
        Ok(())
    }

    fn config_complete(&mut self) -> anyhow::Result<()> {
        if self.files.is_empty() {
            bail!("at least one file= parameter must be supplied");
        }
        let mut partitions = Vec::new();
        let mut files = Vec::new();
        for (path, partition) in &self.files {
            let file = BlockFile::open(path, false)?;
            if file.length() == 0 {
                bail!("{}: a partition cannot be empty: give a file that holds data", path.display());
            }
            partitions.push(NewPartition { length: file.length(), ..partition.clone() });
            files.push(file);
        }
        let layout = self.layout(&partitions)?;
        let disk = assemble(layout, files).context("the disk would pass 2^63-1 bytes")?;
        self.disk = Some(Arc::new(disk));
        Ok(())
    }

    fn open(&self, _: &Open) -> Result<Box<dyn Handle>> {
        let disk = self.disk.clone().ok_or(Errno::EINVAL)?;
        Ok(Box::new(Concat::new(disk)))
    }
}

fn mbr_type(value: &OsStr) -> anyhow::Result<u8> {
    match params::integer("mbr-id", value)? {
        0 => bail!("mbr-id: 0 marks an entry that is not used: use 1 to 0xff"),
        0x05 | 0x0f | 0x85 => bail!("mbr-id: extended partitions are made where they are needed"),
        kind => Ok(kind),
    }
}

/// Puts tables and files where the layout wants them, with padding between them.
fn assemble(layout: Layout, files: Vec<BlockFile>) -> Option<Regions<Segment>> {
    let tables =
        layout.tables.into_iter().map(|(start, bytes)| (start, bytes.len() as u64, Segment::Fixed(bytes)));
    let files = layout.starts.into_iter().zip(files);
    let files = files.map(|(start, file)| (start, file.length(), Segment::File(file)));
    let mut segments: Vec<_> = tables.chain(files).collect();
    segments.sort_by_key(|(start, ..)| *start);
    let mut disk = Regions::new();
    for (start, length, segment) in segments {
        disk.push(start.checked_sub(disk.size())?, Segment::Padding)?;
        disk.push(length, segment)?;
    }
    disk.push(layout.size.checked_sub(disk.size())?, Segment::Padding)?;
    Some(disk)
}

#[cfg(test)]
#[path = "partitioning_tests.rs"]
mod tests;
