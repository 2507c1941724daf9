//! Loop devices and file systems that are set up and taken down with the mount, and `nbdkit-mount -u`.

use std::{fs, path::Path, process::Stdio};

use rustix::process::Signal;

use crate::util::{self, Mount, NBDKIT_MOUNT, image, run, run_ok, sh, temp};

/// A mount in the background, and what it may leave behind when a test fails.
struct Background {
    dir: tempfile::TempDir,
}

impl Background {
    fn new() -> Self {
        let dir = temp();
        for name in ["mnt", "inside"] {
            fs::create_dir(dir.path().join(name)).expect("mkdir");
        }
        Background { dir }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().expect("UTF-8").into()
    }

    /// An image with ext4 on it, or in its first partition.
    fn ext4(&self, partitioned: bool) -> String {
        let disk = image(self.dir.path(), "disk.img", 64 << 20).to_str().expect("UTF-8").to_owned();
        if partitioned {
            sh(&format!(
                "printf 'label: gpt\\n2048,40960\\n' | sfdisk -q {disk} && mkfs.ext4 -q -E offset=1048576 {disk} 20480"
            ));
        } else {
            sh(&format!("mkfs.ext4 -q -F {disk}"));
        }
        format!("file={disk}")
    }

    /// Runs `nbdkit-mount WORDS… MNT`.
    fn start(&self, words: &[&str]) -> util::Run {
        let mnt = self.path("mnt");
        let pid = self.path("pid");
        run([NBDKIT_MOUNT, "-P", pid.as_str()].iter().chain(words).chain([&mnt.as_str()]))
    }

    fn unmount(&self, name: &str) -> util::Run {
        run([NBDKIT_MOUNT, "-u", self.path(name).as_str()])
    }

    fn pid(&self) -> String {
        fs::read_to_string(self.path("pid")).expect("the pidfile").trim().into()
    }

    /// Mounts and loop devices that have to do with the directory.
    fn left(&self) -> String {
        let dir = self.dir.path().display();
        sh(&format!(
            "grep -F {dir} /proc/self/mountinfo || true; losetup -n -O NAME,BACK-FILE | grep -F {dir} || true"
        ))
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let dir = self.dir.path().display().to_string();
        let script = format!(
            "umount -l {dir}/inside; losetup -n -O NAME,BACK-FILE | grep -F {dir}/ | cut -d' ' -f1 | xargs -rn1 losetup -d; \
             fusermount3 -uz {dir}/mnt; umount -l {dir}/mnt"
        );
        let _ = std::process::Command::new("sh")
            .args(["-c", &script])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
    }
}

#[test]
fn a_loop_device_comes_and_goes() {
    let b = Background::new();
    let file = b.ext4(false);
    for (words, readonly) in [(&["--loop"][..], "0\n"), (&["--loop", "-r"], "1\n")] {
        let out = b.start(&[words, &["file", &file]].concat());
        assert_eq!(out.code, 0, "{}", out.stderr);
        let device = out.stdout.trim().to_owned();
        assert!(device.starts_with("/dev/loop"), "{device}");
        assert_eq!(run_ok(["blockdev", "--getsize64", &device]), format!("{}\n", 64 << 20));
        assert_eq!(run_ok(["blockdev", "--getro", &device]), readonly);
        let name = Path::new(&device).file_name().expect("a name").to_str().expect("UTF-8");
        let dio = fs::read_to_string(format!("/sys/block/{name}/loop/dio")).expect("sysfs");
        assert_eq!(dio.trim(), "1", "direct I/O");
        run_ok(["dumpe2fs", "-h", &device]);
        assert_eq!(b.unmount("mnt").code, 0);
        assert_eq!(b.left(), "");
    }
}

#[test]
fn the_block_size_is_that_of_the_disk() {
    let b = Background::new();
    let out = b.start(&["--loop", "--filter=blocksize-policy", "memory", "64M", "blocksize-minimum=4096"]);
    assert_eq!(out.code, 0, "{}", out.stderr);
    assert_eq!(run_ok(["blockdev", "--getss", out.stdout.trim()]), "4096\n");
    assert_eq!(b.unmount("mnt").code, 0);
    // A partition table counts in its own sectors.
    let b = Background::new();
    let file = b.ext4(true);
    let out = b.start(&["--loop", "--filter=blocksize-policy", "file", &file, "blocksize-minimum=4096"]);
    assert_eq!(out.code, 0, "{}", out.stderr);
    assert_eq!(run_ok(["blockdev", "--getss", out.stdout.trim()]), "512\n");
    assert_eq!(b.unmount("mnt").code, 0);
}

#[test]
fn the_file_system_inside_is_mounted_and_unmounted() {
    for (partitioned, words) in [(false, &[][..]), (true, &["--partition", "1", "--fstype", "ext4"])] {
        for place in ["mnt", "inside"] {
            let b = Background::new();
            let (file, inside) = (b.ext4(partitioned), b.path("inside"));
            let out = b.start(&[&["--mount", &inside], words, &["file", &file]].concat());
            assert_eq!((out.code, out.stdout.as_str()), (0, ""), "{}", out.stderr);
            fs::write(b.dir.path().join("inside/hello"), "world").expect("write");
            let options = run_ok(["findmnt", "-no", "OPTIONS", &inside]);
            assert!(options.contains("nosuid") && options.contains("nodev"), "{options}");
            let out = b.unmount(place);
            assert_eq!(out.code, 0, "{}", out.stderr);
            assert_eq!(b.left(), "");
            let offset = if partitioned { "?offset=1048576" } else { "" };
            let disk = b.path("disk.img");
            assert_eq!(run_ok(["debugfs", "-R", "cat hello", &format!("{disk}{offset}")]), "world");
        }
    }
}

#[test]
fn a_partition_that_is_not_there_leaves_nothing_behind() {
    let b = Background::new();
    let (file, inside) = (b.ext4(true), b.path("inside"));
    let line = b.start(&["--mount", &inside, "--partition", "7", "file", &file]).refused_with(4);
    assert!(line.contains("partition 7 not found: the disk has 1 (ext4)"), "{line}");
    let line =
        b.start(&["--mount", &inside, "--partition", "1", "--fstype", "xfs", "file", &file]).refused_with(4);
    assert!(line.contains("cannot mount"), "{line}");
    let plain = b.path("plain.img");
    sh(&format!("truncate -s 16M {plain}"));
    let line = b.start(&["--mount", &inside, "--partition", "1", "file", &plain]).refused_with(4);
    assert!(line.contains("no partition table: leave --partition out"), "{line}");
    assert_eq!(b.left(), "");
}

#[test]
fn signals_take_everything_down() {
    let b = Background::new();
    let (file, inside) = (b.ext4(false), b.path("inside"));
    assert_eq!(b.start(&["--mount", &inside, "file", &file]).code, 0);
    fs::write(b.dir.path().join("inside/hello"), "world").expect("write");
    let pid = b.pid();
    sh(&format!("kill {pid} && tail --pid={pid} -f /dev/null"));
    assert_eq!(b.left(), "");
    sh(&format!("e2fsck -fn {}", b.path("disk.img")));
}

#[test]
fn a_busy_mount_names_who_uses_it() {
    let b = Background::new();
    assert_eq!(b.start(&["memory", "1M"]).code, 0);
    let mut child = std::process::Command::new("cat")
        .current_dir(b.dir.path().join("mnt"))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("cat");
    let mut unmount = std::process::Command::new(NBDKIT_MOUNT)
        .arg("-u")
        .arg(b.dir.path().join("mnt"))
        .stderr(Stdio::piped())
        .spawn()
        .expect("nbdkit-mount -u");
    let mut stderr = unmount.stderr.take().expect("a pipe");
    // The message comes before the mount is let go of.
    let mut line = vec![0; 4096];
    let n = std::io::Read::read(&mut stderr, &mut line).expect("read");
    let line = String::from_utf8_lossy(&line[..n]).into_owned();
    assert!(line.contains(&format!("cat (process {})", child.id())), "{line}");
    drop(child.stdin.take());
    child.wait().expect("wait");
    std::io::Read::read_to_end(&mut stderr, &mut Vec::new()).expect("its end");
    assert_eq!(unmount.wait().expect("wait").code(), Some(0));
    assert_eq!(b.left(), "");
}

#[test]
fn a_loop_device_of_somebody_else_is_named() {
    let b = Background::new();
    assert_eq!(b.start(&["memory", "1M"]).code, 0);
    let device = run_ok(["losetup", "-f", "--show", &b.path("mnt/nbd")]);
    let out = b.unmount("mnt");
    assert_eq!(out.code, 7, "{}", out.stderr);
    assert!(out.stderr.contains(device.trim()), "{}", out.stderr);
    run_ok(["losetup", "-d", device.trim()]);
    assert_eq!(b.unmount("mnt").code, 0);
}

#[test]
fn a_failed_last_flush_is_told() {
    let dir = temp();
    let plugin = dir.path().join("noflush.sh");
    let script = "#!/bin/sh
case $1 in
get_size) echo 1M ;;
pread) head -c $3 /dev/zero ;;
pwrite) cat >/dev/null ;;
can_write | can_flush) ;;
flush) echo 'EIO as the test wants it' >&2; exit 1 ;;
*) exit 2 ;;
esac
";
    fs::write(&plugin, script).expect("write");
    run_ok(["chmod", "+x", plugin.to_str().expect("UTF-8")]);
    let b = Background::new();
    let out = b.start(&["sh", plugin.to_str().expect("UTF-8")]);
    assert_eq!(out.code, 0, "{}", out.stderr);
    sh(&format!("printf x | dd of={} conv=notrunc status=none", b.path("mnt/nbd")));
    let out = b.unmount("mnt");
    assert_eq!(out.code, 7, "{}", out.stderr);
    assert!(out.stderr.contains("flush failed"), "{}", out.stderr);
    assert_eq!(b.left(), "");
}

#[test]
fn force_clears_what_a_killed_server_left() {
    let b = Background::new();
    let (file, inside) = (b.ext4(false), b.path("inside"));
    assert_eq!(b.start(&["--mount", &inside, "file", &file]).code, 0);
    let pid = b.pid();
    sh(&format!("kill -9 {pid} && tail --pid={pid} -f /dev/null"));
    let line = b.start(&["memory", "1M"]).refused_with(4);
    assert!(line.contains("--force"), "{line}");
    let out = b.start(&["--force", "memory", "1M"]);
    assert_eq!(out.code, 0, "{}", out.stderr);
    assert_eq!(fs::metadata(b.path("mnt/nbd")).expect("stat").len(), 1 << 20);
    assert_eq!(b.left().lines().count(), 1, "{}", b.left());
    assert_eq!(b.unmount("mnt").code, 0);
}

#[test]
fn what_is_not_ours_is_left_alone() {
    let b = Background::new();
    let line = b.unmount("mnt").refused_with(7);
    assert!(line.contains("nothing is mounted"), "{line}");
    let line = run([NBDKIT_MOUNT, "-u", "/proc"]).refused_with(7);
    assert!(line.contains("not of nbdkit-mount"), "{line}");
    let line = run([NBDKIT_MOUNT, "-u", "/proc", "extra"]).refused();
    assert!(line.contains("nothing else"), "{line}");
}

#[test]
fn auto_unmount_clears_the_mount_of_a_killed_server() {
    for words in [&["--auto-unmount"][..], &["-o", "auto_unmount"]] {
        let mut mount = Mount::start(words.iter().copied().chain(["memory", "1M"]));
        mount.kill();
        // The watcher is a child of the server, and its end cannot be waited for: the mount table tells.
        let script = format!(
            "for i in $(seq 600); do grep -q ' {0} ' /proc/self/mountinfo || exit 0; sleep 0.1; done; exit 1",
            mount.path().display()
        );
        sh(&script);
        assert_eq!(fs::read_dir(mount.path()).expect("list").count(), 0);
    }
    let mut mount = Mount::start(["--auto-unmount", "memory", "1M"]);
    assert_eq!(mount.signal(Signal::TERM), 0);
}
