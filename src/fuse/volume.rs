//! The files of a mount: exports that are opened when they are first looked up, and their partitions.

use std::{
    collections::HashMap,
    ffi::{OsStr, OsString},
    ops::Range,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use fuser::{Errno, INodeNo};
use nbdkit_core::{
    Announced, Chain, Connection, WriteObserver,
    sync::{Mutex, RwLock},
};

use crate::{
    attr::Owner,
    coherence::{Coherence, Stale, Write},
    export_file::{self, ExportFile},
    partitions::{self, Place, Table},
    passthrough::Passthrough,
    tree::{self, Node, PARTITIONS, Tree},
};

/// An export of the mount.
struct Disk {
    /// The export's name, the default one resolved.
    export: OsString,
    opening: Mutex<()>,
    opened: OnceLock<Opened>,
}

pub(crate) struct Opened {
    whole: Arc<ExportFile>,
    table: Mutex<Table>,
}

impl Opened {
    /// Whether something was written to a partition since it was last flushed.
    fn partitions_unflushed(&self) -> bool {
        self.table.lock().files.iter().any(|(_, file)| file.is_unflushed())
    }
}

/// How files are shown.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Style {
    pub(crate) owner: Owner,
    /// The mount can be written to.
    pub(crate) writable: bool,
    /// Show the partitions too.
    pub(crate) partitions: bool,
    /// What their tables count in, in bytes. None: found out.
    pub(crate) sector_size: Option<u64>,
    /// Let the kernel have files that nobody has to look at.
    pub(crate) passthrough: bool,
}

/// See the module.
pub(crate) struct Volume {
    pub(crate) tree: Tree,
    pub(crate) style: Style,
    pub(crate) coherence: Arc<Coherence>,
    disks: Vec<Disk>,
    /// What the empty export name stands for, if anything.
    default: Option<OsString>,
    connection: Arc<Connection>,
    /// The partitions there are now, by inode number.
    partitions: RwLock<HashMap<INodeNo, Arc<ExportFile>>>,
    next_partition: AtomicU64,
    /// Exports that the chain is opening.
    opening: AtomicUsize,
    observer: OnceLock<Arc<dyn WriteObserver>>,
}

/// A file, without a count of references to whole exports: those stay open as long as the mount.
pub(crate) enum FileRef<'a> {
    Whole(&'a Arc<ExportFile>),
    Partition(Arc<ExportFile>),
}

impl std::ops::Deref for FileRef<'_> {
    type Target = Arc<ExportFile>;

    #[inline]
    fn deref(&self) -> &Arc<ExportFile> {
        match self {
            FileRef::Whole(file) => file,
            FileRef::Partition(file) => file,
        }
    }
}

/// An entry of the directory.
pub(crate) struct Entry {
    pub(crate) ino: INodeNo,
    pub(crate) name: OsString,
}

impl Volume {
    /// The files of the exports named, none of them open. `exports` are in the order of the tree.
    pub(crate) fn new(
        connection: Arc<Connection>,
        default: Option<OsString>,
        (tree, exports): (Tree, Vec<OsString>),
        style: Style,
    ) -> Self {
        let disks = exports
            .into_iter()
            .map(|export| Disk { export, opening: Mutex::default(), opened: OnceLock::new() })
            .collect();
        Volume {
            tree,
            style,
            coherence: Arc::default(),
            disks,
            default,
            connection,
            partitions: RwLock::default(),
            next_partition: AtomicU64::new(PARTITIONS),
            opening: AtomicUsize::new(0),
            observer: OnceLock::new(),
        }
    }

    /// Sets who is not told of what is written through the mount. To be called before anything is opened.
    pub(crate) fn set_observer(&self, observer: Arc<dyn WriteObserver>) {
        let _ = self.observer.set(observer);
    }

    /// Who is not told of what is written through the mount.
    pub(crate) fn observer(&self) -> Option<Arc<dyn WriteObserver>> {
        self.observer.get().cloned()
    }

    /// What the files are made by.
    pub(crate) fn chain(&self) -> &Arc<Chain> {
        self.connection.chain()
    }

    /// The file with this inode number, if it is open.
    #[inline]
    pub(crate) fn file(&self, ino: INodeNo) -> Result<FileRef<'_>, Errno> {
        match self.tree.node(ino) {
            Some(Node::Export(index)) => self.whole(index).map(FileRef::Whole).ok_or(Errno::ENOENT),
            Some(Node::Directory | Node::ByName) => Err(Errno::EISDIR),
            Some(Node::Link) => Err(Errno::ELOOP),
            // The table says something else by now.
            Some(Node::Partition) => {
                self.partitions.read().get(&ino).cloned().map(FileRef::Partition).ok_or(Errno::ESTALE)
            }
            None => Err(Errno::ENOENT),
        }
    }

    fn whole(&self, index: usize) -> Option<&Arc<ExportFile>> {
        self.disks.get(index)?.opened.get().map(|opened| &opened.whole)
    }

    /// The files that are open and are whole exports.
    pub(crate) fn opened(&self) -> impl Iterator<Item = &Arc<ExportFile>> {
        self.disks.iter().filter_map(|disk| disk.opened.get()).map(|opened| &opened.whole)
    }

    /// The same, and whether something was written to it, or to one of its partitions, since the last flush.
    pub(crate) fn unflushed(&self) -> impl Iterator<Item = (&Arc<ExportFile>, bool)> {
        self.disks.iter().filter_map(|disk| disk.opened.get()).map(|opened| {
            let partitions = opened.partitions_unflushed();
            (&opened.whole, opened.whole.is_unflushed() || partitions)
        })
    }

    /// Whether something was written since the last flush.
    pub(crate) fn is_unflushed(&self) -> bool {
        self.unflushed().any(|(_, unflushed)| unflushed)
    }

    /// Opens an export unless it is open.
    ///
    /// # Errors
    /// Those of the chain.
    pub(crate) fn open(&self, index: usize) -> anyhow::Result<Arc<ExportFile>> {
        Ok(self.open_disk(index)?.whole.clone())
    }

    fn open_disk(&self, index: usize) -> anyhow::Result<&Opened> {
        let disk = self.disks.get(index).ok_or_else(|| anyhow::anyhow!("no such export"))?;
        let _opening = disk.opening.lock();
        if let Some(opened) = disk.opened.get() {
            return Ok(opened);
        }
        self.opening.fetch_add(1, Ordering::AcqRel);
        let session = self.connection.open(&disk.export, false);
        self.opening.fetch_sub(1, Ordering::AcqRel);
        let mut session = session?;
        if let Some(observer) = self.observer.get() {
            session.set_observer(observer.clone());
        }
        let minimum = session.caps().block_size.minimum;
        if minimum > 1 {
            log::warn!(
                "the disk takes only requests of multiples of {minimum} bytes, and programs may make others: put \
                 --filter=blocksize with minblock={minimum} over it"
            );
        }
        let passthrough = Passthrough::decide(self.style.passthrough, &session);
        let (size, place) = (session.size(), (self.tree.inode(index), index));
        let whole =
            Arc::new(ExportFile::new(place, Arc::new(session), 0..size, self.style.owner, passthrough));
        Ok(disk.opened.get_or_init(|| Opened { whole, table: Mutex::default() }))
    }

    /// The file with this name, for a lookup by the kernel: its export is opened if need be.
    ///
    /// # Errors
    /// `ENOENT` when there is none; those of the chain, which were logged.
    pub(crate) fn look_up(&self, name: &OsStr) -> Result<Arc<ExportFile>, Errno> {
        let open = |index| self.open_disk(index).map_err(|e| self.refused(index, &e));
        if let Some(index) = self.tree.export(name) {
            return open(index).map(|opened| opened.whole.clone());
        }
        if !self.style.partitions {
            return Err(Errno::ENOENT);
        }
        let (disk, number) = tree::split_partition_name(name).ok_or(Errno::ENOENT)?;
        let opened = open(self.tree.export(disk).ok_or(Errno::ENOENT)?)?;
        let table = self.table(opened);
        let found = table.files.iter().find(|(place, _)| place.number == number);
        found.map(|(_, file)| file.clone()).ok_or(Errno::ENOENT)
    }

    fn refused(&self, index: usize, e: &anyhow::Error) -> Errno {
        let name = self.tree.names().get(index).map(|name| name.display().to_string()).unwrap_or_default();
        log::error!("{name}: {e:#}");
        e.downcast_ref::<nbdkit_core::Error>().map_or(Errno::EIO, export_file::errno)
    }

    /// An export, opened if need be; None if it cannot be, which was logged.
    pub(crate) fn opened_disk(&self, index: usize) -> Option<&Opened> {
        self.open_disk(index).map_err(|e| self.refused(index, &e)).ok()
    }

    /// Whether the chain is opening an export.
    pub(crate) fn is_opening(&self) -> bool {
        self.opening.load(Ordering::Acquire) > 0
    }

    /// Whether [`look_up`](Self::look_up) has nothing to wait for.
    pub(crate) fn is_at_hand(&self, name: &OsStr) -> bool {
        match self.tree.export(name) {
            Some(index) => self.whole(index).is_some(),
            None => !self.style.partitions,
        }
    }

    /// The table of a disk as it is now.
    pub(crate) fn table<'a>(&self, opened: &'a Opened) -> parking_lot::MutexGuard<'a, Table> {
        let mut table = opened.table.lock();
        if table.is_stale() {
            let whole = &opened.whole;
            let read = partitions::read(&whole.session, self.style.sector_size);
            let name =
                self.tree.names().get(whole.disk).map(|name| name.to_string_lossy()).unwrap_or_default();
            let gone = table.update(&name, whole.size(), read, |place| self.partition(whole, place));
            let mut partitions = self.partitions.write();
            gone.iter().for_each(|file| drop(partitions.remove(&file.ino)));
            partitions.extend(table.files.iter().map(|(_, file)| (file.ino, file.clone())));
        }
        table
    }

    fn partition(&self, whole: &ExportFile, place: Place) -> Arc<ExportFile> {
        let ino = INodeNo(self.next_partition.fetch_add(1, Ordering::Relaxed));
        let range = place.start..place.start + place.length;
        let session = whole.session.clone();
        Arc::new(ExportFile::new((ino, whole.disk), session, range, self.style.owner, Passthrough::Off))
    }

    /// The entries of the directory. With partitions, that opens the exports; one that cannot be opened has none.
    pub(crate) fn entries(&self) -> Vec<Entry> {
        let mut entries = Vec::new();
        for (index, name) in self.tree.names().iter().enumerate() {
            entries.push(Entry { ino: self.tree.inode(index), name: name.clone() });
            if !self.style.partitions {
                continue;
            }
            let Ok(opened) = self.open_disk(index).map_err(|e| self.refused(index, &e)) else { continue };
            for (place, file) in &self.table(opened).files {
                let name = tree::partition_name(name, place.number);
                if self.tree.export(&name).is_none() {
                    entries.push(Entry { ino: file.ino, name });
                }
            }
        }
        if self.shows_names() && !self.names().is_empty() {
            entries.push(Entry { ino: tree::BY_NAME, name: tree::BY_NAME_DIR.into() });
        }
        entries
    }

    /// Registers a write through `file`, if other files show the same bytes. `from_cache`: the kernel makes it of a page
    /// that it kept.
    pub(crate) fn begin_write(
        &self,
        file: &ExportFile,
        offset: u64,
        length: u64,
        from_cache: bool,
    ) -> Option<PendingWrite> {
        if !self.style.partitions {
            return None;
        }
        let write = Write { disk: file.disk, file: Some(file.ino), range: file.on_disk(offset, length) };
        let stale = self.pages(&write);
        let ticket = self.coherence.begin(write.clone(), &stale, from_cache);
        Some(PendingWrite { write, stale, ticket })
    }

    /// The write was made, or has failed half-way: brings the other files up to date, then calls `answer`. With
    /// `at_once`, `answer` does not wait for that: a write that the kernel makes of its pages must not.
    pub(crate) fn end_write(
        &self,
        pending: PendingWrite,
        at_once: bool,
        answer: impl FnOnce() + Send + 'static,
    ) {
        let stale = self.changed(&pending.write);
        self.coherence.end(pending.ticket, stale, at_once, answer);
    }

    /// Calls `each` with the files that show a part of what a write changes, and the part, but for the one that it came by.
    fn for_files(&self, write: &Write, mut each: impl FnMut(&ExportFile, Range<u64>)) {
        let Some(opened) = self.disks.get(write.disk).and_then(|disk| disk.opened.get()) else { return };
        let mut look = |file: &ExportFile| {
            if Some(file.ino) != write.file
                && let Some(range) = file.shows(&write.range)
            {
                each(file, range);
            }
        };
        look(&opened.whole);
        if self.style.partitions {
            opened.table.lock().files.iter().for_each(|(_, file)| look(file));
        }
    }

    /// The pages that the kernel may have of what a write changes, in other files than its own.
    fn pages(&self, write: &Write) -> Vec<Stale> {
        let mut pages = Vec::new();
        self.for_files(write, |file, range| {
            if file.was_opened() {
                pages.push(Stale { file: file.ino, range });
            }
        });
        pages
    }

    /// Notes that a disk was changed. Returns what [`pages`](Self::pages) does.
    fn changed(&self, write: &Write) -> Vec<Stale> {
        let opened = self.disks.get(write.disk).and_then(|disk| disk.opened.get());
        self.for_files(write, |file, _| file.attributes.touch());
        if let (Some(opened), true) = (opened, self.style.partitions) {
            opened.table.lock().written(&write.range);
        }
        self.pages(write)
    }

    /// A write by another front end. None: no file shows it.
    fn elsewhere(&self, export: &OsStr, offset: u64, length: u64) -> Option<Write> {
        let export = if export.is_empty() { self.default.as_deref() } else { Some(export) };
        let disk = self.disks.iter().position(|disk| Some(disk.export.as_os_str()) == export)?;
        Some(Write { disk, file: None, range: offset..offset.saturating_add(length) })
    }
}

/// Keeps the kernel's cache true when somebody writes by another front end. That waits for requests of the kernel that
/// hold the pages in question; those are answered by other threads.
impl WriteObserver for Volume {
    fn writing(&self, export_name: &OsStr, offset: u64, length: u64, may_wait: bool) -> Announced {
        let Some(write) = self.elsewhere(export_name, offset, length) else { return Announced::Unheard };
        let stale = self.pages(&write);
        if stale.is_empty() {
            return Announced::Unheard;
        }
        if !may_wait {
            return Announced::NeedsThread;
        }
        self.coherence.begin_elsewhere(write, &stale);
        Announced::Heard
    }

    fn withdrawn(&self, export_name: &OsStr, offset: u64, length: u64) {
        if let Some(write) = self.elsewhere(export_name, offset, length) {
            self.coherence.end_elsewhere(&write);
        }
    }

    fn written(&self, export_name: &OsStr, offset: u64, length: u64) {
        let Some(write) = self.elsewhere(export_name, offset, length) else { return };
        self.coherence.end_elsewhere(&write);
        for stale in self.changed(&write) {
            self.coherence.drop_pages(&stale);
        }
    }
}

/// A write that other files have to be told of.
pub(crate) struct PendingWrite {
    write: Write,
    /// Pages that are in its way.
    stale: Vec<Stale>,
    ticket: crate::coherence::Ticket,
}

impl PendingWrite {
    /// Whether pages are in its way, so that it has to go through [`Coherence::before`] first.
    pub(crate) fn is_blocked(&self) -> bool {
        self.ticket.blocked
    }

    /// Its pages and its number, for [`Coherence::before`].
    pub(crate) fn take_blocking(&mut self) -> (u64, Vec<Stale>) {
        (self.ticket.number(), std::mem::take(&mut self.stale))
    }
}
