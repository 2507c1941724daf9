use std::{path::Path, process::Command};

use nbdkit_core::{Errno, Flags, Op};

use crate::testing::{Answer, Call, Disk, Spec, chain, client, open, started};

const SIZE: usize = 2 << 20;
const PASSPHRASE: (&str, &str) = ("passphrase", "secret");

#[track_caller]
fn cryptsetup(words: &str, dir: &Path) {
    let out = Command::new("cryptsetup").args(words.split(' ')).current_dir(dir).output();
    let out = out.expect("run cryptsetup (package cryptsetup-bin)");
    assert!(out.status.success(), "cryptsetup {words}: {}", String::from_utf8_lossy(&out.stderr));
}

fn plain() -> Vec<u8> {
    (0..SIZE as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 11) as u8).collect()
}

/// A disk of LUKS version 1 by cryptsetup, whose data is not known.
fn formatted(options: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("pw"), "secret").unwrap();
    std::fs::write(dir.path().join("disk"), vec![0; 20 << 20]).unwrap();
    cryptsetup(&format!("luksFormat -q --key-file pw {options} disk"), dir.path());
    std::fs::read(dir.path().join("disk")).unwrap()
}

/// What cryptsetup has encrypted: the header, and the data.
fn encrypted(options: &str) -> (tempfile::TempDir, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("pw"), "secret").unwrap();
    std::fs::write(dir.path().join("disk"), plain()).unwrap();
    cryptsetup(
        &format!("reencrypt --encrypt -q --type luks2 --header header --key-file pw {options} disk"),
        dir.path(),
    );
    let data = std::fs::read(dir.path().join("disk")).unwrap();
    assert!(data != plain());
    (dir, data)
}

fn disk(data: Vec<u8>) -> Disk {
    Spec { data, ..Spec::default() }.disk()
}

fn session(disk: &Disk, params: &[(&str, &str)]) -> nbdkit_core::Result<nbdkit_core::Session> {
    open(&chain(disk, &["luks"], params).unwrap(), client(), false)
}

#[test]
fn reads_and_writes_what_cryptsetup_does() {
    for options in [
        "--pbkdf argon2id --pbkdf-memory 65536 --pbkdf-force-iterations 4 --pbkdf-parallel 2 --sector-size 4096",
        "--pbkdf argon2i --pbkdf-memory 32768 --pbkdf-force-iterations 4 --sector-size 512",
        "--pbkdf pbkdf2 --pbkdf-force-iterations 1000 --hash sha512 -c aes-cbc-essiv:sha256 -s 256",
    ] {
        let (dir, data) = encrypted(options);
        let header = dir.path().join("header");
        let params = [PASSPHRASE, ("luks-header", header.to_str().unwrap())];
        let disk = disk(data);
        let volume = session(&disk, &params).unwrap();
        let mut expected = plain();
        let mut all = vec![0; SIZE];
        volume.pread(&mut all, 0).unwrap();
        assert!(all == expected, "{options}");
        let mut part = [0; 100];
        volume.pread(&mut part, 5001).unwrap();
        assert!(part == expected[5001..5101]);

        // Parts of sectors, whole ones, and zeroes; cryptsetup decrypts the result.
        for (offset, length) in [(0, 4096), (5000, 10), (8000, 20_000), (100_000, 1)] {
            let data = vec![offset as u8 | 1; length];
            volume.pwrite(&data, offset as u64, Flags::empty()).unwrap();
            expected[offset..offset + length].copy_from_slice(&data);
        }
        volume.zero(70_000, 1_000_000, Flags::empty()).unwrap();
        expected[1_000_000..1_070_000].fill(0);
        std::fs::write(dir.path().join("disk"), disk.contents()).unwrap();
        cryptsetup(
            "reencrypt --decrypt --force-offline-reencrypt -q --header header --key-file pw disk",
            dir.path(),
        );
        assert!(std::fs::read(dir.path().join("disk")).unwrap()[..SIZE] == expected, "{options}");
    }
}

#[test]
fn headers_of_both_versions_before_the_data() {
    for options in [
        "--type luks1 --pbkdf-force-iterations 1000 --hash sha1",
        "--type luks1 --pbkdf-force-iterations 1000 --hash sha256 -c aes-cbc-plain64 -s 128",
        "--type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000",
    ] {
        let disk = disk(formatted(options));
        let volume = session(&disk, &[PASSPHRASE]).unwrap();
        volume.pwrite(b"hello", 1000, Flags::empty()).unwrap();
        assert!(!disk.contents().windows(5).any(|bytes| bytes == b"hello"));
        let mut buf = [0; 5];
        session(&disk, &[PASSPHRASE]).unwrap().pread(&mut buf, 1000).unwrap();
        assert_eq!(&buf, b"hello", "{options}");
        let error = session(&disk, &[("passphrase", "wrong")]).unwrap_err();
        assert_eq!(error.errno(), Errno::EACCES);
        assert!(error.to_string().contains("it is wrong"), "{error}");
    }
}

#[test]
fn the_second_copy_serves_when_the_first_is_damaged() {
    let mut data = formatted("--type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000");
    data[5000] ^= 1;
    session(&disk(data.clone()), &[PASSPHRASE]).unwrap();
    data[0] ^= 1;
    session(&disk(data.clone()), &[PASSPHRASE]).unwrap();
    data[0x4000] ^= 1;
    assert_eq!(session(&disk(data), &[PASSPHRASE]).unwrap_err().errno(), Errno::EINVAL);
}

#[test]
fn any_damage_of_the_header() {
    let good = formatted("--type luks1 --pbkdf-force-iterations 1000");
    for at in (0..592).step_by(7) {
        let mut data = good[..600_000].to_vec();
        data[at] ^= 0xff;
        // Iterations in the thousands of millions would take hours.
        if !matches!(at, 164..168) && (at < 208 || (at - 208) % 48 >= 8) {
            let _ = session(&disk(data), &[PASSPHRASE]);
        }
    }
    for length in [0, 5, 500, 592, 5000] {
        assert!(session(&disk(good[..length].to_vec()), &[PASSPHRASE]).is_err(), "{length}");
    }
}

#[test]
fn whole_sectors_are_started() {
    let data = formatted("--type luks1 --pbkdf-force-iterations 1000");
    let spec = Spec { data, later: true, blocks: |op| op != Op::Read, ..Spec::default() };
    let volume = session(&spec.disk(), &[PASSPHRASE]).unwrap();
    let data = vec![7; 4096];
    let write = started(&volume, Call::new(Op::Write, 512, 4096), &data);
    assert!(matches!(write, Answer::Started(Ok(_))), "{write:?}");
    let Answer::Started(Ok(read)) = started(&volume, Call::new(Op::Read, 1024, 1024), &[]) else {
        panic!("not started");
    };
    assert!(read == data[..1024]);
    assert!(matches!(started(&volume, Call::new(Op::Read, 1025, 10), &[]), Answer::NeedsThread));
}

#[test]
fn a_passphrase_is_needed() {
    let error = chain(&disk(vec![0; 1000]), &["luks"], &[]).err().unwrap();
    assert!(error.to_string().contains("passphrase"), "{error:#}");
}

#[test]
fn reads_what_qemu_has_written() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("pw"), "secret").unwrap();
    std::fs::write(dir.path().join("plain"), plain()).unwrap();
    for cipher in [
        "cipher-alg=aes-256,cipher-mode=xts,ivgen-alg=plain64",
        "cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256",
    ] {
        let options = format!("key-secret=s,iter-time=10,{cipher}");
        let words = ["convert", "--object", "secret,id=s,file=pw", "-O", "luks", "-o", &options];
        let run =
            Command::new("qemu-img").args(words).args(["plain", "disk"]).current_dir(dir.path()).output();
        let run = run.expect("run qemu-img (package qemu-utils)");
        assert!(run.status.success(), "{cipher}: {}", String::from_utf8_lossy(&run.stderr));
        let disk = disk(std::fs::read(dir.path().join("disk")).unwrap());
        let mut all = vec![0; SIZE];
        session(&disk, &[PASSPHRASE]).unwrap().pread(&mut all, 0).unwrap();
        assert!(all == plain(), "{cipher}");
    }
}
