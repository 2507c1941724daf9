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

struct Logger {
    /// What every line starts with.
    name: String,
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // Libraries' own chatter is not the product's.
        let target = metadata.target();
        target.starts_with("nbdkit")
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
        let start = match thread.name().filter(|name| name.ends_with(']')) {
            Some(thread) => format!("{}: {thread}: {level}: ", self.name),
            None => format!("{}: {level}: ", self.name),
        };
        // One write for one message, so that those of threads do not mix. Nobody is left to tell if it fails.
        let _ = std::io::stderr().write_all(lines(&start, &record.args().to_string()).as_bytes());
    }

    fn flush(&self) {}
}

/// Gives each line of a message its start, and escapes control characters: a message may quote what a client sent,
/// which must not pass for another message or move a terminal's cursor.
fn lines(start: &str, message: &str) -> String {
    let mut text = String::new();
    for line in message.trim_end_matches('\n').split('\n') {
        text += start;
        for c in line.chars() {
            if c.is_control() && c != '\t' { text.extend(c.escape_default()) } else { text.push(c) }
        }
        text.push('\n');
    }
    text
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_cannot_pass_for_two() {
        assert_eq!(lines("n: error: ", "one"), "n: error: one\n");
        assert_eq!(lines("n: error: ", ""), "n: error: \n");
        let text = lines("n: error: ", "open: a\nn: error: b\u{1b}[2J\tc\n");
        assert_eq!(text, "n: error: open: a\nn: error: n: error: b\\u{1b}[2J\tc\n");
    }
}
