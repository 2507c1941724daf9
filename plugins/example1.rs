//! The example1 plugin: a disk of 100 MiB with one partition, which scripts and test suites use as they find it.
//!
//! It has no parameters and cannot be written. All but the partition table reads as zeroes.

use nbdkit_core::{Caps, Handle, Info, Open, Outcome, Plugin, Request, Result, ThreadModel};

/// Size of the disk in bytes.
const SIZE: u64 = 100 << 20;
/// The partition table: a disk identifier, one partition of type 83 (Linux) from sector 128 to 128 sectors before the
/// end, and the signature.
const TABLE: [(u64, &[u8]); 3] = [
    (440, &[0xe1, 0x5b, 0x02, 0x00]),
    (446, &[0x00, 0x02, 0x03, 0x00, 0x83, 0xbc, 0x31, 0x0c, 0x80, 0, 0, 0, 0x01, 0x1f, 0x03, 0x00]),
    (510, &[0x55, 0xaa]),
];

pub(crate) fn new() -> Box<dyn Plugin> {
    Box::new(Example)
}

struct Example;

impl Plugin for Example {
    fn info(&self) -> Info {
        Info::bundled("example1", "a disk with one partition", "")
    }

    fn thread_model(&self) -> ThreadModel {
        ThreadModel::SerializeAllRequests
    }

    fn open(&self, _: &Open) -> Result<Box<dyn Handle>> {
        Ok(Box::new(Partitioned))
    }
}

struct Partitioned;

impl Handle for Partitioned {
    fn capabilities(&self) -> Result<Caps> {
        Ok(Caps::of_size(SIZE))
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        buf.fill(0);
        let end = offset + buf.len() as u64;
        for (start, bytes) in TABLE {
            let (from, to) = (start.max(offset), (start + bytes.len() as u64).min(end));
            if from < to {
                buf[(from - offset) as usize..(to - offset) as usize]
                    .copy_from_slice(&bytes[(from - start) as usize..(to - start) as usize]);
            }
        }
        Ok(())
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        request.run(self)
    }
}
