//! How a mount starts, lives and ends.

use std::{
    fs,
    io::Read,
    os::unix::fs::FileExt,
    process::{Command, Stdio},
};

use rustix::process::Signal;

use crate::util::{self, Mount, NBDKIT_MOUNT, image, sh, temp};

#[test]
fn the_command_returns_when_the_mount_answers() {
    let dir = temp();
    let disk = image(dir.path(), "disk.img", 1 << 30);
    let (mnt, pidfile) = (dir.path().join("mnt"), dir.path().join("pid"));
    fs::create_dir(&mnt).expect("mkdir");
    // A relative path, since the server changes its directory.
    sh(&format!("cd {} && {NBDKIT_MOUNT} -P pid file file=disk.img mnt", dir.path().display()));
    let unmount = Unmount(mnt.clone());
    assert_eq!(fs::metadata(mnt.join("nbd")).expect("stat").len(), 1 << 30);
    fs::File::options()
        .write(true)
        .open(mnt.join("nbd"))
        .expect("open")
        .write_all_at(b"through", 1000)
        .expect("write");
    let pid = fs::read_to_string(pidfile).expect("the pidfile");
    drop(unmount);
    sh(&format!("tail --pid={} -f /dev/null", pid.trim()));
    let mut found = [0; 7];
    fs::File::open(disk).expect("open").read_exact_at(&mut found, 1000).expect("read");
    assert_eq!(&found, b"through");
}

/// Unmounts at the end.
struct Unmount(std::path::PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        let _ = Command::new("fusermount3").arg("-u").arg(&self.0).output();
    }
}

#[test]
fn a_regular_file_as_the_mountpoint() {
    let dir = temp();
    let mountpoint = image(dir.path(), "point", 0);
    let under = temp();
    let mut mount = Mount::on(mountpoint.clone(), ["memory", "3M"], under);
    assert_eq!(fs::metadata(&mountpoint).expect("stat").len(), 3 << 20);
    let file = fs::File::options().read(true).write(true).open(&mountpoint).expect("open");
    file.write_all_at(b"on top of it", 77).expect("write");
    let mut found = [0; 12];
    file.read_exact_at(&mut found, 77).expect("read");
    assert_eq!(&found, b"on top of it");
    drop(file);
    assert_eq!(mount.unmount(), 0);
    assert_eq!(fs::metadata(&mountpoint).expect("stat").len(), 0, "the file below is as it was");
}

#[test]
fn a_forgotten_mountpoint_hides_no_disk() {
    let dir = temp();
    let images = ["a.img", "b.img", "c.img"].map(|name| image(dir.path(), name, 4096));
    let [a, b, c] = images.each_ref().map(|path| path.to_str().expect("UTF-8"));
    for words in [&["file", a][..], &["split", a, b, c], &["file", a, b]] {
        let line = util::run([&[NBDKIT_MOUNT], words].concat()).refused_with(2);
        let last = words.last().expect("a word");
        assert!(line.contains("the mountpoint is missing") && line.contains(last), "{line}");
        assert!(line.contains("--cover-file"), "{line}");
    }
    let mut mount = Mount::on(images[2].clone(), ["--cover-file", "split", a, b], temp());
    assert_eq!(fs::metadata(c).expect("stat").len(), 8192);
    let line = util::run([NBDKIT_MOUNT, "file", a, c]).refused_with(4);
    assert!(line.contains("in use"), "{line}");
    assert_eq!(mount.unmount(), 0);
    assert_eq!(fs::metadata(c).expect("stat").len(), 4096);
}

#[test]
fn run_mounts_for_one_command() {
    let out =
        util::run([NBDKIT_MOUNT, "--run", "echo $mnt $file; stat -c %s $file; exit 9", "memory", "size=2M"]);
    assert_eq!(out.code, 9, "{}", out.stderr);
    let words: Vec<&str> = out.stdout.split_whitespace().collect();
    assert_eq!(words[1], format!("{}/nbd", words[0]));
    assert_eq!(words[2], "2097152");
    assert!(!fs::exists(words[0]).expect("exists"), "the private directory goes");
    assert_eq!(util::run([NBDKIT_MOUNT, "--run", "kill -TERM $$", "memory", "1M"]).code, 128 + 15);
}

#[test]
fn run_gives_its_status_when_it_unmounts_itself() {
    let command =
        "fusermount3 -u $mnt; while grep -qx fuse /proc/$PPID/task/*/comm 2>/dev/null; do :; done; exit 8";
    assert_eq!(util::run([NBDKIT_MOUNT, "--run", command, "memory", "1M"]).code, 8);
}

#[test]
fn signals_unmount() {
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let mut mount = Mount::start(["memory", "1M"]);
        assert_eq!(mount.signal(signal), 0);
        assert_eq!(fs::read_dir(mount.path()).expect("list").count(), 0, "still mounted");
    }
}

#[test]
fn signals_end_a_start_that_takes_long() {
    let dir = temp();
    let script = format!(
        "{NBDKIT_MOUNT} --filter=delay memory 1M delay-open=1000 {} & children=/proc/$!/task/$!/children
         until grep -q . $children; do :; done; child=$(cat $children)
         kill -TERM $!; wait $! || echo $?; tail --pid=$child -f /dev/null",
        dir.path().display()
    );
    assert_eq!(sh(&script).trim(), "143");
}

#[test]
fn a_busy_mount_ends_too() {
    let dir = temp();
    let disk = image(dir.path(), "disk.img", 1 << 20);
    let mut mount = Mount::start(["--no-passthrough", "file", disk.to_str().expect("UTF-8")]);
    let held = fs::File::options().write(true).open(mount.file()).expect("open");
    held.write_all_at(b"kept", 0).expect("write");
    assert_eq!(mount.signal(Signal::TERM), 0);
    drop(held);
    assert_eq!(&fs::read(&disk).expect("read")[..4], b"kept");
}

#[test]
fn a_sleeping_request_does_not_hold_the_end() {
    let mut mount = Mount::start(["--filter=delay", "memory", "1M", "rdelay=60"]);
    let file = mount.file();
    let reader = std::thread::spawn(move || fs::File::open(file).and_then(|f| f.read_at(&mut [0; 512], 0)));
    // The delay filter's debug lines would tell when the read has arrived, but whether it has does not matter.
    assert_eq!(mount.signal(Signal::TERM), 0);
    let _ = reader.join().expect("the reader");
}

#[test]
fn bad_mount_options() {
    let dir = temp();
    let mnt = dir.path().to_str().expect("UTF-8");
    let line = util::run([NBDKIT_MOUNT, "-o", "rw,nonsense", "memory", "1M", mnt]).refused();
    assert!(line.contains("nonsense"), "{line}");
    let line = util::run([NBDKIT_MOUNT, "-U", "-", "memory", "1M", mnt]).refused();
    assert!(line.contains("name one"), "{line}");
}

#[test]
fn owner_and_mode_can_be_chosen() {
    use std::os::unix::fs::MetadataExt;
    let mount = Mount::start(["-o", "uid=12,gid=34,umask=077,allow_other", "memory", "1M"]);
    let file = fs::metadata(mount.file()).expect("stat");
    assert_eq!((file.uid(), file.gid(), file.mode() & 0o777), (12, 34, 0o600));
}

#[test]
fn a_request_that_takes_too_long_fails() {
    let mount =
        Mount::start(["--timeout", "200ms", "--filter=delay", "memory", "1M", "rdelay=60", "delay-write=60"]);
    let file = fs::File::options().read(true).write(true).open(mount.file()).expect("open");
    let e = file.read_at(&mut [0; 512], 0).expect_err("a timeout");
    assert_eq!(e.raw_os_error(), Some(5));
    assert_eq!(file.write_at(b"x", 0).expect_err("a timeout").raw_os_error(), Some(5));
    assert!(mount.stderr().contains("no answer within 0.2 s"), "{}", mount.stderr());
}

#[test]
fn a_time_limit_does_no_harm() {
    for words in [&[][..], &["-t", "1"], &["--filter=delay", "rdelay=1us"]] {
        let (filters, rest): (Vec<&str>, Vec<&str>) =
            words.iter().partition(|word| word.starts_with('-') || **word == "1");
        let mount =
            Mount::start(["--timeout", "60"].into_iter().chain(filters).chain(["memory", "8M"]).chain(rest));
        sh(&format!(
            "fio --name=v --filename={} --rw=randwrite --bs=4k --size=8m --ioengine=libaio --iodepth=16 --direct=1 \
             --verify=crc32c --verify_fatal=1 --output-format=terse --allow_file_create=0",
            mount.file().display()
        ));
    }
}

#[test]
fn cache_choices() {
    let dir = temp();
    let disk = image(dir.path(), "disk", 8 << 20);
    let file = format!("file={}", disk.display());
    for mode in ["auto", "none", "writeback"] {
        let mut mount = Mount::start([&format!("--cache={mode}"), "file", &file]);
        sh(&format!(
            "fio --name=v --filename={} --rw=randwrite --bs=4k --size=8m --ioengine=psync --fsync=64 --verify=crc32c \
             --verify_fatal=1 --output-format=terse --allow_file_create=0",
            mount.file().display()
        ));
        let open = fs::File::options().read(true).write(true).open(mount.file()).expect("open");
        open.write_all_at(mode.as_bytes(), 12345).expect("write");
        // Only a cache of its own could still hold the old bytes.
        fs::File::options()
            .write(true)
            .open(&disk)
            .expect("open")
            .write_all_at(b"@", 2 << 20)
            .expect("write");
        let mut byte = [0];
        open.read_exact_at(&mut byte, 2 << 20).expect("read");
        if mode == "none" {
            assert_eq!(&byte, b"@", "nothing is kept");
        }
        open.sync_all().expect("fsync");
        let mut found = vec![0; mode.len()];
        fs::File::open(&disk).expect("open").read_exact_at(&mut found, 12345).expect("read");
        assert_eq!(found, mode.as_bytes(), "fsync brings it to the disk");
        drop(open);
        assert_eq!(mount.unmount(), 0);
    }
}

#[test]
fn readiness_by_descriptor_and_service_manager() {
    let dir = temp();
    let (mnt, notify) = (dir.path().join("mnt"), dir.path().join("notify"));
    fs::create_dir(&mnt).expect("mkdir");
    let manager = std::os::unix::net::UnixDatagram::bind(&notify).expect("bind");
    let out = sh(&format!(
        "{{ NOTIFY_SOCKET={1} {NBDKIT_MOUNT} --ready-fd 7 memory 1M {0} 7>&1 >/dev/null; }} | wc -c; \
         stat -c %s {0}/nbd; {NBDKIT_MOUNT} -u {0}",
        mnt.display(),
        notify.display()
    ));
    assert_eq!(out, "1\n1048576\n");
    let mut text = [0; 256];
    let n = manager.recv(&mut text).expect("a message");
    assert!(text[..n].starts_with(b"READY=1\nMAINPID="), "{}", String::from_utf8_lossy(&text[..n]));
    let n = manager.recv(&mut text).expect("a message");
    assert_eq!(&text[..n], b"STOPPING=1");
    assert!(util::run([NBDKIT_MOUNT, "--ready-fd", "99", "memory", "1M", "/tmp"]).refused().contains("99"));
}

#[test]
fn the_end_of_the_parent_is_the_end() {
    let dir = temp();
    let (mnt, pid) = (dir.path().join("mnt"), dir.path().join("pid"));
    fs::create_dir(&mnt).expect("mkdir");
    // The parent waits for readiness, and ends without a signal to its child.
    sh(&format!(
        "mkfifo {1}; bash -c '{NBDKIT_MOUNT} --exit-with-parent -P {1} memory 1M {0} & read pid <{1}; echo $pid >{1}.is' && \
         tail --pid=$(cat {1}.is) -f /dev/null",
        mnt.display(),
        pid.display()
    ));
    assert_eq!(fs::read_dir(&mnt).expect("list").count(), 0, "still mounted");
}

#[test]
fn debug_prints_the_requests_of_the_kernel() {
    let mount = Mount::start(["-d", "memory", "1M"]);
    fs::metadata(mount.file()).expect("stat");
    assert!(mount.stderr().contains("LOOKUP"), "{}", mount.stderr());
}

/// Mounts a disk whose server is lost as soon as the file `lost` exists, does something with it, loses the server, and
/// unmounts.
fn lose(script: &str) -> util::Run {
    let dir = temp();
    let lost = dir.path().join("lost");
    let fails = format!("if test -e '{}'; then echo EIO gone >&2; exit 1; fi", lost.display());
    let mount = Mount::start([
        "eval".to_owned(),
        "get_size=echo 1M".into(),
        format!("pread={fails}; head -c $3 /dev/zero"),
        format!("pwrite={fails}; cat >/dev/null"),
        "can_write=exit 0".into(),
        "can_flush=exit 0".into(),
        format!("flush={fails}"),
    ]);
    sh(&script.replace("DISK", mount.file().to_str().expect("UTF-8")));
    fs::write(&lost, "").expect("write");
    util::run([NBDKIT_MOUNT, "-u", mount.path().to_str().expect("UTF-8")])
}

#[test]
fn after_a_lost_backend_data_may_be_lost_only_if_there_were_any() {
    for harmless in
        ["true", "dd if=DISK of=/dev/null", "dd if=/dev/zero of=DISK bs=4k count=3 conv=notrunc,fsync"]
    {
        let out = lose(harmless);
        assert!(out.code == 0 && !out.stderr.contains("lost"), "{harmless}: {} {}", out.code, out.stderr);
    }
    for harmful in [
        "dd if=/dev/zero of=DISK bs=4k count=3 conv=notrunc",
        "dd if=/dev/zero of=DISK bs=4k count=3 conv=notrunc,fsync; dd if=/dev/zero of=DISK bs=4k count=1 conv=notrunc",
    ] {
        let line = lose(harmful).refused_with(7);
        assert!(line.contains("data may be lost"), "{harmful}: {line}");
    }
}

#[test]
fn a_copy_of_an_image_that_became_shorter_fails_in_every_mode() {
    for words in [&["-r"][..], &["-r", "--no-passthrough"], &["--filter=nofilter"], &["--cache=none"]] {
        let dir = temp();
        let disk = util::patterned(dir.path(), "disk.img", 8 << 20);
        let words = [words, &["file", disk.to_str().expect("UTF-8")]].concat();
        let mount = Mount::start(&words);
        let copy = dir.path().join("copy");
        let cp = || util::run(["cp".as_ref(), mount.file().as_os_str(), copy.as_os_str()]);
        cp().ok();
        assert!(fs::read(&copy).expect("read") == fs::read(&disk).expect("read"), "{words:?}");
        fs::File::options().write(true).open(&disk).expect("open").set_len(5 << 20).expect("truncate");
        sh("echo 3 > /proc/sys/vm/drop_caches 2>/dev/null || true");
        let out = cp();
        assert!(
            out.code != 0 && out.stderr.contains("Input/output error"),
            "{words:?}: {} {}",
            out.code,
            out.stderr
        );
    }
}

/// The counters of a mount do not keep the kernel from reading a file by itself; a layer that has to see requests does.
#[test]
fn the_kernel_reads_what_no_layer_watches() {
    let dir = temp();
    let disk = util::patterned(dir.path(), "disk.img", 1 << 20);
    let disk = disk.to_str().expect("UTF-8");
    for (filter, may) in [("--filter=nofilter", true), ("--filter=count", false), ("--filter=stats", false)] {
        let stats = (filter == "--filter=stats").then_some("statsfile=/dev/null");
        let words = ["-v", "-r", filter, "file", disk].into_iter().chain(stats);
        let mount = Mount::start(words);
        assert!(fs::read(mount.file()).expect("read") == fs::read(disk).expect("read"), "{filter}");
        let log = mount.stderr();
        let cannot =
            log.contains("passthrough: off, the kernel") || log.contains("passthrough: off, only root");
        assert_eq!(log.contains("passthrough: on"), may && !cannot, "{filter}: {log}");
    }
}

/// Another mount namespace has the mount too: the server cannot end, and the one who unmounts hears why.
#[test]
fn an_unmount_does_not_wait_for_another_namespace_for_ever() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let mut mount = Mount::start(["memory", "1M"]);
    let point = mount.path().to_str().expect("UTF-8").to_owned();
    let mut other = Command::new("unshare")
        .args(["-m", "--propagation", "private", "sh", "-c", "echo; exec cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("unshare");
    let mut ready = [0];
    other.stdout.as_mut().expect("a pipe").read_exact(&mut ready).expect("the other namespace");
    let out = util::run(["timeout", "60", NBDKIT_MOUNT, "-u", &point]);
    assert_eq!(out.code, 7, "{}", out.stderr);
    let named = format!("cat (process {}) still has it in its mount namespace", other.id());
    assert!(out.stderr.contains(&named) && out.stderr.contains("nsenter"), "{}", out.stderr);
    drop(other.stdin.take());
    other.wait().expect("wait");
    assert_eq!(mount.wait(), 0);
}

/// A server that was killed may have left its number to somebody else.
/// When a process began, in ticks since the machine did.
fn start_of(pid: u32) -> String {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("a process");
    let (_, fields) = stat.rsplit_once(')').expect("a name");
    fields.split_whitespace().nth(19).expect("a start").to_owned()
}

#[test]
fn an_unmount_does_not_wait_for_a_stranger() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let mut mount = Mount::start(["memory", "1M"]);
    let point = mount.path().to_str().expect("UTF-8").to_owned();
    let own = format!("pid={}\0", mount.pid()).into_bytes();
    let states = fs::read_dir("/run/nbdkit-mount").expect("states").flatten().map(|entry| entry.path());
    let state = states.into_iter().find(|path| fs::read(path).is_ok_and(|text| text.starts_with(&own)));
    let state = state.expect("the state of the mount");
    let server = start_of(mount.pid());
    mount.kill();
    let mut stranger = Command::new("cat").stdin(Stdio::piped()).spawn().expect("cat");
    // A process is known by the tick of the clock that it began at.
    while start_of(stranger.id()) == server {
        stranger.kill().expect("kill");
        stranger.wait().expect("wait");
        stranger = Command::new("cat").stdin(Stdio::piped()).spawn().expect("cat");
    }
    let text = fs::read(&state).expect("read");
    let text = [format!("pid={}\0", stranger.id()).as_bytes(), &text[own.len()..]].concat();
    fs::write(&state, text).expect("write");
    let out = util::run(["timeout", "60", NBDKIT_MOUNT, "-u", &point]);
    assert_eq!(out.code, 0, "{}", out.stderr);
    assert!(!state.exists(), "nobody else takes it away");
    stranger.kill().expect("kill");
    stranger.wait().expect("wait");
}
