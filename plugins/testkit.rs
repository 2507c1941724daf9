//! What tests of plugins that hold a disk share: a started plugin, and a comparison with a byte-array model.

use std::{ffi::OsStr, fs, path::PathBuf, sync::Arc};

use nbdkit_core::{Chain, Client, Flags, Peer, Result, Session, ShutdownFlag};
use proptest::{collection, prelude::*, strategy::ValueTree, test_runner::TestRunner};

mod offers;

pub(crate) use crate::conformance::suite::lend;
pub(crate) use offers::{Offered, Waiting, offer};

/// A file of that content.
pub(crate) fn file(dir: &tempfile::TempDir, name: &str, content: &[u8]) -> PathBuf {
    let path = dir.path().join(name);
    fs::write(&path, content).unwrap();
    path
}

/// A started chain of the plugin alone.
///
/// # Errors
/// Those of its configuration.
pub(crate) fn start(plugin: &str, params: &[(&str, &str)]) -> anyhow::Result<Arc<Chain>> {
    let mut chain = Chain::new(crate::load(plugin).expect("the plugin is registered"), Vec::new());
    for (key, value) in params {
        chain.config(key, OsStr::new(value))?;
    }
    chain.config_complete()?;
    chain.get_ready()?;
    let chain = Arc::new(chain);
    chain.after_fork()?;
    Ok(chain)
}

/// Opens an export for a client that comes from `peer`.
///
/// # Errors
/// Those of the plugin.
pub(crate) fn open_as(chain: &Arc<Chain>, peer: Peer, name: &str) -> Result<Session> {
    let client = Arc::new(Client::new(1, peer, Arc::new(ShutdownFlag::new())));
    Arc::new(chain.connect(client, false)?).open(OsStr::new(name), false)
}

/// Opens the default export.
///
/// # Errors
/// Those of the plugin.
pub(crate) fn open(chain: &Arc<Chain>) -> Result<Session> {
    open_as(chain, Peer::Local, "")
}

/// The open disk of a plugin; panics on any error.
pub(crate) fn disk(plugin: &str, params: &[(&str, &str)]) -> Session {
    open(&start(plugin, params).unwrap()).unwrap()
}

/// The error of configuring a plugin, on one line.
pub(crate) fn config_error(plugin: &str, params: &[(&str, &str)]) -> String {
    format!("{:#}", start(plugin, params).expect_err("the configuration must fail"))
}

/// The content of a small disk.
pub(crate) fn read_all(disk: &Session) -> Vec<u8> {
    let mut bytes = vec![0xaa; disk.size() as usize];
    if !bytes.is_empty() {
        disk.pread(&mut bytes, 0).unwrap();
    }
    bytes
}

/// Offset, length and kind of the extents of a range.
pub(crate) fn extents(disk: &Session, offset: u64, length: u64) -> Vec<(u64, u64, u32)> {
    let extents = disk.extents(length, offset, Flags::empty()).unwrap();
    extents.iter().map(|extent| (extent.offset, extent.length, extent.kind())).collect()
}

/// Runs random changes on a small writable disk and compares it with a byte array after each. Bytes for which
/// `changes` is false keep their value: requests that would change them must fail and change nothing.
pub(crate) fn check_model(disk: &Session, changes: impl Fn(u64) -> bool) {
    let size = disk.size();
    let request = (0..size, 0..size, 0u8..4, any::<u8>(), any::<u32>());
    let mut model = read_all(disk);
    let config = ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() };
    let requests = collection::vec(request, 1..4);
    let mut runner = TestRunner::new(config);
    for _ in 0..200 {
        let batch = requests.new_tree(&mut runner).unwrap().current();
        for (a, b, op, byte, flags) in batch {
            let (offset, length) = (a.min(b), a.abs_diff(b) + 1);
            let flags = Flags::from_bits_truncate(flags);
            let range = offset as usize..(offset + length) as usize;
            let value = if op == 0 { byte } else { 0 };
            let allowed = range.clone().all(|i| changes(i as u64) || model[i] == value);
            let done = match op {
                0 => disk.pwrite(&vec![byte; length as usize], offset, flags & Flags::FUA),
                1 => disk.zero(length, offset, flags & (Flags::FUA | Flags::MAY_TRIM)),
                2 => disk.trim(length, offset, flags & Flags::FUA),
                _ => disk.flush().and_then(|()| disk.cache(length, offset)),
            };
            assert_eq!(done.is_ok(), op > 1 || allowed, "{op} at {offset}+{length}: {done:?}");
            match op {
                // Here a trim of what can change leaves zeroes.
                2 => range.filter(|i| changes(*i as u64)).for_each(|i| model[i] = 0),
                0 | 1 if allowed => model[range].fill(value),
                _ => {}
            }
            let found = read_all(disk);
            let wrong = found.iter().zip(&model).position(|(a, b)| a != b);
            assert_eq!(wrong, None, "first wrong byte after {op} at {offset}+{length}");
            let mut again = vec![1; length as usize];
            if disk.pread_nowait(&mut again, offset).unwrap() {
                assert!(again == model[offset as usize..][..length as usize]);
            }
            for (start, length, kind) in extents(disk, offset, length) {
                let bytes = &model[start as usize..(start + length) as usize];
                assert!(kind & 2 == 0 || bytes.iter().all(|byte| *byte == 0), "extent {start}+{length}");
            }
        }
    }
}
