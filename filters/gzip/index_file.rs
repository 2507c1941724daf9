//! The file that keeps the checkpoints of a .gz file from one start to the next.
//!
//! It names the .gz file by its size, start and end, and has a checksum over all of it. It is written beside its place and
//! renamed, so there is a whole one or none.

use std::{
    fs::File,
    io::{ErrorKind, Read as _, Write as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use nbdkit_core::{Errno, Error, Result};

use super::checkpoints::{Checkpoint, Checkpoints, WINDOW};
use crate::decompress::Source;

const MAGIC: &[u8; 16] = b"nbdkit-gz-index1";
/// Longest file that is read, in bytes.
const MOST: u64 = 512 << 20;

/// See the module.
pub(super) struct IndexFile {
    path: PathBuf,
    /// What identifies the .gz file.
    size: u64,
    fingerprint: u64,
}

impl IndexFile {
    /// The index file of the .gz file in `source`.
    ///
    /// # Errors
    /// Those of the layer below.
    pub(super) fn new(path: &Path, source: &Source) -> Result<Self> {
        Ok(IndexFile { path: path.to_owned(), size: source.size(), fingerprint: source.fingerprint()? })
    }

    fn wrong(&self, what: &str) -> Error {
        let path = self.path.display();
        Error::new(Errno::EINVAL, format!("{path} {what}: remove it, or give another path for the index"))
    }

    /// The size of the disk and the checkpoints, if the file is there.
    ///
    /// # Errors
    /// `EINVAL`: the file is damaged, something else, or the index of another .gz file; those of open(2).
    pub(super) fn load(&self) -> Result<Option<(u64, Arc<Checkpoints>)>> {
        let mut bytes = Vec::new();
        let read = File::open(&self.path).and_then(|file| file.take(MOST).read_to_end(&mut bytes));
        match read {
            Ok(_) => {}
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => {
                let errno = Errno::from_raw(e.raw_os_error().unwrap_or_default());
                return Err(Error::new(errno, format!("{}: {}", self.path.display(), errno.desc())));
            }
        }
        let fields = bytes
            .split_last_chunk()
            .filter(|(fields, sum)| crc32fast::hash(fields) == u32::from_le_bytes(**sum));
        let Some(fields) = fields.and_then(|(fields, _)| fields.strip_prefix(MAGIC)) else {
            return Err(self.wrong("is no index of a .gz file, or is damaged"));
        };
        let mut fields = Fields(fields);
        let known = (fields.u64(), fields.u64());
        if known != (Some(self.size), Some(self.fingerprint)) {
            return Err(self.wrong("is the index of another file"));
        }
        self.parse(&mut fields).map(Some).ok_or_else(|| self.wrong("is damaged"))
    }

    fn parse(&self, fields: &mut Fields<'_>) -> Option<(u64, Arc<Checkpoints>)> {
        let (size, span, frontier, complete) =
            (fields.u64()?, fields.u64()?, fields.u64()?, fields.u64()? != 0);
        let mut list = Vec::new();
        while !fields.0.is_empty() {
            let [disk, file, member] = [fields.u64()?, fields.u64()?, fields.u64()?];
            let [checksum, bits, bit_buffer, length] =
                [fields.u32()?, fields.u32()?, fields.u32()?, fields.u32()?];
            let window = fields.take(length as usize)?.to_vec();
            let fits =
                member <= disk && disk <= size && file <= self.size && bits < 8 && window.len() <= 2 * WINDOW;
            if !fits {
                return None;
            }
            let (bits, bit_buffer) = (bits as u8, bit_buffer as u8);
            list.push(Checkpoint { disk, file, member, checksum, bits, bit_buffer, window });
        }
        (span > 0).then(|| (size, Arc::new(Checkpoints::from(list, span, frontier, complete))))
    }

    /// Writes it. What fails is logged: the next start will be slower.
    pub(super) fn save(&self, size: u64, checkpoints: &Checkpoints) {
        if let Err(e) = self.write(size, checkpoints) {
            log::error!("gzip: cannot write the index {}: {e}", self.path.display());
        }
    }

    fn write(&self, size: u64, checkpoints: &Checkpoints) -> std::io::Result<()> {
        let (list, frontier) = checkpoints.all();
        let mut bytes = MAGIC.to_vec();
        let complete = u64::from(checkpoints.is_complete());
        for field in [self.size, self.fingerprint, size, checkpoints.span(), frontier, complete] {
            bytes.extend(field.to_le_bytes());
        }
        for checkpoint in list {
            for field in [checkpoint.disk, checkpoint.file, checkpoint.member] {
                bytes.extend(field.to_le_bytes());
            }
            let length = checkpoint.window.len() as u32;
            for field in [checkpoint.checksum, checkpoint.bits.into(), checkpoint.bit_buffer.into(), length] {
                bytes.extend(field.to_le_bytes());
            }
            bytes.extend(checkpoint.window);
        }
        bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
        let dir = self.path.parent().unwrap_or(Path::new("/"));
        let mut file = tempfile::NamedTempFile::new_in(dir)?;
        file.write_all(&bytes)?;
        file.as_file().sync_data()?;
        file.persist(&self.path).map_err(|e| e.error)?;
        Ok(())
    }
}

struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take(8)?.try_into().ok().map(u64::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take(4)?.try_into().ok().map(u32::from_le_bytes)
    }
}
