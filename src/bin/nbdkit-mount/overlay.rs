//! `--commit` and `--discard`: what becomes of the changes that the cow filter has kept in a file.

use std::{path::Path, sync::Arc};

use anyhow::{Context as _, Result, bail, ensure};
use nbdkit_cli::{chain, progress::Progress};
use nbdkit_core::{Chain, Client, Flags, Info, Peer, Session, ShutdownFlag};
use nbdkit_filters::{Change, Changes, OverlayFile};
use nbdkit_loader::DebugFlags;
use serde_json::json;

use crate::args::Args;

/// The filter that makes overlays.
const COW: &str = "cow";

/// Whether it is the filter whose overlays these are, and not one from a shared object.
pub(crate) fn is_cow(info: &Info) -> bool {
    info.name == COW && info.path.is_none()
}

/// Data are copied in pieces of this size, zeroes in larger ones.
const PIECE: u64 = 1 << 20;
const ZEROES: u64 = 1 << 30;

/// Removes an overlay, and with it its changes.
///
/// # Errors
/// It is no overlay, or in use.
pub(crate) fn discard(path: &Path, args: &Args) -> Result<u8> {
    ensure!(args.words.is_empty(), "--discard needs no disk: leave out everything after the overlay's name");
    let overlay = OverlayFile::open(path, args.export.as_deref())?;
    let progress = Progress::new("discard", 0, args.json);
    overlay.remove()?;
    progress.finish(json!({}));
    Ok(0)
}

/// Writes the changes in an overlay to the disk that it belongs to, and empties it. Until they are all safe on the disk
/// the overlay keeps them, so that it can be done again after a failure on the way.
///
/// # Errors
/// It is no overlay, in use, or of another disk; the disk cannot be written to. Those of the layers.
pub(crate) fn commit(path: &Path, args: &Args) -> Result<u8> {
    let Some((plugin, parameters)) = args.words.split_first() else {
        bail!(
            "--commit needs the disk that the overlay belongs to: nbdkit-mount --commit OVERLAY PLUGIN [[KEY=]VALUE ...]"
        );
    };
    let overlay = OverlayFile::open(&std::path::absolute(path)?, args.export.as_deref())?;
    let mut chain = chain::load(plugin, &args.filter, DebugFlags::default())?;
    // It would take the changes and lose them, or keep them in another overlay.
    if chain.filters().any(|filter| filter.info().name == COW) {
        bail!("--commit writes to the disk itself: leave out --filter=cow");
    }
    chain::configure(&mut chain, parameters)?;
    chain.config_complete()?;
    chain.get_ready()?;
    let chain = Arc::new(chain);
    chain.after_fork()?;
    let committed = open(&chain, args, &overlay).and_then(|disk| copy(&disk, overlay, args));
    chain.cleanup();
    committed?;
    Ok(0)
}

/// Opens the disk for writing: the export that was named, or that of the overlay, or the default one.
fn open(chain: &Arc<Chain>, args: &Args, overlay: &OverlayFile) -> Result<Session> {
    let client = Arc::new(Client::new(1, Peer::Local, Arc::new(ShutdownFlag::new())));
    let connection = Arc::new(chain.connect(client, false)?);
    let named = args.export.as_deref().or(overlay.export()).filter(|name| !name.is_empty());
    let export = match named {
        Some(export) => export.to_owned(),
        None => connection.default_export(false)?.context("there is no default export: name one with -e")?,
    };
    let disk = connection.open(&export, false)?;
    ensure!(disk.caps().write, "the disk is read-only: the overlay cannot be committed to it");
    Ok(disk)
}

fn copy(disk: &Session, overlay: OverlayFile, args: &Args) -> Result<()> {
    let path = overlay.path().to_owned();
    let changes = overlay.changes(disk, args.force)?;
    changes.begin()?;
    let sum = |zero| changes.iter().filter(|c| c.zero == zero).map(|c| c.length).sum::<u64>();
    let (data, zeroes) = (sum(false), sum(true));
    let mut progress = Progress::new("commit", data + zeroes, args.json);
    let mut buf = vec![0; piece(disk, PIECE) as usize];
    for change in changes.iter() {
        copy_change(disk, &changes, change, &mut buf, &mut progress).with_context(|| {
            format!(
                "the commit is not complete, but nothing is lost: {} still has all changes",
                path.display()
            )
        })?;
    }
    if disk.caps().flush {
        disk.flush().with_context(|| {
            format!("the disk could not be flushed, but {} still has all changes", path.display())
        })?;
    }
    changes.finish(disk).context("the changes are on the disk, but the overlay could not be emptied")?;
    progress.finish(json!({ "data": data, "zeroes": zeroes }));
    Ok(())
}

/// The largest piece of at most `wanted` bytes that the disk takes.
fn piece(disk: &Session, wanted: u64) -> u64 {
    match u64::from(disk.caps().block_size.maximum) {
        0 => wanted,
        maximum => maximum.min(wanted),
    }
}

fn copy_change(
    disk: &Session,
    changes: &Changes,
    change: Change,
    buf: &mut [u8],
    progress: &mut Progress,
) -> nbdkit_core::Result<()> {
    let end = change.offset + change.length;
    let mut at = change.offset;
    while at < end {
        let length = if change.zero {
            let length = piece(disk, ZEROES).min(end - at);
            disk.zero(length, at, Flags::MAY_TRIM)?;
            length
        } else {
            let length = (buf.len() as u64).min(end - at);
            let part = &mut buf[..length as usize];
            changes.read(part, at)?;
            disk.pwrite(part, at, Flags::empty())?;
            length
        };
        at += length;
        progress.advance(length);
    }
    Ok(())
}
