use std::convert::Infallible;

use proptest::prelude::*;

use super::*;
use crate::{
    Layout, LayoutError, NewPartition,
    disk::{u32_at, u64_at},
    guid,
    layout::put,
};

mod foreign;
mod hostile;

/// A sparse disk: some bytes at some offsets, zeroes elsewhere.
struct Sparse {
    size: u64,
    parts: Vec<(u64, Vec<u8>)>,
}

impl Sparse {
    fn table(&self, sector_size: Option<u64>) -> Result<Table, TableError<Infallible>> {
        let mut reads = 0;
        read_table(self.size, sector_size, |buf, offset| {
            reads += 1;
            assert!(reads < 20_000, "the walk is not bounded");
            assert!(offset + buf.len() as u64 <= self.size, "read past the end");
            buf.fill(0);
            for (start, part) in &self.parts {
                for (byte, place) in (offset..).zip(&mut *buf) {
                    if let Some(content) = byte.checked_sub(*start).and_then(|i| part.get(i as usize)) {
                        *place = *content;
                    }
                }
            }
            Ok(())
        })
    }
}

fn disk(layout: &Layout) -> Sparse {
    Sparse { size: layout.size, parts: layout.tables.clone() }
}

fn numbers(table: &Table) -> Vec<u32> {
    table.partitions.iter().map(|partition| partition.number).collect()
}

/// Recomputes the checksums of a GPT that a test has changed.
fn seal(table: &mut [u8], sector_size: usize) {
    let size = (u32_at(table, sector_size + 80) as usize) * u32_at(table, sector_size + 84) as usize;
    if let Some(array) = table.get(2 * sector_size..2 * sector_size + size) {
        let crc = crc32fast::hash(array);
        put(table, sector_size + 88, &crc.to_le_bytes());
    }
    put(table, sector_size + 16, &[0; 4]);
    let length = (u32_at(table, sector_size + 12) as usize).min(512);
    let crc = crc32fast::hash(&table[sector_size..sector_size + length]);
    put(table, sector_size + 16, &crc.to_le_bytes());
}

#[test]
fn an_mbr_is_laid_out_as_documented() {
    let mut partitions = vec![NewPartition::new(301_000); 5];
    partitions[1].mbr_type = 7;
    let layout = Layout::mbr(&partitions).unwrap();
    let sectors: Vec<_> = layout.starts.iter().map(|start| start / 512).collect();
    assert_eq!(sectors, [2048, 4096, 6144, 8192, 10240]);
    let tables: Vec<_> = layout.tables.iter().map(|(start, _)| start / 512).collect();
    assert_eq!(tables, [0, 6144 + 588, 8192 + 588]);
    assert_eq!(layout.size / 512, 10240 + 588);
    assert_eq!(layout.tables[0].1[446], 0x80);
    let table = disk(&layout).table(None).unwrap();
    assert_eq!(numbers(&table), [1, 2, 3, 5, 6]);
    assert_eq!(table.partitions[1].kind, Kind::Mbr(7));
    assert!(table.extended);
}

#[test]
fn an_mbr_ends_at_two_tebibytes() {
    let largest = (u64::from(u32::MAX) - 2048) * 512;
    assert!(Layout::mbr(&[NewPartition::new(largest)]).is_ok());
    assert_eq!(Layout::mbr(&[NewPartition::new(largest + 1)]), Err(LayoutError::TooLargeForMbr));
    let huge = NewPartition { alignment: u64::MAX, ..NewPartition::new(1) };
    assert_eq!(Layout::mbr(&[huge]), Err(LayoutError::TooLargeForMbr));
}

#[test]
fn a_gpt_ends_at_eight_exbibytes() {
    let largest = i64::MAX as u64 / 512 * 512 - (2048 + 33) * 512;
    let layout = Layout::gpt(&[NewPartition::new(largest)], Guid::NIL).unwrap();
    assert_eq!(layout.size, i64::MAX as u64 / 512 * 512);
    assert_eq!(disk(&layout).table(None).unwrap().partitions[0].length, largest);
    assert_eq!(Layout::gpt(&[NewPartition::new(largest + 1)], Guid::NIL), Err(LayoutError::TooLarge));
}

#[test]
fn a_gpt_has_as_many_entries_as_it_needs() {
    let small = NewPartition { alignment: 512, ..NewPartition::new(1) };
    let layout = Layout::gpt(&vec![small; 130], Guid::NIL).unwrap();
    assert_eq!(layout.starts[0], (2 + 33) * 512);
    assert_eq!(numbers(&disk(&layout).table(None).unwrap()), (1..=130).collect::<Vec<_>>());
}

#[test]
fn the_second_copy_of_a_gpt_is_as_good_as_the_first() {
    let layout = Layout::gpt(&[NewPartition::new(5000), NewPartition::new(600)], Guid::NIL).unwrap();
    let (start, copy) = &layout.tables[1];
    let (array, header) = copy.split_at(128 * 128);
    assert_eq!(array, &layout.tables[0].1[1024..]);
    assert_eq!(u64_at(header, 24), layout.size / 512 - 1);
    // The protective partition covers all but the first sector.
    assert_eq!(u64::from(u32_at(&layout.tables[0].1, 446 + 12)), layout.size / 512 - 1);
    assert_eq!(u64_at(header, 32), 1);
    assert_eq!(u64_at(header, 72), start / 512);
    // Put where the first copy was, it is in the wrong place; where it belongs, it leads to the same partitions.
    let good = disk(&layout).table(None).unwrap();
    assert_eq!(good.warnings, [""; 0]);
    let mut moved = disk(&layout);
    moved.parts[0].1[512..1024].copy_from_slice(header);
    let table = moved.table(None).unwrap();
    assert_eq!(table.partitions, good.partitions);
    assert!(table.warnings[0].contains("belongs to another place"), "{:?}", table.warnings);
}

#[test]
fn a_gpt_with_large_sectors_is_found() {
    let layout = Layout::gpt(&[NewPartition::new(8192)], Guid::NIL).unwrap();
    let small = &layout.tables[0].1;
    let mut large = vec![0; 8192];
    large[..512].copy_from_slice(&small[..512]);
    large[4096..4608].copy_from_slice(&small[512..1024]);
    large.extend(&small[1024..]);
    let disk = Sparse { size: 64 << 20, parts: vec![(0, large)] };
    for sector_size in [None, Some(4096)] {
        let table = disk.table(sector_size).unwrap();
        assert_eq!((table.scheme, table.sector_size), (Scheme::Gpt, 4096));
        assert_eq!(table.partitions[0].start, 2048 * 4096);
    }
    // With small sectors there is only the protective MBR, the partition of which is none.
    assert!(matches!(disk.table(Some(512)), Err(TableError::Damaged(_))));
}

#[test]
fn a_stale_gpt_behind_an_mbr_does_not_count() {
    let mut stale = disk(&Layout::gpt(&[NewPartition::new(512)], Guid::NIL).unwrap());
    stale.parts[0].1[450] = 0x83;
    assert_eq!(stale.table(None).unwrap().scheme, Scheme::Mbr);
    stale.parts[0].1[510] = 0;
    assert_eq!(stale.table(None).unwrap().scheme, Scheme::Gpt);
}

#[test]
fn a_disk_without_a_table_says_so() {
    let empty = |size| Sparse { size, parts: Vec::new() }.table(None);
    assert_eq!(empty(0), Err(TableError::TooSmall));
    assert_eq!(empty(511), Err(TableError::TooSmall));
    assert_eq!(empty(512), Err(TableError::NoTable));
    assert_eq!(empty(1 << 40), Err(TableError::NoTable));
}

#[test]
fn a_loop_of_logical_partitions_ends() {
    let mut looped = disk(&Layout::mbr(&vec![NewPartition::new(512); 6]).unwrap());
    // The last EBR links back to the first.
    let last = &mut looped.parts[3].1;
    put(last, 446 + 16, &[0, 0, 0, 0, 5]);
    put(last, 446 + 16 + 8, &0u32.to_le_bytes());
    put(last, 446 + 16 + 12, &1u32.to_le_bytes());
    assert_eq!(numbers(&looped.table(None).unwrap()), [1, 2, 3, 5, 6, 7]);
}

#[test]
fn a_damaged_gpt_is_refused() {
    let good = disk(&Layout::gpt(&[NewPartition::new(512)], Guid::NIL).unwrap());
    let damage = |at: usize, field: &[u8], sealed: bool| {
        let mut parts = good.parts.clone();
        put(&mut parts[0].1, at, field);
        if sealed {
            seal(&mut parts[0].1, 512);
        }
        let with_backup = Sparse { size: good.size, parts }.table(None);
        let mut parts = good.parts.clone();
        put(&mut parts[0].1, at, field);
        if sealed {
            seal(&mut parts[0].1, 512);
        }
        parts.truncate(1);
        (with_backup, Sparse { size: good.size, parts }.table(None))
    };
    let sound = good.table(None).unwrap();
    assert!(damage(0, &[], true).1.is_ok());
    // The checksums of most are right, so that the rule itself is what refuses them.
    for (at, field, sealed, why) in [
        (512 + 56, &[1][..], false, "checksum of the header"),
        (1024 + 32, &[1], false, "checksum of the entries"),
        (512 + 12, &[91], true, "size of the header"),
        (512 + 12, &[1, 2], true, "size of the header"),
        (512 + 72, &[0xff; 8], true, "past the end"),
        (512 + 72, &[1, 0, 0, 0, 0, 0, 0, 0], true, "where they can be"),
        (512 + 80, &[0, 0, 1, 0], true, "too many"),
        (512 + 84, &[0; 4], true, "wrongly sized"),
        (512 + 84, &[129, 0, 0, 0], true, "wrongly sized"),
        (512 + 84, &[0xff; 4], true, "wrongly sized"),
    ] {
        let (with_backup, without) = damage(at, field, sealed);
        match without {
            Err(TableError::Damaged(found)) => assert!(found.contains(why), "{at} {field:?}: {found}"),
            other => panic!("{at} {field:?}: {other:?}"),
        }
        let table = with_backup.unwrap();
        assert_eq!(table.partitions, sound.partitions);
        let [warning] = &table.warnings[..] else { panic!("{:?}", table.warnings) };
        assert!(
            warning.contains(why) && warning.contains("the backup at the end of the disk is used"),
            "{warning}"
        );
    }
}

#[test]
fn errors_of_the_disk_are_passed_on() {
    assert_eq!(read_table(1 << 20, None, |_, _| Err("broken")), Err(TableError::Read("broken")));
}

#[test]
fn copies_that_disagree_are_told_of() {
    let layout = Layout::gpt(&[NewPartition::new(5000)], Guid::NIL).unwrap();
    let backup = layout.size - 512;
    let warning = |change: &dyn Fn(&mut Sparse)| {
        let mut changed = disk(&layout);
        change(&mut changed);
        let table = changed.table(None).unwrap();
        assert_eq!(numbers(&table), [1]);
        table.warnings.join("; ")
    };
    assert_eq!(warning(&|_| ()), "");
    let gone = warning(&|disk| disk.parts.truncate(1));
    assert_eq!(gone, "there is no backup of the GPT where it should be");
    let broken = warning(&|disk| disk.parts[1].1[0] ^= 1);
    assert!(broken.contains("the checksum of the entries is wrong"), "{broken}");
    let other = warning(&|disk| {
        let other = Layout::gpt(&[NewPartition::new(5000)], guid::LINUX).unwrap();
        disk.parts[1] = (backup - 32 * 512, other.tables[1].1.clone());
    });
    assert!(other.contains("say different things"), "{other}");
    let short = warning(&|disk| disk.size -= 512);
    assert!(short.contains(&format!("has {} bytes, but {} when", layout.size - 512, layout.size)), "{short}");
    // A disk that has grown has its backup where it was.
    assert_eq!(warning(&|disk| disk.size += 1 << 20), "");
}

#[test]
fn what_passes_the_end_is_there_with_a_warning() {
    let partitions = [NewPartition::new(1 << 20), NewPartition::new(1 << 20), NewPartition::new(1 << 20)];
    let mut cut = disk(&Layout::mbr(&partitions).unwrap());
    cut.size = (2 << 20) + 512;
    let table = cut.table(None).unwrap();
    assert_eq!(numbers(&table), [1, 2, 3]);
    let within: Vec<_> = table.partitions.iter().map(|p| p.length_within(cut.size)).collect();
    assert_eq!(within, [1 << 20, 512, 0]);
    assert_eq!(
        table.warnings,
        [
            "partition 2 has 1048576 bytes in the table, but the disk ends after 512 of them",
            "partition 3 starts at byte 3145728, past the end of the disk of 2097664 bytes",
        ]
    );
}

#[test]
fn a_gpt_entry_that_makes_no_sense_is_told_of() {
    let mut odd = disk(&Layout::gpt(&[NewPartition::new(512), NewPartition::new(512)], Guid::NIL).unwrap());
    put(&mut odd.parts[0].1, 1024 + 40, &7u64.to_le_bytes());
    seal(&mut odd.parts[0].1, 512);
    let table = odd.table(None).unwrap();
    assert_eq!(numbers(&table), [2]);
    assert_eq!(table.warnings[0], "the entry of partition 1 makes no sense and is ignored");
    assert!(table.warnings[1].contains("say different things"), "{:?}", table.warnings);
}

#[test]
fn the_sectors_of_an_mbr_are_those_that_lead_somewhere() {
    let mut first = vec![0; 512];
    put(&mut first, 510, &[0x55, 0xaa]);
    put(&mut first, 446 + 4, &[0x83]);
    put(&mut first, 446 + 8, &64u32.to_le_bytes());
    put(&mut first, 446 + 12, &1024u32.to_le_bytes());
    let mut squashfs = vec![0; 512];
    put(&mut squashfs, 0, b"hsqs");
    put(&mut squashfs, 28, &[4]);
    for sector_size in SECTOR_SIZES {
        let parts = vec![(0, first.clone()), (64 * sector_size, squashfs.clone())];
        let disk = Sparse { size: 64 << 20, parts };
        assert_eq!(disk.table(None).unwrap().sector_size, sector_size);
    }
    let nothing = Sparse { size: 64 << 20, parts: vec![(0, first)] };
    assert_eq!(nothing.table(None).unwrap().sector_size, 512);
    assert_eq!(nothing.table(Some(2048)).unwrap().partitions[0].start, 64 * 2048);
}

#[test]
fn a_boot_sector_is_no_mbr() {
    let mut boot = vec![0; 512];
    put(&mut boot, 510, &[0x55, 0xaa]);
    put(&mut boot, 446, b"Remove disks or other media.");
    assert_eq!(Sparse { size: 1 << 20, parts: vec![(0, boot)] }.table(None), Err(TableError::NoTable));
}

fn new_partitions(max: usize) -> impl Strategy<Value = Vec<NewPartition>> {
    let partition = (1u64..100_000_000, 9u32..22, 1u8..=255, any::<[u8; 16]>(), "\\PC{0,50}").prop_map(
        |(length, alignment, kind, guid, name)| NewPartition {
            length,
            alignment: 1 << alignment,
            mbr_type: if matches!(kind, 0x05 | 0x0f | 0x85 | 0xee) { 0x83 } else { kind },
            gpt_type: if guid == [0; 16] { guid::LINUX } else { Guid(guid) },
            guid: Guid(guid),
            name,
        },
    );
    prop::collection::vec(partition, 1..max)
}

fn check_round_trip(
    partitions: &[NewPartition],
    layout: &Layout,
    scheme: Scheme,
) -> Result<(), TestCaseError> {
    // Nothing overlaps, and all is within the disk.
    let mut used: Vec<(u64, u64)> =
        layout.tables.iter().map(|(start, bytes)| (*start, start + bytes.len() as u64)).collect();
    used.extend(layout.starts.iter().zip(partitions).map(|(s, p)| (*s, s + p.sectors() * 512)));
    used.sort_unstable();
    prop_assert!(used.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{used:?}");
    prop_assert_eq!(used.last().map(|last| last.1), Some(layout.size));

    let table = disk(layout).table(None).unwrap();
    prop_assert_eq!(table.scheme, scheme);
    prop_assert_eq!(table.partitions.len(), partitions.len());
    for ((i, made), found) in partitions.iter().enumerate().zip(&table.partitions) {
        let logical = scheme == Scheme::Mbr && partitions.len() > 4 && i >= 3;
        prop_assert_eq!(found.number as usize, if logical { i + 2 } else { i + 1 });
        prop_assert_eq!(found.start, layout.starts[i]);
        prop_assert!(found.start.is_multiple_of(made.alignment));
        prop_assert_eq!(found.length, made.length.next_multiple_of(512));
        let kind = match scheme {
            Scheme::Mbr => Kind::Mbr(made.mbr_type),
            _ => Kind::Gpt(made.gpt_type),
        };
        prop_assert_eq!(&found.kind, &kind);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_an_mbr_says_is_read_back(partitions in new_partitions(12)) {
        check_round_trip(&partitions, &Layout::mbr(&partitions).unwrap(), Scheme::Mbr)?;
    }

    #[test]
    fn what_a_gpt_says_is_read_back(partitions in new_partitions(140)) {
        check_round_trip(&partitions, &Layout::gpt(&partitions, Guid::NIL).unwrap(), Scheme::Gpt)?;
    }
}
