//! `--stats`: what goes through a mount or a server, as a live table or one JSON object. Both programs have this file.

use std::{
    collections::VecDeque,
    ffi::OsStr,
    fmt::Write as _,
    fs::File,
    io::{self, IsTerminal as _, Write as _},
    os::{
        fd::AsRawFd as _,
        unix::fs::{FileTypeExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nbdkit_cli::metrics;
use nbdkit_core::{
    Chain,
    stats::{OPS, OpTotals, Totals},
};
use nbdkit_fuse::stats::{SIZE, decode, decode_document, request};
use nix::sys::signal::{SigSet, Signal};
use rustix::{fs::OFlags, io::Errno};
use serde_json::{Map, Value, json};

/// How often the live table is drawn.
const INTERVAL: Duration = Duration::from_secs(1);
/// How many of the last intervals the picture beside a row shows.
const HISTORY: usize = 14;
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// Where a server can be asked.
enum Source {
    /// The mountpoint of a mount.
    Mount(File, PathBuf),
    /// The address of `--metrics`.
    Metrics(Box<OsStr>),
}

impl Source {
    /// # Errors
    /// For a mountpoint that cannot be opened.
    fn new(place: &OsStr) -> Result<Self> {
        let path = Path::new(place);
        let is_socket = std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
        let is_address = !path.exists() && !place.as_encoded_bytes().contains(&b'/');
        if is_socket || is_address {
            return Ok(Source::Metrics(if is_socket { absolute(path) } else { place.into() }));
        }
        Ok(Source::Mount(open(path)?, path.to_owned()))
    }

    fn take(&self) -> Result<Snapshot> {
        match self {
            Source::Mount(mount, path) => Snapshot::of_mount(mount)
                .with_context(|| format!("{} is not a mount of nbdkit-mount", path.display())),
            Source::Metrics(address) => {
                let document = metrics::fetch(address)?;
                Snapshot::of_document(&document)
                    .with_context(|| format!("{} is no server that counts requests", address.display()))
            }
        }
    }
}

/// A path with a slash in it.
fn absolute(path: &Path) -> Box<OsStr> {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned()).into_os_string().into_boxed_os_str()
}

/// What was counted up to a moment: for all requests, then for each layer, the outermost first.
struct Snapshot {
    age: Duration,
    places: Vec<(String, Totals)>,
}

/// Shows the statistics of a mount, or of a server by the address of its `--metrics`: as JSON once, as a table once, or on a
/// terminal live until it ends.
///
/// # Errors
/// It is none of ours, or not to be reached by this user.
pub(crate) fn show(place: &OsStr, json: bool) -> Result<u8> {
    let source = Source::new(place)?;
    let first = source.take()?;
    let mut out = io::stdout().lock();
    if json {
        writeln!(out, "{}", first.json())?;
    } else if !out.is_terminal() {
        out.write_all(first.table(None, None).as_bytes())?;
    } else {
        live(&source, place, first, &mut out)?;
    }
    Ok(0)
}

/// The table of a chain of this process, for SIGUSR1.
pub(crate) fn report(chain: &Chain) -> String {
    let document = nbdkit_fuse::stats::document(chain).unwrap_or_default();
    let snapshot = Snapshot::of_document(document.as_bytes());
    snapshot.map_or_else(|| "requests are not counted".into(), |snapshot| snapshot.table(None, None))
}

fn open(mountpoint: &Path) -> Result<File> {
    let shown = mountpoint.display();
    // Not to wait for a FIFO that was given by mistake.
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    match File::options().read(true).custom_flags(flags).open(mountpoint) {
        Ok(mount) => Ok(mount),
        Err(e) if e.raw_os_error() == Some(Errno::NOTCONN.raw_os_error()) => {
            bail!("the server of {shown} is gone: clear the mount with fusermount3 -u {shown}")
        }
        Err(e) => Err(e).with_context(|| format!("cannot open {shown}")),
    }
}

/// Draws the table again and again on the terminal's other screen, with what happened since it was drawn before. What was on
/// the terminal is there again afterwards.
fn live(source: &Source, place: &OsStr, first: Snapshot, out: &mut impl io::Write) -> Result<()> {
    let ends: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
    ends.thread_block()?;
    let signals = nix::sys::signalfd::SignalFd::new(&ends)?;
    write!(out, "\x1b[?1049h\x1b[?25l\x1b[H\x1b[J{}", first.table(None, None))?;
    let (mut before, mut history) = (first, History::default());
    let end = loop {
        out.flush()?;
        let interval = rustix::event::Timespec::try_from(INTERVAL)?;
        let mut wait = [rustix::event::PollFd::new(&signals, rustix::event::PollFlags::IN)];
        if rustix::event::poll(&mut wait, Some(&interval)).is_ok_and(|count| count > 0) {
            break None;
        }
        let Ok(now) = source.take() else {
            break Some(format!("{} has ended", place.display()));
        };
        history.add(&now, &before);
        write!(out, "\x1b[H\x1b[J{}\n(ends with ^C)", now.table(Some(&before), Some(&history)))?;
        before = now;
    };
    write!(out, "\x1b[?25h\x1b[?1049l")?;
    if let Some(end) = end {
        writeln!(out, "{end}")?;
    }
    Ok(())
}

/// How many requests there were in each of the last intervals, for each row.
#[derive(Default)]
struct History(Vec<[VecDeque<u64>; OPS.len()]>);

impl History {
    fn add(&mut self, now: &Snapshot, before: &Snapshot) {
        self.0.resize_with(now.places.len(), Default::default);
        for (rows, ((_, now), (_, before))) in self.0.iter_mut().zip(now.places.iter().zip(&before.places)) {
            for (row, (now, before)) in rows.iter_mut().zip(now.ops.iter().zip(&before.ops)) {
                row.push_back(now.count.saturating_sub(before.count));
                if row.len() > HISTORY {
                    row.pop_front();
                }
            }
        }
    }

    /// A bar for each interval, the highest for the most requests.
    fn picture(&self, place: usize, op: usize) -> String {
        let Some(row) = self.0.get(place).map(|rows| &rows[op]) else { return String::new() };
        let most = row.iter().copied().max().unwrap_or_default().max(1);
        let bar = |count: &u64| match count {
            0 => ' ',
            count => BARS[((count * 8).div_ceil(most) as usize).clamp(1, 8) - 1],
        };
        row.iter().map(bar).collect()
    }
}

impl Snapshot {
    fn of_mount(mount: &File) -> io::Result<Self> {
        let mut snapshot = Snapshot { age: Duration::ZERO, places: Vec::new() };
        for place in 0..=u8::MAX {
            let answer = match read(mount, place) {
                Ok(answer) => answer,
                Err(e) if place > 0 && e.raw_os_error() == Some(Errno::NODATA.raw_os_error()) => break,
                Err(e) => return Err(e),
            };
            let (name, age, totals) = decode(&answer).ok_or(io::ErrorKind::InvalidData)?;
            snapshot.age = Duration::from_nanos(age);
            snapshot.places.push((name, totals));
        }
        Ok(snapshot)
    }

    fn of_document(document: &[u8]) -> Option<Self> {
        let places = decode_document(document)?;
        let age = Duration::from_nanos(places.first()?.1);
        Some(Snapshot { age, places: places.into_iter().map(|(name, _, totals)| (name, totals)).collect() })
    }

    fn json(&self) -> Value {
        let mut places = self.places.iter().map(|(name, totals)| (name, place_json(totals)));
        let requests = places.next().map_or(Value::Null, |(_, requests)| requests);
        let layers: Vec<Value> = places.map(|(name, ops)| json!({ "name": name, "requests": ops })).collect();
        let all = self.places.first().map(|(_, totals)| totals);
        json!({
            "uptime_s": self.age.as_secs_f64(),
            "requests": requests,
            "cache_hits": all.map(|totals| totals.at_once),
            "layers": layers,
        })
    }

    /// A table of 80 columns: rates and latencies of the time since `earlier`, or since the start, and either the history or
    /// how many requests there were so far.
    fn table(&self, earlier: Option<&Snapshot>, history: Option<&History>) -> String {
        let seconds =
            (self.age - earlier.map_or(Duration::ZERO, |earlier| earlier.age)).as_secs_f64().max(1e-9);
        let age = self.age.as_secs();
        let last = if history.is_some() { "history" } else { "total" };
        let mut text = format!(
            "up {}:{:02}:{:02}\n\n{:<13} {:<7} {:>7} {:>7} {:>8} {:>8} {:>6}  {last:<HISTORY$}\n",
            age / 3600,
            age / 60 % 60,
            age % 60,
            "",
            "request",
            "/s",
            "MiB/s",
            "p50",
            "p99",
            "errors",
        );
        for (index, (name, totals)) in self.places.iter().enumerate() {
            let before = earlier.and_then(|earlier| earlier.places.get(index)).map(|(_, totals)| totals);
            let recent = before.map_or_else(|| totals.clone(), |before| totals.since(before));
            let mut label: String = name.chars().take(13).collect();
            for (number, ((kind, all), recent)) in OPS.iter().zip(&totals.ops).zip(&recent.ops).enumerate() {
                if all.count > 0 {
                    let kind = format!("{kind:?}").to_lowercase();
                    let last = match history {
                        Some(history) => history.picture(index, number),
                        None => all.count.to_string(),
                    };
                    text += &row(&std::mem::take(&mut label), &kind, all, recent, seconds);
                    let _ = writeln!(text, "  {last}");
                }
            }
            let reads = recent.ops[0].count;
            if index == 0 && reads > 0 {
                let share = recent.at_once as f64 * 100.0 / reads as f64;
                let _ = writeln!(text, "{:<13} {share:.1} % of reads found their data in memory", "");
            }
        }
        text
    }
}

fn row(label: &str, kind: &str, all: &OpTotals, recent: &OpTotals, seconds: f64) -> String {
    let latency = |part| recent.latency.percentile(part).map_or("-".into(), duration);
    format!(
        "{label:<13} {kind:<7} {:>7.0} {:>7.1} {:>8} {:>8} {:>6}",
        recent.count as f64 / seconds,
        recent.bytes as f64 / seconds / f64::from(1 << 20),
        latency(0.5),
        latency(0.99),
        all.errors,
    )
}

/// A time in the unit that makes it short.
fn duration(nanoseconds: u64) -> String {
    let n = nanoseconds as f64;
    match nanoseconds {
        0..1_000 => format!("{nanoseconds} ns"),
        1_000..1_000_000 => format!("{:.1} us", n / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} ms", n / 1e6),
        _ => format!("{:.1} s", n / 1e9),
    }
}

fn place_json(totals: &Totals) -> Value {
    let ops = OPS.iter().zip(&totals.ops).filter(|(_, op)| op.count > 0).map(|(kind, op)| {
        let value = json!({
            "count": op.count,
            "bytes": op.bytes,
            "errors": op.errors,
            "p50_ns": op.latency.percentile(0.5),
            "p95_ns": op.latency.percentile(0.95),
            "p99_ns": op.latency.percentile(0.99),
        });
        (format!("{kind:?}").to_lowercase(), value)
    });
    ops.collect::<Map<_, _>>().into()
}

/// Asks the mount for one place of the chain.
#[allow(unsafe_code)]
fn read(mount: &File, place: u8) -> io::Result<Vec<u8>> {
    let mut answer = vec![0; SIZE];
    // SAFETY: the request's number tells the kernel that at most SIZE bytes are written, and so many there are.
    let result = unsafe { nix::libc::ioctl(mount.as_raw_fd(), request(place).into(), answer.as_mut_ptr()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(answer) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(age: u64, reads: u64) -> Snapshot {
        let mut totals = Totals { at_once: reads / 2, ..Totals::default() };
        totals.ops[0].count = reads;
        totals.ops[0].bytes = reads * 1024;
        totals.ops[0].latency.add(30, reads);
        let places = ["requests", "cow", "file"].map(|name| (name.to_string(), totals.clone()));
        Snapshot { age: Duration::from_secs(age), places: places.into() }
    }

    #[test]
    fn the_table_shows_what_happened_since() {
        let table = snapshot(3725, 4096).table(Some(&snapshot(3723, 2048)), None);
        assert!(table.starts_with("up 1:02:05"), "{table}");
        let row = table.lines().find(|line| line.starts_with("cow")).unwrap();
        let words: Vec<_> = row.split_whitespace().collect();
        assert_eq!((words[1], words[2], words[3], words.last()), ("read", "1024", "1.0", Some(&"4096")));
        assert!(table.contains("50.0 % of reads"), "{table}");
        assert_eq!(table.lines().count(), 7, "{table}");
    }

    #[test]
    fn the_live_table_fits_on_a_terminal() {
        let mut history = History::default();
        for reads in [100, 200, 400] {
            history.add(&snapshot(10, reads * 1000), &snapshot(9, 0));
        }
        let table = snapshot(3725, 409_600_000).table(Some(&snapshot(3723, 2048)), Some(&history));
        assert!(table.lines().all(|line| line.chars().count() <= 80), "{table}");
        assert!(table.contains("▂▄█"), "{table}");
    }

    #[test]
    fn the_object_has_totals() {
        let object = snapshot(10, 6).json();
        assert_eq!(object["requests"]["read"]["count"], 6);
        assert_eq!(object["cache_hits"], 3);
        assert_eq!(object["layers"][1]["name"], "file");
        assert!(object["layers"][0]["requests"]["read"]["p99_ns"].as_u64() > Some(0));
        assert!(object["requests"]["write"].is_null());
    }

    #[test]
    fn times_are_short() {
        assert_eq!(
            [999, 1500, 2_340_000, 3_000_000_000].map(duration),
            ["999 ns", "1.5 us", "2.3 ms", "3.0 s"]
        );
    }

    #[test]
    fn what_is_no_mount_says_so() {
        let error = show(OsStr::new("/proc"), true).unwrap_err();
        assert!(error.to_string().contains("not a mount of nbdkit-mount"), "{error}");
    }
}
