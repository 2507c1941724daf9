//! Partition tables, the metadata of LVM2 and the superblocks of file systems, on a disk of which the input is some pieces:
//! a byte for the size of sectors, then for each piece its place in units of 64 bytes, its length (both 16 bits, the least
//! first) and its bytes.

#![no_main]

use libfuzzer_sys::fuzz_target;
use nbdkit_common::{Survey, lvm};

const SIZE: usize = 1 << 20;

fuzz_target!(|input: &[u8]| {
    let Some((sectors, mut rest)) = input.split_first() else { return };
    let mut disk = vec![0; SIZE];
    while let Some((&[p0, p1, l0, l1], more)) = rest.split_first_chunk() {
        let at = usize::from(u16::from_le_bytes([p0, p1])) * 64 % SIZE;
        let length = usize::from(u16::from_le_bytes([l0, l1])).min(SIZE - at).min(more.len());
        disk[at..at + length].copy_from_slice(&more[..length]);
        rest = &more[length..];
    }
    let read = |buf: &mut [u8], offset: u64| {
        let from =
            disk.get(offset as usize..).and_then(|rest| rest.get(..buf.len())).ok_or("past the end")?;
        buf.copy_from_slice(from);
        Ok::<(), &str>(())
    };
    let sector_size = [None, Some(512), Some(1024), Some(2048), Some(4096)][usize::from(sectors % 5)];
    let survey = Survey::new(SIZE as u64, sector_size, read);
    assert!(!survey.warnings.iter().any(|warning| warning.contains("past the end")), "{:?}", survey.warnings);
    for (partition, _) in survey.partitions() {
        assert!(partition.start < SIZE as u64, "{partition:?}");
    }
    if let Ok(Some(volume)) = lvm::read_physical_volume(SIZE as u64, read) {
        let _ = lvm::assemble(&[(volume, SIZE as u64)]);
    }
});
