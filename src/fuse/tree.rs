//! The shape of a mount: a directory with one file in it, or the file alone.

use std::ffi::{OsStr, OsString};

use anyhow::bail;
use fuser::INodeNo;

/// What an inode number stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Node {
    /// The directory that holds the file.
    Directory,
    /// The export.
    File,
}

/// The inodes and the name between them.
#[derive(Debug)]
pub(crate) enum Tree {
    /// The root is a directory, the export is in it under this name.
    Directory(OsString),
    /// The root is the export.
    File,
}

/// Longest name in a directory, in bytes (`FUSE_NAME_MAX` is longer, the rest of the system is not).
pub(crate) const NAME_MAX: u32 = 255;

/// The file's inode number in a directory.
const FILE: INodeNo = INodeNo(2);

impl Tree {
    /// A directory with the export under `name`.
    pub(crate) fn directory(name: &OsStr) -> anyhow::Result<Self> {
        if name.is_empty() || name == "." || name == ".." || name.as_encoded_bytes().contains(&b'/') {
            bail!("'{}' cannot be the name of the file: give one without slashes", name.display());
        }
        if name.len() > NAME_MAX as usize {
            bail!("the name of the file has {} bytes: give one of at most {NAME_MAX}", name.len());
        }
        Ok(Tree::Directory(name.to_owned()))
    }

    /// What `ino` is.
    pub(crate) fn node(&self, ino: INodeNo) -> Option<Node> {
        match self {
            Tree::Directory(_) if ino == INodeNo::ROOT => Some(Node::Directory),
            Tree::Directory(_) if ino == FILE => Some(Node::File),
            Tree::File if ino == INodeNo::ROOT => Some(Node::File),
            _ => None,
        }
    }

    /// The inode number of the export.
    pub(crate) fn file(&self) -> INodeNo {
        match self {
            Tree::Directory(_) => FILE,
            Tree::File => INodeNo::ROOT,
        }
    }

    /// Whether `name` in the directory `parent` is the export.
    pub(crate) fn is_file(&self, parent: INodeNo, name: &OsStr) -> bool {
        matches!(self, Tree::Directory(own) if parent == INodeNo::ROOT && own == name)
    }

    /// The entries of the root directory in order; none when the root is the file.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (INodeNo, Node, &OsStr)> {
        let name = match self {
            Tree::Directory(name) => Some(name.as_os_str()),
            Tree::File => None,
        };
        name.into_iter().flat_map(|name| {
            [
                (INodeNo::ROOT, Node::Directory, OsStr::new(".")),
                (INodeNo::ROOT, Node::Directory, OsStr::new("..")),
                (FILE, Node::File, name),
            ]
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_holds_one_file() {
        let tree = Tree::directory(OsStr::new("disk")).unwrap();
        assert_eq!(tree.node(INodeNo::ROOT), Some(Node::Directory));
        assert_eq!(tree.node(tree.file()), Some(Node::File));
        assert_eq!(tree.node(INodeNo(3)), None);
        assert!(tree.is_file(INodeNo::ROOT, OsStr::new("disk")));
        assert!(!tree.is_file(INodeNo::ROOT, OsStr::new("nbd")));
        assert!(!tree.is_file(tree.file(), OsStr::new("disk")));
        assert_eq!(tree.entries().count(), 3);
    }

    #[test]
    fn a_file_has_no_entries() {
        assert_eq!(Tree::File.node(INodeNo::ROOT), Some(Node::File));
        assert_eq!(Tree::File.file(), INodeNo::ROOT);
        assert_eq!(Tree::File.entries().count(), 0);
    }

    #[test]
    fn names_that_are_paths_are_refused() {
        for name in ["", ".", "..", "a/b", "/", &"x".repeat(256)] {
            assert!(Tree::directory(OsStr::new(name)).is_err(), "{name}");
        }
        assert!(Tree::directory(OsStr::new(&"x".repeat(255))).is_ok());
    }
}
