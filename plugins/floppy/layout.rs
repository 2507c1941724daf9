//! Where everything lies on the disk: the tables of the file system, directories, files.
//!
//! Each file and directory lies in one piece, so a file's part of the disk is the file itself, and the table that chains
//! clusters is computed as it is read: that of a disk of terabytes takes no memory.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail, ensure};
use nbdkit_common::{Guid, Layout, LayoutError, NewPartition, Regions, SECTOR};

use super::{
    names::ENTRY,
    tree::{Directory, Kind, Stamp},
};

/// Copies of the table of clusters.
const TABLES: u64 = 2;
/// The largest clusters, in sectors.
const LARGEST_CLUSTER: u64 = 64;
/// Up to so many clusters of a FAT32 none are made larger: the table of that many takes 8 MiB.
const MANY_CLUSTERS: u64 = 1 << 21;
/// The first cluster there is.
const FIRST: u64 = 2;
/// Most entries of a directory, for it has 2 MiB at most.
const MOST_ENTRIES: usize = 65_536;

/// The file system's kind: how many bits number a cluster. What counts is how many clusters there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fat {
    Fat12,
    Fat16,
    Fat32,
}

/// What the user wants.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub(super) fat: Fat,
    /// In a partition of an MBR.
    pub(super) partitioned: bool,
    /// Blanks: none.
    pub(super) label: [u8; 11],
    /// Of the whole disk, in bytes.
    pub(super) size: Option<u64>,
    /// For the number of the volume.
    pub(super) seed: Vec<u8>,
}

/// What a region of the disk holds.
#[derive(Debug)]
pub(super) enum Part {
    Bytes(Vec<u8>),
    /// The table of clusters.
    Chains,
    File(PathBuf),
    Zeroes,
}

/// The disk.
#[derive(Debug)]
pub(super) struct Disk {
    pub(super) parts: Regions<Part>,
    pub(super) chains: Chains,
}

/// The table of clusters: each file and directory is a chain of clusters that follow each other.
#[derive(Debug)]
pub(super) struct Chains {
    fat: Fat,
    media: u8,
    /// The last cluster of each chain, ascending.
    ends: Vec<u32>,
}

/// The sizes of a file system's parts, in sectors unless said.
#[derive(Clone, Copy, Debug)]
struct Geometry {
    fat: Fat,
    /// Before the first table.
    reserved: u64,
    table: u64,
    /// Of the root directory of FAT12 and FAT16, which has a place of its own.
    root_entries: usize,
    cluster: u64,
    clusters: u64,
    total: u64,
    /// How disks of that size were read in their time.
    media: u8,
    track: u16,
    heads: u16,
}

impl Fat {
    /// The numbers of clusters that make it what it is.
    fn clusters(self) -> std::ops::RangeInclusive<u64> {
        match self {
            Fat::Fat12 => 1..=4084,
            Fat::Fat16 => 4085..=65_524,
            Fat::Fat32 => 65_525..=0x0fff_fff4,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Fat::Fat12 => "fat12",
            Fat::Fat16 => "fat16",
            Fat::Fat32 => "fat32",
        }
    }

    fn table_sectors(self, clusters: u64) -> u64 {
        let entries = clusters + FIRST;
        let bytes = match self {
            Fat::Fat12 => (entries * 3).div_ceil(2),
            Fat::Fat16 => entries * 2,
            Fat::Fat32 => entries * 4,
        };
        bytes.div_ceil(SECTOR)
    }

    /// The most clusters of so many sectors for which there is room beside their tables, or one more than there can be.
    fn most_clusters(self, room: u64, cluster: u64) -> u64 {
        let limit = *self.clusters().end() + 1;
        let beside = |clusters| room.saturating_sub(TABLES * self.table_sectors(clusters)) / cluster;
        // Each step is at least 64 times nearer, from above and from below in turn.
        let (mut most, mut above) = (0, (room / cluster).min(limit));
        while most < above {
            let under = beside(above).min(limit);
            let next = beside(under).min(limit);
            if (under, next) == (most, above) {
                break;
            }
            (most, above) = (under, next);
        }
        (most..=above).rev().find(|clusters| beside(*clusters) >= *clusters).unwrap_or(0)
    }

    /// The type of its partition, addressed by sector number.
    fn partition_type(self) -> u8 {
        match self {
            Fat::Fat12 => 0x01,
            Fat::Fat16 => 0x0e,
            Fat::Fat32 => 0x0c,
        }
    }
}

/// Floppy disks: sectors, sectors of a track, media byte, entries of the root directory.
const FLOPPIES: [(u64, u16, u8, usize); 5] = [
    (720, 9, 0xfd, 112),
    (1440, 9, 0xf9, 112),
    (2400, 15, 0xf9, 224),
    (2880, 18, 0xf0, 224),
    (5760, 36, 0xf0, 240),
];

impl Geometry {
    /// The smallest file system for what `need` says of clusters of so many sectors; or one of `sectors` in all. It starts at
    /// byte `start` of the disk.
    fn choose(
        wanted: &Wanted,
        (sectors, start): (Option<u64>, u64),
        root_needs: usize,
        need: impl Fn(u64) -> u64,
    ) -> Result<Self> {
        let fat = wanted.fat;
        let floppy = FLOPPIES.iter().find(|(size, ..)| !wanted.partitioned && sectors == Some(*size));
        let (media, track, heads, usual_root) = match floppy {
            Some((_, track, media, root)) => (*media, *track, 2, *root),
            None => (0xf8, 63, 255, 512),
        };
        let is32 = fat == Fat::Fat32;
        let root_entries = if is32 { 0 } else { root_needs.max(usual_root).next_multiple_of(16) };
        let reserved = if is32 { 32 } else { 1 };
        let fixed = reserved + (root_entries * ENTRY) as u64 / SECTOR;
        let mut cluster = 1;
        loop {
            let needed = need(cluster);
            let clusters = match sectors {
                Some(sectors) => fat.most_clusters(sectors.saturating_sub(fixed), cluster),
                None => needed.max(*fat.clusters().start()),
            };
            let (least, most) = (*fat.clusters().start(), *fat.clusters().end());
            let many = is32 && clusters > MANY_CLUSTERS;
            if (clusters > most || needed > most || many) && cluster < LARGEST_CLUSTER {
                cluster *= 2;
                continue;
            }
            let table = fat.table_sectors(clusters);
            let total = fixed + TABLES * table + clusters * cluster;
            let name = fat.name();
            if sectors.is_some() {
                // As small as it can be, which tells what size would do.
                ensure!(
                    clusters >= needed && clusters >= least,
                    "size={} is too small for the files in type={name}: leave size= out, or give at least {}",
                    wanted.size.unwrap_or_default(),
                    start
                        + (fixed
                            + TABLES * fat.table_sectors(needed.max(least))
                            + needed.max(least) * cluster)
                            * SECTOR
                );
            }
            ensure!(
                clusters <= most && needed <= most,
                "the disk is too large for type={name}: use type=fat32"
            );
            ensure!(u32::try_from(total).is_ok(), "the disk would pass the 2 TiB that FAT can have");
            return Ok(Geometry {
                fat,
                reserved,
                table,
                root_entries,
                cluster,
                clusters,
                total,
                media,
                track,
                heads,
            });
        }
    }

    fn boot_sector(&self, wanted: &Wanted, start: u64) -> Vec<u8> {
        let mut sector = vec![0; SECTOR as usize];
        let is32 = self.fat == Fat::Fat32;
        let small = u16::try_from(self.total).ok().filter(|_| !is32);
        put(&mut sector, 0, if is32 { &[0xeb, 0x58, 0x90] } else { &[0xeb, 0x3c, 0x90] });
        put(&mut sector, 3, b"NBDKIT  ");
        put(&mut sector, 11, &(SECTOR as u16).to_le_bytes());
        put(&mut sector, 13, &[self.cluster as u8]);
        put(&mut sector, 14, &(self.reserved as u16).to_le_bytes());
        put(&mut sector, 16, &[TABLES as u8]);
        put(&mut sector, 17, &(self.root_entries as u16).to_le_bytes());
        put(&mut sector, 19, &small.unwrap_or(0).to_le_bytes());
        put(&mut sector, 21, &[self.media]);
        put(&mut sector, 24, &self.track.to_le_bytes());
        put(&mut sector, 26, &self.heads.to_le_bytes());
        put(&mut sector, 28, &((start / SECTOR) as u32).to_le_bytes());
        put(&mut sector, 32, &if small.is_some() { 0 } else { self.total as u32 }.to_le_bytes());
        let drive = if self.media == 0xf8 { 0x80 } else { 0 };
        let at = if is32 {
            put(&mut sector, 36, &(self.table as u32).to_le_bytes());
            put(&mut sector, 44, &(FIRST as u32).to_le_bytes());
            // The sector with the numbers of free clusters, and the copy of this one.
            put(&mut sector, 48, &[1, 0, 6, 0]);
            64
        } else {
            put(&mut sector, 22, &(self.table as u16).to_le_bytes());
            36
        };
        put(&mut sector, at, &[drive, 0, 0x29]);
        put(&mut sector, at + 3, &Guid::from_seed(&wanted.seed).0[..4]);
        put(&mut sector, at + 7, &label_or_none(&wanted.label));
        put(&mut sector, at + 18, self.fat.name().to_uppercase().as_bytes());
        put(&mut sector, at + 23, b"   ");
        // For who starts a machine from it: the next device, or nothing.
        put(&mut sector, at + 26, &[0xcd, 0x18, 0xf4, 0xeb, 0xfd]);
        put(&mut sector, 510, &[0x55, 0xaa]);
        sector
    }

    /// The sectors before the first table.
    fn start(&self, wanted: &Wanted, start: u64, used: u64) -> Vec<u8> {
        let boot = self.boot_sector(wanted, start);
        let mut bytes = vec![0; (self.reserved * SECTOR) as usize];
        put(&mut bytes, 0, &boot);
        if self.fat == Fat::Fat32 {
            let mut counts = vec![0; SECTOR as usize];
            put(&mut counts, 0, b"RRaA");
            put(&mut counts, 484, b"rrAa");
            put(&mut counts, 488, &((self.clusters - used) as u32).to_le_bytes());
            let next = if used < self.clusters { (FIRST + used) as u32 } else { u32::MAX };
            put(&mut counts, 492, &next.to_le_bytes());
            put(&mut counts, 510, &[0x55, 0xaa]);
            put(&mut bytes, SECTOR as usize, &counts);
            put(&mut bytes, 6 * SECTOR as usize, &boot);
            put(&mut bytes, 7 * SECTOR as usize, &counts);
        }
        bytes
    }
}

fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + field.len()) {
        place.copy_from_slice(field);
    }
}

fn label_or_none(label: &[u8; 11]) -> [u8; 11] {
    if *label == [b' '; 11] { *b"NO NAME    " } else { *label }
}

/// An entry of a directory.
fn entry(short: &[u8; 11], attributes: u8, time: Stamp, cluster: u64, size: u64) -> [u8; ENTRY] {
    let mut entry = [0; ENTRY];
    let (date, clock) = (time.date.to_le_bytes(), time.time.to_le_bytes());
    let cluster = (cluster as u32).to_le_bytes();
    put(&mut entry, 0, short);
    put(&mut entry, 11, &[attributes]);
    put(&mut entry, 14, &clock);
    put(&mut entry, 16, &date);
    put(&mut entry, 18, &date);
    put(&mut entry, 20, &cluster[2..]);
    put(&mut entry, 22, &clock);
    put(&mut entry, 24, &date);
    put(&mut entry, 26, &cluster[..2]);
    put(&mut entry, 28, &(size as u32).to_le_bytes());
    entry
}

/// How many entries a directory has.
fn entries(directory: &Directory, has_label: bool) -> usize {
    let fixed = if directory.parent.is_some() { 2 } else { usize::from(has_label) };
    let names = directory.entries.iter().map(|entry| 1 + entry.name.long.len().div_ceil(13));
    fixed + names.sum::<usize>()
}

impl Disk {
    /// Lays out the file system of a directory that was scanned.
    ///
    /// # Errors
    /// It does not fit.
    pub(super) fn new(tree: Vec<Directory>, wanted: &Wanted) -> Result<Self> {
        let has_label = wanted.label != [b' '; 11];
        let counts: Vec<usize> = tree.iter().map(|directory| entries(directory, has_label)).collect();
        ensure!(
            counts.iter().all(|count| *count <= MOST_ENTRIES),
            "a directory has more files than FAT can hold: with long names that is about 20,000"
        );
        // The root of FAT12 and FAT16 is in no cluster.
        let root_in_cluster = usize::from(wanted.fat != Fat::Fat32);
        let directory_clusters =
            |count: usize, cluster: u64| ((count * ENTRY) as u64).div_ceil(cluster * SECTOR).max(1);
        let need = |cluster: u64| {
            let directories: u64 =
                counts[root_in_cluster..].iter().map(|count| directory_clusters(*count, cluster)).sum();
            let files: u64 = files(&tree).map(|(_, size)| size.div_ceil(cluster * SECTOR)).sum();
            directories + files
        };
        let start = if wanted.partitioned { NewPartition::new(SECTOR).alignment } else { 0 };
        let sectors = match wanted.size {
            Some(size) => {
                ensure!(size.is_multiple_of(SECTOR), "size={size} is not a multiple of {SECTOR}");
                Some(size.saturating_sub(start) / SECTOR)
            }
            None => None,
        };
        let geometry = Geometry::choose(wanted, (sectors, start), counts[0], need)?;

        // Directories first, then files: the first cluster of each, and the last of each chain.
        let cluster_bytes = geometry.cluster * SECTOR;
        let (mut next, mut ends) = (FIRST, Vec::new());
        let mut take = |clusters: u64| {
            let first = if clusters == 0 { 0 } else { next };
            next += clusters;
            if clusters > 0 {
                ends.push((next - 1) as u32);
            }
            first
        };
        let mut starts = vec![0; root_in_cluster];
        for count in &counts[root_in_cluster..] {
            starts.push(take(directory_clusters(*count, geometry.cluster)));
        }
        let file_starts: Vec<u64> =
            files(&tree).map(|(_, size)| take(size.div_ceil(cluster_bytes))).collect();
        let used = next - FIRST;

        let mut parts = Regions::new();
        let mut push = |length: u64, part: Part| parts.push(length, part).context("the disk is too large");
        if wanted.partitioned {
            let partition = NewPartition {
                mbr_type: geometry.fat.partition_type(),
                ..NewPartition::new(geometry.total * SECTOR)
            };
            let layout = Layout::mbr(&[partition]).map_err(|e| match e {
                LayoutError::TooLargeForMbr => {
                    anyhow::anyhow!("the disk would pass the 2 TiB of an MBR: use table=none")
                }
                LayoutError::TooLarge => anyhow::anyhow!("the disk is too large"),
            })?;
            let Some((0, table)) = layout.tables.into_iter().next() else { bail!("an MBR is at the start") };
            let length = table.len() as u64;
            push(length, Part::Bytes(table))?;
            push(start - length, Part::Zeroes)?;
        }
        let before = geometry.start(wanted, start, used);
        push(before.len() as u64, Part::Bytes(before))?;
        for _ in 0..TABLES {
            push(geometry.table * SECTOR, Part::Chains)?;
        }
        let mut file_start = file_starts.into_iter();
        for (index, directory) in tree.iter().enumerate() {
            let bytes = directory_bytes(directory, index, &starts, wanted, || file_start.next().unwrap_or(0));
            let length = match starts[index] {
                0 => (geometry.root_entries * ENTRY) as u64,
                _ => directory_clusters(counts[index], geometry.cluster) * cluster_bytes,
            };
            let padding = length - bytes.len() as u64;
            push(bytes.len() as u64, Part::Bytes(bytes))?;
            push(padding, Part::Zeroes)?;
        }
        for directory in tree {
            for entry in directory.entries {
                if let Kind::File { path, size } = entry.kind {
                    push(size, Part::File(path))?;
                    push(size.next_multiple_of(cluster_bytes) - size, Part::Zeroes)?;
                }
            }
        }
        let end = start + geometry.total * SECTOR;
        let rest = wanted.size.unwrap_or(end).max(end) - parts.size();
        parts.push(rest, Part::Zeroes).context("the disk is too large")?;
        let chains = Chains { fat: geometry.fat, media: geometry.media, ends };
        Ok(Disk { parts, chains })
    }
}

fn files(tree: &[Directory]) -> impl Iterator<Item = (&PathBuf, u64)> {
    tree.iter().flat_map(|directory| &directory.entries).filter_map(|entry| match &entry.kind {
        Kind::File { path, size } => Some((path, *size)),
        Kind::Directory(_) => None,
    })
}

/// The content of a directory. `file_start` tells the first clusters of the files, one after the other.
fn directory_bytes(
    directory: &Directory,
    index: usize,
    starts: &[u64],
    wanted: &Wanted,
    mut file_start: impl FnMut() -> u64,
) -> Vec<u8> {
    let mut bytes = Vec::new();
    match directory.parent {
        Some(parent) => {
            // The root is called 0, wherever it is.
            let above = if parent == 0 { 0 } else { starts[parent] };
            bytes.extend(entry(b".          ", 0x10, directory.time, starts[index], 0));
            bytes.extend(entry(b"..         ", 0x10, directory.time, above, 0));
        }
        None if wanted.label != [b' '; 11] => {
            bytes.extend(entry(&wanted.label, 0x08, directory.time, 0, 0));
        }
        None => {}
    }
    for inside in &directory.entries {
        bytes.extend(inside.name.long_entries().into_iter().flatten());
        let (attributes, first, size) = match &inside.kind {
            Kind::Directory(index) => (0x10, starts[*index], 0),
            Kind::File { size, .. } => (0x20, file_start(), *size),
        };
        bytes.extend(entry(&inside.name.short, attributes, inside.time, first, size));
    }
    bytes
}

impl Chains {
    #[cfg(test)]
    pub(super) fn for_tests(fat: Fat, ends: Vec<u32>) -> Self {
        Chains { fat, media: 0xf8, ends }
    }

    /// The table's entry for a cluster.
    fn entry(&self, cluster: u64, next_end: &mut usize) -> u32 {
        while self.ends.get(*next_end).is_some_and(|end| u64::from(*end) < cluster) {
            *next_end += 1;
        }
        match (cluster, self.ends.get(*next_end)) {
            (0, _) => 0xffff_ff00 | u32::from(self.media),
            (1, _) => u32::MAX,
            // Free.
            (_, None) => 0,
            (_, Some(end)) if u64::from(*end) == cluster => u32::MAX,
            _ => cluster as u32 + 1,
        }
    }

    /// Fills `buf` with the table from `offset` on.
    pub(super) fn read(&self, buf: &mut [u8], offset: u64) {
        let first = match self.fat {
            Fat::Fat12 => offset / 3 * 2,
            Fat::Fat16 => offset / 2,
            Fat::Fat32 => offset / 4,
        };
        let mut end = self.ends.partition_point(|end| u64::from(*end) < first);
        let mut cluster = first;
        // Whole entries, or pairs of those of 12 bits, some bytes of which are before the buffer or after it.
        let unit = match self.fat {
            Fat::Fat12 => 3,
            Fat::Fat16 => 2,
            Fat::Fat32 => 4,
        };
        let (mut at, stop) = (offset - offset % unit, offset + buf.len() as u64);
        while at < stop {
            let mut next = || {
                cluster += 1;
                self.entry(cluster - 1, &mut end)
            };
            let bits = match self.fat {
                Fat::Fat12 => (next() & 0xfff) | (next() & 0xfff) << 12,
                Fat::Fat16 => next() & 0xffff,
                Fat::Fat32 => next() & 0x0fff_ffff,
            };
            for (here, byte) in (at..at + unit).zip(bits.to_le_bytes()) {
                let place = here.checked_sub(offset).and_then(|place| buf.get_mut(place as usize));
                if let Some(place) = place {
                    *place = byte;
                }
            }
            at += unit;
        }
    }
}
