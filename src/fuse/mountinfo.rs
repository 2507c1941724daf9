//! The mount table of this process (`/proc/self/mountinfo`, see proc_pid_mountinfo(5)): it tells what is mounted where
//! without asking the file systems themselves, one of which may be ours and not answer yet, or no longer.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

use crate::options::SUBTYPE;

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountEntry {
    /// Number of the file system, `MAJOR:MINOR`.
    pub device: String,
    /// Where it is mounted.
    pub target: PathBuf,
    /// Its type.
    pub fstype: String,
    /// What is mounted, as the one who mounted it calls it.
    pub source: String,
}

impl MountEntry {
    /// Whether the mount is one of this program's.
    pub fn is_ours(&self) -> bool {
        self.fstype.starts_with("fuse")
            && (self.fstype.ends_with(SUBTYPE) || self.source.starts_with("nbdkit:"))
    }
}

/// All mounts, in the order in which they were made.
///
/// # Errors
/// If the table cannot be read.
pub fn mounts() -> io::Result<Vec<MountEntry>> {
    let table = fs::read("/proc/self/mountinfo")?;
    Ok(table.split(|b| *b == b'\n').filter_map(parse).collect())
}

/// The mounts at `target`, the uppermost last.
pub(crate) fn at(target: &Path) -> io::Result<Vec<MountEntry>> {
    Ok(mounts()?.into_iter().filter(|e| e.target == target).collect())
}

fn parse(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|b| *b == b' ');
    let device = fields.nth(2)?;
    let target = fields.nth(1)?;
    let mut after = fields.skip_while(|f| *f != b"-").skip(1);
    let (fstype, source) = (after.next()?, after.next()?);
    let text = |field: &[u8]| String::from_utf8_lossy(&unescape(field)).into_owned();
    Some(MountEntry {
        device: text(device),
        target: OsString::from_vec(unescape(target)).into(),
        fstype: text(fstype),
        source: text(source),
    })
}

/// Space, tab, newline and backslash stand there as `\` and three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        match tail {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..] if *first == b'\\' => {
                bytes.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = tail;
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_taken_apart() {
        let line =
            br"36 35 0:45 / /mnt/a\040b rw,noatime shared:1 - fuse.nbdkit-mount nbdkit:file rw,user_id=0";
        assert_eq!(
            parse(line),
            Some(MountEntry {
                device: "0:45".into(),
                target: "/mnt/a b".into(),
                fstype: "fuse.nbdkit-mount".into(),
                source: "nbdkit:file".into(),
            })
        );
    }

    #[test]
    fn odd_lines_are_no_mounts() {
        for line in [&b""[..], b"1 2 3", b"36 35 0:45 / /mnt rw - ", b"36 35 0:45 / /mnt rw"] {
            assert_eq!(parse(line), None);
        }
    }

    #[test]
    fn escapes() {
        assert_eq!(unescape(br"a\134b\01\9"), br"a\b\01\9");
        assert_eq!(unescape(br"\777"), br"\777");
    }

    #[test]
    fn the_root_is_mounted() {
        assert!(!at(Path::new("/")).unwrap().is_empty());
    }
}
