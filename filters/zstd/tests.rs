use nbdkit_core::Errno;

use crate::decompress::testing::{disk, holds, over, pipe, readable, session, survives_damage, try_session};

const SIZE: usize = 2_000_001;

/// Frames of 100,000 bytes, and the table of the seekable format, with or without checksums.
fn seekable(expected: &[u8], checksums: bool) -> Vec<u8> {
    let (mut file, mut table) = (Vec::new(), Vec::new());
    for part in expected.chunks(100_000) {
        let frame = zstd::bulk::compress(part, 1).unwrap();
        table.extend((frame.len() as u32).to_le_bytes());
        table.extend((part.len() as u32).to_le_bytes());
        if checksums {
            table.extend([1, 2, 3, 4]);
        }
        file.extend(frame);
    }
    table.extend((expected.len().div_ceil(100_000) as u32).to_le_bytes());
    table.push(if checksums { 0x80 } else { 0 });
    table.extend(0x8f92_eab1_u32.to_le_bytes());
    file.extend(0x184d_2a5e_u32.to_le_bytes());
    file.extend((table.len() as u32).to_le_bytes());
    file.extend(table);
    file
}

#[test]
fn frames_with_and_without_length() {
    let expected = disk(SIZE);
    let path = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(path.path(), &expected).unwrap();
    let path = path.path().to_str().unwrap();
    for command in [
        "zstd -c -1".to_owned(),
        "zstd -c --no-check".to_owned(),
        format!("zstd -c -3 {path}"),
        format!("zstd -c -T2 -B500000 {path}"),
        format!("zstd -c --long=27 {path}"),
    ] {
        holds(&session(over(pipe(&command, &expected)), "zstd", &[]), &expected);
    }
    let mut file = pipe("zstd -c", &expected[..500_000]);
    file.extend(b"\x50\x2a\x4d\x18\x05\0\0\0skip!");
    file.extend(pipe("zstd -c", &[]));
    file.extend(pipe("zstd -c", &expected[500_000..]));
    holds(&session(over(file), "zstd", &[]), &expected);
    assert_eq!(session(over(pipe("zstd -c", &[])), "zstd", &[]).size(), 0);
}

#[test]
fn the_seekable_format() {
    let expected = disk(SIZE);
    for checksums in [false, true] {
        holds(&session(over(seekable(&expected, checksums)), "zstd", &[]), &expected);
    }
    // The table is used: what it says of a frame's data is wrong here, and found to be.
    let mut file = seekable(&expected, false);
    let table = file.len() - 9 - 21 * 8;
    file[table + 4] ^= 1;
    assert!(try_session(over(file), "zstd", &[]).unwrap().size() != SIZE as u64);
}

#[test]
fn damage_is_an_error_for_its_frame_alone() {
    let expected = disk(SIZE);
    let mut file = Vec::new();
    for part in expected.chunks(100_000) {
        file.extend(pipe(&format!("zstd -c --stream-size={}", part.len()), part));
    }
    let middle = file.len() / 2 + 1000;
    file[middle] ^= 1;
    let session = session(over(file), "zstd", &[]);
    assert_eq!(readable(&session, &expected, 100_000), 20, "one of 21 frames");
}

#[test]
fn large_frames_are_decoded_in_parts() {
    let mut expected = vec![0; 66 << 20];
    for start in [0, 30 << 20, 65 << 20] {
        expected[start..start + (1 << 20)].copy_from_slice(&disk(1 << 20));
    }
    let session = session(over(pipe("zstd -c", &expected)), "zstd", &[]);
    for start in [0, 30 << 20, (30 << 20) + 5000, (66 << 20) - 5000, 3 << 20] {
        let mut buf = vec![1; 5000];
        session.pread(&mut buf, start as u64).unwrap();
        assert!(buf == expected[start..start + 5000], "{start}");
    }
}

#[test]
fn any_damage() {
    let expected = disk(300_000);
    survives_damage(&pipe("zstd -c", &expected), &expected, "zstd", &[]);
    // Of the seekable format's table nothing is verified, so only what else is damaged must be found.
    let file = seekable_checked(&expected);
    let (frames, table) = file.split_at(file.len() - 9 - 3 * 8 - 8);
    for at in (8..frames.len()).step_by(frames.len() / 50) {
        let mut damaged = file.clone();
        damaged[at] ^= 0x55;
        assert!(readable(&session(over(damaged), "zstd", &[]), &expected, 100_000) < 3);
    }
    for at in frames.len()..frames.len() + table.len() {
        let mut damaged = file.clone();
        damaged[at] ^= 0x55;
        if let Ok(session) = try_session(over(damaged), "zstd", &[]) {
            let _ = session.pread(&mut [0; 512], 0);
        }
    }
}

/// As [`seekable`], of frames with checksums.
fn seekable_checked(expected: &[u8]) -> Vec<u8> {
    let (mut file, mut table) = (Vec::new(), Vec::new());
    for part in expected.chunks(100_000) {
        let frame = pipe(&format!("zstd -c --stream-size={}", part.len()), part);
        table.extend((frame.len() as u32).to_le_bytes());
        table.extend((part.len() as u32).to_le_bytes());
        file.extend(frame);
    }
    table.extend((expected.len().div_ceil(100_000) as u32).to_le_bytes());
    table.push(0);
    table.extend(0x8f92_eab1_u32.to_le_bytes());
    file.extend(0x184d_2a5e_u32.to_le_bytes());
    file.extend((table.len() as u32).to_le_bytes());
    file.extend(table);
    file
}

#[test]
fn other_files_are_refused() {
    let cut = pipe("zstd -c", &disk(100_000));
    for file in [Vec::new(), disk(10_000), cut[..cut.len() - 1].to_vec(), cut[..5].to_vec()] {
        let error = try_session(over(file), "zstd", &[]).unwrap_err();
        assert!(matches!(error.errno(), Errno::EINVAL | Errno::EIO), "{error}");
    }
}
