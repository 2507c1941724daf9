//! Large reads and writes of a disk that is lent: what goes through a pipe, and what must not.

use std::{fs::File, os::fd::AsFd, os::unix::fs::FileExt};

use nbdkit_core::{Caps, Error, Loan};

use super::*;

const M: usize = 1 << 20;
const DISK: usize = 8 * M;

/// A file that is lent; reads and writes that go through the chain instead are counted.
struct Lent {
    file: Arc<File>,
    copies: Arc<AtomicUsize>,
    /// What is lent is this instead.
    instead: Option<Arc<File>>,
}

struct OpenLent(Arc<File>, Arc<AtomicUsize>, Option<Arc<File>>);

impl Lent {
    fn new() -> Self {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&pattern(0, DISK), 0).unwrap();
        Lent { file: Arc::new(file), copies: Arc::default(), instead: None }
    }
}

impl Plugin for Lent {
    fn info(&self) -> Info {
        Info::bundled("lent", "lent", "")
    }

    fn open(&self, _: &Open) -> Result<Box<dyn Handle>> {
        Ok(Box::new(OpenLent(self.file.clone(), self.copies.clone(), self.instead.clone())))
    }
}

impl Handle for OpenLent {
    fn capabilities(&self) -> Result<Caps> {
        Ok(Caps::of_size(DISK as u64).with_write(true))
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        if request.may_lend() {
            let fd = self.2.as_ref().unwrap_or(&self.0).as_fd();
            return Outcome::Lent(Loan { fd, offset: request.offset() });
        }
        request.run(self)
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.1.fetch_add(1, SeqCst);
        self.0.read_exact_at(buf, offset).map_err(|_| Error::new(Errno::EIO, "short"))
    }

    fn pwrite(&self, buf: &[u8], offset: u64, _: Flags) -> Result<()> {
        self.1.fetch_add(1, SeqCst);
        Ok(self.0.write_all_at(buf, offset)?)
    }
}

/// Bytes that tell where they are, in a disk or a version of it.
fn pattern(seed: usize, length: usize) -> Vec<u8> {
    (0..length).map(|i| ((i + seed * 13) * 7 + (i >> 8) * 3 + (i >> 16) * 5) as u8).collect()
}

fn write(cookie: u64, offset: usize, data: &[u8]) -> Vec<u8> {
    [&request(0, cmd::WRITE, cookie, offset as u64, data.len() as u32)[..], data].concat()
}

/// Whether this kernel tells what is in memory; otherwise reads are copied.
fn kernel_tells(file: &File) -> bool {
    crate::cachestat::is_resident(file.as_fd(), 0, 4096)
}

#[test]
fn large_data_passes_without_a_copy() {
    let lent = Lent::new();
    let (file, copies) = (lent.file.clone(), lent.copies.clone());
    let mut served = serve(lent, Config::default()).begin();
    let mut disk = pattern(0, DISK);
    for (seed, (offset, length)) in
        [(0, M), (4096, M), (777, M - 1000), (3 * M + 1, 65_537), (M, 2 * M), (5 * M, 100_000)]
            .into_iter()
            .enumerate()
    {
        let data = pattern(seed + 1, length);
        served.send(&write(1, offset, &data));
        assert_eq!(served.receive(), simple_reply(0, 1));
        disk[offset..][..length].copy_from_slice(&data);
        let mut there = vec![0; DISK];
        file.read_exact_at(&mut there, 0).unwrap();
        assert!(there == disk, "after {length} bytes at {offset}");
    }
    assert_eq!(copies.load(SeqCst), 0);
    for (offset, length) in [(0, M), (777, M - 4096), (3 * M + 1, 65_537), (5 * M, 65_536)] {
        served.send(&request(0, cmd::READ, 2, offset as u64, length as u32));
        assert_eq!(served.receive(), simple_reply(0, 2));
        let mut got = vec![0; length];
        served.socket.read_exact(&mut got).unwrap();
        assert!(got == disk[offset..][..length], "{length} bytes at {offset}");
    }
    if kernel_tells(&file) {
        assert_eq!(copies.load(SeqCst), 0);
    }
    // More than a pipe holds cannot be taken back when its end fails, so it is copied, but for parts.
    served.send(&request(0, cmd::READ, 3, 0, 4 << 20));
    assert_eq!(served.receive(), simple_reply(0, 3));
    let mut got = vec![0; 4 * M];
    served.socket.read_exact(&mut got).unwrap();
    assert!(got == disk[..4 * M]);
    assert_eq!(copies.load(SeqCst), if kernel_tells(&file) { 1 } else { 5 });
    served.ended();
}

#[test]
fn a_slow_client_gets_all_in_order() {
    let mut served = serve(Lent::new(), Config::default()).begin();
    let disk = pattern(0, DISK);
    // More than the socket holds of either: the last writes arrive only if the server goes on receiving though its
    // replies are not taken.
    served.socket.set_write_timeout(Some(DEADLINE)).unwrap();
    for cookie in 0..12 {
        served.send(&request(0, cmd::READ, cookie, (cookie % 8) * M as u64, M as u32));
        served.send(&write(100, 0, &disk[..100_000]));
    }
    for cookie in 0..12_u8 {
        assert_eq!(served.receive(), simple_reply(0, cookie));
        let mut got = vec![0; M];
        served.socket.read_exact(&mut got).unwrap();
        assert!(got == disk[usize::from(cookie % 8) * M..][..M], "{cookie}");
        assert_eq!(served.receive(), simple_reply(0, 100));
    }
    served.ended();
}

#[test]
fn small_pieces_fill_no_pipe_for_ever() {
    let lent = Lent::new();
    let file = lent.file.clone();
    let mut served = serve(lent, Config::default()).begin();
    let data = pattern(9, 100_000);
    let bytes = write(1, 5, &data);
    // The header, then one byte at a time: each is a piece of its own in the pipe.
    served.send(&bytes[..28]);
    for byte in bytes[28..3000].chunks(1) {
        served.send(byte);
    }
    served.send(&bytes[3000..]);
    assert_eq!(served.receive(), simple_reply(0, 1));
    let mut there = vec![0; data.len()];
    file.read_exact_at(&mut there, 5).unwrap();
    assert!(there == data);
    // The connection is in step.
    served.send(&request(0, cmd::READ, 2, 5, 4));
    assert_eq!(served.receive(), simple_reply(0, 2));
    assert_eq!(served.receive::<4>(), data[..4]);
    served.ended();
}

#[test]
fn a_client_that_vanishes_tears_no_sector() {
    for sent in [28, 29, 4000, 5000, 70_000, 300_001, M - 1] {
        let lent = Lent::new();
        let file = lent.file.clone();
        let mut served = serve(lent, Config::default()).begin();
        let new = vec![0xaa; M];
        let offset = 4096 + 512;
        // The header alone first, so that all of the data goes through the pipe.
        let bytes = write(1, offset, &new);
        served.send(&bytes[..28]);
        served.send(&bytes[28..sent]);
        served.ended();
        let old = pattern(0, DISK);
        let mut there = vec![0; DISK];
        file.read_exact_at(&mut there, 0).unwrap();
        let end = offset + sent - 28;
        for (index, sector) in there.chunks(512).enumerate() {
            let at = index * 512;
            let is_old = *sector == old[at..at + 512];
            let is_new = sector.iter().all(|b| *b == 0xaa) && at >= offset && at + 512 <= end;
            assert!(is_old || is_new, "sector at {at} after {sent} bytes");
        }
    }
}

#[test]
fn what_the_file_refuses_is_an_error_of_the_request() {
    let mut lent = Lent::new();
    let path = tempfile::NamedTempFile::new().unwrap();
    path.as_file().write_all_at(&pattern(0, DISK), 0).unwrap();
    // A file that cannot be written to, though it is lent as one that can.
    lent.instead = Some(Arc::new(File::open(path.path()).unwrap()));
    let mut served = serve(lent, Config::default()).begin();
    served.send(&write(1, 0, &pattern(1, M)));
    let reply = served.receive::<16>();
    assert_ne!(reply, simple_reply(0, 1));
    assert_eq!(reply[15], 1);
    // The payload was skipped.
    served.send(&request(0, cmd::READ, 2, 0, 16));
    assert_eq!(served.receive(), simple_reply(0, 2));
    assert_eq!(served.receive::<16>(), pattern(0, 16)[..]);
    served.ended();
}

#[test]
fn what_the_file_does_not_have_is_an_error_of_the_request() {
    let lent = Lent::new();
    lent.file.set_len(3 * M as u64 + 5000).unwrap();
    let mut served = serve(lent, Config::default()).begin();
    served.send(&request(0, cmd::READ, 1, 3 * M as u64 - 4096, 100_000));
    assert_eq!(served.receive(), simple_reply(5, 1));
    served.send(&request(0, cmd::READ, 2, 0, 16));
    assert_eq!(served.receive(), simple_reply(0, 2));
    assert_eq!(served.receive::<16>(), pattern(0, 16)[..]);
    served.ended();
}
