//! What goes past the page cache and what waits in the ring, compared with a byte array, with io_uring and without.

use std::{io::IoSliceMut, os::unix::fs::FileExt, sync::Arc, thread};

use nbdkit_core::{Call, Chain, Client, Data, Flags, Op, Peer, Session, ShutdownFlag};
use proptest::prelude::*;
use rustix::{
    fs::fadvise,
    io::{ReadWriteFlags, preadv2},
};
use tempfile::NamedTempFile;

use super::*;
use crate::testkit::{Offered, Waiting, offer};

/// No multiple of any block, and more than what one bounce buffer holds.
const SIZE: usize = (1 << 20) + 3 * 4096 + 700;

/// A file on whatever the temporary directory is on, and on a file system in memory.
fn files(size: usize) -> Vec<NamedTempFile> {
    let mut files = vec![NamedTempFile::new().unwrap()];
    files.extend(NamedTempFile::new_in("/dev/shm"));
    files.iter().for_each(|file| file.as_file().set_len(size as u64).unwrap());
    files
}

fn start(file: &NamedTempFile, uncached: bool, no_ring: bool) -> Arc<Chain> {
    start_with(file, Hints { direct: uncached, no_ring, ..Hints::default() })
}

fn start_with(file: &NamedTempFile, hints: Hints) -> Arc<Chain> {
    let mut chain = Chain::new(Box::new(FilePlugin { hints, ..FilePlugin::default() }), Vec::new());
    chain.config("file", file.path().as_os_str()).unwrap();
    chain.config_complete().unwrap();
    chain.get_ready().unwrap();
    Arc::new(chain)
}

fn open(chain: &Arc<Chain>) -> Arc<Session> {
    let client = Arc::new(Client::new(1, Peer::Local, Arc::new(ShutdownFlag::new())));
    Arc::new(Arc::new(chain.connect(client, false).unwrap()).open(OsStr::new(""), false).unwrap())
}

/// Offers a read. None: it was not started.
fn start_read(session: &Session, length: usize, offset: u64) -> Option<Waiting> {
    let call = Call::new(Op::Read, offset, length as u64);
    match offer(session, call, Data::Read(&mut vec![0xaa; length])) {
        Offered::Started(waiting) => Some(waiting),
        _ => None,
    }
}

/// Offers a write. None: it was not started.
fn start_write(session: &Session, data: &[u8], offset: u64, flags: Flags) -> Option<Waiting> {
    let call = Call::new(Op::Write, offset, data.len() as u64).with_flags(flags);
    match offer(session, call, Data::Write(data)) {
        Offered::Started(waiting) => Some(waiting),
        _ => None,
    }
}

fn read(session: &Arc<Session>, length: usize, offset: u64) -> Vec<u8> {
    if let Some(waiting) = start_read(session, length, offset) {
        return waiting.finish(session).unwrap();
    }
    let mut buf = vec![0xaa; length];
    session.pread(&mut buf, offset).unwrap();
    buf
}

fn write(session: &Arc<Session>, data: &[u8], offset: u64, flags: Flags) {
    match start_write(session, data, offset, flags) {
        Some(waiting) => assert!(waiting.finish(session).unwrap().is_empty()),
        None => session.pwrite(data, offset, flags).unwrap(),
    }
}

/// Whether the kernel has none of the file in memory.
fn is_cold(file: &NamedTempFile, offset: u64, length: usize) -> bool {
    let mut buf = vec![0; length];
    preadv2(file, &mut [IoSliceMut::new(&mut buf)], offset, ReadWriteFlags::NOWAIT).is_err()
}

fn cool(file: &NamedTempFile) {
    file.as_file().sync_all().unwrap();
    fadvise(file, 0, None, Advice::DontNeed).unwrap();
}

#[derive(Clone, Debug)]
enum Step {
    Read(usize, usize),
    Write(usize, usize, u8, bool),
    Zero(usize, usize, bool),
    Cool,
}

/// A range: anywhere, or from edge to edge of blocks, or around the end.
fn range() -> impl Strategy<Value = (usize, usize)> {
    let point = prop_oneof![
        2 => 0..SIZE,
        2 => (0..SIZE / 512).prop_map(|n| n * 512),
        4 => (0..SIZE / 4096).prop_map(|n| n * 4096),
        1 => SIZE - 2000..SIZE,
    ];
    let length =
        prop_oneof![1..2000_usize, Just(4096_usize), Just(512), Just(8192), 1..200_000_usize, Just(SIZE)];
    (point, length).prop_map(|(start, length)| (start, length.min(SIZE - start)))
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => range().prop_map(|(a, n)| Step::Read(a, n)),
        6 => (range(), any::<u8>(), any::<bool>()).prop_map(|((a, n), byte, fua)| Step::Write(a, n, byte, fua)),
        1 => (range(), any::<bool>()).prop_map(|((a, n), trim)| Step::Zero(a, n, trim)),
        1 => Just(Step::Cool),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn it_is_an_array_of_bytes(steps in prop::collection::vec((step(), any::<bool>()), 1..40)) {
        for file in files(SIZE) {
            for (direct, dropping, no_ring) in
                [(true, false, false), (true, false, true), (false, false, false), (false, true, false)]
            {
                file.as_file().set_len(0).unwrap();
                file.as_file().set_len(SIZE as u64).unwrap();
                let chain = start_with(&file, Hints { direct, dropping, no_ring, ..Hints::default() });
                let sessions = [open(&chain), open(&chain)];
                let mut model = vec![0; SIZE];
                for (step, second) in &steps {
                    let session = &sessions[usize::from(*second)];
                    match *step {
                        Step::Read(at, n) => assert!(read(session, n, at as u64) == model[at..at + n], "{step:?}"),
                        Step::Write(at, n, byte, fua) => {
                            let data: Vec<u8> = (0..n).map(|i| byte.wrapping_add((i % 251) as u8)).collect();
                            model[at..at + n].copy_from_slice(&data);
                            write(session, &data, at as u64, if fua { Flags::FUA } else { Flags::empty() });
                        }
                        Step::Zero(at, n, trim) => {
                            model[at..at + n].fill(0);
                            let flags = if trim { Flags::MAY_TRIM } else { Flags::empty() };
                            session.zero(n as u64, at as u64, flags).unwrap();
                        }
                        Step::Cool => cool(&file),
                    }
                }
                sessions[0].flush().unwrap();
                assert!(read(&sessions[1], SIZE, 0) == model);
                drop(sessions);
                let mut found = vec![0; SIZE];
                file.as_file().read_exact_at(&mut found, 0).unwrap();
                assert!(found == model, "another process sees something else");
                assert_eq!(file.as_file().metadata().unwrap().len(), SIZE as u64);
            }
        }
    }
}

/// Everybody writes small pieces of the same blocks, none of which is another's.
#[test]
fn no_byte_is_lost_between_neighbours() {
    const PIECE: usize = 256;
    const SIZE: usize = 64 * 4096 + 3 * PIECE;
    let files = files(SIZE);
    for (file, no_ring) in files.iter().flat_map(|file| [(file, false), (file, true)]) {
        let chain = start(file, true, no_ring);
        thread::scope(|scope| {
            for id in 0..4_usize {
                let session = open(&chain);
                scope.spawn(move || {
                    // The first two halves of each block are small pieces, the rest is written as a whole.
                    for round in 0..3_u8 {
                        for index in 0..SIZE / PIECE {
                            let whole = index % 16 >= 8;
                            if index % 4 == id && !whole {
                                write(
                                    &session,
                                    &[round * 4 + id as u8; PIECE],
                                    (index * PIECE) as u64,
                                    Flags::empty(),
                                );
                            } else if whole
                                && index % 2 == 0
                                && index / 2 % 4 == id
                                && index + 1 < SIZE / PIECE
                            {
                                write(
                                    &session,
                                    &[round * 4 + id as u8; 2 * PIECE],
                                    (index * PIECE) as u64,
                                    Flags::empty(),
                                );
                            }
                        }
                    }
                });
            }
        });
        let found = read(&open(&chain), SIZE, 0);
        for (index, piece) in found.chunks(PIECE).enumerate() {
            let owner = if index % 16 >= 8 { index / 2 % 4 } else { index % 4 };
            assert!(
                piece.iter().all(|byte| *byte == 8 + owner as u8),
                "piece {index} of {owner}: {}",
                piece[0]
            );
        }
    }
}

#[test]
fn the_page_cache_stays_free() {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    file.as_file().write_all_at(&[7; 1 << 20], 0).unwrap();
    cool(&file);
    let chain = start(&file, true, false);
    let session = open(&chain);
    if !is_cold(&file, 0, 1) {
        return; // A file system in memory.
    }
    for (offset, length) in [(4096, 4096), (10_000, 33), (65_536, 300_000)] {
        assert!(read(&session, length, offset) == vec![7; length]);
        write(&session, &vec![8; length], offset, Flags::empty());
        session.cache(length as u64, offset).unwrap();
        assert!(is_cold(&file, offset, length), "{length} bytes at {offset}");
    }
    // The end of a file has to pass through it.
    file.as_file().set_len((1 << 20) + 100).unwrap();
    let session = open(&chain);
    write(&session, &[9; 200], (1 << 20) - 100, Flags::empty());
    assert!(is_cold(&file, 1 << 20, 1));
    assert!(read(&session, 200, (1 << 20) - 100) == [9; 200]);
}

#[test]
fn the_page_cache_lets_go_of_what_was_used() {
    let file = NamedTempFile::new().unwrap();
    file.as_file().write_all_at(&[7; 1 << 20], 0).unwrap();
    cool(&file);
    if !is_cold(&file, 0, 1) {
        return; // A file system in memory.
    }
    let session = open(&start_with(&file, Hints { dropping: true, ..Hints::default() }));
    assert!(read(&session, 300_000, 65_536) == vec![7; 300_000]);
    assert!(is_cold(&file, 81_920, 4096), "what was read is dropped");
    write(&session, &[8; 1000], 500_000, Flags::empty());
    assert!(!is_cold(&file, 500_000, 1000), "writes gather");
    session.flush().unwrap();
    assert!(is_cold(&file, 500_000, 1000), "a flush drops what was written");
    for piece in 0..64 {
        write(&session, &[9; 1 << 20], 0, Flags::empty());
        assert!(read(&session, 1, piece) == [9]);
    }
    assert!(is_cold(&file, 524_288, 4096), "so does a window of writes");
}

#[test]
fn what_is_cold_waits_in_the_ring_if_there_is_one() {
    let file = NamedTempFile::new().unwrap();
    file.as_file().write_all_at(&[5; 1 << 20], 0).unwrap();
    cool(&file);
    if !is_cold(&file, 0, 1) || ring::Ring::new().is_err() {
        return;
    }
    for uncached in [true, false] {
        let session = open(&start(&file, uncached, false));
        // By way of the page cache one may bring what the next one asks for, and what is being read stays.
        let have_started = (0..100).any(|_| {
            cool(&file);
            let waiting: Vec<_> = (0..64).filter_map(|i| start_read(&session, 4000, i * 5000 + 1)).collect();
            let count = waiting.len();
            for waiting in waiting {
                assert!(waiting.finish(&session).unwrap() == [5; 4000]);
            }
            count == 64 || !uncached && count > 0
        });
        assert!(have_started, "uncached: {uncached}");
        // Nobody has to have so much memory for it.
        assert!(start_read(&session, ring::LARGEST + 1, 0).is_none());
        assert!(start_read(&session, 1, 1 << 20).is_none(), "out of range");
        let durable = start_write(&session, &[5; 4096], 0, Flags::FUA);
        assert_eq!(durable.map(|waiting| waiting.finish(&session).unwrap()).is_some(), uncached);
        assert!(start_write(&session, &[5; 4096], 100, Flags::empty()).is_none(), "a part of a block");
        assert!(start_read(&open(&start(&file, uncached, true)), 4096, 0).is_none());
    }
}

#[test]
fn requests_end_when_the_client_leaves() {
    let file = NamedTempFile::new().unwrap();
    file.as_file().write_all_at(&[5; 1 << 20], 0).unwrap();
    cool(&file);
    let chain = start(&file, true, false);
    if ring::Ring::new().is_err() || !is_cold(&file, 0, 1) {
        return;
    }
    for _ in 0..20 {
        let session = open(&chain);
        let waiting: Vec<_> = (0..300).filter_map(|i| start_read(&session, 1000, i * 3000)).collect();
        assert!(!waiting.is_empty());
        drop(session);
        for waiting in waiting {
            assert!(waiting.end().unwrap() == [5; 1000]);
        }
    }
}

#[test]
fn a_file_that_becomes_shorter_gives_an_error_past_the_page_cache_too() {
    for no_ring in [false, true] {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(16_384).unwrap();
        let session = open(&start(&file, true, no_ring));
        file.as_file().set_len(5000).unwrap();
        assert!(read(&session, 5000, 0) == [0; 5000]);
        for (length, offset) in [(4096, 4096), (1, 5000), (100, 4950), (4096, 12_288)] {
            let result = match start_read(&session, length, offset) {
                Some(waiting) => waiting.finish(&session),
                None => session.pread(&mut vec![0; length], offset).map(|()| Vec::new()),
            };
            assert_eq!(result.unwrap_err().errno(), nbdkit_core::Errno::EIO, "{length} bytes at {offset}");
        }
    }
}
