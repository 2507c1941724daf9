use nbdkit_core::Errno;

use crate::decompress::testing::{disk, holds, over, pipe, session, survives_damage, try_session};

const SIZE: usize = 3_500_001;

#[test]
fn levels_members_names_and_trailing_bytes() {
    let expected = disk(SIZE);
    for options in ["-1", "-9", "-6"] {
        holds(
            &session(over(pipe(&format!("gzip -c {options}"), &expected)), "gzip", &[("span", "64K")]),
            &expected,
        );
    }
    let mut file = pipe("gzip -c", &expected[..1_000_000]);
    file.extend(pipe("gzip -c", &[]));
    file.extend(pipe("pigz -c -p2 -b128", &expected[1_000_000..2_000_000]));
    file.extend(pipe("gzip -c -1", &expected[2_000_000..]));
    holds(&session(over(file.clone()), "gzip", &[]), &expected);
    file.extend([0; 512]);
    holds(&session(over(file.clone()), "gzip", &[]), &expected);
    file.extend(b"something else");
    holds(&session(over(file), "gzip", &[]), &expected);
    assert_eq!(session(over(pipe("gzip -c", &[])), "gzip", &[]).size(), 0);

    // A name, a comment, an extra field and a checksum of the header.
    let plain = pipe("gzip -nc", b"hello");
    let mut file = plain[..10].to_vec();
    file[3] = 0x1e;
    file.extend(b"\x03\x00abcname\0comment\0\x12\x34");
    file.extend(&plain[10..]);
    holds(&session(over(file), "gzip", &[]), b"hello");
}

#[test]
fn stored_blocks_and_one_long_run() {
    let noise: Vec<u8> = (0..SIZE as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    holds(&session(over(pipe("gzip -c", &noise)), "gzip", &[("span", "64K")]), &noise);
    let zeroes = vec![0; 20 << 20];
    let session = session(over(pipe("gzip -c", &zeroes)), "gzip", &[]);
    holds(&session, &zeroes);
}

#[test]
fn a_size_that_was_given_needs_no_scan() {
    let expected = disk(SIZE);
    let file = pipe("gzip -c", &expected);
    let size = SIZE.to_string();
    for given in ["trailer", &size] {
        let params = [("gzip-size", given), ("span", "64K")];
        holds(&session(over(file.clone()), "gzip", &params), &expected);
        // From the end to the start.
        let session = session(over(file.clone()), "gzip", &params);
        for start in (0..SIZE - 100).step_by(300_000).rev() {
            let mut buf = [0; 100];
            session.pread(&mut buf, start as u64).unwrap();
            assert!(buf == expected[start..start + 100], "{start}");
        }
    }
    // Less is wanted.
    let smaller = session(over(file.clone()), "gzip", &[("gzip-size", "2000000")]);
    holds(&smaller, &expected[..2_000_000]);
    // There is another member, so the end of the file says too little: the end cannot be read, for it is not the end.
    let mut two = pipe("gzip -c", &expected[..1000]);
    two.extend(file);
    let session = session(over(two), "gzip", &[("gzip-size", "trailer")]);
    let mut buf = [0; 100];
    session.pread(&mut buf, 0).unwrap();
    assert_eq!(session.pread(&mut buf, SIZE as u64 - 100).unwrap_err().errno(), Errno::EIO);
}

#[test]
fn what_is_before_the_damage_can_be_read() {
    let expected = disk(SIZE);
    let file = pipe("gzip -c", &expected);
    let cut = file[..file.len() / 2].to_vec();
    let error = try_session(over(cut.clone()), "gzip", &[]).unwrap_err();
    assert!(error.to_string().contains("gzip-size="), "{error}");
    let session = session(over(cut), "gzip", &[("gzip-size", &SIZE.to_string())]);
    let mut buf = [0; 4096];
    session.pread(&mut buf, 100).unwrap();
    assert!(buf == expected[100..4196]);
    assert_eq!(session.pread(&mut buf, SIZE as u64 - 4096).unwrap_err().errno(), Errno::EIO);
}

#[test]
fn any_damage() {
    let expected = disk(300_000);
    survives_damage(&pipe("gzip -c", &expected), &expected, "gzip", &[("span", "64K")]);
}

#[test]
fn an_index_saves_the_scan() {
    let dir = tempfile::tempdir().unwrap();
    let index = dir.path().join("index");
    let expected = disk(SIZE);
    let file = pipe("gzip -c", &expected);
    let params = [("gzip-index-path", index.to_str().unwrap()), ("span", "64K")];
    for filter in ["indexed-gzip", "gzip"] {
        let params = if filter == "gzip" { [("index-path", params[0].1), params[1]] } else { params };
        let disk = over(file.clone()).disk();
        let chain = crate::testing::chain(&disk, &[filter], &params).unwrap();
        let session = crate::testing::open(&chain, crate::testing::client(), true).unwrap();
        let read: u64 = disk.take_calls().iter().map(|call| call.length).sum();
        assert_eq!(read > file.len() as u64, filter == "indexed-gzip", "{read}");
        let mut buf = [0; 100];
        session.pread(&mut buf, SIZE as u64 - 200).unwrap();
        assert!(buf == expected[SIZE - 200..SIZE - 100]);
        holds(&session, &expected);
    }
    // Of another file, and damaged.
    let other = pipe("gzip -c -1", &expected);
    let error = try_session(over(other), "indexed-gzip", &params).unwrap_err();
    assert!(error.to_string().contains("another file"), "{error}");
    let mut bytes = std::fs::read(&index).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&index, bytes).unwrap();
    let error = try_session(over(file), "indexed-gzip", &params).unwrap_err();
    assert!(error.to_string().contains("damaged"), "{error}");
}

#[test]
fn other_files_are_refused() {
    for file in [Vec::new(), vec![0x1f], disk(10_000), b"\x1f\x8b\x08\0".to_vec()] {
        let error = try_session(over(file), "gzip", &[]).unwrap_err();
        assert!(matches!(error.errno(), Errno::EINVAL | Errno::EIO), "{error}");
    }
}
