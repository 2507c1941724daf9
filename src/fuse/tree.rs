//! The shape of a mount: a directory with a file for each export, and perhaps for each partition, or one file alone.
//!
//! Only names and inode numbers; nothing here is open.

use std::{
    collections::HashMap,
    ffi::{OsStr, OsString},
    os::unix::ffi::{OsStrExt, OsStringExt},
};

use anyhow::bail;
use fuser::INodeNo;

/// What an inode number stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Node {
    /// The directory that holds the files.
    Directory,
    /// The export of this index.
    Export(usize),
    /// A partition or a logical volume, if there still is one with this inode number.
    Partition,
    /// The directory with the names of partitions.
    ByName,
    /// A link in that, if there still is one with this inode number.
    Link,
}

/// The exports and their names.
#[derive(Debug)]
pub(crate) struct Tree {
    /// The root is the first export, not a directory.
    bare: bool,
    names: Vec<OsString>,
    by_name: HashMap<OsString, usize>,
}

/// Longest name in a directory, in bytes (`FUSE_NAME_MAX` is longer, the rest of the system is not).
pub(crate) const NAME_MAX: u32 = 255;

/// Inode number of the first export in a directory; the others follow.
const FIRST: u64 = 2;
/// From here on inode numbers are those of partitions.
pub(crate) const PARTITIONS: u64 = 1 << 20;
/// The directory with links to them.
pub(crate) const BY_NAME: INodeNo = INodeNo(PARTITIONS - 1);
/// Its name.
pub(crate) const BY_NAME_DIR: &str = "by-name";
/// From here on inode numbers are those of links, each as far from here as what it leads to is from 0.
pub(crate) const LINKS: u64 = 1 << 48;

impl Tree {
    /// The one export alone.
    pub(crate) fn file() -> Self {
        Tree { bare: true, names: vec![OsString::new()], by_name: HashMap::new() }
    }

    /// A directory with a file for each name. All differ, as those of [`file_names`] do.
    pub(crate) fn directory(names: Vec<OsString>) -> Self {
        let by_name = names.iter().cloned().zip(0..).collect();
        Tree { bare: false, names, by_name }
    }

    /// Whether the root is an export.
    pub(crate) fn is_bare(&self) -> bool {
        self.bare
    }

    /// What `ino` is.
    #[inline]
    pub(crate) fn node(&self, ino: INodeNo) -> Option<Node> {
        match ino.0 {
            1 if self.bare => Some(Node::Export(0)),
            1 => Some(Node::Directory),
            n if n >= LINKS => Some(Node::Link),
            n if n >= PARTITIONS => Some(Node::Partition),
            n if n == BY_NAME.0 => Some(Node::ByName),
            n => {
                let index = usize::try_from(n.checked_sub(FIRST)?).ok()?;
                (!self.bare && index < self.names.len()).then_some(Node::Export(index))
            }
        }
    }

    /// The inode number of an export.
    pub(crate) fn inode(&self, export: usize) -> INodeNo {
        if self.bare { INodeNo::ROOT } else { INodeNo(FIRST + export as u64) }
    }

    /// The export with this name in the directory.
    pub(crate) fn export(&self, name: &OsStr) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    /// The names in the directory, by export.
    pub(crate) fn names(&self) -> &[OsString] {
        &self.names
    }
}

/// Checks the name that the user wants for the default export's file.
///
/// # Errors
/// One line that names the fix.
pub(crate) fn check_name(name: &OsStr) -> anyhow::Result<()> {
    if name.is_empty() || name == "." || name == ".." || name.as_bytes().contains(&b'/') {
        bail!("'{}' cannot be the name of the file: give one without slashes", name.display());
    }
    if name.len() > NAME_MAX as usize {
        bail!("the name of the file has {} bytes: give one of at most {NAME_MAX}", name.len());
    }
    Ok(())
}

/// The files of several exports, as pairs of an export's name and its file's: `default`, if there is one, under
/// `filename`, and the others under their own names, escaped where those are no file names. What is too long even so is
/// left out.
pub fn file_names<'a>(
    default: Option<&OsStr>,
    exports: impl IntoIterator<Item = &'a OsStr>,
    filename: &OsStr,
) -> Vec<(OsString, OsString)> {
    let mut files: Vec<_> = default.map(|name| (name.to_owned(), filename.to_owned())).into_iter().collect();
    let mut seen: std::collections::HashSet<OsString> = default.map(OsStr::to_owned).into_iter().collect();
    for export in exports {
        if !seen.insert(export.to_owned()) {
            continue;
        }
        let mut name = escape(export);
        if default.is_some() && name == filename {
            name = escape_first(&name);
        }
        if name.is_empty() || name.len() > NAME_MAX as usize {
            log::warn!("the export '{}' is not shown: no file can have its name", export.display());
            continue;
        }
        files.push((export.to_owned(), name));
    }
    files
}

/// An export's name as a file name: `/`, `%` and control characters become `%` and two hexadecimal digits, and so
/// does the first dot of `.` and `..`.
pub(crate) fn escape(name: &OsStr) -> OsString {
    if name == "." || name == ".." {
        return escape_first(name);
    }
    let mut escaped = Vec::with_capacity(name.len());
    for &byte in name.as_bytes() {
        match byte {
            b'/' | b'%' | 0..=0x1f | 0x7f => escaped.extend(format!("%{byte:02X}").bytes()),
            byte => escaped.push(byte),
        }
    }
    OsString::from_vec(escaped)
}

fn escape_first(name: &OsStr) -> OsString {
    let Some((first, rest)) = name.as_bytes().split_first() else { return OsString::new() };
    OsString::from_vec([format!("%{first:02X}").as_bytes(), rest].concat())
}

/// The name of a partition's file, as the kernel names those of its disks: `nbd1`, and `vol0p1` after a digit.
pub fn partition_name(disk: &OsStr, number: u32) -> OsString {
    let mut name = disk.to_owned();
    if disk.as_bytes().last().is_some_and(u8::is_ascii_digit) {
        name.push("p");
    }
    name.push(number.to_string());
    name
}

/// The disk's name and the partition's number in the name of a partition's file.
pub fn split_partition_name(name: &OsStr) -> Option<(&OsStr, u32)> {
    let bytes = name.as_bytes();
    let digits = bytes.iter().rev().take_while(|b| b.is_ascii_digit()).count();
    let (disk, number) = bytes.split_at(bytes.len() - digits);
    let number: u32 = std::str::from_utf8(number).ok()?.parse().ok()?;
    let disk = match disk.strip_suffix(b"p") {
        Some(disk) if disk.last().is_some_and(u8::is_ascii_digit) => disk,
        _ => disk,
    };
    let disk = OsStr::from_bytes(disk);
    // Only one way of writing it counts: no leading zeroes.
    (partition_name(disk, number) == name).then_some((disk, number))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(default: Option<&str>, exports: &[&str]) -> Vec<String> {
        file_names(default.map(OsStr::new), exports.iter().map(OsStr::new), OsStr::new("nbd"))
            .into_iter()
            .map(|(_, file)| file.into_string().unwrap())
            .collect()
    }

    #[test]
    fn a_directory_holds_its_files() {
        let tree = Tree::directory(vec!["nbd".into(), "b".into()]);
        assert_eq!(tree.node(INodeNo::ROOT), Some(Node::Directory));
        assert_eq!(tree.node(tree.inode(1)), Some(Node::Export(1)));
        assert_eq!(tree.node(INodeNo(4)), None);
        assert_eq!(tree.node(INodeNo(0)), None);
        assert_eq!(tree.node(BY_NAME), Some(Node::ByName));
        assert_eq!(tree.node(INodeNo(LINKS + PARTITIONS)), Some(Node::Link));
        assert_eq!(tree.node(INodeNo(PARTITIONS + 7)), Some(Node::Partition));
        assert_eq!(tree.export(OsStr::new("b")), Some(1));
        assert_eq!(tree.export(OsStr::new("c")), None);
    }

    #[test]
    fn a_file_has_no_entries() {
        let tree = Tree::file();
        assert_eq!(tree.node(INodeNo::ROOT), Some(Node::Export(0)));
        assert_eq!(tree.inode(0), INodeNo::ROOT);
        assert_eq!(tree.node(INodeNo(2)), None);
        assert_eq!(tree.export(OsStr::new("")), None);
    }

    #[test]
    fn names_that_are_paths_are_refused() {
        for name in ["", ".", "..", "a/b", "/", &"x".repeat(256)] {
            assert!(check_name(OsStr::new(name)).is_err(), "{name}");
        }
        assert!(check_name(OsStr::new(&"x".repeat(255))).is_ok());
    }

    #[test]
    fn the_default_export_has_a_name_of_its_own() {
        assert_eq!(names(Some(""), &[""]), ["nbd"]);
        assert_eq!(names(Some("a"), &["b", "a", "b"]), ["nbd", "b"]);
        assert_eq!(names(None, &["a", "nbd"]), ["a", "nbd"]);
        assert_eq!(names(Some("a"), &["nbd"]), ["nbd", "%6Ebd"]);
    }

    #[test]
    fn names_that_are_no_file_names_are_escaped() {
        assert_eq!(
            names(None, &["a/b", "100%", ".", "..", "...", "x\ny"]),
            ["a%2Fb", "100%25", "%2E", "%2E.", "...", "x%0Ay"]
        );
        assert!(names(None, &["", &"/".repeat(86)]).is_empty());
    }

    #[test]
    fn partitions_are_named_as_the_kernel_does() {
        for (disk, number, name) in [("nbd", 1, "nbd1"), ("vol0", 12, "vol0p12"), ("p", 3, "p3")] {
            assert_eq!(partition_name(OsStr::new(disk), number), name);
            assert_eq!(split_partition_name(OsStr::new(name)), Some((OsStr::new(disk), number)));
        }
        for name in ["nbd", "nbd01", "nbdp1x", "", "nbd99999999999"] {
            assert_eq!(split_partition_name(OsStr::new(name)), None, "{name}");
        }
        assert_eq!(split_partition_name(OsStr::new("nbdp1")), Some((OsStr::new("nbdp"), 1)));
    }
}
