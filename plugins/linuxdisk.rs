//! The linuxdisk plugin: a directory as a disk with an ext2, ext3 or ext4 file system, made at the start by mke2fs.
//!
//! How large the file system has to be is known only to who makes it, so it is made larger until all fits.

use std::{
    collections::HashSet,
    ffi::{OsStr, OsString},
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, Result, bail, ensure};
use nbdkit_common::{Guid, Layout, NewPartition, Regions, SECTOR};
use nbdkit_core::{Errno, Error, Handle, Info, Open, Plugin, params};

use crate::{
    block_file::BlockFile,
    concat::{Concat, Segment},
    iso::check,
    maker,
    partitioning::assemble,
    sh::Patience,
};

const HELP: &str = "\
[dir=]DIRECTORY          (required) What is on the disk
label=LABEL              Label of the file system
type=ext2|ext3|ext4      The file system (default ext2)
size=SIZE|+SIZE          Its size, or how much is to be free in it (default: little)";

/// The blocks that are counted with: those of all but small file systems.
const BLOCK: u64 = 4096;
/// How much an inode takes.
const INODE: u64 = 256;
/// How often a larger file system is tried.
const TRIES: u32 = 20;

pub(crate) fn new() -> Box<dyn Plugin> {
    Box::new(LinuxDisk {
        directory: None,
        label: OsString::new(),
        kind: "ext2",
        size: Size::Little,
        disk: None,
    })
}

#[derive(Clone, Copy)]
enum Size {
    Little,
    Free(u64),
    Whole(u64),
}

struct LinuxDisk {
    directory: Option<PathBuf>,
    label: OsString,
    kind: &'static str,
    size: Size,
    disk: Option<Arc<Regions<Segment>>>,
}

/// What a directory holds.
#[derive(Debug, Default)]
struct Content {
    bytes: u64,
    inodes: u64,
}

/// Adds up what is in a directory, and in those in it.
fn measure(root: &Path) -> Result<Content> {
    let mut content = Content::default();
    let mut seen = HashSet::new();
    let mut directories = vec![root.to_owned()];
    while let Some(path) = directories.pop() {
        let fail = |e: std::io::Error| Error::from(e).context(path.display());
        let mut entries = 0;
        for entry in std::fs::read_dir(&path).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let metadata = match entry.metadata() {
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
                metadata => metadata.map_err(|e| Error::from(e).context(entry.path().display()))?,
            };
            entries += 8 + entry.file_name().len() as u64 + 4;
            if metadata.is_dir() {
                directories.push(entry.path());
                continue;
            }
            // The names of a file are one file.
            if metadata.nlink() > 1 && !seen.insert((metadata.dev(), metadata.ino())) {
                continue;
            }
            content.inodes += 1;
            // Holes stay holes.
            let allocated = metadata.blocks() * 512;
            content.bytes += metadata.len().min(allocated.max(BLOCK)).next_multiple_of(BLOCK);
        }
        content.inodes += 1;
        content.bytes += entries.next_multiple_of(BLOCK);
    }
    Ok(content)
}

impl LinuxDisk {
    /// The size of the first try.
    fn estimate(&self, content: &Content, free: u64) -> Option<u64> {
        let journal = if self.kind == "ext2" { 0 } else { (content.bytes + free) / 16 + (4 << 20) };
        let data = content.bytes.checked_add(content.bytes / 64)?.checked_add(free)?;
        let inodes = (content.inodes + 16) * INODE;
        // The groups of blocks have their tables.
        let tables = data / 256 + (256 << 10);
        data.checked_add(inodes)?
            .checked_add(journal)?
            .checked_add(tables)
            .map(|size| size.next_multiple_of(1 << 16))
    }

    fn make(&self, directory: &Path, disk: &Path, size: u64, inodes: u64) -> Result<()> {
        let file = std::fs::File::options().write(true).truncate(true).open(disk);
        let file = file.map_err(Error::from).with_context(|| disk.display().to_string())?;
        file.set_len(size).map_err(Error::from).with_context(|| format!("a disk of {size} bytes"))?;
        // Nothing is reserved for root in a disk that is not written to.
        let script = r#"exec mke2fs -q -F -m 0 -t "$nbdkit_type" -N "$nbdkit_inodes" -L "$nbdkit_label" -d "$nbdkit_dir" "$nbdkit_disk""#;
        let inodes = inodes.to_string();
        let variables = [
            ("nbdkit_type", OsStr::new(self.kind)),
            ("nbdkit_inodes", OsStr::new(&inodes)),
            ("nbdkit_label", &self.label),
            ("nbdkit_dir", directory.as_os_str()),
            ("nbdkit_disk", disk.as_os_str()),
        ];
        Ok(maker::make("mke2fs", OsStr::new(script), &variables, false, Patience::default())?)
    }

    /// Makes the file system, as large as it has to be.
    fn fill(&self, directory: &Path, disk: &Path) -> Result<()> {
        let content = measure(directory)?;
        let free = match self.size {
            Size::Whole(size) => return self.make(directory, disk, size, inodes(&content, size)),
            Size::Free(free) => free,
            Size::Little => 0,
        };
        let mut size = self.estimate(&content, free).context("the disk would pass 2^63-1 bytes")?;
        let mut tried = 0;
        loop {
            match self.make(directory, disk, size, inodes(&content, free)) {
                Ok(()) => match free_bytes(disk)? {
                    there if there >= free => return Ok(()),
                    there => size += free - there,
                },
                Err(e) if tried == TRIES || !is_too_small(&e) => return Err(e),
                Err(e) => {
                    log::debug!("linuxdisk: {size} bytes are too few: {e:#}");
                    size += size / 8 + (1 << 20);
                }
            }
            ensure!(tried < TRIES, "a file system with {free} free bytes cannot be made");
            tried += 1;
            size = size.next_multiple_of(BLOCK);
        }
    }
}

/// Whether another size may help: mke2fs says so in many ways.
fn is_too_small(error: &anyhow::Error) -> bool {
    let text = format!("{error:#}");
    ["allocat", "space", "too small", "Could not", "not enough", "inode"]
        .iter()
        .any(|word| text.contains(word))
}

/// Inodes for what is there, and for files of 16 KiB in what is free.
fn inodes(content: &Content, free: u64) -> u64 {
    content.inodes + 16 + free / (16 << 10)
}

/// What is free in a file system, as its superblock has it.
fn free_bytes(disk: &Path) -> Result<u64> {
    use std::os::unix::fs::FileExt as _;
    let mut superblock = [0; 1024];
    let file = std::fs::File::open(disk).map_err(Error::from)?;
    file.read_exact_at(&mut superblock, 1024).map_err(Error::from).context("reading the superblock")?;
    let number = |at: usize| {
        superblock.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes)
    };
    ensure!(number(0x38) & 0xffff == 0xef53, "mke2fs made no file system");
    // The upper half of the count is there with 64 bits only.
    let upper = if number(0x60) & 0x80 == 0 { 0 } else { u64::from(number(0x158)) << 32 };
    let block = 1024_u64 << number(0x18).min(6);
    Ok((upper | u64::from(number(0x0c))).saturating_mul(block))
}

impl Plugin for LinuxDisk {
    fn info(&self) -> Info {
        Info::bundled("linuxdisk", "nbdkit Linux virtual disk plugin", HELP).magic("dir")
    }

    fn callbacks(&self) -> Option<Vec<&'static str>> {
        Some([crate::READ_ONLY, &["can_extents", "extents", "config_complete", "get_ready"]].concat())
    }

    fn config(&mut self, key: &str, value: &OsStr) -> Result<bool> {
        match key {
            "dir" => {
                ensure!(self.directory.is_none(), "dir= was given twice: a disk is made of one directory");
                let path = std::path::absolute(value).with_context(|| format!("dir={}", value.display()))?;
                self.directory = Some(path);
            }
            "label" => self.label = value.to_owned(),
            "type" => {
                self.kind = match params::text(value)? {
                    "ext2" => "ext2",
                    "ext3" => "ext3",
                    "ext4" => "ext4",
                    other => bail!("unknown type '{other}': use ext2, ext3 or ext4"),
                };
            }
            "size" => {
                self.size = match value.as_bytes().strip_prefix(b"+") {
                    Some(free) => Size::Free(params::size(OsStr::from_bytes(free))?),
                    None => Size::Whole(params::size(value)?),
                };
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn config_complete(&mut self) -> Result<()> {
        let directory = self.directory.as_deref();
        check(directory.context("you must supply the dir=DIRECTORY parameter after the plugin name")?)
    }

    fn get_ready(&mut self) -> Result<()> {
        let directory = self.directory.as_deref().context("there is no directory")?;
        let disk = tempfile::Builder::new().prefix("nbdkit").tempfile_in(maker::directory());
        let disk = disk.with_context(|| format!("cannot make a file in {}", maker::directory().display()))?;
        self.fill(directory, disk.path())?;
        let file = BlockFile::open(disk.path(), true)?;
        let seed = directory.as_os_str().as_bytes();
        let partition = NewPartition {
            guid: Guid::from_seed(&[b"partition of ", seed].concat()),
            ..NewPartition::new(file.length().next_multiple_of(SECTOR))
        };
        let layout = Layout::gpt(&[partition], Guid::from_seed(seed));
        let layout = layout.map_err(|_| anyhow::anyhow!("the disk would pass 2^63-1 bytes"))?;
        let disk = assemble(layout, vec![(file.length(), Segment::File(file))])
            .context("the disk would pass 2^63-1 bytes")?;
        self.disk = Some(Arc::new(disk));
        Ok(())
    }

    fn open(&self, _: &Open) -> nbdkit_core::Result<Box<dyn Handle>> {
        Ok(Box::new(Concat::new(self.disk.clone().ok_or(Errno::EINVAL)?).for_reading()))
    }
}
