//! Hears of writes that come in by the other front end.

use std::{ffi::OsStr, sync::Weak};

use nbdkit_core::{Announced, WriteObserver};

use crate::volume::Volume;

/// The observer of a mount. The sessions of the mount hold it, so it must not hold them.
pub(crate) struct Observer(pub(crate) Weak<Volume>);

impl WriteObserver for Observer {
    fn writing(&self, export_name: &OsStr, offset: u64, length: u64, may_wait: bool) -> Announced {
        let volume = self.0.upgrade();
        volume.map_or(Announced::Unheard, |volume| volume.writing(export_name, offset, length, may_wait))
    }

    fn withdrawn(&self, export_name: &OsStr, offset: u64, length: u64) {
        if let Some(volume) = self.0.upgrade() {
            volume.withdrawn(export_name, offset, length);
        }
    }

    fn written(&self, export_name: &OsStr, offset: u64, length: u64) {
        if let Some(volume) = self.0.upgrade() {
            volume.written(export_name, offset, length);
        }
    }
}
