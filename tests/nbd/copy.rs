//! Whole disks through the NBD front end: copies are byte for byte the same, and maps tell the truth.

use std::{fs, os::unix::fs::FileExt};

use crate::util::{self, Server, image, patterned, qemu_io, sh, temp};

#[test]
fn nbdcopy_both_ways() {
    let dir = temp();
    let source = patterned(dir.path(), "source", (9 << 20) + 777);
    let target = image(dir.path(), "target", (9 << 20) + 777);
    let from = Server::start(["-r", "file", source.to_str().expect("UTF-8")]);
    let to = Server::start(["file", target.to_str().expect("UTF-8")]);
    util::run_ok(["nbdcopy", "--flush", &from.uri(), &to.uri()]);
    assert!(fs::read(&source).expect("read") == fs::read(&target).expect("read"), "the copies differ");
    let again = dir.path().join("again");
    let again = again.to_str().expect("UTF-8");
    util::run_ok(["nbdcopy", "--connections=4", &from.uri(), again]);
    assert!(fs::read(&source).expect("read") == fs::read(again).expect("read"), "the copies differ");
}

#[test]
fn holes_are_seen() {
    let dir = temp();
    let disk = image(dir.path(), "disk", 8 << 20);
    let file = fs::File::options().write(true).open(&disk).expect("open");
    for at in [0, 3 << 20, (8 << 20) - 4096] {
        file.write_all_at(&[0xa5; 4096], at).expect("write");
    }
    let server = Server::start(["file", disk.to_str().expect("UTF-8")]);
    let over_nbd = util::run_ok(["qemu-img", "map", "--output=json", "-f", "raw", &server.uri()]);
    let of_file =
        util::run_ok(["qemu-img", "map", "--output=json", "-f", "raw", disk.to_str().expect("UTF-8")]);
    let shape = |json: &str| -> Vec<_> {
        let list: serde_json::Value = serde_json::from_str(json).expect("JSON");
        let list = list.as_array().expect("a list").clone();
        list.into_iter()
            .map(|e| (e["start"].clone(), e["length"].clone(), e["data"].clone(), e["zero"].clone()))
            .collect()
    };
    assert_eq!(shape(&over_nbd), shape(&of_file));
    assert!(shape(&of_file).len() > 3, "{of_file}");
    let map = util::run_ok(["nbdinfo", "--map", "--json", &server.uri()]);
    assert!(map.contains("hole,zero") && map.contains("\"allocated\"") || map.contains("data"), "{map}");
}

#[test]
fn qemu_converts_and_compares() {
    let dir = temp();
    let source = patterned(dir.path(), "source", 5 << 20);
    let target = image(dir.path(), "target", 5 << 20);
    let (source, target) = (source.to_str().expect("UTF-8"), target.to_str().expect("UTF-8"));
    let server = Server::start(["file", target]);
    util::run_ok(["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, &server.uri()]);
    let same = util::run_ok(["qemu-img", "compare", "-f", "raw", "-F", "raw", source, &server.uri()]);
    assert!(same.contains("identical"), "{same}");
    qemu_io(&server.uri(), &["write -P 0x55 64k 64k", "write -z 128k 64k", "discard 256k 64k", "flush"]);
    qemu_io(&server.uri(), &["read -P 0x55 64k 64k", "read -P 0 128k 64k"]);
}

#[test]
fn fio_verifies() {
    let server = Server::start(["memory", "64M"]);
    for (rw, bs) in [("randwrite", "4k"), ("write", "1m"), ("randwrite", "512-128k")] {
        let range = if bs.contains('-') { "bsrange" } else { "bs" };
        sh(&format!(
            "fio --name=v --ioengine=nbd --uri='{}' --rw={rw} --{range}={bs} --size=64m --iodepth=16 \
             --verify=crc32c --verify_fatal=1 --verify_state_save=0 --output-format=terse",
            server.uri()
        ));
    }
}

#[test]
fn many_connections_write_one_disk() {
    let dir = temp();
    let disk = image(dir.path(), "disk", 64 << 20);
    let server = Server::start(["file", disk.to_str().expect("UTF-8")]);
    sh(&format!(
        "fio --name=v --ioengine=nbd --uri='{}' --rw=randwrite --bs=8k --size=16m --offset_increment=16m \
         --numjobs=4 --iodepth=8 --verify=crc32c --verify_fatal=1 --verify_state_save=0 --output-format=terse",
        server.uri()
    ));
}

#[test]
fn a_block_device() {
    let dir = temp();
    let backing = image(dir.path(), "backing", 8 << 20);
    let device = sh(&format!("losetup --find --show {}", backing.display()));
    let device = device.trim();
    let detach = scopeguard(device.to_owned());
    let server = Server::start(["file", device]);
    util::nbdsh(
        &server.uri(),
        "assert h.get_size() == 8 << 20
# Requests of any size work all the same.
h.set_strict_mode(h.get_strict_mode() & ~nbd.STRICT_ALIGN)
h.pwrite(b'block' * 1000, 4096)
h.zero(4096, 4096)
assert h.pread(4096, 4096) == bytes(4096)
h.trim(65536, 1 << 20)
h.flush()
assert h.pread(5, 8195) == (b'block' * 1000)[4099:4104]",
    );
    drop(server);
    drop(detach);
}

/// Detaches a loop device at the end.
fn scopeguard(device: String) -> impl Drop {
    struct Detach(String);
    impl Drop for Detach {
        fn drop(&mut self) {
            let _ = std::process::Command::new("losetup").args(["-d", &self.0]).output();
        }
    }
    Detach(device)
}
