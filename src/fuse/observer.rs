//! Keeps the kernel's cache true when somebody writes through the other door.

use std::{
    ffi::{OsStr, OsString},
    sync::{Arc, OnceLock},
};

use fuser::{INodeNo, Notifier};
use nbdkit_core::WriteObserver;

use crate::attr::Attributes;

/// The observer of one file.
pub(crate) struct Observer {
    /// The file's export, the default name resolved.
    export: OsString,
    /// What the empty name stands for, if anything.
    default: Option<OsString>,
    file: INodeNo,
    attributes: Arc<Attributes>,
    /// Set once the mount answers; before that nothing is cached.
    notifier: OnceLock<Notifier>,
}

impl Observer {
    pub(crate) fn new(
        export: OsString,
        default: Option<OsString>,
        file: INodeNo,
        attributes: Arc<Attributes>,
    ) -> Self {
        Observer { export, default, file, attributes, notifier: OnceLock::new() }
    }

    /// Starts telling the kernel.
    pub(crate) fn connect(&self, notifier: Notifier) {
        // Set once, by the mount that made it.
        let _ = self.notifier.set(notifier);
    }

    fn is_ours(&self, name: &OsStr) -> bool {
        if name.is_empty() { self.default.as_ref() == Some(&self.export) } else { name == self.export }
    }
}

impl WriteObserver for Observer {
    /// Waits for requests of the kernel that hold the pages in question; those are answered by other threads.
    fn written(&self, export_name: &OsStr, offset: u64, length: u64) {
        if !self.is_ours(export_name) {
            return;
        }
        self.attributes.touch();
        let Some(notifier) = self.notifier.get() else { return };
        let (Ok(offset), Ok(length)) = (i64::try_from(offset), i64::try_from(length)) else { return };
        if let Err(e) = notifier.inval_inode(self.file, offset, length) {
            // A mount that is ending caches nothing.
            log::debug!("the kernel's cache was not told of a write: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::Options;

    fn observer(export: &str, default: Option<&str>) -> Observer {
        let attributes = Arc::new(Attributes::new(&Options::default(), true));
        Observer::new(export.into(), default.map(OsString::from), INodeNo(2), attributes)
    }

    #[test]
    fn the_empty_name_is_the_default_export() {
        let disk = observer("disk", Some("disk"));
        assert!(disk.is_ours(OsStr::new("disk")));
        assert!(disk.is_ours(OsStr::new("")));
        assert!(!disk.is_ours(OsStr::new("other")));
        let other = observer("other", Some("disk"));
        assert!(!other.is_ours(OsStr::new("")));
        assert!(!observer("disk", None).is_ours(OsStr::new("")));
        assert!(observer("", Some("")).is_ours(OsStr::new("")));
    }
}
