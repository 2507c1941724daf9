//! Counts and times requests, and writes a report when the server ends.

mod report;

use std::{
    ffi::OsStr,
    fs::{File, OpenOptions},
    io::Write as _,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use nbdkit_core::{
    Below, Completion, Extents, Filter, Flags, Handle, Info, Io, Next, NextConfig, NextConfigComplete, Op,
    Open, Result, ThreadModel, params,
};
use parking_lot::Mutex;

use self::report::{Counter, Report};

const HELP: &str = "\
statsfile=<FILE>               The file for the report (required).
statsappend=<BOOL>             Append to the file (default false).
statsthreshold=<PERCENTILE>    Sizes and alignments of this share of requests, 0 to 100 (default 95).
statsformat=<FORMAT>           'text' (default) or 'json'.";

pub(crate) fn new() -> Box<dyn Filter> {
    Box::new(Stats {
        path: None,
        append: false,
        threshold: 95,
        json: false,
        file: None,
        started: Instant::now(),
        counters: Arc::default(),
    })
}

struct Stats {
    path: Option<PathBuf>,
    append: bool,
    threshold: u8,
    json: bool,
    /// Opened while errors can still be seen.
    file: Option<File>,
    started: Instant,
    counters: Arc<Counters>,
}

/// One counter for each kind of request, in the order of the report.
#[derive(Default)]
struct Counters([Mutex<Counter>; KINDS.len()]);

const KINDS: [(Op, &str); 7] = [
    (Op::Read, "read"),
    (Op::Write, "write"),
    (Op::Trim, "trim"),
    (Op::Zero, "zero"),
    (Op::Extents, "extents"),
    (Op::Cache, "cache"),
    (Op::Flush, "flush"),
];

impl Counters {
    fn count(&self, op: Op, length: u64, offset: u64, took: Duration) {
        let counters = KINDS.iter().zip(&self.0).filter(|((kind, _), _)| *kind == op);
        for (_, counter) in counters {
            counter.lock().count(length, offset, took);
        }
    }
}

impl Filter for Stats {
    fn info(&self) -> Info {
        Info::bundled("stats", "nbdkit stats filter", HELP)
    }

    fn config(&mut self, key: &str, value: &OsStr, next: &mut NextConfig<'_>) -> anyhow::Result<()> {
        match key {
            "statsfile" => self.path = Some(value.into()),
            "statsappend" => self.append = params::boolean(value)?,
            "statsthreshold" => {
                let threshold = params::integer(key, value)?;
                ensure!(threshold <= 100, "{key}={threshold} is not a percentage: use 0 to 100");
                self.threshold = threshold;
            }
            "statsformat" => {
                self.json = match params::text(value)? {
                    "text" => false,
                    "json" => true,
                    other => bail!("unknown {key} '{other}': use text or json"),
                }
            }
            _ => return next(key, value),
        }
        Ok(())
    }

    fn config_complete(&mut self, next: &mut NextConfigComplete<'_>) -> anyhow::Result<()> {
        ensure!(self.path.is_some(), "the stats filter needs statsfile=FILE");
        next()
    }

    fn get_ready(&mut self, _: ThreadModel) -> anyhow::Result<()> {
        if let Some(path) = &self.path {
            let file = OpenOptions::new()
                .create(true)
                .write(true)
                .append(self.append)
                .truncate(!self.append)
                .open(path)
                .with_context(|| format!("cannot open statsfile='{}'", path.display()))?;
            self.file = Some(file);
        }
        self.started = Instant::now();
        Ok(())
    }

    fn cleanup(&self, _: &Below) {
        let counters = self.counters.0.each_ref().map(|counter| counter.lock().clone());
        let report = Report {
            elapsed: self.started.elapsed(),
            threshold: self.threshold,
            counters: KINDS.iter().map(|(_, name)| *name).zip(counters).collect(),
        };
        let text = if self.json { report.json() } else { report.text() };
        if let Some(Err(e)) = self.file.as_ref().map(|mut file| file.write_all(text.as_bytes())) {
            log::error!("stats: cannot write the report: {e}");
        }
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        Ok(Box::new(Counted { counters: self.counters.clone(), next: next.open(open)? }))
    }
}

struct Counted {
    counters: Arc<Counters>,
    next: Next,
}

impl Counted {
    /// Runs a request, and counts it if it succeeds.
    fn run<T>(
        &self,
        op: Op,
        length: u64,
        offset: u64,
        request: impl FnOnce(&Next) -> Result<T>,
    ) -> Result<T> {
        let start = Instant::now();
        let result = request(&self.next)?;
        self.counters.count(op, length, offset, start.elapsed());
        Ok(result)
    }
}

// Nothing is lent: what is read from a loan is not seen.
impl Handle for Counted {
    fn next(&self) -> Option<&Next> {
        Some(&self.next)
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.run(Op::Read, buf.len() as u64, offset, |next| next.pread(buf, offset))
    }

    fn pread_nowait(&self, buf: &mut [u8], offset: u64) -> Result<bool> {
        let start = Instant::now();
        let done = self.next.pread_nowait(buf, offset)?;
        if done {
            self.counters.count(Op::Read, buf.len() as u64, offset, start.elapsed());
        }
        Ok(done)
    }

    fn pwrite(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
        self.run(Op::Write, buf.len() as u64, offset, |next| next.pwrite(buf, offset, flags))
    }

    fn submit(&self, io: Io<'_>, offset: u64, mut done: Completion) -> Option<Completion> {
        let (counters, start) = (self.counters.clone(), Instant::now());
        let (op, length) = (io.op(), io.length());
        done.look(move |failure| {
            if failure.is_none() {
                counters.count(op, length, offset, start.elapsed());
            }
        });
        let mut back = self.next.submit(io, offset, done)?;
        back.unlook();
        Some(back)
    }

    fn flush(&self) -> Result<()> {
        self.run(Op::Flush, 0, 0, Next::flush)
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.run(Op::Trim, length, offset, |next| next.trim(length, offset, flags))
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.run(Op::Zero, length, offset, |next| next.zero(length, offset, flags))
    }

    fn extents(&self, length: u64, offset: u64, flags: Flags, extents: &mut Extents) -> Result<()> {
        self.run(Op::Extents, length, offset, |next| next.extents(length, offset, flags, extents))
    }

    fn cache(&self, length: u64, offset: u64) -> Result<()> {
        self.run(Op::Cache, length, offset, |next| next.cache(length, offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Disk, Spec, View, chain, check_model, client, config_error, open};

    const CALLS: [Op; 7] = [Op::Read, Op::Write, Op::Trim, Op::Zero, Op::Extents, Op::Cache, Op::Flush];

    /// The report after one request of each kind, and two reads.
    fn report(disk: &Disk, path: &std::path::Path, params: &[(&str, &str)]) -> String {
        let params = [&[("statsfile", path.to_str().unwrap())][..], params].concat();
        let chain = chain(disk, &["stats"], &params).unwrap();
        let session = open(&chain, client(), false).unwrap();
        let _ = session.pread(&mut [0; 512], 4096);
        let _ = session.pread_nowait(&mut [0; 512], 512);
        let _ = session.pwrite(&[0; 1024], 1024, Flags::empty());
        let _ = session.trim(2048, 0, Flags::empty());
        let _ = session.zero(4096, 0, Flags::empty());
        let _ = session.extents(8192, 0, Flags::empty());
        let _ = session.cache(16384, 0);
        let _ = session.flush();
        drop(session);
        chain.cleanup();
        std::fs::read_to_string(path).unwrap()
    }

    #[test]
    fn model() {
        check_model(&["stats"], &[("statsfile", "/dev/null")], 20_000, &View::same(20_000));
    }

    #[test]
    fn each_request_is_counted_once() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Spec::default().disk();
        let json = report(&disk, &dir.path().join("stats"), &[("statsformat", "json")]);
        for (op, (_, name)) in CALLS.iter().zip(KINDS) {
            let n = if *op == Op::Read { 2 } else { 1 };
            assert_eq!(disk.count(*op), n, "{name}");
            let length = match op {
                Op::Read | Op::Write => 1024,
                Op::Trim => 2048,
                Op::Zero => 4096,
                Op::Extents => 8192,
                Op::Cache => 16384,
                Op::Flush => 0,
            };
            let start = format!("\"{name}\":{{\"ops\":{n},\"bytes\":{length},");
            assert!(json.contains(&start), "{start} is not in {json}");
        }
        assert!(
            json.contains(
                "\"sizes\":{\"9\":{\"requests\":2,\"bytes\":1024,\"alignment\":{\"9\":1,\"12\":1}}}"
            )
        );
    }

    #[test]
    fn failed_requests_are_not_counted() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Spec { fail_after: Some(0), ..Spec::default() }.disk();
        let text = report(&disk, &dir.path().join("stats"), &[]);
        assert!(text.starts_with("total: 0 ops, ") && text.lines().count() == 1, "{text}");
    }

    #[test]
    fn a_file_is_replaced_or_appended_to() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stats");
        std::fs::write(&path, "before\n").unwrap();
        let disk = Spec::default().disk();
        let appended = report(&disk, &path, &[("statsappend", "true")]);
        assert!(appended.starts_with("before\ntotal: 8 ops, "), "{appended}");
        assert!(report(&disk, &path, &[]).starts_with("total: 8 ops, "));
    }

    #[test]
    fn nothing_escapes_by_a_loan() {
        let params = [("statsfile", "/dev/null")];
        assert!(crate::testing::session(&Spec::default().disk(), "stats", &params).loan(0, 512).is_none());
    }

    #[test]
    fn what_cannot_be_is_refused() {
        assert!(config_error("stats", &[]).contains("needs statsfile=FILE"));
        let with = |key, value| config_error("stats", &[("statsfile", "/dev/null"), (key, value)]);
        assert!(with("statsthreshold", "101").contains("use 0 to 100"));
        assert!(with("statsformat", "xml").contains("use text or json"));
        let nowhere = config_error("stats", &[("statsfile", "/nonexistent/stats")]);
        assert!(nowhere.contains("cannot open statsfile='/nonexistent/stats'"), "{nowhere}");
    }
}
