//! The suite itself: the checks, and what a row of plugins says. The module above has the rows, and starts a plugin of a
//! row. The loader's tests include this file for plugins and filters that are shared libraries.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    ops::Range,
    path::Path,
    sync::Arc,
};

use nbdkit_core::{
    Caps, Chain, Client, Connection, Errno, Flags, Op, Peer, Result, Session, ShutdownFlag, Support,
};
use tempfile::TempDir;

use super::{ROWS, start};

#[path = "checks.rs"]
mod checks;
#[path = "loans.rs"]
mod loans;

pub(crate) use loans::lend;

/// What becomes of data that a client writes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Writes {
    /// It reads back.
    Kept,
    /// The disk does not change, and the client is not told.
    Discarded,
    /// They fail.
    Fail(Errno),
    /// The export is read-only.
    Refused,
}

/// A plugin, how to configure it, and what to expect.
pub(super) struct Row {
    pub(super) plugin: &'static str,
    /// Parameters; files that it needs are made in the directory.
    pub(super) params: fn(&Path) -> Vec<(&'static str, OsString)>,
    pub(super) export: &'static str,
    pub(super) size: u64,
    /// Its capabilities as [`describe`] writes them.
    pub(super) caps: &'static str,
    pub(super) writes: Writes,
    /// Where the suite writes; the rest may have rules of its own.
    pub(super) area: Range<u64>,
}

/// Makes a sparse file and returns its path.
pub(super) fn image(dir: &Path, name: &str, size: u64) -> OsString {
    let path = dir.join(name);
    File::create(&path).unwrap().set_len(size).unwrap();
    path.into()
}

/// A configured and started plugin.
struct Subject {
    row: &'static Row,
    chain: Arc<Chain>,
    /// Kept until the end, with the plugin's files.
    _dir: TempDir,
}

impl Subject {
    fn start(row: &'static Row) -> Self {
        let dir = TempDir::new().unwrap();
        let chain = start(row.plugin, (row.params)(dir.path())).unwrap();
        Subject { row, chain, _dir: dir }
    }

    fn try_open(&self, readonly: bool) -> Result<Session> {
        connect(&self.chain, readonly).open(OsStr::new(self.row.export), false)
    }

    fn open(&self, readonly: bool) -> Session {
        self.try_open(readonly).unwrap()
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        self.chain.cleanup();
    }
}

pub(super) fn connect(chain: &Arc<Chain>, readonly: bool) -> Arc<Connection> {
    let client = Client::new(1, Peer::Local, Arc::new(ShutdownFlag::new()));
    Arc::new(chain.connect(Arc::new(client), readonly).unwrap())
}

/// The capabilities in one line, for comparing and for messages.
fn describe(caps: &Caps) -> String {
    let support = |name: &str, support| match support {
        Support::None => String::new(),
        support => format!("{name}={support:?}"),
    };
    let flag = |name: &str, on: bool| if on { name.to_owned() } else { String::new() };
    let words = [
        flag("write", caps.write),
        flag("flush", caps.flush),
        flag("trim", caps.trim),
        support("zero", caps.zero),
        flag("fast_zero", caps.fast_zero),
        support("fua", caps.fua),
        flag("multi_conn", caps.multi_conn),
        support("cache", caps.cache),
        flag("extents", caps.extents),
        flag("rotational", caps.rotational),
    ];
    words.into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

/// Runs a check on each row and says which one failed.
fn for_each_row(check: impl Fn(&Subject)) {
    for row in ROWS {
        let subject = Subject::start(row);
        let params = (row.params)(TempDir::new().unwrap().path());
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| check(&subject)));
        assert!(result.is_ok(), "plugin {} with {params:?} failed", row.plugin);
    }
}

/// `length` bytes from `offset`.
pub(super) fn read(session: &Session, range: Range<u64>) -> Vec<u8> {
    let mut buf = vec![0xa5; (range.end - range.start) as usize];
    session.pread(&mut buf, range.start).unwrap();
    buf
}

/// The flags that this disk offers out of those given, in every combination.
fn combinations(caps: &Caps, flags: &[Flags]) -> Vec<Flags> {
    let offered = flags.iter().filter(|flag| {
        !(flag.contains(Flags::FUA) && caps.fua == Support::None
            || flag.contains(Flags::FAST_ZERO) && !caps.fast_zero)
    });
    offered.fold(vec![Flags::empty()], |all, flag| {
        all.iter().flat_map(|combination| [*combination, *combination | *flag]).collect()
    })
}
