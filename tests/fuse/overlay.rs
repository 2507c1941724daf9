//! Overlays that stay: killed servers, commits and discards.

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::OFlags,
};

use crate::util::{self, Mount, NBDKIT_MOUNT, Run, image, patterned, temp};

const BLOCK: usize = 4096;

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn mount(base: &Path, overlay: &Path) -> Mount {
    let file = format!("cow-file={}", text(overlay));
    Mount::start(["--filter=cow", "file", text(base), &file, "cow-block-size=4k"])
}

fn commit(overlay: &Path, base: &Path) -> Run {
    util::run([NBDKIT_MOUNT, "--json", "--commit", text(overlay), "file", text(base)])
}

/// Numbers that are the same in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

/// What each block of the disk may hold: what was flushed last, and everything that was written since.
struct Model {
    versions: Vec<Vec<[u8; BLOCK]>>,
}

impl Model {
    fn of(bytes: &[u8]) -> Self {
        let versions = bytes.chunks(BLOCK).map(|block| vec![block.try_into().expect("a block")]).collect();
        Model { versions }
    }

    fn flushed(&mut self) {
        self.versions.iter_mut().for_each(|versions| drop(versions.drain(..versions.len() - 1)));
    }

    /// What a killed server has left is one of the versions, and from now on the only one.
    fn check(&mut self, found: &[u8], round: usize) {
        for (number, (block, versions)) in found.chunks(BLOCK).zip(&mut self.versions).enumerate() {
            let known = versions.iter().any(|version| version == block);
            let held: Vec<u8> = versions.iter().map(|version| version[0]).collect();
            assert!(known, "round {round}, block {number}: {:?}… is none of {held:?}", &block[..4]);
            *versions = vec![block.try_into().expect("a block")];
        }
    }
}

/// Writes, zeroes and flushes until the server is gone.
fn write_until_killed(file: &File, model: &mut Model, dice: &mut Dice, done: &AtomicUsize) {
    loop {
        let block = dice.roll(model.versions.len() as u64) as usize;
        let at = (block * BLOCK) as u64;
        let result = match dice.roll(16) {
            0..3 => file.sync_data().map(|()| model.flushed()),
            3 => {
                // Counted before it is done: the server may be killed in between.
                model.versions[block].push([0; BLOCK]);
                let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(file, flags, at, BLOCK as u64).map_err(Into::into)
            }
            _ => {
                let data = [dice.roll(255) as u8 + 1; BLOCK];
                model.versions[block].push(data);
                file.write_all_at(&data, at)
            }
        };
        done.fetch_add(1, Ordering::Release);
        if result.is_err() {
            return;
        }
    }
}

#[test]
fn what_was_flushed_survives_kill_9() {
    let dir = temp();
    let base = patterned(dir.path(), "base.img", 64 * BLOCK);
    let original = fs::read(&base).expect("read");
    let overlay = dir.path().join("overlay");
    let mut model = Model::of(&original);
    let mut dice = Dice(0x2545_f491_4f6c_dd1d);
    for round in 0..50 {
        let mut mount = mount(&base, &overlay);
        let direct = OFlags::DIRECT.bits().cast_signed();
        let file =
            File::options().read(true).write(true).custom_flags(direct).open(mount.file()).expect("open");
        let mut found = vec![0; original.len()];
        file.read_exact_at(&mut found, 0).expect("read");
        model.check(&found, round);
        let done = AtomicUsize::new(0);
        let wanted = dice.roll(200) as usize;
        std::thread::scope(|scope| {
            let (file, model, dice) = (&file, &mut model, &mut dice);
            let writer = scope.spawn(|| write_until_killed(file, model, dice, &done));
            while done.load(Ordering::Acquire) < wanted && !writer.is_finished() {
                std::thread::yield_now();
            }
            mount.kill();
        });
    }
    assert_eq!(fs::read(&base).expect("read"), original, "the base is only read");
}

#[test]
fn a_commit_brings_the_changes_into_the_base() {
    let dir = temp();
    let base = patterned(dir.path(), "base.img", 100 * BLOCK + 512);
    let overlay = dir.path().join("overlay");
    let mut expected = fs::read(&base).expect("read");
    let mut first = mount(&base, &overlay);
    let file = File::options().write(true).open(first.file()).expect("open");
    for (at, length) in [(100, 5000), (50 * BLOCK, 3 * BLOCK), (100 * BLOCK, 512)] {
        expected[at..at + length].fill(0x5a);
        file.write_all_at(&vec![0x5a; length], at as u64).expect("write");
    }
    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&file, flags, 70 * BLOCK as u64, 4 * BLOCK as u64).expect("punch");
    expected[70 * BLOCK..74 * BLOCK].fill(0);
    drop(file);
    assert!(commit(&overlay, &base).refused().contains("in use"));
    assert_eq!(first.unmount(), 0);

    let lines = commit(&overlay, &base).ok();
    let lines: Vec<serde_json::Value> =
        lines.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let (last, before) = lines.split_last().expect("lines");
    let (data, zeroes) = (5 * BLOCK as u64 + 512, 4 * BLOCK as u64);
    assert_eq!(*last, serde_json::json!({ "event": "done", "data": data, "zeroes": zeroes }));
    let progress = before.last().expect("progress");
    assert_eq!(
        *progress,
        serde_json::json!({ "event": "progress", "done": data + zeroes, "total": data + zeroes })
    );
    assert!(fs::read(&base).expect("read") == expected, "the base");
    // There is nothing left to commit, and the overlay can be used again.
    assert!(commit(&overlay, &base).ok().contains("\"data\":0"));
    let again = mount(&base, &overlay);
    assert!(fs::read(again.file()).expect("read") == expected, "the mount");
}

#[test]
fn a_commit_that_fails_loses_nothing() {
    let dir = temp();
    let base = patterned(dir.path(), "base.img", 64 * BLOCK);
    let overlay = dir.path().join("overlay");
    let mut first = mount(&base, &overlay);
    let file = File::options().write(true).open(first.file()).expect("open");
    file.write_all_at(&vec![7; 32 * BLOCK], 0).expect("write");
    drop(file);
    assert_eq!(first.unmount(), 0);

    let words = ["--filter=error", "file", text(&base), "error-pwrite-rate=100%"];
    let line = util::run([&[NBDKIT_MOUNT, "--commit", text(&overlay)], &words[..]].concat());
    assert_eq!(line.code, 1);
    assert!(line.stderr.contains("nothing is lost"), "{}", line.stderr);
    let other = image(dir.path(), "small.img", 1 << 20);
    let line = commit(&overlay, &other).refused();
    assert!(line.contains("262144") && line.contains("1048576"), "{line}");
    let line =
        util::run([NBDKIT_MOUNT, "--commit", text(&overlay), "--filter=cow", "file", text(&base)]).refused();
    assert!(line.contains("leave out --filter=cow"), "{line}");
    let line =
        util::run([NBDKIT_MOUNT, "--commit", text(&overlay), "--filter=readonly", "file", text(&base)]);
    assert!(line.refused().contains("read-only"));
    commit(&overlay, &base).ok();
    assert_eq!(fs::read(&base).expect("read")[..32 * BLOCK], vec![7; 32 * BLOCK]);
}

#[test]
fn a_killed_commit_can_be_run_again() {
    let dir = temp();
    let base = image(dir.path(), "base.img", 64 << 20);
    let overlay = dir.path().join("overlay");
    let mut first = mount(&base, &overlay);
    let file = File::options().write(true).open(first.file()).expect("open");
    let data = vec![9; 1 << 20];
    (0..32).for_each(|n| file.write_all_at(&data, n << 21).expect("write"));
    drop(file);
    assert_eq!(first.unmount(), 0);
    // Slowed down, it is killed at its first line of progress.
    let mut child = std::process::Command::new(NBDKIT_MOUNT)
        .args(["--json", "--commit", text(&overlay), "--filter=delay", "file", text(&base), "wdelay=10ms"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("start");
    let out = child.stdout.take().expect("stdout");
    let mut fds = [PollFd::new(&out, PollFlags::IN)];
    poll(&mut fds, Some(&rustix::event::Timespec { tv_sec: 60, tv_nsec: 0 })).expect("poll");
    child.kill().expect("kill");
    child.wait().expect("wait");
    assert!(commit(&overlay, &base).ok().contains(&format!("\"data\":{}", 32 << 20)), "all of it again");
    let found = fs::read(&base).expect("read");
    assert!(
        found
            .chunks(1 << 20)
            .enumerate()
            .all(|(n, part)| part.iter().all(|b| *b == if n % 2 == 0 { 9 } else { 0 }))
    );
}

#[test]
fn a_discard_removes_an_overlay_and_nothing_else() {
    let dir = temp();
    let base = patterned(dir.path(), "base.img", 16 * BLOCK);
    let overlay = dir.path().join("overlay");
    let discard = |path: &Path| util::run([NBDKIT_MOUNT, "--discard", text(path)]);
    let mut first = mount(&base, &overlay);
    assert!(discard(&overlay).refused().contains("in use"));
    assert_eq!(first.unmount(), 0);
    assert!(discard(&base).refused().contains("not an overlay"));
    assert!(base.exists());
    discard(&overlay).ok();
    assert!(!overlay.exists());
    assert!(discard(&overlay).refused().contains("No such file"));
    assert!(
        util::run([NBDKIT_MOUNT, "--json", "memory", "1M", "/mnt"]).refused().contains("--json goes with")
    );
}

fn kill_after_write(mount: &mut Mount, export: &str, byte: u8) {
    let file = File::options().write(true).open(mount.path().join(export)).expect("open");
    file.write_all_at(&[byte; BLOCK], 0).expect("write");
    file.sync_all().expect("sync");
    drop(file);
    mount.kill();
}

#[test]
fn another_disk_is_refused_and_a_moved_or_copied_one_is_not() {
    let dir = temp();
    let base = patterned(dir.path(), "base.img", 64 * BLOCK);
    let original = fs::read(&base).expect("read");
    let other = dir.path().join("other.img");
    fs::write(&other, vec![0x77; 64 * BLOCK]).expect("write");
    let overlay = dir.path().join("overlay");
    kill_after_write(&mut mount(&base, &overlay), "nbd", 0x5a);

    let cow_file = format!("cow-file={}", text(&overlay));
    let place = dir.path().join("mnt");
    fs::create_dir(&place).expect("mkdir");
    let words = [NBDKIT_MOUNT, "--filter=cow", "file", text(&other), &cow_file, text(&place)];
    let refused = [util::run(words).refused_with(3), commit(&overlay, &other).refused()];
    for line in refused {
        for part in [text(&base), text(&other), "sampled blocks differ, the first at offset 0"] {
            assert!(line.contains(part), "{line}");
        }
    }
    assert_eq!(fs::read(&other).expect("read"), vec![0x77; 64 * BLOCK], "untouched");

    let copy = dir.path().join("copy.img");
    fs::copy(&base, &copy).expect("copy");
    fs::rename(&base, dir.path().join("moved.img")).expect("rename");
    for same in ["copy.img", "moved.img"] {
        kill_after_write(&mut mount(&dir.path().join(same), &overlay), "nbd", 0x5b);
    }
    // Somebody writes to the base.
    File::options()
        .write(true)
        .open(&copy)
        .expect("open")
        .write_all_at(b"x", 64 * BLOCK as u64 - 1)
        .expect("write");
    assert!(commit(&overlay, &copy).refused().contains("sampled blocks differ"));
    let forced = [&["--force"][..], &["--commit", text(&overlay), "file", text(&copy)]].concat();
    util::run([&[NBDKIT_MOUNT], &forced[..]].concat()).ok();
    let found = fs::read(&copy).expect("read");
    assert!(found[..BLOCK] == [0x5b; BLOCK] && found[BLOCK..2 * BLOCK] == original[BLOCK..2 * BLOCK]);

    // After the commit the disk is the base as it is now; and the option overrides when mounting, too.
    kill_after_write(&mut mount(&copy, &overlay), "nbd", 0x5c);
    let forced = Mount::start(["--force", "--filter=cow", "file", text(&other), &cow_file]);
    assert_eq!(fs::read(forced.file()).expect("read")[BLOCK - 1..=BLOCK], [0x5c, 0x77]);
}

#[test]
fn each_export_has_an_overlay() {
    let dir = temp();
    let images = dir.path().join("images");
    fs::create_dir(&images).expect("mkdir");
    for (name, blocks) in [("disk0", 16), ("disk1", 16), ("disk2", 40)] {
        patterned(&images, name, blocks * BLOCK);
    }
    let originals: Vec<_> =
        ["disk0", "disk1", "disk2"].iter().map(|name| fs::read(images.join(name)).expect("read")).collect();
    let images = format!("dir={}", text(&images));
    let overlays = format!("cow-file={}/", text(&dir.path().join("overlays")));
    for keep in [&[][..], &[overlays.as_str()]] {
        let words = [&["--filter=cow", "file", &images, "cow-block-size=4k"], keep].concat();
        let mut mount = Mount::start(words);
        for (name, byte) in [("disk0", 1), ("disk2", 3)] {
            let file = File::options().write(true).open(mount.path().join(name)).expect("open");
            file.write_all_at(&[byte; BLOCK], 0).expect("write");
        }
        for (index, byte) in [1, originals[1][0], 3].into_iter().enumerate() {
            let found = fs::read(mount.path().join(format!("disk{index}"))).expect("read");
            assert_eq!(found[0], byte, "disk{index}");
            assert!(found[BLOCK..] == originals[index][BLOCK..], "disk{index}");
        }
        assert_eq!(mount.unmount(), 0);
    }
    let overlays = dir.path().join("overlays");
    let run = |words: &[&str]| util::run([&[NBDKIT_MOUNT], words].concat());
    let line = run(&["--commit", text(&overlays), "file", &images]).refused();
    assert!(line.contains("name one with -e") && line.contains("'disk2'"), "{line}");
    run(&["--commit", text(&overlays), "-e", "disk2", "file", &images]).ok();
    run(&["--discard", text(&overlays), "-e", "disk0"]).ok();
    assert!(
        run(&["--discard", text(&overlays), "-e", "disk0"])
            .refused()
            .contains("no overlay of export 'disk0'")
    );
    for (index, byte) in [originals[0][0], originals[1][0], 3].into_iter().enumerate() {
        let found = fs::read(dir.path().join("images").join(format!("disk{index}"))).expect("read");
        assert_eq!(found[0], byte, "disk{index}");
    }
}

#[test]
fn exports_do_not_share_changes_over_nbd() {
    let dir = temp();
    for (name, size) in [("disk0", 1 << 20), ("disk1", 1 << 20), ("disk2", 3 << 20)] {
        image(dir.path(), name, size);
    }
    let server = util::Server::start(["--filter=cow", "file", &format!("dir={}", text(dir.path()))]);
    for (name, byte) in [("disk0", "0x11"), ("disk2", "0x33")] {
        util::qemu_io(&server.uri_of(name), &[&format!("write -P {byte} 0 64k")]);
    }
    for (name, byte) in [("disk0", "0x11"), ("disk1", "0"), ("disk2", "0x33")] {
        util::qemu_io(&server.uri_of(name), &[&format!("read -P {byte} 0 64k")]);
    }
}
