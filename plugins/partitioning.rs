//! Files, and disks of other chains, as the partitions of one disk, with a table made around them.
//!
//! A chain is a server in itself, which serves the partition to this plugin: its layers are configured, started and ended with
//! those of the chain that this plugin is in. How large its disk is can be asked only when it serves; then the table is made.

use std::{
    ffi::{OsStr, OsString},
    os::unix::ffi::OsStrExt,
    path::PathBuf,
    sync::{Arc, OnceLock},
};

use anyhow::{Context as _, bail};
use nbdkit_common::{Guid, LINUX, Layout, LayoutError, NewPartition, Regions, SECTOR};
use nbdkit_core::{
    Above, Chain, ChainMaker, Client, Errno, Error, Handle, Info, Open, Peer, Plugin, Result, Session,
    ShutdownFlag, params,
};

use crate::{
    block_file::BlockFile,
    concat::{Concat, Segment},
    image::ImageGuard,
    lock::{Access, Lock},
};

const HELP: &str = "\
file=<FILENAME>            (required, may be repeated) The partitions, in order; or
file='[ [--filter=FILTER...] PLUGIN [KEY=VALUE...] ]'
                           the disk that a plugin serves, perhaps through filters.
partition-type=mbr|gpt     The table (default: MBR for up to 4 partitions and 2 TB).
alignment=<SIZE>           Alignment of the files that follow (default 1M).
mbr-id=<BYTE>|default      Type in an MBR of the files that follow (default 0x83).
type-guid=<GUID>|default   Type in a GPT of the files that follow (default Linux).
lock=off|auto|on           Lock the files against other programs (default auto).";

pub(crate) fn new() -> Box<dyn Plugin> {
    Box::new(Partitioning {
        sources: Vec::new(),
        scheme: None,
        template: NewPartition::new(0),
        disk: OnceLock::new(),
        guard: ImageGuard::default(),
        locks: Vec::new(),
        chains: None,
    })
}

#[derive(Clone, Copy)]
enum Scheme {
    Mbr,
    Gpt,
}

struct Partitioning {
    sources: Vec<(Source, NewPartition)>,
    scheme: Option<Scheme>,
    /// What the next file will be.
    template: NewPartition,
    disk: OnceLock<Arc<Regions<Segment>>>,
    guard: ImageGuard,
    /// Of all files, from the start on.
    locks: Vec<Lock>,
    chains: Option<Arc<dyn ChainMaker>>,
}

/// Where the data of a partition is.
enum Source {
    File(PathBuf),
    Chain(SubChain),
}

/// Another chain, as it was given.
struct SubChain {
    text: OsString,
    /// Until it is ready.
    early: Option<Box<Chain>>,
    chain: OnceLock<Arc<Chain>>,
}

impl Source {
    /// What it is called on the command line.
    fn name(&self) -> &OsStr {
        match self {
            Source::File(path) => path.as_os_str(),
            Source::Chain(chain) => &chain.text,
        }
    }
}

impl SubChain {
    fn chain(&self) -> Result<&Arc<Chain>> {
        self.chain.get().ok_or_else(|| Error::new(Errno::EINVAL, "a chain is not ready"))
    }

    /// Opens it on behalf of somebody.
    fn open(&self, client: Arc<Client>, readonly: bool, tls: bool) -> Result<Session> {
        let connection = Arc::new(self.chain()?.connect(client, readonly)?);
        connection.open(OsStr::new(""), tls).map_err(|e| e.context(self.text.display()))
    }
}

/// A client of a chain below, who stands for one of this chain: the two chains have their own states of him.
fn stand_in(client: &Arc<Client>) -> Arc<Client> {
    let inner = Arc::new(Client::new(client.number, client.peer.clone(), client.server().clone()));
    if let Some(context) = client.security_context.get() {
        let _ = inner.security_context.set(context.clone());
    }
    if let Some(certificate) = client.certificate.get() {
        let _ = inner.certificate.set(certificate.clone());
    }
    let (gone, leave) = (Arc::downgrade(&inner), Arc::downgrade(client));
    client.gone.on_raise(move || {
        if let Some(inner) = gone.upgrade() {
            inner.gone.raise();
        }
    });
    inner.leave.on_raise(move || {
        if let Some(client) = leave.upgrade() {
            client.disconnect(false);
        }
    });
    inner
}

impl Partitioning {
    /// Takes a file or a chain with what holds for it at this place of the command line.
    fn add(&mut self, value: &OsStr) -> anyhow::Result<()> {
        let (source, name) = if value.as_bytes().trim_ascii().starts_with(b"[") {
            (Source::Chain(self.sub_chain(value)?), String::new())
        } else {
            let path = std::path::absolute(value).with_context(|| format!("file={}", value.display()))?;
            BlockFile::check(&path)?;
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            (Source::File(path), name)
        };
        // The same at each start, so that what refers to a partition by its GUID goes on to find it.
        let number = format!("partition {} of ", self.sources.len() + 1);
        let guid = Guid::from_seed(&[number.as_bytes(), source.name().as_bytes()].concat());
        self.sources.push((source, NewPartition { name, guid, ..self.template.clone() }));
        Ok(())
    }

    fn sub_chain(&self, text: &OsStr) -> anyhow::Result<SubChain> {
        let maker = self.chains.as_ref().context("chains cannot be made here")?;
        let chain = maker.make(text).with_context(|| text.to_string_lossy().into_owned())?;
        // A library is there once, with one set of its variables.
        let paths = chain.infos().into_iter().filter_map(|info| info.path);
        for path in paths {
            let others = self.sources.iter().filter_map(|(source, _)| match source {
                Source::Chain(SubChain { early: Some(chain), .. }) => Some(chain.infos()),
                _ => None,
            });
            if others.flatten().any(|other| other.path.as_ref() == Some(&path)) {
                bail!("{} is not bundled, and can be in one partition only", path.display());
            }
        }
        Ok(SubChain { text: text.to_owned(), early: Some(Box::new(chain)), chain: OnceLock::new() })
    }

    /// The chains, in the order of their numbers.
    fn sub_chains(&self) -> impl Iterator<Item = &SubChain> {
        self.sources.iter().filter_map(|(source, _)| match source {
            Source::Chain(chain) => Some(chain),
            Source::File(_) => None,
        })
    }

    /// Makes the disk. `chain_size` tells how large the disks of the chains are.
    fn make(&self, chain_size: impl Fn(&SubChain) -> Result<u64>) -> anyhow::Result<()> {
        let (mut partitions, mut segments, mut chains) = (Vec::new(), Vec::new(), 0);
        for (source, partition) in &self.sources {
            let (length, segment) = match source {
                Source::File(path) => {
                    let file = BlockFile::open(path, false)?;
                    (file.length(), Segment::File(file))
                }
                Source::Chain(chain) => {
                    chains += 1;
                    (chain_size(chain)?, Segment::Chain(chains - 1))
                }
            };
            if length == 0 {
                bail!(
                    "{}: a partition cannot be empty: give a file that holds data",
                    source.name().display()
                );
            }
            partitions.push(NewPartition { length, ..partition.clone() });
            segments.push((length, segment));
        }
        let disk =
            assemble(self.layout(&partitions)?, segments).context("the disk would pass 2^63-1 bytes")?;
        let _ = self.disk.set(Arc::new(disk));
        Ok(())
    }

    fn layout(&self, partitions: &[NewPartition]) -> anyhow::Result<Layout> {
        let paths: Vec<&[u8]> = self.sources.iter().map(|(source, _)| source.name().as_bytes()).collect();
        let gpt = || Layout::gpt(partitions, Guid::from_seed(&paths.join(&0)));
        let layout = match self.scheme {
            Some(Scheme::Mbr) => Layout::mbr(partitions),
            Some(Scheme::Gpt) => gpt(),
            None if partitions.len() > 4 => gpt(),
            None => Layout::mbr(partitions).or_else(|_| gpt()),
        };
        layout.map_err(|e| match e {
            LayoutError::TooLargeForMbr => anyhow::anyhow!(
                "the disk is larger than the 2 TB that an MBR partition table supports: use partition-type=gpt"
            ),
            LayoutError::TooLarge => anyhow::anyhow!("the disk would pass 2^63-1 bytes"),
        })
    }
}

impl Plugin for Partitioning {
    fn info(&self) -> Info {
        Info::bundled("partitioning", "nbdkit partitioning plugin", HELP).magic("file")
    }

    fn callbacks(&self) -> Option<Vec<&'static str>> {
        Some([crate::EVERYTHING, &["config_complete", "get_ready", "after_fork", "cleanup"]].concat())
    }

    fn config(&mut self, key: &str, value: &OsStr) -> anyhow::Result<bool> {
        let default = value.eq_ignore_ascii_case("default");
        match key {
            "file" => self.add(value)?,
            "partition-type" => {
                self.scheme = Some(match params::text(value)?.to_ascii_lowercase().as_str() {
                    "mbr" | "dos" => Scheme::Mbr,
                    "gpt" => Scheme::Gpt,
                    other => bail!("unknown partition-type '{other}': use mbr or gpt"),
                });
            }
            "alignment" => {
                let alignment = params::size(value)?;
                if alignment < SECTOR || !alignment.is_multiple_of(SECTOR) {
                    bail!("partition alignment {alignment} is not a multiple of the sector size {SECTOR}");
                }
                self.template.alignment = alignment;
            }
            "mbr-id" => self.template.mbr_type = if default { 0x83 } else { mbr_type(value)? },
            "type-guid" if default => self.template.gpt_type = LINUX,
            "type-guid" => {
                let guid = params::text(value)?.parse().map_err(|e| anyhow::anyhow!("type-guid: {e}"))?;
                if guid == Guid::NIL {
                    bail!("type-guid: a GUID of zeroes marks an entry that is not used");
                }
                self.template.gpt_type = guid;
            }
            "lock" => return self.guard.config(key, value),
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn set_above(&mut self, above: Above) {
        self.guard.set_above(above);
    }

    fn set_chains(&mut self, chains: &Arc<dyn ChainMaker>) {
        self.chains = Some(chains.clone());
    }

    fn config_complete(&mut self) -> anyhow::Result<()> {
        if self.sources.is_empty() {
            bail!("at least one file= parameter must be supplied");
        }
        for (source, _) in &mut self.sources {
            if let Source::Chain(SubChain { early: Some(chain), text, .. }) = source {
                chain.config_complete().with_context(|| text.to_string_lossy().into_owned())?;
            }
        }
        // Of files alone, what is wrong is told before the server is ready.
        if self.sub_chains().next().is_none() { self.make(|_| Ok(0)) } else { Ok(()) }
    }

    fn get_ready(&mut self) -> anyhow::Result<()> {
        let readonly = !self.guard.may_be_written();
        for (source, _) in &mut self.sources {
            match source {
                // The files were opened for writing, for all clients, before it was known whether anybody does.
                Source::File(path) => {
                    let file = BlockFile::open(path, true)?;
                    self.locks.extend(self.guard.lock(file.file(), path, Access::new(!readonly))?);
                }
                Source::Chain(SubChain { text, early, chain }) => {
                    let mut ready = early.take().context("it was ready before")?;
                    ready.set_readonly(readonly);
                    ready.get_ready().with_context(|| text.to_string_lossy().into_owned())?;
                    let _ = chain.set(Arc::new(*ready));
                }
            }
        }
        Ok(())
    }

    fn after_fork(&self, server: &Arc<ShutdownFlag>) -> anyhow::Result<()> {
        for sub in self.sub_chains() {
            let chain = sub.chain()?;
            chain.after_fork().with_context(|| sub.text.to_string_lossy().into_owned())?;
            let weak = Arc::downgrade(chain);
            server.on_raise(move || {
                if let Some(chain) = weak.upgrade() {
                    chain.server().raise();
                }
            });
        }
        if self.disk.get().is_some() {
            return Ok(());
        }
        self.make(|sub| {
            let client = Arc::new(Client::new(0, Peer::Local, server.clone()));
            Ok(sub.open(client, true, false)?.size())
        })
    }

    fn cleanup(&self) {
        self.sub_chains().filter_map(|sub| sub.chain.get()).for_each(Chain::cleanup);
    }

    fn open(&self, open: &Open) -> Result<Box<dyn Handle>> {
        let disk = self.disk.get().ok_or(Errno::EINVAL)?;
        let mut sessions = Vec::new();
        for (index, sub) in self.sub_chains().enumerate() {
            let session = sub.open(stand_in(&open.client), open.readonly, open.tls)?;
            let is_it = |kind: &Segment| matches!(kind, Segment::Chain(number) if *number == index);
            let region = disk.as_slice().iter().find(|region| is_it(&region.kind));
            if region.is_none_or(|region| region.length != session.size()) {
                let text = "the disk has another size than it had when the server started";
                return Err(Error::new(Errno::EINVAL, text).context(sub.text.display()));
            }
            sessions.push(session);
        }
        Ok(Box::new(Concat::new(disk.clone()).over(sessions)))
    }
}

fn mbr_type(value: &OsStr) -> anyhow::Result<u8> {
    match params::integer("mbr-id", value)? {
        0 => bail!("mbr-id: 0 marks an entry that is not used: use 1 to 0xff"),
        0x05 | 0x0f | 0x85 => bail!("mbr-id: extended partitions are made where they are needed"),
        kind => Ok(kind),
    }
}

/// Puts tables and what has data, with its length, where the layout wants them, with padding between them.
pub(crate) fn assemble(layout: Layout, data: Vec<(u64, Segment)>) -> Option<Regions<Segment>> {
    let tables =
        layout.tables.into_iter().map(|(start, bytes)| (start, bytes.len() as u64, Segment::Fixed(bytes)));
    let data = layout.starts.into_iter().zip(data).map(|(start, (length, segment))| (start, length, segment));
    let mut segments: Vec<_> = tables.chain(data).collect();
    segments.sort_by_key(|(start, ..)| *start);
    let mut disk = Regions::new();
    for (start, length, segment) in segments {
        disk.push(start.checked_sub(disk.size())?, Segment::Padding)?;
        disk.push(length, segment)?;
    }
    disk.push(layout.size.checked_sub(disk.size())?, Segment::Padding)?;
    Some(disk)
}

#[cfg(test)]
#[path = "partitioning_tests.rs"]
mod tests;
