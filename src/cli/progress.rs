//! How far a long job is: a bar on a terminal, lines of JSON for programs, otherwise nothing.

use std::{
    io::{IsTerminal as _, Write as _},
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use nbdkit_core::{
    Chain, Op, ShutdownFlag,
    stats::{OpTotals, Totals},
};
use serde_json::{Value, json};

/// The least time between two lines, and between two looks at the throughput.
const PAUSE: Duration = Duration::from_millis(250);

/// The progress of a job over a number of bytes.
#[derive(Debug)]
pub struct Progress {
    done: u64,
    total: u64,
    show: Show,
}

#[derive(Debug)]
enum Show {
    Nothing,
    Bar(ProgressBar),
    /// When the last line was written.
    Lines(Option<Instant>),
}

impl Progress {
    /// Starts a job of `total` bytes, called `what` on the terminal. `json`: lines on standard output instead.
    pub fn new(what: &'static str, total: u64, json: bool) -> Self {
        let show = if json {
            Show::Lines(None)
        } else if std::io::stderr().is_terminal() {
            let style = "{msg} {wide_bar} {bytes}/{total_bytes}, {bytes_per_sec}, {eta} left";
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            bar.set_style(
                ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()),
            );
            Show::Bar(bar.with_message(what))
        } else {
            Show::Nothing
        };
        Progress { done: 0, total, show }
    }

    /// Some more bytes are done.
    pub fn advance(&mut self, bytes: u64) {
        self.done += bytes;
        match &mut self.show {
            Show::Nothing => {}
            Show::Bar(bar) => bar.set_position(self.done),
            Show::Lines(last) => {
                if last.is_none_or(|last| last.elapsed() >= PAUSE) || self.done == self.total {
                    *last = Some(Instant::now());
                    line(&json!({ "event": "progress", "done": self.done, "total": self.total }));
                }
            }
        }
    }

    /// The job is done; `result` goes into the last line.
    pub fn finish(self, mut result: Value) {
        match self.show {
            Show::Nothing => {}
            Show::Bar(bar) => bar.finish_and_clear(),
            Show::Lines(_) => {
                result["event"] = "done".into();
                line(&result);
            }
        }
    }
}

/// Writes a line of JSON. Whether somebody still reads it does not matter to the job.
fn line(value: &Value) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{value}").and_then(|()| out.flush());
}

/// Live throughput on the terminal, until it is dropped.
#[derive(Debug)]
pub struct Throughput {
    stop: Arc<ShutdownFlag>,
    thread: Option<JoinHandle<()>>,
}

impl Throughput {
    /// Starts to show what goes through the chain, if there is a terminal. The chain counts its requests.
    ///
    /// # Errors
    /// If there can be no further thread.
    pub fn show(chain: Arc<Chain>) -> Result<Self> {
        let stop = Arc::new(ShutdownFlag::new());
        if !std::io::stderr().is_terminal() {
            return Ok(Throughput { stop, thread: None });
        }
        let bar = ProgressBar::new_spinner();
        let stopped = stop.clone();
        let thread = std::thread::Builder::new().name("progress".into()).spawn(move || {
            let mut before = chain.stats().map(|stats| stats.total()).unwrap_or_default();
            let mut then = Instant::now();
            while !stopped.wait_for(PAUSE) {
                let Some(now) = chain.stats().map(|stats| stats.total()) else { break };
                bar.set_message(rates(&now.since(&before), then.elapsed()));
                bar.tick();
                (before, then) = (now, Instant::now());
            }
            bar.finish_and_clear();
        });
        Ok(Throughput { stop, thread: Some(thread.context("cannot start a thread")?) })
    }
}

impl Drop for Throughput {
    fn drop(&mut self) {
        self.stop.raise();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What went through in some time, as one line.
fn rates(totals: &Totals, time: Duration) -> String {
    let seconds = time.as_secs_f64().max(1e-9);
    let rate = |op: &OpTotals| {
        let (requests, bytes) = (op.count as f64 / seconds, op.bytes as f64 / seconds);
        format!("{:.1} MiB/s ({requests:.0}/s)", bytes / f64::from(1 << 20))
    };
    format!("read {}   written {}", rate(totals.of(Op::Read)), rate(totals.of(Op::Write)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_per_second() {
        let mut totals = Totals::default();
        totals.ops[Op::Write as usize].bytes = 3 << 20;
        totals.ops[Op::Write as usize].count = 5;
        let text = rates(&totals, Duration::from_millis(500));
        assert_eq!(text, "read 0.0 MiB/s (0/s)   written 6.0 MiB/s (10/s)");
    }
}
