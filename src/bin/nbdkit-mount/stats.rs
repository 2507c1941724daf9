//! `--stats`: what goes through a mount, as a live table or one JSON object.

use std::{
    fmt::Write as _,
    fs::File,
    io::{self, IsTerminal as _, Write as _},
    os::{fd::AsRawFd as _, unix::fs::OpenOptionsExt as _},
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nbdkit_core::stats::{OPS, OpTotals, Totals};
use nbdkit_fuse::stats::{SIZE, decode, request};
use rustix::{fs::OFlags, io::Errno};
use serde_json::{Map, Value, json};

/// How often the live table is drawn.
const INTERVAL: Duration = Duration::from_secs(1);

/// What was counted up to a moment: for all requests, then for each layer, the outermost first.
struct Snapshot {
    age: Duration,
    places: Vec<(String, Totals)>,
}

/// Shows the statistics of a mount: as JSON once, as a table once, or on a terminal live until it is unmounted.
///
/// # Errors
/// It is no mount of ours, or not to be opened by this user.
pub(crate) fn show(mountpoint: &Path, json: bool) -> Result<u8> {
    let mount = open(mountpoint)?;
    let first = Snapshot::take(&mount)
        .with_context(|| format!("{} is not a mount of nbdkit-mount", mountpoint.display()))?;
    let mut out = io::stdout().lock();
    if json {
        writeln!(out, "{}", first.json())?;
    } else if !out.is_terminal() {
        out.write_all(first.table(None).as_bytes())?;
    } else {
        live(&mount, mountpoint, first, &mut out)?;
    }
    Ok(0)
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

/// Draws the table again and again, with what happened since it was drawn before.
fn live(mount: &File, mountpoint: &Path, first: Snapshot, out: &mut impl io::Write) -> Result<()> {
    let mut before = first;
    write!(out, "\x1b[H\x1b[J{}", before.table(None))?;
    loop {
        out.flush()?;
        std::thread::sleep(INTERVAL);
        let Ok(now) = Snapshot::take(mount) else {
            writeln!(out, "{} was unmounted", mountpoint.display())?;
            return Ok(());
        };
        write!(out, "\x1b[H\x1b[J{}\n(ends with ^C)\n", now.table(Some(&before)))?;
        before = now;
    }
}

impl Snapshot {
    fn take(mount: &File) -> io::Result<Self> {
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

    /// A table of everything so far, with rates and latencies of the time since `earlier`, or since the start.
    fn table(&self, earlier: Option<&Snapshot>) -> String {
        let seconds =
            (self.age - earlier.map_or(Duration::ZERO, |earlier| earlier.age)).as_secs_f64().max(1e-9);
        let age = self.age.as_secs();
        let mut text = format!(
            "up {}:{:02}:{:02}\n\n{:<14} {:<8} {:>10} {:>10} {:>10} {:>10} {:>10} {:>8} {:>12}\n",
            age / 3600,
            age / 60 % 60,
            age % 60,
            "",
            "request",
            "per second",
            "MiB/s",
            "p50",
            "p95",
            "p99",
            "errors",
            "total"
        );
        for (index, (name, totals)) in self.places.iter().enumerate() {
            let before = earlier.and_then(|earlier| earlier.places.get(index)).map(|(_, totals)| totals);
            let recent = before.map_or_else(|| totals.clone(), |before| totals.since(before));
            let mut label = name.as_str();
            for ((kind, all), recent) in OPS.iter().zip(&totals.ops).zip(&recent.ops) {
                if all.count > 0 {
                    let kind = format!("{kind:?}").to_lowercase();
                    text += &row(std::mem::take(&mut label), &kind, all, recent, seconds);
                }
            }
            let reads = recent.ops[0].count;
            if index == 0 && reads > 0 {
                let share = recent.at_once as f64 * 100.0 / reads as f64;
                let _ = writeln!(text, "{:<14} {share:.1} % of reads found their data in memory", "");
            }
        }
        text
    }
}

fn row(label: &str, kind: &str, all: &OpTotals, recent: &OpTotals, seconds: f64) -> String {
    let latency = |part| recent.latency.percentile(part).map_or("-".into(), duration);
    format!(
        "{label:<14} {kind:<8} {:>10.0} {:>10.1} {:>10} {:>10} {:>10} {:>8} {:>12}\n",
        recent.count as f64 / seconds,
        recent.bytes as f64 / seconds / f64::from(1 << 20),
        latency(0.5),
        latency(0.95),
        latency(0.99),
        all.errors,
        all.count
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
        let table = snapshot(3725, 4096).table(Some(&snapshot(3723, 2048)));
        assert!(table.starts_with("up 1:02:05"), "{table}");
        let row = table.lines().find(|line| line.starts_with("cow")).unwrap();
        let words: Vec<_> = row.split_whitespace().collect();
        assert_eq!((words[1], words[2], words[3], words.last()), ("read", "1024", "1.0", Some(&"4096")));
        assert!(table.contains("50.0 % of reads"), "{table}");
        assert_eq!(table.lines().count(), 7, "{table}");
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
        let error = show(Path::new("/proc"), true).unwrap_err();
        assert!(error.to_string().contains("not a mount of nbdkit-mount"), "{error}");
    }
}
