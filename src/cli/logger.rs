//! Messages: `NAME: [PLUGIN[N]: ]error: …` always, `… debug: …` under `-v`.
//!
//! Debug messages go to standard error, if the program was started with `-v`. Errors go where they are wanted; left
//! alone, to standard error, and to syslog once the program has left its terminal.
//!
//! A connection's threads are called `PLUGIN[N]`; their name becomes the part in the middle.

use std::{
    ffi::{CString, OsStr},
    fs::File,
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::{Context as _, Result, bail};
use log::{Level, LevelFilter, Log, Metadata, Record};
use nix::syslog::{Facility, LogFlags, Severity, openlog, syslog};
use parking_lot::Mutex;

/// What a line looks like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// As scripts know it.
    #[default]
    Text,
    /// The same after a time stamp.
    Time,
    /// A JSON object.
    Json,
}

impl Format {
    /// Reads the value of `--log-format`.
    ///
    /// # Errors
    /// For an unknown word.
    pub fn parse(word: &str) -> Result<Self> {
        Ok(match word {
            "text" => Format::Text,
            "time" => Format::Time,
            "json" => Format::Json,
            _ => bail!("--log-format={word}: choose text, time or json"),
        })
    }
}

/// The format of lines, if somebody chose it.
static FORMAT: OnceLock<Format> = OnceLock::new();
/// What messages start with.
static NAME: OnceLock<String> = OnceLock::new();
/// The last message that went to a file or syslog, and how often it came again.
static LAST: Mutex<(String, u64)> = Mutex::new((String::new(), 0));

/// Where errors go, if somebody chose it.
static SINK: OnceLock<Sink> = OnceLock::new();
/// Whether the program has left its terminal.
static BACKGROUND: AtomicBool = AtomicBool::new(false);

/// A place for errors.
#[derive(Debug)]
pub enum Sink {
    /// Standard error.
    Stderr,
    /// syslog(3).
    Syslog,
    /// None.
    Null,
    /// The end of a file.
    File {
        /// As it was given.
        path: PathBuf,
        /// The file; another one after SIGHUP.
        file: Mutex<File>,
    },
}

/// Opens a log file for more.
fn open_log(path: &Path) -> std::io::Result<File> {
    File::options().append(true).create(true).mode(0o644).open(path)
}

/// Chooses the format of lines. Only the first call counts.
pub fn set_format(format: Format) {
    let _ = FORMAT.set(format);
}

/// Opens the log file again, as programs that move it away ask for. False: there is none.
pub fn reopen() -> bool {
    let Some(Sink::File { path, file }) = SINK.get() else { return false };
    match open_log(path) {
        Ok(opened) => *file.lock() = opened,
        Err(e) => log::error!("cannot open {} again: {e}", path.display()),
    }
    true
}

/// Says something that was asked for, where errors go.
pub fn report(text: &str) {
    let name = NAME.get().map_or("nbdkit", String::as_str);
    say(Level::Info, name, None, text);
}

impl Sink {
    /// Reads the value of `--log`: None leaves the choice to the program.
    ///
    /// # Errors
    /// For an unknown word, and a file that cannot be opened.
    pub fn parse(word: &OsStr) -> Result<Option<Self>> {
        Ok(Some(match word.to_str() {
            Some("default") => return Ok(None),
            Some("stderr") => Sink::Stderr,
            Some("syslog") => Sink::Syslog,
            Some("null") => Sink::Null,
            _ if Path::new(word).is_absolute() => {
                let file = open_log(Path::new(word));
                let file = file.with_context(|| format!("--log: cannot open {}", word.display()))?;
                Sink::File { path: word.into(), file: Mutex::new(file) }
            }
            _ => bail!(
                "--log={}: must be \"stderr\", \"syslog\", \"null\", \"default\" or the absolute path of a file",
                word.display()
            ),
        }))
    }
}

/// Sends errors to `sink` from now on. Only the first call counts.
pub fn send_errors_to(sink: Sink) {
    let _ = SINK.set(sink);
}

/// Whether standard error is still of use in the background.
pub fn keeps_stderr() -> bool {
    log::log_enabled!(target: "nbdkit", Level::Debug) || matches!(SINK.get(), Some(Sink::Stderr))
}

/// From now on the program has no terminal.
pub fn in_background() {
    BACKGROUND.store(true, Ordering::Relaxed);
}

/// Says `text` of one or more lines, each of which tells the program, the level, and the connection if it is one's.
fn say(level: Level, name: &str, connection: Option<&str>, text: &str) {
    let text = &*nbdkit_core::without_numbers(text);
    let background = BACKGROUND.load(Ordering::Relaxed);
    let sink = match (level, SINK.get()) {
        (Level::Error | Level::Info, Some(sink)) => sink,
        (Level::Warn, Some(sink)) if background => sink,
        (Level::Error | Level::Warn | Level::Info, None) if background => &Sink::Syslog,
        _ => &Sink::Stderr,
    };
    let write = |text: &str| {
        let whole = || line(name, level, connection, text);
        // One write for one message, so that those of threads do not mix. Nobody is left to tell if it fails.
        let _ = match sink {
            Sink::Stderr => std::io::stderr().write_all(whole().as_bytes()),
            Sink::File { file, .. } => file.lock().write_all(whole().as_bytes()),
            Sink::Syslog => lines(&middle(level, connection), text)
                .lines()
                .try_for_each(|line| syslog(Severity::LOG_ERR, line).map_err(std::io::Error::from)),
            Sink::Null => Ok(()),
        };
    };
    // What stays is not filled with one message; on a terminal it is better seen that something goes on.
    if matches!(sink, Sink::File { .. } | Sink::Syslog) && level != Level::Info {
        let mut last = LAST.lock();
        if last.0 == text {
            last.1 += 1;
            return;
        }
        let (_, again) = std::mem::replace(&mut *last, (text.to_owned(), 0));
        if again > 0 {
            write(&format!("the last message came {again} times more"));
        }
    }
    write(text);
}

/// The name of a level in messages.
fn level_name(level: Level) -> &'static str {
    match level {
        Level::Error => "error",
        Level::Warn => "warning",
        Level::Info => "info",
        _ => "debug",
    }
}

/// What a line has between the program's name and the text.
fn middle(level: Level, connection: Option<&str>) -> String {
    let level = level_name(level);
    connection.map_or_else(|| format!("{level}: "), |connection| format!("{connection}: {level}: "))
}

/// A message as it is written, in the format that was chosen.
fn line(name: &str, level: Level, connection: Option<&str>, text: &str) -> String {
    let format = FORMAT.get().copied().unwrap_or_default();
    let time = || humantime::format_rfc3339_micros(std::time::SystemTime::now());
    let start = format!("{name}: {}", middle(level, connection));
    match format {
        Format::Text => lines(&start, text),
        Format::Time => lines(&format!("{} {start}", time()), text),
        Format::Json => {
            let mut object = serde_json::json!({
                "time": time().to_string(),
                "level": level_name(level),
                "program": name,
                "message": text.trim_end_matches('\n'),
            });
            if let Some(connection) = connection {
                object["connection"] = connection.into();
            }
            format!("{object}\n")
        }
    }
}

/// Debug messages that a flag of the server silences: the flag, their target, and whether it does.
static MUTABLE: [(&str, &str, AtomicBool); 2] = [
    ("backend.controlpath", "nbdkit::controlpath", AtomicBool::new(false)),
    ("backend.datapath", "nbdkit::datapath", AtomicBool::new(false)),
];

/// Silences the messages whose flag is set to 0.
pub fn mute(mut is_off: impl FnMut(&str) -> bool) {
    for (flag, _, muted) in &MUTABLE {
        muted.store(is_off(flag), Ordering::Relaxed);
    }
}

/// One library more whose messages are shown.
static ADDED: std::sync::OnceLock<&str> = std::sync::OnceLock::new();

/// Shows the messages of this target too, as if they were the product's own. Works once.
pub fn add(target: &'static str) {
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
        let thread = std::thread::current();
        let connection = thread.name().filter(|name| name.ends_with(']'));
        say(record.level(), &self.name, connection, &record.args().to_string());
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
pub fn start(name: &str, verbose: bool) {
    // syslog keeps the pointer, so the name is never freed.
    if let Ok(name) = CString::new(name) {
        let _ = openlog(Some(Box::leak(name.into_boxed_c_str())), LogFlags::LOG_PID, Facility::LOG_DAEMON);
    }
    let _ = NAME.set(name.to_owned());
    let logger = Box::new(Logger { name: name.to_owned() });
    if log::set_boxed_logger(logger).is_ok() {
        log::set_max_level(if verbose { LevelFilter::Trace } else { LevelFilter::Warn });
    }
    std::panic::set_hook(Box::new(|panic| log::error!("{panic}")));
}

/// An error that ends the program, on one line; a layer may have said it already.
pub fn fatal(name: &str, error: &anyhow::Error) {
    if error.downcast_ref::<nbdkit_core::Error>().is_some_and(nbdkit_core::Error::is_logged) {
        return;
    }
    let text = format!("{error:#}").trim_end().replace('\n', " ");
    say(Level::Error, name, None, &text);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_json_line_is_one_object() {
        FORMAT.set(Format::Json).unwrap();
        let line = line("nbdkit", Level::Error, Some("file[1]"), "a \"quoted\" \u{1b}\nmessage\n");
        let object: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(line.lines().count(), 1);
        assert_eq!(object["message"], "a \"quoted\" \u{1b}\nmessage");
        assert_eq!((&object["level"], &object["connection"]), (&"error".into(), &"file[1]".into()));
        assert!(object["time"].as_str().unwrap().ends_with('Z'), "{line}");
    }

    #[test]
    fn a_message_cannot_pass_for_two() {
        assert_eq!(lines("n: error: ", "one"), "n: error: one\n");
        assert_eq!(lines("n: error: ", ""), "n: error: \n");
        let text = lines("n: error: ", "open: a\nn: error: b\u{1b}[2J\tc\n");
        assert_eq!(text, "n: error: open: a\nn: error: n: error: b\\u{1b}[2J\tc\n");
    }
}
