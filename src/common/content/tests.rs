use std::convert::Infallible;

use proptest::prelude::*;

use super::*;

fn detect(size: u64, parts: &[(usize, &[u8])]) -> Option<Content> {
    let read = |buf: &mut [u8], offset: u64| -> Result<(), Infallible> {
        assert!(offset + buf.len() as u64 <= size, "read past the end");
        buf.fill(0);
        for (start, part) in parts {
            for (byte, place) in (offset..).zip(&mut *buf) {
                if let Some(content) = byte.checked_sub(*start as u64).and_then(|i| part.get(i as usize)) {
                    *place = *content;
                }
            }
        }
        Ok(())
    };
    detect_content(size, read).unwrap()
}

#[test]
fn nothing_is_nothing() {
    for size in [0, 1, 511, 512, 4096, 1 << 20, 1 << 50] {
        assert_eq!(detect(size, &[]), None);
    }
}

/// Those that no program on a usual machine makes.
#[test]
fn by_their_signatures() {
    for (at, magic, kind) in [
        (32, &b"NXSB"[..], "apfs"),
        (3, b"ReFS\0\0\0\0", "ReFS"),
        (3, b"-FVE-FS-", "BitLocker"),
        (0, b"verity\0\0\x01\0\0\0", "DM_verity_hash"),
        (1024, b"H+\0\x04", "hfsplus"),
        (0, b"-rom1fs-", "romfs"),
        (9564, b"\x54\x19\x01\0", "ufs"),
    ] {
        assert_eq!(detect(1 << 20, &[(at, magic)]).map(|content| content.kind), Some(kind));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Superblocks with any content behind their signatures.
    #[test]
    fn hostile_superblocks_do_no_harm(
        size in prop_oneof![0u64..200_000, any::<u64>().prop_map(|size| size >> 1)],
        kind in 0usize..9,
        noise in prop::collection::vec(any::<u8>(), 1024),
    ) {
        let signatures: [(usize, usize, &[u8]); 9] = [
            (0, 3, b"NTFS    \0\x02\x08"),
            (0, 3, b"EXFAT   "),
            (0, 54, b"FAT16   "),
            (0, 82, b"FAT32   "),
            (1024, 56, b"\x53\xef"),
            (32768, 1, b"CD001"),
            (32768, 1, b"NSR02"),
            (524288, 0, b"\x02\0"),
            (512, 0, b"LABELONE"),
        ];
        let (start, at, signature) = signatures[kind];
        let mut block = noise.clone();
        block[at..at + signature.len()].copy_from_slice(signature);
        let _ = detect(size, &[(start, &block), (1 << 17, &noise)]);
    }
}
