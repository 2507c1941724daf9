//! Which file system in a disk is mounted, and how: by name, read-only without a write, recovered in an overlay, and undone
//! in any order.

use std::{fs, process::Stdio};

use crate::util::{Mount, NBDKIT_MOUNT, Run, image, run, run_ok, sh, temp};

/// A directory with mountpoints `mnt` and `inside`, which are free when it is dropped.
struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let bench = Bench { dir: temp() };
        for name in ["mnt", "inside"] {
            fs::create_dir(bench.dir.path().join(name)).expect("mkdir");
        }
        bench
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().expect("UTF-8").into()
    }

    /// A disk with a FAT and two ext4s, the second with a name, the third the root of a system.
    fn disk(&self) -> String {
        let disk = image(self.dir.path(), "disk.img", 64 << 20).to_str().expect("UTF-8").to_owned();
        sh(&format!(
            "set -e; sgdisk -n 1:2048:+4M -t 1:ef00 -c 1:boot -n 2:0:+16M -c 2:data -n 3:0:+16M -t 3:8304 -c 3:system {disk} \
             >/dev/null; mkfs.vfat -n EFI --offset 2048 {disk} 4096 >/dev/null; \
             mkfs.ext4 -q -F -L stuff -E offset=5242880 {disk} 16384; \
             mkfs.ext4 -q -F -L linux -E offset=22020096 {disk} 16384"
        ));
        disk
    }

    /// An ext4 that was copied while it was mounted, with `file` in its journal alone.
    fn dirty(&self) -> String {
        let (disk, dirty) = (image(self.dir.path(), "clean.img", 32 << 20), self.path("dirty.img"));
        sh(&format!("mkfs.ext4 -q {}", disk.display()));
        self.mount(&["file", disk.to_str().expect("UTF-8")]);
        sh(&format!(
            "echo data > {0}/file; sync -f {0}/file; cp {1} {dirty}",
            self.path("inside"),
            disk.display()
        ));
        self.unmount();
        let state = run_ok(["dumpe2fs", "-h", &dirty]);
        assert!(state.contains("needs_recovery"), "{state}");
        dirty
    }

    fn start(&self, words: &[&str]) -> Run {
        let (mnt, inside) = (self.path("mnt"), self.path("inside"));
        run([&[NBDKIT_MOUNT, "--mount", inside.as_str()], words, &[mnt.as_str()]].concat())
    }

    fn mount(&self, words: &[&str]) -> String {
        let out = self.start(words);
        assert_eq!(out.code, 0, "{words:?}: {}", out.stderr);
        out.stderr
    }

    fn unmount(&self) {
        run_ok([NBDKIT_MOUNT, "-u", &self.path("mnt")]);
    }

    fn options(&self) -> String {
        run_ok(["findmnt", "-no", "OPTIONS", &self.path("inside")])
    }

    /// Mounts and loop devices that have to do with the directory.
    fn left(&self) -> String {
        let dir = self.dir.path().display();
        sh(&format!(
            "grep -F {dir} /proc/self/mountinfo || true; losetup -n -O NAME,BACK-FILE | grep -F {dir} || true"
        ))
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let dir = self.dir.path().display().to_string();
        let script = format!(
            "umount -l {dir}/inside; losetup -n -O NAME,BACK-FILE | grep -F {dir}/ | cut -d' ' -f1 | xargs -rn1 losetup -d; \
             umount -l {dir}/mnt"
        );
        let quiet = || Stdio::null();
        let _ =
            std::process::Command::new("sh").args(["-c", &script]).stdout(quiet()).stderr(quiet()).status();
    }
}

#[test]
fn partitions_are_found_by_name() {
    let b = Bench::new();
    let disk = b.disk();
    let id = |field: &str, offset: u64| {
        let script = format!("blkid -p -O {offset} -S 16777216 -o value -s {field} {disk}");
        run_ok(["sh", "-c", &script]).trim().to_owned()
    };
    let unique = run_ok(["sh", "-c", &format!("partx -n 2 -go UUID {disk}")]).trim().to_owned();
    let uuid = format!("UUID={}", id("UUID", 5242880).to_uppercase());
    let partuuid = format!("PARTUUID={unique}");
    for (selector, label) in [
        ("2", "stuff"),
        ("LABEL=stuff", "stuff"),
        ("stuff", "stuff"),
        ("data", "stuff"),
        ("PARTLABEL=data", "stuff"),
        (uuid.as_str(), "stuff"),
        (partuuid.as_str(), "stuff"),
        ("nbd2", "stuff"),
        ("root", "linux"),
        ("3", "linux"),
    ] {
        b.mount(&["--partition", selector, "file", &disk]);
        let found = run_ok(["findmnt", "-no", "LABEL", &b.path("inside")]);
        b.unmount();
        assert_eq!(found.trim(), label, "{selector}");
    }
    for (words, says) in [
        (
            &["--partition", "nosuch"][..],
            "partition nosuch not found: the disk has 1 (vfat \"EFI\"), 2 (ext4 \"stuff\")",
        ),
        (
            &[],
            "more than one file system: say which with --partition, of 1 (vfat \"EFI\"), 2 (ext4 \"stuff\"), 3",
        ),
        (&["--partition", "0"], "count from 1"),
    ] {
        let out = b.start(&[words, &["file", &disk]].concat());
        assert!(out.code != 0 && out.stderr.contains(says), "{words:?}: {}", out.stderr);
    }
    assert_eq!(b.left(), "");
}

#[test]
fn the_only_file_system_needs_no_name() {
    let b = Bench::new();
    let disk = image(b.dir.path(), "disk.img", 64 << 20).to_str().expect("UTF-8").to_owned();
    sh(&format!(
        "printf 'label: dos\n2048,8192,82\n10240,40960\n' | sfdisk -q {disk} && mkfs.ext4 -q -F -E offset=5242880 {disk} 20480"
    ));
    b.mount(&["file", &disk]);
    b.unmount();
    assert_eq!(b.left(), "");
}

#[test]
fn links_by_name() {
    let b = Bench::new();
    let disk = b.disk();
    let mount = Mount::start(["--partitions", "file", &disk]);
    let names = run_ok(["ls", mount.path().join("by-name").to_str().expect("UTF-8")]);
    assert_eq!(names, "boot\ndata\nsystem\n");
    let link = mount.path().join("by-name/data");
    assert_eq!(fs::read_link(&link).expect("a link").to_str(), Some("../nbd2"));
    assert_eq!(fs::metadata(&link).expect("stat").len(), 16 << 20);
    run_ok(["sgdisk", "-c", "2:other/name", mount.file().to_str().expect("UTF-8")]);
    let names = run_ok(["ls", mount.path().join("by-name").to_str().expect("UTF-8")]);
    assert_eq!(names, "boot\nother%2Fname\nsystem\n");
    assert!(fs::read_link(&link).is_err());
    assert!(fs::write(mount.path().join("by-name/new"), "").is_err());
}

#[test]
fn commands_have_a_variable_for_each_partition() {
    let b = Bench::new();
    let disk = b.disk();
    let script = "stat -c %s $part1 $part2; blkid -p -o value -s LABEL $part3; echo $part4";
    let out = run_ok([NBDKIT_MOUNT, "--partitions", "--run", script, "file", &disk]);
    assert_eq!(out, "4194304\n16777216\nlinux\n\n");
}

#[test]
fn mount_options_are_passed_on() {
    let b = Bench::new();
    let disk = image(b.dir.path(), "disk.img", 32 << 20).to_str().expect("UTF-8").to_owned();
    sh(&format!("mkfs.ext4 -q {disk}"));
    b.mount(&["--mount-options", "noexec,noatime", "--mount-options", "data=journal", "file", &disk]);
    let options = b.options();
    b.unmount();
    for option in ["nosuid", "nodev", "noexec", "noatime", "data=journal"] {
        assert!(options.contains(option), "no {option} in {options}");
    }
}

/// A copy of a file system is mounted beside the original, which XFS otherwise refuses.
#[test]
fn copies_of_xfs() {
    let (a, b) = (Bench::new(), Bench::new());
    let disk = image(a.dir.path(), "disk.img", 320 << 20).to_str().expect("UTF-8").to_owned();
    let copy = b.path("copy.img");
    sh(&format!("mkfs.xfs -q {disk} && cp --sparse=always {disk} {copy}"));
    a.mount(&["file", &disk]);
    b.mount(&["-r", "file", &copy]);
    let options = b.options();
    assert!(options.contains("nouuid") && options.contains("norecovery"), "{options}");
    b.unmount();
    a.unmount();
}

#[test]
fn what_has_to_be_recovered() {
    let b = Bench::new();
    let dirty = b.dirty();
    let sum = || run_ok(["md5sum", &dirty]);
    let before = sum();
    let said = b.mount(&["-r", "file", &dirty]);
    assert!(said.contains("not unmounted") && said.contains("--recovered"), "{said}");
    assert!(b.options().contains("norecovery"), "{}", b.options());
    b.unmount();
    // Recovered in an overlay, read-only or not, and the image is as it was.
    for words in [&["-r", "--recovered"][..], &["--recovered"]] {
        let said = b.mount(&[words, &["file", &dirty]].concat());
        assert_eq!(said, "", "{words:?}");
        assert_eq!(fs::read_to_string(b.path("inside/file")).expect("read"), "data\n");
        let readonly = fs::write(b.path("inside/new"), "text").is_err();
        assert_eq!(readonly, words.contains(&"-r"));
        b.unmount();
        assert_eq!(sum(), before, "{words:?}");
    }
    // Without any of that the image is recovered itself.
    b.mount(&["file", &dirty]);
    b.unmount();
    assert_ne!(sum(), before);
}

/// What is mounted inside may be unmounted by umount(8), and takes its loop device with it.
#[test]
fn the_loop_device_goes_with_the_file_system() {
    let b = Bench::new();
    let disk = image(b.dir.path(), "disk.img", 32 << 20).to_str().expect("UTF-8").to_owned();
    sh(&format!("mkfs.ext4 -q {disk}"));
    b.mount(&["file", &disk]);
    run_ok(["umount", &b.path("inside")]);
    assert_eq!(b.left().lines().count(), 1, "the disk alone: {}", b.left());
    run_ok(["umount", &b.path("mnt")]);
    assert_eq!(b.left(), "");
    // And in the usual order after that, with nothing in the way.
    b.mount(&["file", &disk]);
    run_ok(["umount", &b.path("inside")]);
    b.unmount();
    assert_eq!(b.left(), "");
}

#[test]
fn a_mount_in_use_is_waited_for_or_taken_out_of_sight() {
    let mount = Mount::start(["memory", "1M"]);
    let path = mount.path().to_str().expect("UTF-8");
    let file = fs::File::open(mount.file()).expect("open");
    let out = run([NBDKIT_MOUNT, "-u", "--wait=0", path]);
    assert_eq!(out.code, 7, "{}", out.stderr);
    assert!(out.stderr.contains("is in use"), "{}", out.stderr);
    run_ok([NBDKIT_MOUNT, "-u", "--lazy", path]);
    assert!(!mount.file().exists());
    drop(file);
    let line = run([NBDKIT_MOUNT, "-u", "--lazy", "--wait=1", path]).refused();
    assert!(line.contains("cannot be used together"), "{line}");
    let line = run([NBDKIT_MOUNT, "-u"]).refused();
    assert!(line.contains("needs a mountpoint"), "{line}");
}

#[test]
fn mounts_are_listed() {
    let mount = Mount::start(["memory", "1M"]);
    let path = mount.path().display().to_string();
    let text = run_ok([NBDKIT_MOUNT, "--list-mounts"]);
    let line = text.lines().find(|line| line.starts_with(&path)).expect("the mount");
    assert_eq!(line, format!("{path} from nbdkit:memory, process {}", mount.pid()));
    let all: serde_json::Value =
        serde_json::from_str(&run_ok([NBDKIT_MOUNT, "--list-mounts", "--json"])).expect("JSON");
    let ours = all.as_array().expect("a list").iter().find(|m| m["mountpoint"] == path.as_str());
    assert_eq!(ours.expect("the mount")["pid"], mount.pid());
}

#[test]
fn the_options_of_the_server() {
    let dir = temp();
    let log = dir.path().join("log").to_str().expect("UTF-8").to_owned();
    let words = [NBDKIT_MOUNT, "--name=disk7", &format!("--log={log}"), "nosuch", "/mnt"];
    let out = run(words);
    assert_eq!((out.code, out.stderr.as_str()), (1, ""));
    let said = fs::read_to_string(&log).expect("the log");
    assert!(said.starts_with("nbdkit-mount[disk7]: error: unknown plugin 'nosuch'"), "{said}");
    let config = run_ok([NBDKIT_MOUNT, "--dump-config"]);
    assert!(config.contains("\nname=nbdkit-mount\n"), "{config}");
    let plugin = run_ok([NBDKIT_MOUNT, "--dump-plugin", "memory"]);
    assert!(plugin.contains("\nname=memory\n"), "{plugin}");
    let out = run([NBDKIT_MOUNT, "-D", "nosuch.flag=1", "--run", "true", "memory", "1M"]);
    assert!(out.stderr.contains("nosuch.flag"), "{}", out.stderr);
}
