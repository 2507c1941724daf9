use std::convert::Infallible;

use proptest::prelude::*;

use super::*;
use crate::layout::put;

const TEXT: &str = r#"
vg0 { # a comment { = }
    id = "70yH1V-P6f1-2ZbX-ya4w-pmdI-o18H-bXDCsw"
    seqno = 7
    status = ["RESIZEABLE", "READ", "WRITE"]
    flags = []
    extent_size = 128
    physical_volumes {
        pv0 { id = "first" device = "/dev/\"odd\\name" pe_start = 2048 pe_count = 99 }
        pv1 { id = "second" pe_start = 4096 pe_count = 99 }
    }
    logical_volumes {
        lin { id = "L" status = ["READ", "WRITE", "VISIBLE"] segment_count = 2
            segment1 { start_extent = 0 extent_count = 3 type = "striped" stripe_count = 1 stripes = ["pv0", 5] }
            segment2 { start_extent = 3 extent_count = 1 type = "striped" stripe_count = 1 stripes = ["pv1", 0] }
        }
        with-hyphen { id = "S" status = ["VISIBLE"] segment_count = 1
            segment1 { start_extent = 0 extent_count = 4 type = "striped" stripe_count = 2 stripe_size = 64
                stripes = [ "pv0", 10, "pv1", 20 ] }
        }
        thin { id = "T" status = ["VISIBLE"] segment_count = 1
            segment1 { start_extent = 0 extent_count = 4 type = "thin" thin_pool = "pool" } }
        hidden { id = "H" status = ["READ"] segment_count = 1
            segment1 { start_extent = 0 extent_count = 4 type = "striped" stripe_count = 1 stripes = ["pv0", 0] } }
        gap { id = "G" status = ["VISIBLE"] segment_count = 1
            segment1 { start_extent = 1 extent_count = 4 type = "striped" stripe_count = 1 stripes = ["pv0", 0] } }
        snap { id = "N" status = ["VISIBLE"] segment_count = 1
            segment1 { start_extent = 0 extent_count = 4 type = "striped" stripe_count = 1 stripes = ["pv0", 0] } }
        snapshot0 { id = "N0" status = ["READ"] segment_count = 1
            segment1 { start_extent = 0 extent_count = 4 type = "snapshot" chunk_size = 8 origin = "gap" cow_store = "snap" } }
    }
}
contents = "Text Format Volume Group"
"#;

fn group() -> Group {
    Group::from_text(&text::parse(TEXT.as_bytes()).unwrap()).unwrap()
}

#[test]
fn a_group_is_read() {
    let group = group();
    assert_eq!((group.name.as_str(), group.sequence, group.members.len()), ("vg0", 7, 2));
    let names: Vec<_> = group.volumes.iter().map(|v| (group.device_name(v), v.size >> 16)).collect();
    let expected =
        [("vg0-lin", 4), ("vg0-with--hyphen", 4), ("vg0-thin", 4), ("vg0-gap", 4), ("vg0-snap", 4)];
    assert_eq!(names, expected.map(|(name, extents)| (name.to_owned(), extents)));
    assert!(group.volumes[0].writable && !group.volumes[3].writable);
    let why = |index: usize| group.volumes[index].segments.as_ref().unwrap_err().as_str();
    assert_eq!(why(2), "volumes of type thin are not understood");
    assert_eq!((why(3), why(4)), ("it is the origin of a snapshot", "it is a snapshot"));
}

#[test]
fn bytes_are_where_they_should_be() {
    let group = group();
    const EXTENT: u64 = 128 * 512;
    let linear = |offset| group.volumes[0].locate(offset);
    assert_eq!(linear(0), Some((0, 2048 * 512 + 5 * EXTENT, 3 * EXTENT)));
    assert_eq!(linear(3 * EXTENT - 1), Some((0, 2048 * 512 + 8 * EXTENT - 1, 1)));
    assert_eq!(linear(3 * EXTENT), Some((1, 4096 * 512, EXTENT)));
    assert_eq!(linear(4 * EXTENT), None);
    let striped = |offset| group.volumes[1].locate(offset);
    let stripe = 64 * 512;
    assert_eq!(striped(0), Some((0, 2048 * 512 + 10 * EXTENT, stripe)));
    assert_eq!(striped(stripe + 1), Some((1, 4096 * 512 + 20 * EXTENT + 1, stripe - 1)));
    assert_eq!(striped(2 * stripe), Some((0, 2048 * 512 + 10 * EXTENT + stripe, stripe)));
    assert_eq!(group.volumes[2].locate(0), None);
}

#[test]
fn text_that_is_not_well_formed() {
    for text in
        ["a", "a = ", "a {", "a }", "}", "a = [1", "a = [1 2]", "a = \"x", "a = \"x\\", "a = x", "= 1"]
    {
        assert_eq!(text::parse(text.as_bytes()), None, "{text}");
    }
    assert_eq!(text::parse("a{".repeat(100).as_bytes()), None);
    assert_eq!(text::parse(format!("a = {}", "[".repeat(100)).as_bytes()), None);
    assert!(text::parse(b"a = [1, 2,] b = -1 c {}\0\0").is_some());
}

/// A physical volume with metadata in a ring that begins at `offset`.
fn disk(metadata: &[u8], offset: usize) -> Vec<u8> {
    const START: usize = 4096;
    const LENGTH: usize = 16 << 10;
    let mut disk = vec![0; 1 << 20];
    put(&mut disk, 512, b"LABELONE");
    put(&mut disk, 520, &1u64.to_le_bytes());
    put(&mut disk, 532, &32u32.to_le_bytes());
    put(&mut disk, 536, b"LVM2 001");
    put(&mut disk, 544, b"UB1DO9pKD0GWI0JD0w7aWAnWxrBqwpme");
    for (i, number) in [1u64 << 20, 1 << 20, 0, 0, 0, START as u64, LENGTH as u64].into_iter().enumerate() {
        put(&mut disk, 576 + 8 * i, &number.to_le_bytes());
    }
    let sum = checksum(&disk[532..1024]);
    put(&mut disk, 528, &sum.to_le_bytes());
    put(&mut disk, START + 4, METADATA);
    let size = metadata.len() as u64;
    for (i, number) in [START as u64, LENGTH as u64, offset as u64, size].into_iter().enumerate() {
        put(&mut disk, START + 24 + 8 * i, &number.to_le_bytes());
    }
    put(&mut disk, START + 56, &checksum(metadata).to_le_bytes());
    let sum = checksum(&disk[START + 4..START + 512]);
    put(&mut disk, START, &sum.to_le_bytes());
    for (i, byte) in metadata.iter().enumerate() {
        let at = offset + i;
        disk[START + if at < LENGTH { at } else { at - LENGTH + 512 }] = *byte;
    }
    disk
}

fn read(disk: &[u8]) -> Option<PhysicalVolume> {
    let read = |buf: &mut [u8], offset: u64| -> Result<(), Infallible> {
        buf.copy_from_slice(&disk[offset as usize..][..buf.len()]);
        Ok(())
    };
    read_physical_volume(disk.len() as u64, read).unwrap()
}

#[test]
fn a_physical_volume_is_read_wherever_its_metadata_begin() {
    for offset in [512, 1024, (16 << 10) - 700] {
        let found = read(&disk(TEXT.as_bytes(), offset)).unwrap();
        assert_eq!((found.id.as_str(), &found.warning), ("UB1DO9-pKD0-GWI0-JD0w-7aWA-nWxr-Bqwpme", &None));
        assert_eq!(found.group, Some(group()));
    }
    let mut damaged = disk(TEXT.as_bytes(), 512);
    damaged[4096 + 600] ^= 1;
    let found = read(&damaged).unwrap();
    assert_eq!(found.group, None);
    assert_eq!(found.warning.unwrap(), "the LVM metadata are damaged: their checksum is wrong");
    assert_eq!(read(&vec![0; 1 << 20]), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Numbers of the metadata that are not to be trusted.
    #[test]
    fn hostile_metadata_do_no_harm(
        numbers in prop::collection::vec((0usize..60, prop_oneof![0i64..9, any::<i64>()]), 0..8),
        offset in any::<u64>(),
        size in any::<u64>(),
    ) {
        let mut words: Vec<String> = TEXT.split(' ').map(String::from).collect();
        let places: Vec<usize> = (0..words.len()).filter(|i| words[*i].parse::<i64>().is_ok()).collect();
        for (place, number) in numbers {
            words[places[place % places.len()]] = number.to_string();
        }
        let text = words.join(" ");
        if let Some(group) = text::parse(text.as_bytes()).as_ref().and_then(Group::from_text) {
            for volume in group.volumes {
                for offset in [0, 1 << 16, volume.size / 2, volume.size.saturating_sub(1)] {
                    if let Some((member, start, length)) = volume.locate(offset) {
                        prop_assert!(member < group.members.len() && length > 0);
                        prop_assert!(start.checked_add(length).is_some());
                    }
                }
            }
        }
        let mut disk = disk(TEXT.as_bytes(), 512);
        put(&mut disk, 4096 + 40, &offset.to_le_bytes());
        put(&mut disk, 4096 + 48, &size.to_le_bytes());
        let sum = checksum(&disk[4096 + 4..4096 + 512]);
        put(&mut disk, 4096, &sum.to_le_bytes());
        prop_assert!(read(&disk).is_some());
    }
}
