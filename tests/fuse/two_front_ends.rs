//! One chain, a mount and an NBD socket at the same time: each sees at once what the other writes.

use std::{fs::File, os::unix::fs::FileExt};

use crate::util::{Mount, image, nbdsh, run, temp};

/// A mount with an NBD front end; the URI of that.
pub(super) fn both(words: &[&str]) -> (Mount, String, tempfile::TempDir) {
    let dir = temp();
    let socket = dir.path().join("sock");
    let all = ["-U", socket.to_str().expect("UTF-8")].iter().chain(words).copied().collect::<Vec<_>>();
    let uri = format!("nbd+unix://?socket={}", socket.display());
    (Mount::start(all), uri, dir)
}

#[test]
fn writes_are_seen_at_once() {
    let disk_dir = temp();
    let disk = image(disk_dir.path(), "disk", 4 << 20);
    let disk = disk.to_str().expect("UTF-8");
    for words in [
        &["memory", "4M"][..],
        &["file", disk],
        &["--no-passthrough", "file", disk],
        &["--filter=cow", "memory", "4M"],
    ] {
        let (mount, uri, _dir) = both(words);
        let file = File::options().read(true).write(true).open(mount.file()).expect("open");
        for round in 0_u8..20 {
            let at = u64::from(round) * 100_000 % (3 << 20);
            // Fill the page cache, so that stale pages would be read.
            let mut buf = vec![0; 8192];
            file.read_exact_at(&mut buf, at).expect("read");
            nbdsh(&uri, &format!("h.pwrite(bytes([{round} + 1]) * 5000, {at} + 100)"));
            file.read_exact_at(&mut buf, at).expect("read");
            assert!(buf[100..5100].iter().all(|b| *b == round + 1), "{words:?}: stale after an NBD write");
            file.write_all_at(&[round + 100; 3000], at + 6000).expect("write");
            nbdsh(&uri, &format!("assert h.pread(3000, {at} + 6000) == bytes([{round} + 100]) * 3000"));
            nbdsh(&uri, &format!("h.zero(4096, {at}); h.trim(0x1000, {at} + 0x1000)"));
            file.read_exact_at(&mut buf, at).expect("read");
            assert!(buf[..4096].iter().all(|b| *b == 0), "{words:?}: stale after an NBD zero");
        }
    }
}

#[test]
fn the_socket_goes_with_the_mount() {
    let (mut mount, uri, dir) = both(&["memory", "1M"]);
    nbdsh(&uri, "h.pwrite(b'x', 0)");
    assert_eq!(mount.unmount(), 0);
    assert!(!dir.path().join("sock").exists());
    assert_ne!(run(["nbdinfo", &uri]).code, 0);
}

/// Both write at full speed, each its half; nothing is lost and nothing hangs.
#[test]
fn both_work_hard() {
    let (mount, uri, _dir) = both(&["memory", "64M"]);
    let fio = |target: String, offset: &str| {
        let script = format!(
            "fio --name=v {target} --rw=randwrite --bs=4k --size=32m --offset={offset} --iodepth=8 \
             --verify=crc32c --verify_fatal=1 --verify_state_save=0 --output-format=terse --allow_file_create=0"
        );
        std::thread::spawn(move || run(["bash", "-c", &script]).ok())
    };
    let over_nbd = fio(format!("--ioengine=nbd --uri='{uri}'"), "0");
    let over_fuse = fio(format!("--ioengine=libaio --filename={}", mount.file().display()), "32m");
    over_nbd.join().expect("fio over NBD");
    over_fuse.join().expect("fio over FUSE");
}
