use std::convert::Infallible;

use proptest::prelude::*;

use super::*;

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
    // Put where the first copy was, it leads to the same partitions.
    let mut moved = disk(&layout);
    moved.parts[0].1[512..1024].copy_from_slice(header);
    assert_eq!(moved.table(None), disk(&layout).table(None));
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
    // With small sectors there is only the protective MBR.
    assert_eq!(disk.table(Some(512)).unwrap().scheme, Scheme::Mbr);
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
        Sparse { size: good.size, parts }.table(None)
    };
    assert!(damage(0, &[], true).is_ok());
    // The checksums of most are right, so that the rule itself is what refuses them.
    for (at, field, sealed, why) in [
        (512 + 56, &[1][..], false, "checksum of the GPT header"),
        (1024 + 32, &[1], false, "checksum of the GPT entries"),
        (512 + 12, &[91], true, "size of the GPT header"),
        (512 + 12, &[1, 2], true, "size of the GPT header"),
        (512 + 72, &[0xff; 8], true, "past the end"),
        (512 + 72, &[1, 0, 0, 0, 0, 0, 0, 0], true, "where they can be"),
        (512 + 80, &[0, 0, 1, 0], true, "too many"),
        (512 + 84, &[0; 4], true, "wrongly sized"),
        (512 + 84, &[129, 0, 0, 0], true, "wrongly sized"),
        (512 + 84, &[0xff; 4], true, "wrongly sized"),
    ] {
        match damage(at, field, sealed) {
            Err(TableError::Damaged(found)) => assert!(found.contains(why), "{at} {field:?}: {found}"),
            other => panic!("{at} {field:?}: {other:?}"),
        }
    }
}

#[test]
fn errors_of_the_disk_are_passed_on() {
    assert_eq!(read_table(1 << 20, None, |_, _| Err("broken")), Err(TableError::Read("broken")));
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
            Scheme::Gpt => Kind::Gpt(made.gpt_type),
        };
        prop_assert_eq!(found.kind, kind);
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

    /// A chain of EBRs whose every sector is hostile: no panic, no read past the end, an end.
    #[test]
    fn hostile_mbrs_do_no_harm(
        size in 512u64..200_000,
        entries in prop::collection::vec(
            (prop::sample::select(vec![0u8, 5, 0x0f, 0x83, 0x85]),
             prop_oneof![0u32..400, any::<u32>()], prop_oneof![0u32..400, any::<u32>()]), 1..200),
    ) {
        // Each sector of the disk takes its 4 entries from the list, in turn.
        let mut bytes = vec![0; size as usize];
        for (i, sector) in bytes.chunks_exact_mut(512).enumerate() {
            for slot in 0..4 {
                let (kind, start, sectors) = entries[(i * 4 + slot) % entries.len()];
                put(sector, 446 + 16 * slot + 4, &[kind]);
                put(sector, 446 + 16 * slot + 8, &start.to_le_bytes());
                put(sector, 446 + 16 * slot + 12, &sectors.to_le_bytes());
            }
            put(sector, 510, &[0x55, 0xaa]);
        }
        let table = Sparse { size, parts: vec![(0, bytes)] }.table(None).unwrap();
        prop_assert_eq!(table.scheme, Scheme::Mbr);
        prop_assert!(table.partitions.windows(2).all(|pair| pair[0].number < pair[1].number));
    }

    /// A GPT with correct checksums over hostile numbers.
    #[test]
    fn hostile_gpts_do_no_harm(
        fields in prop::collection::vec((12usize..92, any::<u8>()), 0..6),
        array in prop::option::of(prop_oneof![0u64..40, any::<u64>()]),
        count in prop::option::of(prop_oneof![0u32..300, any::<u32>()]),
        entry in any::<[u8; 48]>(),
        sealed: bool,
    ) {
        let mut disk = disk(&Layout::gpt(&[NewPartition::new(512)], Guid::NIL).unwrap());
        let table = &mut disk.parts[0].1;
        put(table, 1024 + 128, &entry);
        for (at, byte) in fields {
            table[512 + at] = byte;
        }
        if let Some(array) = array {
            put(table, 512 + 72, &array.to_le_bytes());
        }
        if let Some(count) = count {
            put(table, 512 + 80, &count.to_le_bytes());
        }
        if sealed {
            seal(table, 512);
        }
        if let Ok(table) = disk.table(None) {
            for partition in table.partitions {
                prop_assert!(partition.length > 0);
                prop_assert!(partition.start.checked_add(partition.length).is_some());
            }
        }
    }
}
