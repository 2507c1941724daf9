//! The directory `by-name`: links with the names that partition tables have for partitions.

use std::{
    collections::HashSet,
    ffi::{OsStr, OsString},
};

use fuser::{Errno, INodeNo};

use crate::{
    tree::{self, BY_NAME_DIR, LINKS, NAME_MAX},
    volume::{Entry, Volume},
};

/// A link.
pub(crate) struct Link {
    pub(crate) name: OsString,
    /// The inode number of the file that it leads to.
    file: INodeNo,
    /// The path of that.
    pub(crate) target: OsString,
}

impl Link {
    pub(crate) fn ino(&self) -> INodeNo {
        INodeNo(LINKS + self.file.0)
    }
}

impl Volume {
    /// Whether there is such a directory as soon as there are names.
    pub(crate) fn shows_names(&self) -> bool {
        self.style.partitions && self.tree.export(OsStr::new(BY_NAME_DIR)).is_none()
    }

    /// The links. Of two with the same name the first is there. May wait.
    pub(crate) fn names(&self) -> Vec<Link> {
        let mut links = Vec::new();
        let mut seen = HashSet::new();
        for (index, disk) in self.tree.names().iter().enumerate() {
            let Some(opened) = self.opened_disk(index) else { continue };
            let table = self.table(opened);
            for (name, number) in &table.names {
                let name = tree::escape(OsStr::new(name));
                let file = table.files.iter().find(|(place, _)| place.number == *number);
                let Some((_, file)) = file.filter(|_| name.len() <= NAME_MAX as usize) else { continue };
                if seen.insert(name.clone()) {
                    let mut target = OsString::from("../");
                    target.push(tree::partition_name(disk, *number));
                    links.push(Link { name, file: file.ino, target });
                }
            }
        }
        links
    }

    /// The link with this inode number. May wait.
    ///
    /// # Errors
    /// `ESTALE`: there no longer is one.
    pub(crate) fn link(&self, ino: INodeNo) -> Result<Link, Errno> {
        self.names().into_iter().find(|link| link.ino() == ino).ok_or(Errno::ESTALE)
    }

    /// The entries of the directory.
    pub(crate) fn link_entries(&self) -> Vec<Entry> {
        self.names().into_iter().map(|link| Entry { ino: link.ino(), name: link.name }).collect()
    }
}
