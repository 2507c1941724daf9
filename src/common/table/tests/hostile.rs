//! Tables that were made to do harm: no panic, no read past the end, an end.

use super::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

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

    /// The other kinds, with checksums that are right over numbers that are not.
    #[test]
    fn hostile_tables_of_all_kinds_do_no_harm(
        kind in 0usize..5,
        size in 512u64..200_000,
        fields in prop::collection::vec((0usize..1024, any::<u32>()), 0..40),
        sector_size in prop::option::of(prop::sample::select(SECTOR_SIZES.to_vec())),
    ) {
        let mut bytes = vec![0; 4096];
        for (at, word) in fields {
            put(&mut bytes, 4 * at.min(1023), &word.to_be_bytes());
        }
        match kind {
            0 => sun(&mut bytes),
            1 => {
                rdb(&mut bytes, b"RDSK", 28);
                let mut list = bytes.split_off(512);
                rdb(&mut list, b"PART", 16);
                bytes.extend(list);
            }
            2 => apm(&mut bytes),
            3 => bsd(&mut bytes[512..]),
            _ => {
                bsd(&mut bytes[512..]);
                put(&mut bytes, 446, &[0, 0, 0, 0, 0xa5, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0]);
                put(&mut bytes, 462, &[0; 48]);
                put(&mut bytes, 510, &[0x55, 0xaa]);
            }
        }
        bytes.truncate(size as usize);
        if let Ok(table) = (Sparse { size, parts: vec![(0, bytes)] }).table(sector_size) {
            prop_assert!(table.warnings.len() <= MAX_WARNINGS + 1);
            for partition in table.partitions {
                prop_assert!(partition.length > 0);
                prop_assert!(partition.start.checked_add(partition.length).is_some());
            }
        }
    }
}

fn sun(bytes: &mut [u8]) {
    put(bytes, 508, &0xdabe_u16.to_be_bytes());
    put(bytes, 510, &[0; 2]);
    let sum = (0..512).step_by(2).fold(0, |sum, at| sum ^ crate::disk::be16_at(bytes, at));
    put(bytes, 510, &sum.to_be_bytes());
}

/// A block of the Amiga's, the link of which leads to block 1.
fn rdb(bytes: &mut [u8], magic: &[u8; 4], link: usize) {
    put(bytes, 0, magic);
    put(bytes, 4, &64u32.to_be_bytes());
    put(bytes, 8, &[0; 4]);
    if magic == b"RDSK" {
        put(bytes, 16, &512u32.to_be_bytes());
    }
    put(bytes, link, &1u32.to_be_bytes());
    let sum = (0..64).fold(0_u32, |sum, i| sum.wrapping_add(crate::disk::be32_at(bytes, 4 * i)));
    put(bytes, 8, &0_u32.wrapping_sub(sum).to_be_bytes());
}

fn apm(bytes: &mut [u8]) {
    put(bytes, 0, b"ER");
    (1..8).for_each(|block| put(bytes, 512 * block, b"PM"));
}

fn bsd(bytes: &mut [u8]) {
    let magic = 0x8256_4557_u32.to_le_bytes();
    put(bytes, 0, &magic);
    put(bytes, 132, &magic);
    put(bytes, 138, &[8, 0]);
    put(bytes, 136, &[0; 2]);
    let sum = (0..148 + 8 * 16).step_by(2).fold(0, |sum, at| sum ^ crate::disk::u16_at(bytes, at));
    put(bytes, 136, &sum.to_le_bytes());
}
