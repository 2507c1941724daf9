//! A mount in this process, for the same counts at the FUSE front end.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::{FileExt, OpenOptionsExt},
    sync::Arc,
};

use nbdkit_core::{Chain, Memory, ShutdownFlag};
use nbdkit_fuse::{Config, Mount};

use super::{Cost, ROUNDS, least};

/// See the module. It is unmounted when dropped.
pub(crate) struct Mounted {
    file: File,
    stop: Arc<ShutdownFlag>,
    mount: Option<Mount>,
    _dir: tempfile::TempDir,
}

impl Mounted {
    pub(crate) fn new(chain: &Arc<Chain>) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let config = Config { mountpoint: dir.path().to_owned(), passthrough: false, ..Config::default() };
        let stop = Arc::new(ShutdownFlag::new());
        let mount = Mount::new(chain.clone(), config, stop.clone()).expect("a mount");
        let direct = rustix::fs::OFlags::DIRECT.bits().cast_signed();
        let file = OpenOptions::new().read(true).write(true).custom_flags(direct).open(mount.file());
        Mounted { file: file.expect("open"), stop, mount: Some(mount), _dir: dir }
    }

    /// What a read or a write takes that is not kept by the kernel.
    pub(crate) fn cost(&self, write: bool, length: usize) -> Cost {
        let mut memory = nbdkit_core::Buffers::default().take(length).expect("memory");
        assert!(Memory::is_aligned(&memory));
        least(ROUNDS as u64, || {
            for n in 0..ROUNDS {
                let offset = (n * length) as u64 % super::DISK;
                if write {
                    self.file.write_all_at(&memory, offset).expect("write");
                } else {
                    self.file.read_exact_at(&mut memory, offset).expect("read");
                }
            }
        })
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        self.file = File::open("/dev/null").expect("open");
        self.stop.raise();
        if let Some(mount) = self.mount.take() {
            mount.wait().expect("unmount");
        }
    }
}
