//! The distribution's plugins and filters, each put to work by its file: the disk that it shows through our front ends
//! is the disk that it shows in the C nbdkit, before and after the same writes.

mod filters;
mod languages;
mod plugins;

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FallocateFlags, fallocate},
    io::Errno,
};

use crate::util::{Mount, NBDKIT, run_ok, sh, temp};

/// The C nbdkit.
const C_NBDKIT: &str = "nbdkit";

/// The distribution's directory of plugins or filters.
pub(super) fn directory(kind: &str) -> PathBuf {
    let dump = sh("nbdkit --dump-config");
    let key = format!("{kind}dir=");
    let line = dump.lines().find_map(|line| line.strip_prefix(&key)).expect("the distribution's nbdkit");
    line.into()
}

/// The file of a plugin.
pub(super) fn plugin(name: &str) -> String {
    directory("plugin").join(format!("nbdkit-{name}-plugin.so")).display().to_string()
}

/// The option for the file of a filter.
pub(super) fn filter(name: &str) -> String {
    format!("--filter={}/nbdkit-{name}-filter.so", directory("filter").display())
}

/// The files of all plugins or filters.
fn libraries(kind: &str) -> Vec<PathBuf> {
    let files = fs::read_dir(directory(kind)).expect("a directory").map(|entry| entry.unwrap().path());
    let list: Vec<_> = files.filter(|path| path.extension().is_some_and(|e| e == "so")).collect();
    assert!(list.len() > 20, "{list:?}");
    list
}

/// A path as a word.
fn word(path: &Path) -> String {
    path.to_str().expect("UTF-8").to_owned()
}

/// Words of a command line.
fn words<S: Into<String>>(words: impl IntoIterator<Item = S>) -> Vec<String> {
    words.into_iter().map(Into::into).collect()
}

/// What is written, in the middle of the disk, and from where to where it is zeroed again.
const WRITTEN: usize = 8192;
const ZEROED: std::ops::Range<usize> = 2048..6144;

/// What a front end shows of a disk.
#[derive(Debug, PartialEq)]
struct Seen {
    before: Vec<u8>,
    /// After the writes; None: it is read-only.
    after: Option<Vec<u8>>,
}

impl Seen {
    fn load(dir: &Path) -> Self {
        Seen {
            before: fs::read(dir.join("before")).expect("the disk"),
            after: fs::read(dir.join("after")).ok(),
        }
    }
}

/// Makes what a chain needs in a directory, and gives the words of its command line.
type Words<'a> = dyn Fn(&Path) -> Vec<String> + 'a;

/// A chain to look at through each front end. Each server gets a directory of its own for what its chain needs.
struct Disk<'a> {
    words: Box<Words<'a>>,
    export: &'a str,
    writable: bool,
    same: bool,
}

impl<'a> Disk<'a> {
    /// A read-only disk that looks the same each time; the closure makes files in a directory and gives the words of
    /// the command line.
    fn new(words: impl Fn(&Path) -> Vec<String> + 'a) -> Self {
        Disk { words: Box::new(words), export: "", writable: false, same: true }
    }

    /// Writes are kept.
    fn writable(self) -> Self {
        Disk { writable: true, ..self }
    }

    /// The disk of this name.
    fn export(self, export: &'a str) -> Self {
        Disk { export, ..self }
    }

    /// Each server makes it anew, with other times and random numbers in it.
    fn differs(self) -> Self {
        Disk { same: false, ..self }
    }

    /// The disk as an NBD client sees it.
    #[track_caller]
    fn over_nbd(&self, program: &str) -> Seen {
        let dir = temp();
        let at = dir.path().display();
        let script = format!(
            "
def disk():
    size = h.get_size()
    return b''.join(h.pread(min(1 << 20, size - at), at) for at in range(0, size, 1 << 20))
open('{at}/before', 'wb').write(disk())
if not h.is_read_only():
    at = h.get_size() // 8192 * 4096
    h.pwrite(bytes(i % 255 + 1 for i in range({WRITTEN})), at)
    if h.can_zero():
        h.zero({length}, at + {start})
    else:
        h.pwrite(bytes({length}), at + {start})
    if h.can_flush():
        h.flush()
    open('{at}/after', 'wb').write(disk())
h.shutdown()
",
            start = ZEROED.start,
            length = ZEROED.len(),
        );
        let path = dir.path().join("client.py");
        fs::write(&path, script).expect("write a file");
        let client = format!("nbdsh -u \"$uri\" -c - < {}", path.display());
        let mut all = words([program, "-U", "-", "-e", self.export]);
        all.extend((self.words)(dir.path()));
        all.extend(words(["--run", &client]));
        run_ok(all);
        Seen::load(dir.path())
    }

    /// The disk as the kernel sees it.
    #[track_caller]
    fn mounted(&self) -> Seen {
        let dir = temp();
        let mut all = words(["-e", self.export]);
        all.extend((self.words)(dir.path()));
        let mut mount = Mount::start(&all);
        let before = fs::read(mount.file()).expect("read the disk");
        let mode = rustix::fs::stat(mount.file()).expect("stat").st_mode;
        let after = (mode & 0o222 != 0).then(|| {
            let file = File::options().write(true).open(mount.file()).expect("open the disk");
            let at = (before.len() / 8192 * 4096) as u64;
            file.write_all_at(&pattern(), at).expect("write");
            let (start, length) = (at + ZEROED.start as u64, ZEROED.len() as u64);
            match fallocate(&file, FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, start, length) {
                // This chain cannot zero, as the NBD client was told too.
                Err(Errno::OPNOTSUPP) => file.write_all_at(&[0; ZEROED.end - ZEROED.start], start),
                zeroed => zeroed.map_err(Into::into),
            }
            .expect("zero");
            file.sync_all().expect("sync");
            fs::read(mount.file()).expect("read the disk")
        });
        assert_eq!(mount.unmount(), 0);
        Seen { before, after }
    }

    /// Looks through both front ends and compares with the C nbdkit. Returns the disk as it was found each time.
    #[track_caller]
    fn through_both_doors(self) -> Vec<Vec<u8>> {
        let seen = [self.over_nbd(C_NBDKIT), self.over_nbd(NBDKIT), self.mounted()];
        for (i, front_end) in seen.iter().enumerate() {
            assert!(!front_end.before.is_empty(), "front end {i}");
            assert_eq!(front_end.after.is_some(), self.writable, "front end {i}: writable");
            if let Some(after) = &front_end.after {
                let mut want = front_end.before.clone();
                let at = want.len() / 8192 * 4096;
                want[at..at + WRITTEN].copy_from_slice(&pattern());
                want[at..][ZEROED].fill(0);
                assert!(*after == want, "front end {i}: what was written");
            }
            assert!(!self.same || *front_end == seen[0], "front end {i} shows another disk");
        }
        seen.into_iter().map(|seen| seen.before).collect()
    }
}

/// What is written: no byte of it is zero.
fn pattern() -> Vec<u8> {
    (0..WRITTEN).map(|i| (i % 255 + 1) as u8).collect()
}
