//! The conformance suite: what a door may rely on, checked for every plugin through the chain and the dispatcher that
//! the doors use.
//!
//! To add a plugin, add its row to [`ROWS`]: a test fails until it is there.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    ops::Range,
    path::Path,
    sync::Arc,
};

use nbdkit_core::{Caps, Chain, Client, Connection, Errno, Flags, Peer, Result, Session, Stop, Support};
use tempfile::TempDir;

mod checks;
mod model;

/// What becomes of data that a client writes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Writes {
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
struct Row {
    plugin: &'static str,
    /// Parameters; files that it needs are made in the directory.
    params: fn(&Path) -> Vec<(&'static str, OsString)>,
    export: &'static str,
    size: u64,
    /// Its capabilities as [`describe`] writes them.
    caps: &'static str,
    writes: Writes,
    /// Where the suite writes; the rest may have rules of its own.
    area: Range<u64>,
}

/// All that a plugin can offer.
const EVERYTHING: &str = "write flush trim zero=Native fast_zero fua=Native multi_conn cache=Native extents";

/// A size that is no multiple of anything.
const ODD: u64 = (1 << 20) + 4097;

const ROWS: &[Row] = &[
    Row {
        plugin: "data",
        params: |_| vec![("raw", "hello".into()), ("size", ODD.to_string().into())],
        export: "",
        size: ODD,
        caps: EVERYTHING,
        writes: Writes::Kept,
        area: 0..ODD,
    },
    Row {
        plugin: "file",
        params: |dir| vec![("file", image(dir, "disk", ODD))],
        export: "",
        size: ODD,
        caps: EVERYTHING,
        writes: Writes::Kept,
        area: 0..ODD,
    },
    Row {
        plugin: "file",
        params: |dir| {
            vec![("file", image(dir, "disk", ODD)), ("cache", "none".into()), ("fadvise", "random".into())]
        },
        export: "",
        size: ODD,
        caps: EVERYTHING,
        writes: Writes::Kept,
        area: 0..ODD,
    },
    Row {
        plugin: "file",
        params: |dir| {
            image(dir, "one", 512);
            image(dir, "two", 4096);
            vec![("dir", dir.into())]
        },
        export: "two",
        size: 4096,
        caps: EVERYTHING,
        writes: Writes::Kept,
        area: 0..4096,
    },
    Row {
        plugin: "file",
        params: |dir| vec![("file", image(dir, "empty", 0))],
        export: "",
        size: 0,
        caps: EVERYTHING,
        writes: Writes::Kept,
        area: 0..0,
    },
    Row {
        plugin: "full",
        params: |_| vec![("size", ODD.to_string().into())],
        export: "",
        size: ODD,
        caps: "write trim zero=Emulate fast_zero multi_conn cache=Native extents",
        writes: Writes::Fail(Errno::ENOSPC),
        area: 0..ODD,
    },
    Row {
        plugin: "info",
        params: |_| vec![("mode", "exportname".into())],
        export: "hello",
        size: 5,
        caps: "multi_conn cache=Native",
        writes: Writes::Refused,
        area: 0..0,
    },
    Row {
        plugin: "memory",
        params: |_| vec![("size", ODD.to_string().into())],
        export: "",
        size: ODD,
        caps: EVERYTHING,
        writes: Writes::Kept,
        area: 0..ODD,
    },
    Row {
        plugin: "memory",
        params: |_| vec![("size", i64::MAX.to_string().into())],
        export: "",
        size: i64::MAX as u64,
        caps: EVERYTHING,
        writes: Writes::Kept,
        area: i64::MAX as u64 - 100_000..i64::MAX as u64,
    },
    Row {
        plugin: "memory",
        params: |_| vec![("size", "64K".into()), ("allocator", "malloc,mlock=true".into())],
        export: "",
        size: 65536,
        caps: EVERYTHING,
        writes: Writes::Kept,
        area: 0..65536,
    },
    Row {
        plugin: "null",
        params: |_| vec![("size", ODD.to_string().into())],
        export: "",
        size: ODD,
        caps: EVERYTHING,
        writes: Writes::Discarded,
        area: 0..ODD,
    },
    Row {
        plugin: "ones",
        params: |_| vec![("size", ODD.to_string().into())],
        export: "",
        size: ODD,
        caps: EVERYTHING,
        writes: Writes::Discarded,
        area: 0..ODD,
    },
    Row {
        plugin: "ones",
        params: |_| vec![("size", "1M".into()), ("byte", "0".into())],
        export: "",
        size: 1 << 20,
        caps: EVERYTHING,
        writes: Writes::Discarded,
        area: 0..1 << 20,
    },
    Row {
        plugin: "partitioning",
        params: |dir| vec![("file", image(dir, "disk", ODD))],
        export: "",
        size: (1 << 20) + ODD.next_multiple_of(512),
        caps: EVERYTHING,
        writes: Writes::Kept,
        area: 1 << 20..(1 << 20) + ODD,
    },
    Row {
        plugin: "pattern",
        params: |_| vec![("size", ODD.to_string().into())],
        export: "",
        size: ODD,
        caps: "multi_conn cache=Native",
        writes: Writes::Refused,
        area: 0..ODD,
    },
    Row {
        plugin: "split",
        params: |dir| {
            let sizes = [("one", 5000), ("two", 0), ("three", 1), ("four", ODD - 5001)];
            sizes.map(|(name, size)| ("file", image(dir, name, size))).into()
        },
        export: "",
        size: ODD,
        caps: EVERYTHING,
        writes: Writes::Kept,
        area: 0..ODD,
    },
    Row {
        plugin: "zero",
        params: |_| vec![],
        export: "",
        size: 0,
        caps: "multi_conn cache=Native",
        writes: Writes::Refused,
        area: 0..0,
    },
];

/// Makes a sparse file and returns its path.
fn image(dir: &Path, name: &str, size: u64) -> OsString {
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

/// A chain of one plugin, ready for connections.
fn start(plugin: &str, params: Vec<(&str, OsString)>) -> anyhow::Result<Arc<Chain>> {
    let mut chain = Chain::new(crate::load(plugin).unwrap(), vec![]);
    for (key, value) in params {
        chain.config(key, &value)?;
    }
    chain.config_complete()?;
    chain.get_ready()?;
    let chain = Arc::new(chain);
    chain.after_fork()?;
    Ok(chain)
}

fn connect(chain: &Arc<Chain>, readonly: bool) -> Arc<Connection> {
    let client = Client::new(1, Peer::Local, Arc::new(Stop::new()));
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
fn read(session: &Session, range: Range<u64>) -> Vec<u8> {
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
