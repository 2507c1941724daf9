//! What the memory plugin adds to the conformance suite: what it costs, and its parameters.

use std::os::unix::fs::MetadataExt;

use super::*;

fn disk(size: u64) -> Shared {
    Shared { disk: Arc::new(Disk::new(size, false).unwrap()), known: Mutex::default() }
}

fn extents(handle: &Shared, range: Range<u64>) -> Vec<(u64, u64, u32)> {
    let mut extents = Extents::new(range.start, range.end);
    handle.extents(range.end - range.start, range.start, Flags::empty(), &mut extents).unwrap();
    extents.as_slice().iter().map(|e| (e.offset, e.length, e.kind())).collect()
}

/// Allocated memory, in bytes.
fn allocated(handle: &Shared) -> u64 {
    handle.disk.file.metadata().unwrap().blocks() * 512
}

#[test]
fn only_what_is_written_costs_memory() {
    for size in [1, PAGE - 1, PAGE, 10 * PAGE + 1, 3 << 29, BLIND - 1, BLIND, BLIND + 1, i64::MAX as u64] {
        let handle = disk(size);
        handle.pread(&mut vec![0; size.min(1 << 20) as usize], 0).unwrap();
        assert_eq!(allocated(&handle), 0, "{size} bytes, after a read");
        let data = vec![1; size.min(2 * PAGE) as usize];
        handle.pwrite(&data, size - data.len() as u64, Flags::empty()).unwrap();
        assert!((1..=3 * PAGE).contains(&allocated(&handle)), "{size} bytes, after a write");
        handle.zero(size, 0, Flags::empty()).unwrap();
        // The last page of the largest disks is beyond what a hole can reach.
        let left = if size > BLIND { PAGE } else { 0 };
        assert_eq!(allocated(&handle), left, "{size} bytes, after all was zeroed");
    }
}

#[test]
fn extents_reach_the_last_byte_of_the_largest_disk() {
    const SIZE: u64 = i64::MAX as u64;
    let handle = disk(SIZE);
    assert_eq!(extents(&handle, 0..SIZE), [(0, SIZE, 3)]);
    handle.pwrite(&[1], SIZE - 1, Flags::empty()).unwrap();
    assert_eq!(extents(&handle, 0..SIZE), [(0, BLIND, 3), (BLIND, SIZE - BLIND, 0)]);
    assert_eq!(extents(&handle, SIZE - 1..SIZE), [(SIZE - 1, 1, 0)]);
    handle.pwrite(&[1], BLIND - 1, Flags::empty()).unwrap();
    assert_eq!(
        extents(&handle, BLIND - 2 * PAGE..SIZE),
        [(BLIND - 2 * PAGE, PAGE, 3), (BLIND - PAGE, SIZE - BLIND + PAGE, 0)]
    );
}

#[test]
fn remembered_data_is_forgotten_when_holes_are_made() {
    let handle = disk(8 * PAGE);
    handle.pwrite(&[1; 8 * PAGE as usize], 0, Flags::empty()).unwrap();
    for start in [0, PAGE, 5 * PAGE] {
        assert_eq!(extents(&handle, start..8 * PAGE), [(start, 8 * PAGE - start, 0)]);
    }
    handle.trim(PAGE, 6 * PAGE, Flags::empty()).unwrap();
    assert_eq!(
        extents(&handle, 5 * PAGE..8 * PAGE),
        [(5 * PAGE, PAGE, 0), (6 * PAGE, PAGE, 3), (7 * PAGE, PAGE, 0)]
    );
}

#[test]
fn allocators_of_upstream_are_accepted() {
    for (value, mlock) in [
        ("sparse", false),
        ("malloc", false),
        ("malloc,mlock=true", true),
        ("malloc,mlock=0", false),
        ("zstd", false),
        ("zstd,level=3", false),
    ] {
        assert_eq!(allocator(value).unwrap(), mlock, "{value}");
    }
    for bad in ["", "foo", "sparse,mlock=true", "malloc,mlock=maybe", "malloc,level=3", "zstd,level=x"] {
        assert!(allocator(bad).is_err(), "{bad}");
    }
}

#[test]
fn the_size_is_required() {
    let error = Memory::default().config_complete().unwrap_err().to_string();
    assert!(error.contains("you must specify size=SIZE"), "{error}");
}
