//! Tests of the blocksize filter.

use super::*;
use crate::testing::{
    Answer, Spec, View, check_model, check_model_over, config_error, inline, lent, read_inline, session,
    started,
};

/// The spec of a disk that insists on its limits.
fn strict(size: u64, minimum: u32, maximum: u32) -> Spec {
    Spec { block_size: BlockSize { minimum, preferred: minimum.max(512), maximum }, ..Spec::emulated(size) }
}

fn calls(calls: &[Call]) -> Vec<(Op, u64, u64, bool)> {
    calls.iter().map(|c| (c.op, c.offset, c.length, c.flags.contains(Flags::FUA))).collect()
}

#[test]
fn model() {
    check_model(&["blocksize"], &[], 20_000, &View::same(20_000));
    let params = [("minblock", "1k"), ("maxdata", "2k"), ("maxlen", "3k")];
    check_model(&["blocksize"], &params, 20_000, &View::same(19_456));
    let view = View::same(16 << 10);
    check_model_over(&strict(20_000, 4096, 8192), &["blocksize"], &[], &view);
    check_model_over(
        &Spec { fua: Support::Native, ..strict(20_000, 4096, 4096) },
        &["blocksize"],
        &[],
        &view,
    );
}

#[test]
fn ranges_are_cut_where_the_disk_wants_it() {
    let cut = |length, offset, min, max| {
        pieces(length, offset, min, max).map(|p| (p.offset, p.length, p.whole)).collect::<Vec<_>>()
    };
    assert_eq!(cut(10, 3, 1, 4), [(3, 4, true), (7, 4, true), (11, 2, true)]);
    assert_eq!(cut(2, 3, 8, 16), [(3, 2, false)]);
    assert_eq!(cut(30, 3, 8, 16), [(3, 5, false), (8, 16, true), (24, 8, true), (32, 1, false)]);
    assert_eq!(cut(i64::MAX as u64, 0, 512, i64::MAX as u64).len(), 2);
}

#[test]
fn several_pieces_with_fua_are_flushed_once() {
    let disk = Spec::emulated(8192).disk();
    let session = session(&disk, "blocksize", &[("minblock", "512"), ("maxdata", "512")]);
    session.pwrite(&[7; 1000], 100, Flags::FUA).unwrap();
    assert_eq!(
        calls(&disk.take_calls()),
        [
            (Op::Read, 0, 512, false),
            (Op::Write, 0, 512, false),
            (Op::Write, 512, 512, false),
            (Op::Read, 1024, 512, false),
            (Op::Write, 1024, 512, false),
            (Op::Flush, 0, 0, false)
        ]
    );
    session.trim(100, 10, Flags::FUA).unwrap();
    assert_eq!(calls(&disk.calls()), [(Op::Flush, 0, 0, false)]);
}

#[test]
fn native_fua_goes_with_each_piece() {
    let disk = Spec::sized(8192).disk();
    let session = session(&disk, "blocksize", &[("maxdata", "512"), ("maxlen", "1k")]);
    session.pwrite(&[7; 1000], 0, Flags::FUA).unwrap();
    session.zero(1500, 0, Flags::FUA).unwrap();
    assert_eq!(
        calls(&disk.calls()),
        [
            (Op::Write, 0, 512, true),
            (Op::Write, 512, 488, true),
            (Op::Zero, 0, 1024, true),
            (Op::Zero, 1024, 476, true)
        ]
    );
}

#[test]
fn parallel_writes_into_one_block_lose_nothing() {
    let disk = Spec { data: vec![0; 4096], ..Spec::default() }.disk();
    let session = session(&disk, "blocksize", &[("minblock", "4k")]);
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let session = &session;
            scope.spawn(move || {
                for i in 0..512 {
                    session.pwrite(&[thread as u8 + 1], i * 8 + thread, Flags::empty()).unwrap();
                }
            });
        }
    });
    assert!(disk.contents().iter().enumerate().all(|(i, byte)| usize::from(*byte) == i % 8 + 1));
}

#[test]
fn whole_blocks_are_not_put_back_by_a_part() {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

    const BLOCK: u64 = 512;
    // More blocks than there are locks, and not from the first one on.
    let (first, blocks) = (3, LOCKS as u64 + 7);
    let disk = Spec::sized((first + blocks) * BLOCK).disk();
    let session = session(&disk, "blocksize", &[("minblock", "512")]);
    let done = AtomicBool::new(false);
    let target = AtomicU64::new(first);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Relaxed) {
                let block = target.load(Relaxed);
                session.pwrite(&[0xff], block * BLOCK + 7, Flags::empty()).unwrap();
            }
        });
        for round in 0..20_000_u64 {
            let count = 1 + round % blocks;
            let start = (first + round % (blocks - count + 1)) * BLOCK;
            let data = vec![(round % 200) as u8; (count * BLOCK) as usize];
            target.store(start / BLOCK + count - 1, Relaxed);
            session.pwrite(&data, start, Flags::empty()).unwrap();
            let mut there = vec![0; data.len()];
            session.pread(&mut there, start).unwrap();
            let kept = there.iter().zip(&data).enumerate().all(|(i, (a, b))| a == b || i % 512 == 7);
            if !kept {
                done.store(true, Relaxed);
            }
            assert!(kept, "round {round}");
        }
        done.store(true, Relaxed);
    });
}

#[test]
fn a_whole_block_is_not_written_inline_while_a_part_of_it_is_changed() {
    let disk = Spec::sized(64 << 10).disk();
    let session = session(&disk, "blocksize", &[("minblock", "512")]);
    let write = |block: u64| inline(&session, Call::new(Op::Write, block * 512, 1024), &[1; 1024]);
    assert!(matches!(write(1), Answer::Done(Ok(_))));
    disk.hold();
    std::thread::scope(|scope| {
        scope.spawn(|| session.pwrite(&[2], 1000, Flags::empty()).unwrap());
        disk.wait_inside(1);
        assert!(matches!(write(0), Answer::NeedsThread));
        assert!(matches!(write(1), Answer::NeedsThread));
        disk.release();
    });
    assert!(matches!(write(0), Answer::Done(Ok(_))));
    assert_eq!(disk.contents()[..1024], [1; 1024]);
}

#[test]
fn parts_of_blocks_are_read_inline_and_written_on_a_thread() {
    let disk = Spec::sized(8192).disk();
    let session = session(&disk, "blocksize", &[("minblock", "512")]);
    let mut buf = [0; 1000];
    assert!(read_inline(&session, &mut buf, 100).unwrap());
    assert_eq!(buf, disk.contents()[100..1100]);
    disk.take_calls();
    for op in [Op::Write, Op::Zero, Op::Trim] {
        assert!(matches!(inline(&session, Call::new(op, 1, 512), &[0; 512]), Answer::NeedsThread));
    }
    assert!(disk.calls().is_empty());
}

#[test]
fn what_the_disk_takes_is_started() {
    let disk = Spec { later: true, ..Spec::sized(8192) }.disk();
    let cut = session(&disk, "blocksize", &[("maxdata", "1k")]);
    let blocks = session(&disk, "blocksize", &[("minblock", "512")]);
    let start = |session, op, length| started(session, Call::new(op, 0, length), &vec![1; length as usize]);
    for (op, length) in [(Op::Read, 1000), (Op::Write, 1000), (Op::Trim, 2000), (Op::Cache, 2000)] {
        assert!(matches!(start(&cut, op, length), Answer::Started(Ok(_))), "{op:?}");
    }
    assert!(matches!(start(&cut, Op::Write, 1025), Answer::NeedsThread));
    assert!(matches!(start(&blocks, Op::Read, 512), Answer::Started(Ok(_))));
    assert!(matches!(start(&blocks, Op::Write, 512), Answer::Done(Ok(_))), "a lock is held");
}

#[test]
fn loans_to_write_to_do_not_go_round_the_locks() {
    let disk = Spec::sized(8192).disk();
    let lends = |params: &[_], op| lent(&session(&disk, "blocksize", params), op, 1, 5000).is_some();
    assert!(lends(&[], Op::Read) && lends(&[], Op::Write));
    let blocks = [("minblock", "512"), ("maxdata", "512")];
    assert!(lends(&blocks, Op::Read) && !lends(&blocks, Op::Write));
}

#[test]
fn a_fast_zero_in_pieces_is_refused_before_anything_is_done() {
    let disk = Spec::sized(8192).disk();
    let session = session(&disk, "blocksize", &[("minblock", "512"), ("maxlen", "1k")]);
    for (length, offset) in [(100, 0), (512, 1), (2048, 0), (1000, 0)] {
        let error = session.zero(length, offset, Flags::FAST_ZERO).unwrap_err();
        assert_eq!(error.errno(), Errno::EOPNOTSUPP);
    }
    assert!(disk.calls().is_empty());
    session.zero(1024, 512, Flags::FAST_ZERO).unwrap();
}

#[test]
fn what_clients_are_told() {
    let told = |spec: Spec, params: &[(&str, &str)]| {
        let caps = session(&spec.disk(), "blocksize", params).caps().clone();
        let BlockSize { minimum, preferred, maximum } = caps.block_size;
        (caps.size, minimum, preferred, maximum)
    };
    assert_eq!(told(Spec::sized(10_000), &[]), (10_000, 1, 4096, u32::MAX));
    assert_eq!(told(Spec::sized(100_000), &[("minblock", "64k")]), (65_536, 1, 65_536, u32::MAX));
    assert_eq!(told(strict(10_000, 512, 8192), &[]), (9728, 1, 4096, u32::MAX));
}

#[test]
fn bad_limits_are_refused() {
    assert!(config_error("blocksize", &[("minblock", "3")]).contains("power of 2"));
    assert!(config_error("blocksize", &[("minblock", "128k")]).contains("must not exceed 65536"));
    assert!(config_error("blocksize", &[("minblock", "0")]).contains("non-zero"));
    let message = config_error("blocksize", &[("maxdata", "100"), ("minblock", "4k")]);
    assert_eq!(message, "maxdata must be a multiple of 4096");
    assert_eq!(
        config_error("blocksize", &[("maxlen", "100"), ("minblock", "512")]),
        "maxlen must be a multiple of 512"
    );
}
