use nbdkit_core::{Errno, Op, ThreadModel};

use crate::{
    decompress::testing::{disk, holds, over, pipe, readable, session, survives_damage, try_session},
    testing::{Answer, Call, Spec, needs_thread, started},
};

const SIZE: usize = 1_200_001;

#[test]
fn blocks_streams_and_checksums() {
    let expected = disk(SIZE);
    for options in [
        "--block-size=65536",
        "-T2 --block-size=1MiB",
        "-C none",
        "-C crc32",
        "-C sha256",
        "--x86 --lzma2=preset=0",
    ] {
        let file = pipe(&format!("xz -c {options}"), &expected);
        holds(&session(over(file), "xz", &[]), &expected);
    }
    // Streams one after the other, empty ones among them, and padding.
    let mut file = pipe("xz -c", &expected[..500_000]);
    file.extend([0; 8]);
    file.extend(pipe("xz -c", &[]));
    file.extend(pipe("xz -c -C crc32 --block-size=300000", &expected[500_000..]));
    file.extend([0; 4]);
    holds(&session(over(file), "xz", &[]), &expected);
    assert_eq!(session(over(pipe("xz -c", &[])), "xz", &[]).size(), 0);
}

#[test]
fn below_may_want_whole_blocks_or_one_request_at_a_time() {
    let expected = disk(SIZE);
    let mut file = pipe("xz -c --block-size=100000", &expected);
    for model in [ThreadModel::SerializeRequests, ThreadModel::SerializeAllRequests] {
        let spec = Spec { thread_model: model, ..over(file.clone()) };
        let session = session(spec, "xz", &[]);
        assert!(needs_thread(&session, Op::Read));
        holds(&session, &expected);
    }
    file.resize(file.len().next_multiple_of(512), 0);
    let block_size = nbdkit_core::BlockSize { minimum: 512, preferred: 512, maximum: u32::MAX };
    holds(&session(Spec { block_size, ..over(file) }, "xz", &[]), &expected);
}

#[test]
fn reads_wait_without_a_thread_and_are_then_answered_at_once() {
    let expected = disk(SIZE);
    let session = session(over(pipe("xz -c --block-size=100000", &expected)), "xz", &[]);
    let call = Call::new(Op::Read, 150_000, 100_000);
    let Answer::Started(Ok(data)) = started(&session, call, &[]) else { panic!("not started") };
    assert!(data == expected[150_000..250_000]);
    let Answer::Done(Ok(data)) = started(&session, call, &[]) else { panic!("not at once") };
    assert!(data == expected[150_000..250_000]);
}

#[test]
fn damage_is_an_error_for_its_block_alone() {
    let expected = disk(SIZE);
    let mut file = pipe("xz -c --block-size=100000", &expected);
    let middle = file.len() / 2;
    file[middle] ^= 1;
    assert_eq!(readable(&session(over(file), "xz", &[]), &expected, 100_000), 12);
}

#[test]
fn any_damage() {
    let expected = disk(400_000);
    survives_damage(&pipe("xz -c --block-size=100000", &expected), &expected, "xz", &[]);
}

#[test]
fn other_files_are_refused() {
    for file in [Vec::new(), b"\xfd7zXZ\0".to_vec(), disk(100_000)] {
        let error = try_session(over(file), "xz", &[]).unwrap_err();
        assert!(matches!(error.errno(), Errno::EINVAL | Errno::EIO), "{error}");
    }
    let file = pipe("xz -c", &disk(2_000_000));
    let error = try_session(over(file), "xz", &[("xz-max-block", "1M")]).unwrap_err();
    assert!(error.to_string().contains("raise xz-max-block"), "{error}");
}

/// A block of 66 MiB is given out in parts, forward from where a decoder has stopped, and backward from the start.
#[test]
fn large_blocks_are_decoded_in_parts() {
    let mut expected = vec![0; 66 << 20];
    for start in [0, 30 << 20, 65 << 20] {
        expected[start..start + (1 << 20)].copy_from_slice(&disk(1 << 20));
    }
    let session = session(over(pipe("xz -c -0", &expected)), "xz", &[]);
    for start in [0, 30 << 20, (30 << 20) + 5000, (66 << 20) - 5000, 3 << 20] {
        let mut buf = vec![1; 5000];
        session.pread(&mut buf, start as u64).unwrap();
        assert!(buf == expected[start..start + 5000], "{start}");
    }
}
