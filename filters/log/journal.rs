//! Where the entries go: a file, a script, or the debug messages when there is neither.
//!
//! A request never fails because it cannot be logged.

use std::{
    ffi::OsString,
    fmt,
    fs::{File, OpenOptions},
    io::{self, Write as _},
    path::Path,
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    time::SystemTime,
};

use anyhow::Context as _;
use log::{Level, debug, error, log_enabled};
use nbdkit_core::Result;
use parking_lot::Mutex;

use super::entry::{Entry, Kind, Outcome, Time};

/// See the module. The default one goes to the debug messages.
#[derive(Default)]
pub(super) struct Journal {
    file: Option<Mutex<File>>,
    script: Option<OsString>,
    /// Something went wrong and was reported; once is enough.
    failed: AtomicBool,
}

impl Journal {
    /// Opens the log file.
    pub(super) fn open(path: Option<&Path>, append: bool, script: Option<OsString>) -> anyhow::Result<Self> {
        let open = |path: &Path| {
            OpenOptions::new()
                .create(true)
                .write(true)
                .append(append)
                .truncate(!append)
                .open(path)
                .map(Mutex::new)
                .with_context(|| format!("cannot open the log file '{}'", path.display()))
        };
        Ok(Journal { file: path.map(open).transpose()?, script, failed: AtomicBool::new(false) })
    }

    /// Whether anyone reads the entries. Without, a request costs no more than this question.
    pub(super) fn is_on(&self) -> bool {
        self.file.is_some() || self.script.is_some() || log_enabled!(Level::Debug)
    }

    /// Whether an entry starts a process and waits for it.
    pub(super) fn has_script(&self) -> bool {
        self.script.is_some()
    }

    /// Logs that something happened.
    pub(super) fn print(&self, connection: Option<u64>, action: &str, params: fmt::Arguments<'_>) {
        self.log(SystemTime::now(), &Entry { kind: Kind::Print, action, connection, id: None, params });
    }

    /// Logs that an action begins.
    pub(super) fn enter(&self, connection: Option<u64>, action: &str, id: u64, params: fmt::Arguments<'_>) {
        self.entered(SystemTime::now(), connection, action, id, params);
    }

    /// Logs that an action has begun at a time that is past.
    pub(super) fn entered(
        &self,
        time: SystemTime,
        connection: Option<u64>,
        action: &str,
        id: u64,
        params: fmt::Arguments<'_>,
    ) {
        self.log(time, &Entry { kind: Kind::Enter, action, connection, id: Some(id), params });
    }

    /// Logs that an action has ended, and how.
    pub(super) fn leave<T>(
        &self,
        connection: Option<u64>,
        action: &str,
        id: u64,
        params: fmt::Arguments<'_>,
        result: &Result<T>,
    ) {
        let params = format_args!("{params}{}", Outcome(result.as_ref().err()));
        self.log(SystemTime::now(), &Entry { kind: Kind::Leave, action, connection, id: Some(id), params });
    }

    fn log(&self, time: SystemTime, entry: &Entry<'_>) {
        if let Some(file) = &self.file {
            // One write for each line, so that what others append to the file comes between lines.
            let line = format!("{} {entry}\n", Time(time));
            self.check("logfile", file.lock().write_all(line.as_bytes()));
        }
        if let Some(script) = &self.script {
            let mut text = OsString::from(entry.assignments());
            text.push("\n");
            text.push(script);
            // What the script returns has no meaning.
            let status = Command::new("bash").arg("-c").arg(text).stdin(Stdio::null()).status();
            self.check("logscript: cannot run bash", status.map(drop));
        }
        if self.file.is_none() && self.script.is_none() {
            debug!("log: {entry}");
        }
    }

    fn check(&self, what: &str, result: io::Result<()>) {
        if let Err(e) = result
            && !self.failed.swap(true, Ordering::Relaxed)
        {
            error!("log: {what}: {e}; entries are lost");
        }
    }
}
