//! Messages on standard error: `NAME: [PLUGIN[N]: ]error: …` always, `… debug: …` under `-v`.
//!
//! A connection's threads are called `PLUGIN[N]`; their name becomes the part in the middle.

use std::{
    io::Write,
    sync::atomic::{AtomicBool, Ordering},
};

use log::{Level, LevelFilter, Log, Metadata, Record};

/// Debug messages that a flag of the server silences: the flag, their target, and whether it does.
static MUTABLE: [(&str, &str, AtomicBool); 2] = [
    ("backend.controlpath", "nbdkit::controlpath", AtomicBool::new(false)),
    ("backend.datapath", "nbdkit::datapath", AtomicBool::new(false)),
];

/// Silences the messages whose flag is set to 0.
#[allow(dead_code, reason = "nbdkit-mount has no debug flags")]
pub(crate) fn mute(mut is_off: impl FnMut(&str) -> bool) {
    for (flag, _, muted) in &MUTABLE {
        muted.store(is_off(flag), Ordering::Relaxed);
    }
}

/// One library more whose messages are shown.
static ADDED: std::sync::OnceLock<&str> = std::sync::OnceLock::new();

/// Shows the messages of this target too, as if they were the product's own. Works once.
#[allow(dead_code, reason = "nbdkit has no library with messages for users")]
pub(crate) fn add(target: &'static str) {
    let _ = ADDED.set(target);
}

struct Logger {
    /// What every line starts with.
    name: String,
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // Libraries' own chatter is not the product's.
        let target = metadata.target();
        (target.starts_with("nbdkit") || ADDED.get().is_some_and(|added| *added == target))
            && !MUTABLE.iter().any(|(_, name, muted)| *name == target && muted.load(Ordering::Relaxed))
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let level = match record.level() {
            Level::Error => "error",
            Level::Warn => "warning",
            _ => "debug",
        };
        let thread = std::thread::current();
        let line = match thread.name().filter(|name| name.ends_with(']')) {
            Some(thread) => format!("{}: {thread}: {level}: {}\n", self.name, record.args()),
            None => format!("{}: {level}: {}\n", self.name, record.args()),
        };
        // One write for one line, so that lines of threads do not mix. Nobody is left to tell if it fails.
        let _ = std::io::stderr().write_all(line.as_bytes());
    }

    fn flush(&self) {}
}

/// Starts logging for the program `name`; `verbose` is `-v`.
pub(crate) fn start(name: &str, verbose: bool) {
    let logger = Box::new(Logger { name: name.to_owned() });
    if log::set_boxed_logger(logger).is_ok() {
        log::set_max_level(if verbose { LevelFilter::Trace } else { LevelFilter::Warn });
    }
    std::panic::set_hook(Box::new(|panic| log::error!("{panic}")));
}

/// An error that ends the program, on one line.
pub(crate) fn fatal(name: &str, error: &anyhow::Error) {
    let text = format!("{error:#}").trim_end().replace('\n', " ");
    let _ = writeln!(std::io::stderr(), "{name}: error: {text}");
}
