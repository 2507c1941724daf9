//! A disk that is a `Vec<u8>`, for both examples.

use std::sync::{Arc, Mutex};

use nbdkit_core::{Caps, Chain, Flags, Handle, Info, Open, Plugin, Result};

#[derive(Clone)]
struct Disk(Arc<Mutex<Vec<u8>>>);

impl Plugin for Disk {
    fn info(&self) -> Info {
        Info::bundled("vec", "a disk in memory", "")
    }

    fn open(&self, _: &Open) -> Result<Box<dyn Handle>> {
        Ok(Box::new(self.clone()))
    }
}

impl Handle for Disk {
    fn capabilities(&self) -> Result<Caps> {
        let mut caps = Caps::of_size(self.0.lock().expect("the disk").len() as u64);
        (caps.write, caps.multi_conn) = (true, true);
        Ok(caps)
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        buf.copy_from_slice(&self.0.lock().expect("the disk")[offset as usize..][..buf.len()]);
        Ok(())
    }

    fn pwrite(&self, buf: &[u8], offset: u64, _: Flags) -> Result<()> {
        self.0.lock().expect("the disk")[offset as usize..][..buf.len()].copy_from_slice(buf);
        Ok(())
    }
}

/// The chain: no filters, and this plugin, ready to be opened.
pub(crate) fn chain(bytes: Vec<u8>) -> anyhow::Result<Arc<Chain>> {
    let mut chain = Chain::new(Box::new(Disk(Arc::new(Mutex::new(bytes)))), Vec::new());
    chain.config_complete()?;
    chain.get_ready()?;
    let chain = Arc::new(chain);
    chain.after_fork()?;
    Ok(chain)
}
