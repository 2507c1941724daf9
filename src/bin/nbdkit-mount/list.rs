//! `--list`: what is on the disks of a chain, without mounting anything.

mod columns;
mod json;

use std::{
    ffi::{OsStr, OsString},
    io::Write as _,
    sync::Arc,
};

use anyhow::{Context as _, Result, bail, ensure};
use nbdkit_cli::chain;
use nbdkit_common::{
    Content, HEAD, ImageFormat, Survey, TAIL, detect_content,
    lvm::{Assembly, PhysicalVolume, assemble, read_physical_volume},
    read_aligned,
};
use nbdkit_core::{Chain, Client, Connection, Peer, Session, ShutdownFlag};
use nbdkit_loader::DebugFlags;

use crate::{args::Args, plan};

/// A disk of the chain.
struct Disk {
    /// The name of its file in a mount.
    file: OsString,
    export: OsString,
    size: u64,
    /// A format that other programs pack disks in.
    format: Option<ImageFormat>,
    survey: Survey,
}

/// A logical volume.
struct Volume {
    /// The name that the device mapper has for it.
    device: String,
    group: String,
    name: String,
    id: String,
    size: u64,
    content: Option<Content>,
    /// Why it cannot be looked into.
    refused: Option<String>,
}

/// All that is listed.
#[derive(Default)]
struct Listing {
    disks: Vec<Disk>,
    volumes: Vec<Volume>,
    /// What is wrong with exports and volume groups.
    warnings: Vec<String>,
}

/// Where a physical volume is: a part of a disk.
struct Place {
    session: Arc<Session>,
    start: u64,
}

/// Prints what there is.
///
/// # Errors
/// Those of the layers.
pub(crate) fn list(args: &Args) -> Result<u8> {
    let Some((plugin, parameters)) = args.words.split_first() else {
        bail!("--list needs a disk: nbdkit-mount --list PLUGIN [[KEY=]VALUE ...]");
    };
    let sector_size = plan::sector_size(args)?;
    chain::check_order(&args.words)?;
    let mut chain = chain::load(plugin, &args.filter, DebugFlags::default())?;
    chain.set_readonly(true);
    chain::configure(&mut chain, parameters)?;
    chain.config_complete()?;
    chain.get_ready()?;
    let chain = Arc::new(chain);
    chain.after_fork()?;
    let listing = Listing::new(&chain, args, sector_size);
    chain.cleanup();
    let listing = listing?;
    let text = if args.json { format!("{}\n", listing.json()) } else { listing.text(columns::width()) };
    std::io::stdout().write_all(text.as_bytes()).context("cannot print")?;
    Ok(0)
}

impl Listing {
    fn new(chain: &Arc<Chain>, args: &Args, sector_size: Option<u64>) -> Result<Listing> {
        let client = Arc::new(Client::new(1, Peer::Local, Arc::new(ShutdownFlag::new())));
        let connection = Arc::new(chain.connect(client, true)?);
        let exports = exports(&connection, args.export.as_deref(), &args.filename)?;
        let alone = exports.len() == 1;
        let mut listing = Listing::default();
        let (mut places, mut physical) = (Vec::new(), Vec::new());
        for (export, file) in exports {
            let session = match connection.open(&export, false) {
                Ok(session) => Arc::new(session),
                Err(e) if alone => return Err(e.into()),
                Err(e) => {
                    listing.warnings.push(format!("{}: {e}", file.display()));
                    continue;
                }
            };
            let size = session.size();
            let read = |buf: &mut [u8], offset| read(&session, buf, offset);
            let survey = Survey::new(size, sector_size, read);
            let whole = survey.whole.iter().map(|content| (0, size, content));
            let partitions = survey.partitions().filter_map(|(partition, content)| {
                Some((partition.start, partition.length_within(size), content?))
            });
            for (start, length, _) in whole.chain(partitions).filter(|(.., content)| content.kind == LVM) {
                let found = read_physical_volume(length, |buf: &mut [u8], offset| read(buf, start + offset));
                match found {
                    Ok(Some(volume)) => {
                        let warning = volume.warning.iter();
                        listing
                            .warnings
                            .extend(warning.map(|warning| format!("{}: {warning}", file.display())));
                        physical.push((volume, length));
                        places.push(Place { session: session.clone(), start });
                    }
                    Ok(None) => {}
                    Err(e) => listing.warnings.push(format!("{}: {e}", file.display())),
                }
            }
            listing.disks.push(Disk { file, export, size, format: format(&session), survey });
        }
        listing.add_volumes(&physical, &places);
        Ok(listing)
    }

    fn add_volumes(&mut self, physical: &[(PhysicalVolume, u64)], places: &[Place]) {
        for assembly in assemble(physical) {
            for volume in &assembly.group.volumes {
                let refused = assembly.check(volume).err();
                let content = match refused {
                    Some(_) => Ok(None),
                    None => detect_content(volume.size, |buf: &mut [u8], offset| {
                        read_volume(&assembly, volume, places, buf, offset)
                    }),
                };
                let device = assembly.group.device_name(volume);
                let content = content.unwrap_or_else(|e| {
                    self.warnings.push(format!("{device} cannot be read: {e}"));
                    None
                });
                self.volumes.push(Volume {
                    device,
                    group: assembly.group.name.clone(),
                    name: volume.name.clone(),
                    id: volume.id.clone(),
                    size: volume.size,
                    content,
                    refused,
                });
            }
        }
    }
}

/// The type of what is a physical volume.
const LVM: &str = "LVM2_member";

fn read_volume(
    assembly: &Assembly,
    volume: &nbdkit_common::lvm::Volume,
    places: &[Place],
    buf: &mut [u8],
    offset: u64,
) -> nbdkit_core::Result<()> {
    let whole = assembly.read(volume, buf, offset, |disk, piece, at| {
        read(&places[disk].session, piece, places[disk].start + at)
    })?;
    if whole { Ok(()) } else { Err(nbdkit_core::Errno::EIO.into()) }
}

/// Reads in the blocks that the disk takes.
fn read(session: &Session, buf: &mut [u8], offset: u64) -> nbdkit_core::Result<()> {
    let shape = (session.size(), session.caps().block_size.minimum);
    read_aligned(buf, offset, shape, |buf, offset| session.pread(buf, offset))
}

/// Pairs of an export's name and that of its file.
fn exports(
    connection: &Connection,
    export: Option<&OsStr>,
    filename: &OsStr,
) -> Result<Vec<(OsString, OsString)>> {
    let default = connection.default_export(false)?;
    if let Some(export) = export.filter(|export| !export.is_empty()) {
        return Ok(vec![(export.to_owned(), filename.to_owned())]);
    }
    let listed = match connection.list_exports(false) {
        Ok(listed) => listed,
        Err(_) if default.is_some() => nbdkit_core::Exports::new(),
        Err(e) => return Err(e).context("the exports cannot be listed: name one with -e"),
    };
    let names = listed.into_iter().map(|export| export.name.as_os_str());
    let exports = nbdkit_fuse::file_names(default.as_deref(), names, filename);
    ensure!(!exports.is_empty(), "the plugin has no exports: name one with -e");
    Ok(exports)
}

/// The format of an image that is served as if it were a disk.
fn format(session: &Session) -> Option<ImageFormat> {
    let size = session.size();
    let part = |length: usize, at: u64| {
        let mut buf = vec![0; size.min(length as u64) as usize];
        if !buf.is_empty() {
            read(session, &mut buf, at).ok()?;
        }
        Some(buf)
    };
    let found = ImageFormat::detect(&part(HEAD, 0)?, &part(TAIL, size.saturating_sub(TAIL as u64))?);
    // That is a disk's content too, and listed as such.
    found.filter(|format| format.name != "luks")
}
