//! What the fuzz targets share: a disk in memory, chains over it, and a look at all that a chain tells of a disk.

use std::{ffi::OsStr, sync::Arc};

use nbdkit_core::{
    Caps, Chain, Client, Errno, Extents, Flags, Handle, Info, Open, Outcome, Peer, Plugin, Request, Result,
    Session, ShutdownFlag,
};
use parking_lot::Mutex;

pub mod wire;

/// A disk that is the bytes of an input. It does everything itself.
#[derive(Clone)]
pub struct Disk {
    bytes: Arc<Mutex<Vec<u8>>>,
    readonly: bool,
}

impl Disk {
    /// A disk with these bytes.
    pub fn new(bytes: Vec<u8>) -> Self {
        Disk { bytes: Arc::new(Mutex::new(bytes)), readonly: false }
    }

    /// A disk that nobody may write to.
    pub fn readonly(bytes: Vec<u8>) -> Self {
        Disk { readonly: true, ..Disk::new(bytes) }
    }

    /// What it holds.
    pub fn contents(&self) -> Vec<u8> {
        self.bytes.lock().clone()
    }

    /// A chain of these filters, the outermost first, over the disk. None: the parameters are refused.
    pub fn chain(&self, filters: &[&str], params: &[(&str, &OsStr)]) -> Option<Arc<Chain>> {
        let filters = filters.iter().map(|name| nbdkit_filters::load(name).expect("a filter of that name"));
        chain(Box::new(self.clone()), filters.collect(), params)
    }
}

/// A configured chain. None: the parameters are refused.
pub fn chain(
    plugin: Box<dyn Plugin>,
    filters: Vec<Box<dyn nbdkit_core::Filter>>,
    params: &[(&str, &OsStr)],
) -> Option<Arc<Chain>> {
    let mut chain = Chain::new(plugin, filters);
    for (key, value) in params {
        chain.config(key, value).ok()?;
    }
    chain.config_complete().ok()?;
    chain.get_ready().ok()?;
    let chain = Arc::new(chain);
    chain.after_fork().ok()?;
    Some(chain)
}

/// Opens the default export.
pub fn open(chain: &Arc<Chain>, readonly: bool) -> Option<Session> {
    let client = Arc::new(Client::new(1, Peer::Local, Arc::new(ShutdownFlag::new())));
    let connection = Arc::new(chain.connect(client, readonly).ok()?);
    connection.open(OsStr::new(""), false).ok()
}

/// Looks at everything that a chain tells of a disk, as far as `most` bytes.
pub fn explore(chain: &Arc<Chain>, most: u64) {
    let Some(session) = open(chain, false) else { return };
    let size = session.size();
    let _ = session.export_description();
    let mut buf = vec![0; 65_536];
    let mut at = 0;
    while at < size.min(most) {
        let length = (size - at).min(buf.len() as u64);
        let _ = session.pread(&mut buf[..length as usize], at);
        let _ = session.extents(length, at, Flags::empty());
        at += length;
    }
    if let Some(last) = size.checked_sub(512) {
        let _ = session.pread(&mut buf[..512], last);
    }
    if session.caps().write && size >= 4096 {
        let _ = session.pwrite(&buf[..4096], (size - 4096) / 2, Flags::empty());
        if session.caps().zero != nbdkit_core::Support::None {
            let _ = session.zero(4096, 0, Flags::empty());
        }
        if session.caps().flush {
            let _ = session.flush();
        }
    }
}

impl Plugin for Disk {
    fn info(&self) -> Info {
        Info::bundled("disk", "the bytes of an input", "")
    }

    fn open(&self, open: &Open) -> Result<Box<dyn Handle>> {
        Ok(Box::new(Disk { readonly: self.readonly || open.readonly, ..self.clone() }))
    }
}

impl Handle for Disk {
    fn capabilities(&self) -> Result<Caps> {
        Ok(Caps::native(self.bytes.lock().len() as u64).with_write(!self.readonly))
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        request.run(self)
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let bytes = self.bytes.lock();
        let from = bytes.get(offset as usize..).and_then(|rest| rest.get(..buf.len())).ok_or(Errno::EIO)?;
        buf.copy_from_slice(from);
        Ok(())
    }

    fn pwrite(&self, buf: &[u8], offset: u64, _: Flags) -> Result<()> {
        self.bytes.lock()[offset as usize..][..buf.len()].copy_from_slice(buf);
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn trim(&self, _: u64, _: u64, _: Flags) -> Result<()> {
        Ok(())
    }

    fn zero(&self, length: u64, offset: u64, _: Flags) -> Result<()> {
        self.bytes.lock()[offset as usize..][..length as usize].fill(0);
        Ok(())
    }

    fn cache(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }

    fn extents(&self, length: u64, offset: u64, _: Flags, extents: &mut Extents) -> Result<()> {
        // Sectors of zeroes are holes.
        let bytes = self.bytes.lock();
        for at in (offset..offset + length).step_by(512) {
            let to = (at + 512).min(offset + length);
            let zero = bytes[at as usize..to as usize].iter().all(|byte| *byte == 0);
            extents.add(at, to - at, zero, zero)?;
        }
        Ok(())
    }
}
