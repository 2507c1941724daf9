//! What the memory plugin adds to the conformance suite: what it costs, and its parameters.

use std::{ffi::OsStr, ops::Range};

use nbdkit_core::{Extents, Flags, Handle, Plugin};

use super::{
    Memory, Shared,
    allocator::{Allocator, Data},
    plain::{BLIND, PAGE},
};
use crate::testkit;

fn disk(size: u64) -> Shared {
    Shared::new(Allocator::Sparse.make(size).unwrap().into())
}

fn extents(handle: &Shared, range: Range<u64>) -> Vec<(u64, u64, u32)> {
    let mut extents = Extents::new(range.start, range.end);
    handle.extents(range.end - range.start, range.start, Flags::empty(), &mut extents).unwrap();
    extents.as_slice().iter().map(|e| (e.offset, e.length, e.kind())).collect()
}

/// Allocated memory, in bytes.
fn allocated(handle: &Shared) -> u64 {
    match &handle.disk.data {
        Data::Plain(plain) => plain.allocated(),
        Data::Compressed(compressed) => compressed.allocated() as u64,
    }
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

fn known(handle: &Shared) -> u64 {
    match &handle.disk.data {
        Data::Plain(plain) => plain.known(),
        Data::Compressed(_) => 0,
    }
}

#[test]
fn pages_are_known_while_they_exist() {
    let handle = disk(100 * PAGE + 7);
    let pages = || (known(&handle), allocated(&handle) / PAGE);
    assert_eq!(pages(), (0, 0));
    for round in 0..2_u8 {
        handle.pwrite(&[round + 1; 2 * PAGE as usize], PAGE / 2, Flags::empty()).unwrap();
        handle.pwrite(&[9], 100 * PAGE + 6, Flags::empty()).unwrap();
        assert_eq!(pages(), (4, 4), "{round}");
    }
    // A page that is zeroed in part still exists.
    handle.zero(2 * PAGE - 1, PAGE / 2, Flags::empty()).unwrap();
    assert_eq!(pages(), (3, 3));
    let mut bytes = [0xee; 3 * PAGE as usize];
    handle.pread(&mut bytes, 0).unwrap();
    let half = PAGE as usize / 2;
    assert!(bytes[..5 * half - 1] == [0; 5 * PAGE as usize / 2 - 1] && bytes[5 * half - 1..5 * half] == [2]);
    assert_eq!(pages(), (3, 3));
    handle.trim(7, 100 * PAGE, Flags::empty()).unwrap();
    handle.trim(3 * PAGE, 0, Flags::empty()).unwrap();
    assert_eq!(pages(), (0, 0));
    handle.pread(&mut bytes, 0).unwrap();
    assert!(bytes == [0; 3 * PAGE as usize] && pages() == (0, 0));
}

/// The file on loan and the mapping are the same memory.
#[test]
fn what_is_written_on_loan_is_seen() {
    use std::os::unix::fs::FileExt as _;
    let handle = disk(10 * PAGE);
    handle.pwrite(&[1; PAGE as usize], PAGE, Flags::empty()).unwrap();
    let Data::Plain(plain) = &handle.disk.data else { panic!("it is not compressed") };
    let loan = plain.loan(0);
    let file = std::fs::File::from(loan.fd.try_clone_to_owned().unwrap());
    file.write_all_at(&[2; 3 * PAGE as usize], 0).unwrap();
    let mut bytes = vec![0; 4 * PAGE as usize];
    handle.pread(&mut bytes, 0).unwrap();
    assert!(
        bytes[..3 * PAGE as usize] == [2; 3 * PAGE as usize]
            && bytes[3 * PAGE as usize..] == [0; PAGE as usize]
    );
    assert!(file.set_len(PAGE).is_err(), "it can shrink under the mapping");
}

#[test]
fn allocators() {
    let parse = |value: &str| Allocator::parse(OsStr::new(value));
    let zstd = |level| Allocator::Zstd { level };
    for (value, want) in [
        ("sparse", Allocator::Sparse),
        ("malloc", Allocator::Malloc { mlock: false }),
        ("malloc,mlock=true", Allocator::Malloc { mlock: true }),
        ("malloc,mlock=0", Allocator::Malloc { mlock: false }),
        ("zstd", zstd(3)),
        ("zstd,level=-5", zstd(-5)),
    ] {
        assert_eq!(parse(value).unwrap(), want, "{value}");
    }
    for (value, message) in [
        ("", "unknown allocator \"\""),
        ("foo,x=1", "unknown allocator \"foo\""),
        ("sparse,mlock=true", "allocator=sparse does not take extra parameters"),
        ("malloc,mlock=maybe", "boolean"),
        ("malloc,level=3", "allocator=malloc: unknown parameter level=3"),
        ("malloc,", "allocator=malloc: unknown parameter"),
        ("zstd,level=x", "level"),
        ("zstd,level=23", "level must be from"),
        ("zstd,mlock=true", "allocator=zstd does not take extra parameters"),
    ] {
        let error = parse(value).unwrap_err().to_string();
        assert!(error.contains(message), "{value}: {error}");
    }
}

#[test]
fn each_allocator_has_its_best_block_size() {
    for (value, preferred) in [("sparse", 32768), ("malloc", 512), ("zstd", 32768)] {
        let handle = testkit::disk("memory", &[("size", "1M"), ("allocator", value)]);
        let sizes = handle.caps().block_size;
        assert_eq!((sizes.minimum, sizes.preferred, sizes.maximum), (1, preferred, u32::MAX));
    }
}

fn compressed(size: u64) -> Shared {
    Shared::new(Allocator::Zstd { level: 3 }.make(size).unwrap().into())
}

#[test]
fn compressed_pages_are_small_and_holes_stay_holes() {
    const PAGE: u64 = 32768;
    let size = (1 << 40) + 5;
    let handle = compressed(size);
    assert_eq!(extents(&handle, 0..size), [(0, size, 3)]);
    let text: Vec<u8> = b"all work and no play ".iter().cycle().take(4 << 20).copied().collect();
    handle.pwrite(&text, PAGE - 1, Flags::empty()).unwrap();
    assert!(allocated(&handle) < 64 << 10, "{}", allocated(&handle));
    handle.pwrite(b"end", size - 3, Flags::empty()).unwrap();
    let end = (PAGE - 1 + text.len() as u64).next_multiple_of(PAGE);
    let last = size / PAGE * PAGE;
    assert_eq!(extents(&handle, 0..size), [(0, end, 0), (end, last - end, 3), (last, size - last, 0)]);
    // A page that was zeroed in parts is a hole, and so is the short one at the end.
    handle.zero(100, 0, Flags::empty()).unwrap();
    assert_eq!(extents(&handle, 0..PAGE), [(0, PAGE, 0)]);
    handle.zero(PAGE - 100, 100, Flags::empty()).unwrap();
    handle.trim(5, size - 5, Flags::empty()).unwrap();
    assert_eq!(extents(&handle, 0..size), [(0, PAGE, 3), (PAGE, end - PAGE, 0), (end, size - end, 3)]);
    handle.zero(size, 0, Flags::empty()).unwrap();
    assert_eq!(allocated(&handle), 0);
}

#[test]
fn what_cannot_be_compressed_takes_its_own_size() {
    let handle = compressed(1 << 20);
    let mut state = 1_u64;
    let noise: Vec<u8> = (0..1 << 17)
        .flat_map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 32).to_le_bytes()
        })
        .collect();
    handle.pwrite(&noise[..1 << 20], 0, Flags::empty()).unwrap();
    assert!(allocated(&handle) <= 1 << 20, "{}", allocated(&handle));
    let mut back = vec![0; 1 << 20];
    handle.pread(&mut back, 0).unwrap();
    assert!(back == noise[..1 << 20]);
}

#[test]
fn every_allocator_keeps_what_is_written() {
    for allocator in ["sparse", "malloc", "zstd"] {
        let handle = testkit::disk("memory", &[("size", "100001"), ("allocator", allocator)]);
        testkit::check_model(&handle, |_| true);
    }
}

/// Neighbours in one page do not lose each other's bytes.
#[test]
fn parts_of_a_page_are_written_side_by_side() {
    for disk in [disk(65536), compressed(65536)] {
        // Holes are made meanwhile.
        std::thread::scope(|scope| {
            for thread in 0..4_u8 {
                let disk = &disk;
                scope.spawn(move || {
                    for round in 0..100_u8 {
                        for at in (u64::from(thread)..64).step_by(4) {
                            disk.pwrite(&[round; 1000], at * 1000, Flags::empty()).unwrap();
                        }
                        if thread == 0 {
                            disk.zero(1000, 64_000, Flags::empty()).unwrap();
                        }
                    }
                });
            }
        });
        let mut back = vec![0; 65536];
        disk.pread(&mut back, 0).unwrap();
        assert!(back[..64_000].iter().all(|byte| *byte == 99) && back[64_000..] == [0; 1536]);
    }
}

#[test]
fn the_size_is_required() {
    let error = Memory::default().config_complete().unwrap_err().to_string();
    assert!(error.contains("you must specify size=SIZE"), "{error}");
}
