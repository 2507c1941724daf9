//! Zero over a plugin that can only write reaches the end of the range, however long the range is.

use std::{ffi::OsStr, sync::Arc};

use nbdkit_core::{Caps, Chain, Client, Flags, Handle, Info, Open, Peer, Plugin, Result, ShutdownFlag};
use parking_lot::Mutex;

const SIZE: usize = 200 << 20;

type Bytes = Arc<Mutex<Vec<u8>>>;

/// A disk with pwrite and without zero.
struct WriteOnly(Bytes);

impl Plugin for WriteOnly {
    fn info(&self) -> Info {
        Info::bundled("write-only", "", "")
    }

    fn open(&self, _: &Open) -> Result<Box<dyn Handle>> {
        Ok(Box::new(Disk(self.0.clone())))
    }
}

struct Disk(Bytes);

impl Handle for Disk {
    fn capabilities(&self) -> Result<Caps> {
        Ok(Caps::of_size(SIZE as u64).with_write(true))
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        buf.copy_from_slice(&self.0.lock()[offset as usize..][..buf.len()]);
        Ok(())
    }

    fn pwrite(&self, buf: &[u8], offset: u64, _: Flags) -> Result<()> {
        self.0.lock()[offset as usize..][..buf.len()].copy_from_slice(buf);
        Ok(())
    }
}

#[test]
fn zero_by_writing_advances_to_the_end() {
    let bytes = Bytes::new(Mutex::new(vec![1; SIZE]));
    let mut chain = Chain::new(Box::new(WriteOnly(bytes.clone())), vec![]);
    chain.config_complete().unwrap();
    chain.get_ready().unwrap();
    let client = Client::new(1, Peer::Local, Arc::new(ShutdownFlag::new()));
    let connection = Arc::new(chain).connect(Arc::new(client), false).unwrap();
    let session = Arc::new(connection).open(OsStr::new(""), false).unwrap();
    session.zero(SIZE as u64 - 6, 3, Flags::empty()).unwrap();
    let bytes = bytes.lock();
    assert!(bytes[..3].iter().chain(&bytes[SIZE - 3..]).all(|b| *b == 1), "more than the range was zeroed");
    assert!(bytes[3..SIZE - 3].iter().all(|b| *b == 0), "old data is left in the range");
}
