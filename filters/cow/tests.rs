//! Tests of the cow filter.

use std::sync::Barrier;

use nbdkit_core::Session;

use super::*;
use crate::testing::{
    Answer, Disk, Spec, View, chain, check_model, check_model_over, client, config_error, lent, open,
    read_inline, session, started,
};

const BLOCK: u64 = 4096;

fn cow(disk: &Disk) -> Session {
    session(disk, "cow", &[("cow-block-size", "4k")])
}

fn kinds(session: &Session, length: u64, offset: u64) -> Vec<(u64, u64, u32)> {
    let extents = session.extents(length, offset, Flags::empty()).unwrap();
    extents.iter().map(|e| (e.offset, e.length, e.kind())).collect()
}

fn read(session: &Session, length: usize, offset: u64) -> Vec<u8> {
    let mut buf = vec![0xaa; length];
    session.pread(&mut buf, offset).unwrap();
    buf
}

#[test]
fn model() {
    let view = View { through: false, ..View::same(30_001) };
    for params in [
        &[("cow-block-size", "4k")][..],
        &[("cow-block-size", "64k")],
        &[("cow-block-size", "4k"), ("cow-on-read", "true")],
        &[("cow-block-size", "8k"), ("cow-on-cache", "true")],
    ] {
        check_model(&["cow"], params, 30_001, &view);
    }
    let block_size = BlockSize { minimum: 512, preferred: 512, maximum: 1024 };
    let strict = Spec { write: false, block_size, ..Spec::sized(20_480) };
    let view = View { through: false, ..View::same(20_480) };
    check_model_over(&strict, &["cow"], &[("cow-block-size", "4k")], &view);
}

#[test]
fn the_disk_below_is_only_read() {
    let disk = Spec::sized(5 * BLOCK).disk();
    let before = disk.contents();
    let session = cow(&disk);
    session.pwrite(&[1; 6000], 1000, Flags::FUA).unwrap();
    session.zero(5000, 9000, Flags::FUA).unwrap();
    session.trim(BLOCK, 4 * BLOCK, Flags::empty()).unwrap();
    session.flush().unwrap();
    assert!(disk.calls().iter().all(|call| matches!(call.op, Op::Read | Op::Extents)), "{:?}", disk.calls());
    assert_eq!(disk.contents(), before);
}

#[test]
fn a_write_of_whole_blocks_reads_nothing() {
    let disk = Spec::sized(5 * BLOCK + 100).disk();
    let session = cow(&disk);
    session.pwrite(&[1; 2 * BLOCK as usize], BLOCK, Flags::empty()).unwrap();
    // The last block is a short one.
    session.pwrite(&[2; 100], 5 * BLOCK, Flags::empty()).unwrap();
    // These blocks are stored by now.
    session.pwrite(&[3; 10], BLOCK + 7, Flags::empty()).unwrap();
    assert!(disk.calls().is_empty());
    assert_eq!(read(&session, 19, BLOCK), [[1; 7].to_vec(), [3; 10].to_vec(), [1; 2].to_vec()].concat());
}

#[test]
fn extents_tell_the_three_states_apart() {
    let data = [vec![1; 2 * BLOCK as usize], vec![0; 4 * BLOCK as usize]].concat();
    let session = cow(&Spec { data, ..Spec::default() }.disk());
    session.pwrite(&[0], 5 * BLOCK, Flags::empty()).unwrap();
    session.trim(BLOCK, 0, Flags::empty()).unwrap();
    assert_eq!(
        kinds(&session, 6 * BLOCK, 0),
        [(0, BLOCK, 3), (BLOCK, BLOCK, 0), (2 * BLOCK, 3 * BLOCK, 3), (5 * BLOCK, BLOCK, 0)]
    );
    assert_eq!(kinds(&session, 100, BLOCK - 50), [(BLOCK - 50, 50, 3), (BLOCK, 50, 0)]);
    assert_eq!(session.extents(6 * BLOCK, 0, Flags::REQ_ONE).unwrap().len(), 1);
}

#[test]
fn the_rest_of_a_large_discarded_block_is_zero() {
    let session = session(&Spec::sized(4 << 20).disk(), "cow", &[("cow-block-size", "4M")]);
    session.trim(4 << 20, 0, Flags::empty()).unwrap();
    session.pwrite(&[1; 10], 100, Flags::empty()).unwrap();
    // It is written in chunks, so look at the same place in the next one.
    assert!(
        read(&session, 4 << 20, 0).iter().enumerate().all(|(i, b)| *b == u8::from((100..110).contains(&i)))
    );
}

#[test]
fn a_zero_keeps_its_space_unless_it_may_trim() {
    let session = cow(&Spec::sized(4 * BLOCK).disk());
    session.zero(BLOCK, 0, Flags::empty()).unwrap();
    session.zero(BLOCK, BLOCK, Flags::MAY_TRIM).unwrap();
    assert_eq!(kinds(&session, 2 * BLOCK, 0), [(0, BLOCK, 0), (BLOCK, BLOCK, 3)]);
    assert!(read(&session, 2 * BLOCK as usize, 0).iter().all(|byte| *byte == 0));
}

#[test]
fn a_fast_zero_is_done_only_where_it_is_one() {
    let session = cow(&Spec::sized(4 * BLOCK).disk());
    let fast = Flags::FAST_ZERO | Flags::MAY_TRIM;
    session.zero(2 * BLOCK, 0, fast).unwrap();
    // Part of a discarded block: nothing to copy.
    session.zero(100, 10, fast).unwrap();
    let error = session.zero(100, 3 * BLOCK, fast).unwrap_err();
    assert_eq!(error.errno(), Errno::EOPNOTSUPP);
    assert!(session.zero(BLOCK, 3 * BLOCK, Flags::FAST_ZERO).is_err());
    assert_eq!(read(&session, 100, 3 * BLOCK), Spec::sized(4 * BLOCK).data[3 * BLOCK as usize..][..100]);
}

#[test]
fn connections_share_the_overlay() {
    let disk = Spec::default().disk();
    let chain = chain(&disk, &["cow"], &[]).unwrap();
    let one = open(&chain, client(), false).unwrap();
    let two = open(&chain, client(), false).unwrap();
    one.pwrite(b"hello", 100, Flags::empty()).unwrap();
    assert_eq!(read(&two, 5, 100), b"hello");
    drop((one, two));
    assert_eq!(read(&open(&chain, client(), true).unwrap(), 5, 100), b"hello");
}

#[test]
fn parallel_writes_into_one_block_lose_nothing() {
    // Only the first write into a block copies it, so each round takes a fresh one.
    const ROUNDS: u64 = 256;
    let session = cow(&Spec { data: vec![0; (ROUNDS * BLOCK) as usize], ..Spec::default() }.disk());
    let barrier = Barrier::new(4);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (session, barrier) = (&session, &barrier);
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    barrier.wait();
                    session.pwrite(&[thread as u8 + 1], round * BLOCK + thread, Flags::empty()).unwrap();
                }
            });
        }
    });
    for round in 0..ROUNDS {
        assert_eq!(read(&session, 4, round * BLOCK), [1, 2, 3, 4]);
    }
}

#[test]
fn a_slow_read_below_does_not_hold_up_other_blocks() {
    let disk = Spec::sized(4 * BLOCK).disk();
    let session = cow(&disk);
    disk.hold();
    std::thread::scope(|scope| {
        scope.spawn(|| session.pwrite(&[1], 0, Flags::empty()).unwrap());
        disk.wait_inside(1);
        session.pwrite(&[2; BLOCK as usize], BLOCK, Flags::empty()).unwrap();
        assert_eq!(read(&session, 1, BLOCK), [2]);
        disk.release();
    });
}

#[test]
fn reads_copy_while_the_path_exists() {
    let dir = tempfile::tempdir().unwrap();
    let trigger = dir.path().join("trigger");
    let disk = Spec::default().disk();
    let session = session(&disk, "cow", &[("cow-on-read", trigger.to_str().unwrap())]);
    read(&session, 10, 0);
    read(&session, 10, 0);
    assert_eq!(disk.take_calls().len(), 2);
    std::fs::write(&trigger, "").unwrap();
    read(&session, 10, 0);
    disk.take_calls();
    read(&session, 10, 0);
    assert!(disk.calls().is_empty());
}

#[test]
fn a_cache_request_copies_when_asked() {
    let disk = Spec::default().disk();
    let session = session(&disk, "cow", &[("cow-on-cache", "true")]);
    session.cache(10, 0).unwrap();
    disk.take_calls();
    read(&session, 1000, 0);
    assert!(disk.calls().is_empty());
}

#[test]
fn a_read_of_the_overlay_needs_no_wait() {
    let disk = Spec { blocks: |_| true, ..Spec::default() }.disk();
    let session = cow(&disk);
    assert!(!read_inline(&session, &mut [0; 10], 0).unwrap());
    session.trim(BLOCK, 0, Flags::empty()).unwrap();
    assert!(read_inline(&session, &mut [0; 10], 0).unwrap());
}

#[test]
fn what_is_wholly_below_may_be_started_and_lent() {
    let disk = Spec { later: true, ..Spec::default() }.disk();
    let overlaid = cow(&disk);
    overlaid.pwrite(&[7], 2 * BLOCK, Flags::empty()).unwrap();
    let start = |op, offset| started(&overlaid, Call::new(op, offset, BLOCK), &[9; BLOCK as usize]);
    for op in [Op::Read, Op::Cache] {
        assert!(matches!(start(op, BLOCK), Answer::Started(Ok(_))), "{op:?}");
    }
    for (offset, below) in [(BLOCK, true), (BLOCK + 1, false), (2 * BLOCK, false), (3 * BLOCK, true)] {
        assert_eq!(lent(&overlaid, Op::Read, offset, BLOCK), below.then_some(offset));
    }
    assert_eq!(lent(&overlaid, Op::Write, BLOCK, BLOCK), None);
    assert!(matches!(start(Op::Write, BLOCK), Answer::NeedsThread));
    assert!(matches!(start(Op::Read, BLOCK + 1), Answer::Done(Ok(_))), "it is mixed, and in memory");
    let copying = session(&disk, "cow", &[("cow-on-read", "true")]);
    assert_eq!(lent(&copying, Op::Read, 0, BLOCK), None);
}

#[test]
fn extents_need_a_thread_only_below() {
    let disk = Spec { blocks: |op| op == Op::Extents, ..Spec::default() }.disk();
    let session = cow(&disk);
    session.trim(BLOCK, 0, Flags::empty()).unwrap();
    let inline = |length| session.extents_nowait(length, 0, Flags::empty()).map(|found| found.unwrap().len());
    assert_eq!((inline(BLOCK), inline(2 * BLOCK)), (Some(1), None));
}

#[test]
fn an_error_below_leaves_the_block_as_it_was() {
    // The read of what comes before the patch works, that of what comes after does not.
    let disk = Spec { fail_after: Some(1), ..Spec::default() }.disk();
    let session = cow(&disk);
    assert_eq!(session.pwrite(&[1], 1000, Flags::empty()).unwrap_err().errno(), Errno::EIO);
    assert_eq!(disk.count(Op::Read), 2);
    assert!(session.pread(&mut [0], 1000).is_err(), "the block is still the disk's");
}

#[test]
fn the_largest_disk_works() {
    let params = [("truncate", "9223372036854775807")];
    let chain = chain(&Spec::default().disk(), &["cow", "truncate"], &params).unwrap();
    let session = open(&chain, client(), false).unwrap();
    let last = session.size() - 1;
    assert_eq!(read(&session, 1, last), [0]);
    session.trim(1 << 20, last - (1 << 20), Flags::empty()).unwrap();
    session.pwrite(b"x", 1 << 40, Flags::empty()).unwrap();
    assert_eq!(read(&session, 2, 1 << 40), b"x\0");
    // Not every file system takes a file that large, but each says so.
    if let Err(error) = session.pwrite(b"x", last, Flags::empty()) {
        assert_eq!(error.errno(), Errno::ENOSPC, "{error}");
    }
}

#[test]
fn zeroes_of_a_huge_disk_are_not_discarded_one_by_one() {
    let params = [("truncate", "9223372036854775807")];
    let data = vec![1; 100];
    let chain = chain(&Spec { data, ..Spec::default() }.disk(), &["cow", "truncate"], &params).unwrap();
    let session = open(&chain, client(), false).unwrap();
    session.trim(session.size() - 5, 5, Flags::empty()).unwrap();
    session.zero(session.size(), 0, Flags::MAY_TRIM | Flags::FAST_ZERO).unwrap();
    assert_eq!(read(&session, 200, 0), [0; 200]);
    assert_eq!(kinds(&session, session.size(), 0), [(0, session.size(), 3)]);
}

#[test]
fn discards_keep_to_blocks_with_data_below() {
    // Zeroes below: half of block 0, all of block 2, half of block 4.
    let mut data = vec![1; 6 * BLOCK as usize];
    for (start, end) in [(2048, 4096), (8192, 12288), (16384, 18432)] {
        data[start..end].fill(0);
    }
    let session = cow(&Spec { data, ..Spec::default() }.disk());
    session.zero(6 * BLOCK - 200, 100, Flags::MAY_TRIM).unwrap();
    assert_eq!(read(&session, 6 * BLOCK as usize - 200, 100), vec![0; 6 * BLOCK as usize - 200]);
    assert_eq!((read(&session, 100, 0), read(&session, 100, 6 * BLOCK - 100)), (vec![1; 100], vec![1; 100]));
}

#[test]
fn too_many_blocks_name_the_parameter() {
    let params = [("truncate", "8191P"), ("cow-block-size", "4k")];
    let chain = chain(&Spec::default().disk(), &["cow", "truncate"], &params).unwrap();
    let error = open(&chain, client(), false).unwrap_err();
    assert!(error.to_string().contains("larger cow-block-size"), "{error}");
    // And the server lives.
    assert!(open(&chain, client(), false).unwrap_err().to_string().contains("larger cow-block-size"));
}

#[test]
fn bad_values_are_refused() {
    for bad in ["4095", "2048", "5000", "4G"] {
        assert!(config_error("cow", &[("cow-block-size", bad)]).contains("4096..2G"), "{bad}");
    }
    assert!(config_error("cow", &[("cow-on-read", "relative/path")]).contains("absolute path"));
    assert!(config_error("cow", &[("cow-on-cache", "/path")]).contains("boolean"));
}
