//! The floppy plugin: a directory as a disk with a FAT file system, made as it is read.
//!
//! The layout is computed (`layout`) rather than written by a library for FAT: those want a disk to write to, and so a copy
//! of all files. Here the disk's regions are the files themselves, which are opened when they are read: what they hold now
//! is what is on the disk, in the sizes that they had at the start.

use std::{
    ffi::OsStr,
    fs::File,
    os::unix::{ffi::OsStrExt, fs::FileExt, fs::OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, bail, ensure};
use nbdkit_common::Piece;
use nbdkit_core::{
    Caps, Errno, Error, Extents, Flags, Handle, Info, Op, Open, Outcome, Plugin, Request, Result, Support,
    params, sync::Mutex,
};
use rustix::fs::OFlags;

use layout::{Disk, Fat, Part, Wanted};

mod layout;
mod names;
#[cfg(test)]
mod tests;
mod tree;

const HELP: &str = "\
[dir=]DIRECTORY          (required) What is on the disk
label=LABEL              Name of the volume, up to 11 letters (default NBDKITFLOPY)
size=SIZE                Size of the disk (default: as small as it can be)
type=fat12|fat16|fat32   The file system (default fat32)
table=mbr|none           Put it in a partition or not (default mbr)";

/// Files that are kept open, for what is read piece by piece.
const KEPT: usize = 32;

pub(crate) fn new() -> Box<dyn Plugin> {
    Box::new(Floppy {
        directory: None,
        label: *b"NBDKITFLOPY",
        size: None,
        fat: Fat::Fat32,
        partitioned: true,
        disk: None,
    })
}

struct Floppy {
    directory: Option<PathBuf>,
    label: [u8; 11],
    size: Option<u64>,
    fat: Fat,
    partitioned: bool,
    disk: Option<Arc<Volume>>,
}

/// A volume label: capital letters, digits and what else a short name may have, and blanks.
fn label(value: &OsStr) -> anyhow::Result<[u8; 11]> {
    let text = value.as_bytes().to_ascii_uppercase();
    ensure!(text.len() <= 11, "label={} is longer than the 11 letters of a FAT label", value.display());
    let wrong = text.iter().find(|byte| !matches!(byte, b' '..=b'~') || b"\"*+,./:;<=>?[\\]|".contains(byte));
    if let Some(wrong) = wrong {
        bail!("label={}: a FAT label cannot have '{}' in it", value.display(), wrong.escape_ascii());
    }
    let mut label = [b' '; 11];
    label[..text.len()].copy_from_slice(&text);
    Ok(label)
}

impl Plugin for Floppy {
    fn info(&self) -> Info {
        Info::bundled("floppy", "nbdkit floppy plugin", HELP).magic("dir")
    }

    fn callbacks(&self) -> Option<Vec<&'static str>> {
        Some([crate::READ_ONLY, &["can_extents", "extents", "config_complete", "get_ready"]].concat())
    }

    fn config(&mut self, key: &str, value: &OsStr) -> anyhow::Result<bool> {
        match key {
            "dir" => {
                ensure!(self.directory.is_none(), "dir= was given twice: a disk is made of one directory");
                let path = std::path::absolute(value).with_context(|| format!("dir={}", value.display()))?;
                self.directory = Some(path);
            }
            "label" => self.label = label(value)?,
            "size" => self.size = Some(params::size(value)?),
            "type" => {
                self.fat = match &*params::text(value)?.to_ascii_lowercase() {
                    "fat12" => Fat::Fat12,
                    "fat16" => Fat::Fat16,
                    "fat32" => Fat::Fat32,
                    other => bail!("unknown type '{other}': use fat12, fat16 or fat32"),
                };
            }
            "table" => {
                self.partitioned = match params::text(value)? {
                    "mbr" => true,
                    "none" => false,
                    other => bail!("unknown table '{other}': use mbr or none"),
                };
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn config_complete(&mut self) -> anyhow::Result<()> {
        let directory = self.directory.as_deref();
        crate::iso::check(
            directory.context("you must supply the dir=DIRECTORY parameter after the plugin name")?,
        )
    }

    fn get_ready(&mut self) -> anyhow::Result<()> {
        let directory = self.directory.as_deref().context("there is no directory")?;
        let wanted = Wanted {
            fat: self.fat,
            partitioned: self.partitioned,
            label: self.label,
            size: self.size,
            seed: [directory.as_os_str().as_bytes(), &self.label].concat(),
        };
        let disk = Disk::new(tree::scan(directory)?, &wanted)
            .with_context(|| format!("dir={}", directory.display()))?;
        self.disk = Some(Arc::new(Volume { disk, kept: Mutex::default() }));
        Ok(())
    }

    fn open(&self, _: &Open) -> Result<Box<dyn Handle>> {
        let volume = self.disk.clone().ok_or(Errno::EINVAL)?;
        Ok(Box::new(Reader { volume }))
    }
}

/// The disk, and the files of it that were read last.
struct Volume {
    disk: Disk,
    /// By the start of their regions, the latest one first.
    kept: Mutex<Vec<(u64, Arc<File>)>>,
}

impl Volume {
    /// The open file of the region that starts there.
    fn file(&self, start: u64, path: &Path) -> Result<Arc<File>> {
        let mut kept = self.kept.lock();
        if let Some(index) = kept.iter().position(|(at, _)| *at == start) {
            kept[..=index].rotate_right(1);
            return Ok(kept[0].1.clone());
        }
        drop(kept);
        let fail = |e: std::io::Error| Error::from(e).context(path.display());
        // What is there now may be something that an open would wait for.
        let flags = (OFlags::NONBLOCK | OFlags::NOFOLLOW).bits().cast_signed();
        let file = File::options().read(true).custom_flags(flags).open(path).map_err(fail)?;
        if !file.metadata().map_err(fail)?.is_file() {
            return Err(Error::new(Errno::EIO, format!("{}: is no longer a regular file", path.display())));
        }
        let file = Arc::new(file);
        let mut kept = self.kept.lock();
        kept.insert(0, (start, file.clone()));
        kept.truncate(KEPT);
        Ok(file)
    }

    fn read(&self, piece: &Piece<'_, Part>, buf: &mut [u8]) -> Result<()> {
        match &piece.region.kind {
            Part::Bytes(bytes) => {
                buf.copy_from_slice(&bytes[piece.within as usize..(piece.within + piece.length) as usize]);
            }
            Part::Chains => self.disk.chains.read(buf, piece.within),
            Part::Zeroes => buf.fill(0),
            Part::File(path) => {
                let file = self.file(piece.region.start, path)?;
                file.read_exact_at(buf, piece.within).map_err(|e| match e.kind() {
                    std::io::ErrorKind::UnexpectedEof => Error::new(
                        Errno::EIO,
                        format!(
                            "{}: the file is shorter than it was when the server started",
                            path.display()
                        ),
                    ),
                    _ => Error::from(e).context(path.display()),
                })?;
            }
        }
        Ok(())
    }
}

struct Reader {
    volume: Arc<Volume>,
}

impl Handle for Reader {
    fn capabilities(&self) -> Result<Caps> {
        let caps = Caps::of_size(self.volume.disk.parts.size());
        Ok(caps.with_multi_conn(true).with_cache(Support::Native).with_extents(true))
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        for piece in self.volume.disk.parts.pieces(offset, buf.len() as u64) {
            self.volume.read(&piece, &mut buf[piece.at as usize..(piece.at + piece.length) as usize])?;
        }
        Ok(())
    }

    fn extents(&self, length: u64, offset: u64, _: Flags, extents: &mut Extents) -> Result<()> {
        for piece in self.volume.disk.parts.pieces(offset, length) {
            let empty = matches!(piece.region.kind, Part::Zeroes);
            extents.add(offset + piece.at, piece.length, empty, empty)?;
        }
        Ok(())
    }

    fn cache(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        let pieces = &self.volume.disk.parts;
        // Files may be slow, and there may be much to open.
        let waits = request.op() == Op::Read
            && pieces
                .pieces(request.offset(), request.length())
                .any(|piece| matches!(piece.region.kind, Part::File(_)));
        if request.may_lend() || waits && !request.may_wait() {
            return Outcome::NeedsThread;
        }
        request.run(self)
    }
}
